"""A trained adapter and prompts -> images, and the base model's images of the same prompts.

Four types of prompt ask four questions (Yeh et al. 2024, appendix D.3):

    train    the captions of the training images          was it learnt?
    trigger  "[trigger] class" alone                      what does the name alone mean now?
    alter    the concept in other places and guises       does it still obey?
    style    the concept in other styles                  what else was forgotten?

Image i of each type has the seed `generate.seed + i` in every model, the base included, so images
differ by the adapter alone and can be compared pair by pair. The adapter is merged before
sampling, unless it depends on the timestep: no image pays for it. Sampling is in float32 whatever
training was in, since a merged weight rounded to half precision loses the small updates that are
being compared.

    NAME-HASH/generate/KIND/0000.png    the run's images;  generate/images.parquet lists them
    base/NAME-HASH/KIND/0000.png        the base model's, shared by all runs that ask the same
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from lyco_lab import tracking
from lyco_lab.config import Run
from lyco_lab.data.folder import Dataset
from lyco_lab.data.stage import dataset
from lyco_lab.diffusion import word
from lyco_lab.diffusion.model import Diffusion, fingerprint, load
from lyco_lab.errors import UserError
from lyco_lab.formats import embedding, kohya
from lyco_lab.miniature import placed
from lyco_lab.miniature.prompts import Prompt, prompts
from lyco_lab.progress import track
from lyco_lab.record import Record, atomic, locked
from lyco_lab.train import embedding_file

STAGE = "generate"
TABLE = "images.parquet"
GRID_SIDE = 4  # of the sample grids shown in W&B, in images

# For a folder of the user's own: what the concept's descriptor "{}" is put into. The paper's
# templates differ by category; these are plain enough for a person, a thing or a place.
TEMPLATES = {
    "alter": (
        "{} at the beach",
        "{} in a forest",
        "{} in the snow",
        "{} in a city at night",
        "{} in a desert",
        "{} inside a room",
        "{} on a plain background",
        "{} seen from above",
        "{} under a rainbow",
        "{} next to a red car",
    ),
    "style": (
        "{} in the style of pencil drawing",
        "{} in the style of watercolor painting",
        "{} in the style of Vincent Van Gogh",
        "{} in the style of Claude Monet",
        "{} in the style of pixel art",
    ),
}


def generate(run: Run, record: Record) -> None:
    """The stage: every image of the run and of the base model, or those still missing."""
    if record.done(STAGE):
        return
    asked = ask(run, dataset(run, record))
    if not asked:
        raise UserError(
            f"generate.types = {list(run.generate.types)} gives no prompt for run {run.name!r}: "
            "concepts of the category 'style' have none of the type 'style'"
        )
    diffusion = load(placed(run.model)).to("cuda" if torch.cuda.is_available() else "cpu")
    base = base_folder(run, record)
    with locked(base):  # runs side by side ask for the same
        if not (base / TABLE).is_file():
            render(run, diffusion, asked, base, f"{run.name}: base model")
    if (file := embedding_file(run, record)) is not None:
        word.add(diffusion, str(run.embedding.token), embedding.load(file))
    for mounted in kohya.apply(record.path / "adapter.safetensors", diffusion.parts).values():
        if mounted.is_one_weight:
            mounted.merge()
        else:
            mounted.eval()
    render(run, diffusion, asked, record.path / STAGE, f"{run.name}: generate")
    show(run, record)
    record.finish(STAGE, images=len(asked), base=base.name)


def ask(run: Run, images: Dataset) -> list[Prompt]:
    """The prompts of all types the run asks for, in order."""
    count = run.generate.images_per_type
    asked: list[Prompt] = []
    for kind in run.generate.types:
        if run.data.concept is not None:
            asked += prompts(run.data.concept, kind, count, run.generate.seed)
        else:
            asked += folder_prompts(images, kind, count)
    return asked


def folder_prompts(images: Dataset, kind: str, count: int) -> list[Prompt]:
    """Prompts for images of the user's own, whose attributes nobody wrote down."""
    descriptor = " ".join(word for word in (images.trigger, images.class_word) if word)
    if kind == "train":
        texts: Sequence[str] = images.captions
    elif not descriptor:
        raise UserError(
            f"prompts of type {kind!r} need the word that stands for the concept: begin every "
            f"caption in {images.folder} with the same 'trigger class', or ask for "
            "generate.types=[train] only"
        )
    elif kind == "trigger":
        texts = [descriptor]
    elif kind == "style" and images.category == "style":
        return []  # a style cannot be asked for in another style
    else:
        texts = [template.format(descriptor) for template in TEMPLATES[kind]]
    return [
        Prompt(
            kind=kind,
            index=index,
            text=text,
            scored_text=scored(text, images.trigger, images.class_word),
            attributes={},
            concept="",
        )
        for index, text in enumerate(repeated(texts, count))
    ]


