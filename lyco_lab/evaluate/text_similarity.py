"""Text similarity: how well an image shows what its prompt says.

    T = mean over images i of cos(x_i, t_i)

x_i and t_i are the image-text pair's embeddings of image i and of its text: one to one, not all
pairs. Range [-1, 1], higher is better. The value is the raw cosine, not multiplied by 100 or 2.5.

A trigger word means nothing to an encoder that never saw it, so published numbers differ by what
was done with it. The option `evaluate.trigger_in_text` names it:

    keep   the prompt as it was generated from: "vokael character, in the forest"
    class  without the trigger: "character, in the forest" (the paper's choice for characters,
           scenes and toys)
    drop   without trigger and class word: "in the forest" (its choice for styles and outfits)

The text per option travels with every prompt (`scored_text`); this file only compares.

Shapes: N images, D features.

Reference: Yeh et al., 2024, appendix D.4, https://arxiv.org/abs/2309.14859
"""

from typing import ClassVar, Literal

from torch import Tensor

from lyco_lab.evaluate.base import Metric, Score, View, per_image, unit


def text_similarity(x_ND: Tensor, t_ND: Tensor) -> Tensor:
    """(N,): the cosine of each image with its own text."""
    if x_ND.shape != t_ND.shape:
        raise ValueError(
            f"each image needs its own text: image features are {tuple(x_ND.shape)}, "
            f"text features {tuple(t_ND.shape)}"
        )
    return (unit(x_ND) * unit(t_ND)).sum(dim=1).clamp(-1.0, 1.0)


class TextSimilarity(Metric):
    name: ClassVar[str] = "text_similarity"
    title: ClassVar[str] = "Text similarity"
    better: ClassVar[Literal["higher", "lower"]] = "higher"
    low: ClassVar[float] = -1.0
    high: ClassVar[float] = 1.0
    columns: ClassVar[dict[str, str]] = {"text_similarity_alter": "alter"}

    def measure(self, view: View) -> dict[str, Score]:
        # Many images share a text; it is encoded once.
        texts = sorted(set(view.texts))
        t_TD = view.images.judges.clip_text(texts)
        row = {text: i for i, text in enumerate(texts)}
        t_ND = t_TD[[row[text] for text in view.texts]]
        return {self.name: per_image(text_similarity(view.images.clip_ND, t_ND), view)}
