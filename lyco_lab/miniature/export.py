"""The world as folders of images, captions and a manifest: the format that real data uses too.

OUT/world/            pictures of the pretraining world
OUT/concepts/NAME/    what is held out of it, as a run trains on it
"""

import json
from pathlib import Path

from PIL import Image

from lyco_lab.miniature.concepts import CONCEPTS
from lyco_lab.miniature.concepts import write as write_concept
from lyco_lab.miniature.vocabulary import caption
from lyco_lab.miniature.world import pictures
from lyco_lab.record import atomic


def write(out: Path, count: int, seed: int = 0) -> None:
    """`count` pictures of the world, and all concepts. Written again, they are the same bytes."""
    folder = out / "world"
    drawn = pictures(count, seed)
    lines = []
    for index, (scene, pixels) in enumerate(zip(drawn.scenes, drawn.pixels, strict=True)):
        name, text = f"{index:06d}", caption(scene)
        with atomic(folder / f"{name}.png") as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
        with atomic(folder / f"{name}.txt") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        line = {"file": f"{name}.png", "caption": text, "attributes": scene.readable()}
        lines.append(json.dumps(line) + "\n")
    with atomic(folder / "manifest.jsonl") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    for concept in CONCEPTS.values():
        write_concept(concept, out / "concepts" / concept.name, seed)
