"""The world on disk, in the format that real data uses: images, captions, manifest.

OUT/world/         pictures of the pretraining world
OUT/concepts/NAME/ the training folder of each held-out concept
"""

import json
from pathlib import Path

from PIL import Image

from lyco_lab.errors import UserError
from lyco_lab.files import atomic, writing
from lyco_lab.miniature import concepts
from lyco_lab.miniature.vocabulary import caption
from lyco_lab.miniature.world import drawn
from lyco_lab.progress import track


def write(out: Path, count: int, seed: int = 0) -> None:
    """`count` pictures and all concepts; the same arguments give the same bytes.

    Refuses a folder with other files in it: nothing that it did not write is touched.
    """
    world = out / "world"
    foreign = (
        [p for p in out.iterdir() if p.name not in ("world", "concepts")] if out.is_dir() else []
    )
    if foreign:
        raise UserError(f"{out} holds other files ({foreign[0].name}): name a new folder")
    with writing(world):
        world.mkdir(parents=True, exist_ok=True)
    lines = []
    pictures = drawn(count, seed)
    for i in track(range(count), "world"):
        scene, pixels = next(pictures)
        text = caption(scene)
        with atomic(world / f"{i:06d}.png", durable=False) as path:
            Image.fromarray(pixels).save(path, format="PNG")
        with atomic(world / f"{i:06d}.txt", durable=False) as path:
            path.write_text(text + "\n", encoding="utf-8")
        lines.append({"file": f"{i:06d}.png", "caption": text, "attributes": scene.readable()})
    with atomic(world / "manifest.jsonl") as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for subject in concepts.CONCEPTS.values():
        concepts.write(subject, out / "concepts" / subject.name, seed)