def repeated(texts: Sequence[str], count: int) -> list[str]:
    """`count` texts: each floor(count / n) times and the first count mod n once more."""
    often, more = divmod(count, len(texts))
    return [text for i, text in enumerate(texts) for _ in range(often + (i < more))]


def scored(text: str, trigger: str, class_word: str) -> dict[str, str]:
    """What an image is compared with under each `evaluate.trigger_in_text`; never nothing."""
    descriptor = " ".join(word for word in (trigger, class_word) if word)
    if not descriptor:
        return {"keep": text, "class": text, "drop": text}
    named = text.replace(descriptor, class_word).strip(" ,")
    bare = text.replace(descriptor, "").strip(" ,")
    return {"keep": text, "class": named or text, "drop": bare or class_word or text}


def render(
    run: Run, diffusion: Diffusion, asked: Sequence[Prompt], folder: Path, title: str
) -> None:
    """Images as PNG, then the table that says the folder is whole.

    Batches are always cut at the same places: an image depends on its batch in the last bits, and
    a stage that was interrupted has to end with the images it would have made at once.
    """
    size = run.generate.batch_size
    batches = [asked[i : i + size] for i in range(0, len(asked), size)]
    for batch in track(batches, title):
        paths = [image_path(folder, prompt.kind, prompt.index) for prompt in batch]
        if all(path.is_file() for path in paths):
            continue
        images = diffusion.sample(
            [prompt.text for prompt in batch],
            [run.generate.seed + prompt.index for prompt in batch],
            steps=run.generate.steps,
            guidance=run.generate.guidance,
        )
        for path, image in zip(paths, images, strict=True):
            write_image(path, image)
    table = pd.DataFrame([row(prompt, run.generate.seed) for prompt in asked])
    with atomic(folder / TABLE) as temporary:
        table.to_parquet(temporary, index=False)


def show(run: Run, record: Record) -> None:
    """The copy that W&B gets: one grid of images for each type of prompt."""
    made = read_table(record.path / STAGE)
    with tracking.track(run, record, STAGE) as tracker:
        for kind, rows in made.groupby("kind", sort=False):
            shown = rows.head(GRID_SIDE**2)
            caption = "; ".join(dict.fromkeys(shown["prompt"]))
            tracker.image(f"samples/{kind}", tiled(shown["file"].tolist()), caption)


def tiled(files: Sequence[str]) -> NDArray[np.uint8]:
    """Images of one size side by side, row by row, as near to a square as their number allows."""
    images = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    across = int(np.ceil(np.sqrt(len(images))))
    blank = np.zeros_like(images[0])
    images += [blank] * (-len(images) % across)
    rows = [np.concatenate(images[i : i + across], axis=1) for i in range(0, len(images), across)]
    return np.concatenate(rows)


def row(prompt: Prompt, first_seed: int) -> dict[str, object]:
    """A line of images.parquet; later stages read prompts from it alone."""
    return {
        "kind": prompt.kind,
        "index": prompt.index,
        "prompt": prompt.text,
        "seed": first_seed + prompt.index,
        "file": str(image_path(Path(), prompt.kind, prompt.index)),
        "concept": prompt.concept,
        "attributes": json.dumps(dict(prompt.attributes), sort_keys=True),
        **{f"scored_{rule}": text for rule, text in sorted(prompt.scored_text.items())},
    }


def read_table(folder: Path) -> pd.DataFrame:
    """The rows of a folder that `render` completed, its pictures' paths made absolute."""
    path = folder / TABLE
    if not path.is_file():
        raise UserError(f"{path} does not exist: generate that run's images first")
    table = pd.read_parquet(path)
    table["file"] = [str(folder / name) for name in table["file"]]
    return table


def base_folder(run: Run, record: Record) -> Path:
    """Where the base model's images for this run's prompts lie, beside the folders of runs.

    Named by what they depend on and nothing else, so every adapter of a concept finds the same,
    in whichever study it is.
    """
    name = run.data.concept or Path(str(run.data.folder)).name
    depends = {
        "model": fingerprint(placed(run.model)),
        "concept": run.data.concept,
        "images": record.facts("data")["digest"],
        "generate": run.to_dict()["generate"],
    }
    text = json.dumps(depends, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return record.path.parent / "base" / f"{name}-{digest}"


def image_path(folder: Path, kind: str, index: int) -> Path:
    return folder / kind / f"{index:04d}.png"


def write_image(path: Path, image_HWC: NDArray[np.uint8]) -> None:
    with atomic(path, durable=False) as temporary:
        Image.fromarray(image_HWC).save(temporary, format="PNG")
