"""A trained adapter and prompts -> images, and the base model's images of the same prompts.

Four types of prompt ask four questions (Yeh et al. 2024, appendix D.3):

    train    the captions of the training images          was it learnt?
    trigger  "[trigger] class" alone                      what does the name alone mean now?
    alter    the concept in other places and guises       does it still obey?
    style    the concept in other styles                  what else was forgotten?

A folder of several concepts is asked for each of them, by its own prompts. Image i of each concept
and type has the seed `generate.seed + i` in every model, the base included, so images differ by the
adapter alone and can be compared pair by pair; and batches end with their concept, so a concept's
images are those that it would have alone.

The adapter is merged before sampling, unless it depends on the timestep: no image pays for it.
Sampling is in float32 whatever training was in, since a merged weight rounded to half precision
loses the small updates that are being compared.

    NAME-HASH/generate/KIND/0000.png    the run's images;  generate/images.parquet lists them
    base/NAME-HASH/KIND/0000.png        the base model's, shared by all runs that ask the same
    …/generate/02-CONCEPT/KIND/0000.png where there are several concepts
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from lyco_lab import tracking
from lyco_lab.config import Run
from lyco_lab.config.asked import Asked
from lyco_lab.data.concepts import Concept
from lyco_lab.data.stage import dataset
from lyco_lab.devices import device
from lyco_lab.diffusion import word
from lyco_lab.diffusion.base import NoPicture
from lyco_lab.diffusion.memory import AtOnce, NoMemory
from lyco_lab.diffusion.model import Diffusion, fingerprint, load
from lyco_lab.errors import UserError, nearest
from lyco_lab.files import atomic, locked, sweep
from lyco_lab.formats import embedding, kohya
from lyco_lab.integrity import BASE, mend
from lyco_lab.miniature import placed
from lyco_lab.miniature.prompts import Prompt, prompts
from lyco_lab.progress import track
from lyco_lab.readers import Damaged, read_json, read_parquet, read_png
from lyco_lab.record import Record
from lyco_lab.train import embedding_file

STAGE = "generate"
TABLE = "images.parquet"
PIECES = "at_once.json"  # is there once memory ran out
GRID_SIDE = 4  # of the sample grids shown in W&B, in images

# What a concept's descriptor "{}" is put into, by the concept's category; "" is plain enough for a
# person, a thing or a place.
ALTER = {
    "": (
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
    "person": (
        "{} reading a newspaper",
        "{} riding a horse",
        "{} cooking in a kitchen",
        "{} in a raincoat",
        "{} asleep on a sofa",
        "{} playing chess in a park",
        "{} on a mountain top",
        "{} in a crowded train",
        "{} with a parrot on the shoulder",
        "{} seen from behind",
    ),
    "plushie": (
        "{} in a shop window",
        "{} on a bicycle",
        "{} in the snow",
        "{} in a bath full of foam",
        "{} on a bookshelf",
        "{} in a suitcase",
        "{} made of wood",
        "{} beside a birthday cake",
        "{} with an umbrella",
        "{} on the moon",
    ),
    "style": (
        "a lighthouse on a cliff, {}",
        "a bowl of fruit, {}",
        "a cat on a windowsill, {}",
        "a steam train in a valley, {}",
        "a dancer on a stage, {}",
        "a market full of people, {}",
        "a robot in a garden, {}",
        "a ship in a storm, {}",
        "a village in winter, {}",
        "an old man with a violin, {}",
    ),
    "waterfall": (
        "{} frozen in winter",
        "{} at night under the moon",
        "{} seen from above",
        "{} with a wooden bridge",
        "{} in autumn",
        "{} in a desert",
        "{} with a deer beside it",
        "{} in thick fog",
        "{} with a canoe below",
        "{} in a city",
    ),
    "canal": (
        "{} frozen in winter",
        "{} at night with lanterns",
        "{} seen from above",
        "{} with a red sailing boat",
        "{} in heavy rain",
        "{} without water",
        "{} with swans",
        "{} in thick fog",
        "{} with a market on its banks",
        "{} between skyscrapers",
    ),
    "garden": (
        "{} covered in snow",
        "{} at night with lanterns",
        "{} seen from above",
        "{} with a fountain",
        "{} in autumn",
        "{} in heavy rain",
        "{} with a peacock",
        "{} with a glass house",
        "{} with children playing",
        "{} on a roof",
    ),
    "castle": (
        "{} covered in snow",
        "{} at night under the moon",
        "{} seen from above",
        "{} in a desert",
        "{} on an island",
        "{} in ruins",
        "{} with a hot-air balloon",
        "{} in a thunderstorm",
        "{} with knights in front",
        "{} in a forest in autumn",
    ),
    "sculpture": (
        "{} covered in snow",
        "{} at night in a spotlight",
        "{} in a museum",
        "{} on a beach",
        "{} made of glass",
        "{} overgrown with ivy",
        "{} in a fountain",
        "{} in a workshop",
        "{} with a pigeon on it",
        "{} in a busy street",
    ),
}
STYLE = (
    "{} in the style of pencil drawing",
    "{} in the style of watercolor painting",
    "{} in the style of Vincent Van Gogh",
    "{} in the style of Claude Monet",
    "{} in the style of pixel art",
)


def generate(run: Run, record: Record) -> None:
    """The stage: every image of the run and of the base model, or those still missing."""
    base = Record(base_folder(run, record))
    sweep(base.path)
    for line in mend(base):
        print(line)
    wanted = record.pending(STAGE)
    if not wanted and base.done(STAGE):
        return
    asked = ask(run, dataset(run, record).concepts)
    diffusion = load(placed(run.model)).to(device(run))
    with locked(base.path):  # runs side by side ask for the same
        if not base.done(STAGE):
            remedy = (
                f"the model itself does that: look whether {run.model.path} is whole, and try a "
                f"smaller generate.guidance than {run.generate.guidance:g}"
            )
            files = render(run, diffusion, asked, base.path, f"{run.name}: base model", remedy)
            base.finish(STAGE, outputs=files)
    if not wanted:
        return
    record.require("train")
    if (file := embedding_file(run, record)) is not None:
        word.add(diffusion, str(run.embedding.token), embedding.load(file))
    for mounted in kohya.apply(record.path / "adapter.safetensors", diffusion.parts).values():
        if mounted.is_one_weight:
            mounted.merge()
        else:
            mounted.eval()
    remedy = (
        "the adapter changes the weights too much, or is damaged, since the base model drew the "
        f"same: try a smaller train.lr than {run.train.lr:g}"
    )
    render(run, diffusion, asked, record.path / STAGE, f"{run.name}: generate", remedy)
    show(run, record)
    cut: dict[str, Any] = {
        "at_once": asdict(pieces(record.path / STAGE)),
        "base_at_once": asdict(pieces(base.path)),
    }
    record.finish(
        STAGE,
        beside=[stage_of(base)],
        images=len(asked),
        base=base.path.name,
        **cut,
    )


def ask(run: Run, concepts: Sequence[Concept]) -> list[Prompt]:
    """The prompts of all concepts and types the run asks for, in order."""
    how = run.generate
    asked: list[Prompt] = []
    if run.data.concept is not None:
        for kind in how.types:
            asked += prompts(run.data.concept, kind, how.images_per_type, how.seed)
    else:
        check(how.concepts, concepts)
        for concept, folder in zip(concepts, folders(concepts), strict=True):
            told = drawn(concept, how.concepts)
            if told is None:
                continue
            for kind in how.types:
                found = folder_prompts(told, kind, how.images_per_type)
                name = told.name if folder else ""
                asked += [replace(prompt, concept=name, folder=folder) for prompt in found]
    if not asked:
        raise UserError(
            f"generate.types = {list(how.types)} gives no prompt for run {run.name!r}: "
            "concepts of the category 'style' have none of the type 'style'"
        )
    return asked


def folders(concepts: Sequence[Concept]) -> list[str]:
    """A folder for each of several concepts, on any file system."""
    if len(concepts) == 1:
        return [""]
    plain = [re.sub("[^a-z0-9]+", "-", c.name.lower()).strip("-")[:60] for c in concepts]
    width = len(str(len(concepts)))
    return [f"{i:0{width}d}-{name}".rstrip("-") for i, name in enumerate(plain, start=1)]


def drawn(concept: Concept, entries: Sequence[Asked]) -> Concept | None:
    """The concept as `generate.concepts` has it; None where it is not to be drawn."""
    is_drawn = True
    for entry in entries:
        if entry.matches(concept.name):
            is_drawn = is_drawn if entry.drawn is None else entry.drawn
            concept = replace(concept, category=entry.category or concept.category)
    return concept if is_drawn else None


def check(entries: Sequence[Asked], concepts: Sequence[Concept]) -> None:
    """Raise an error for names that are those of no concept, or where none is left."""
    names = [concept.name for concept in concepts]
    for entry in entries:
        for pattern in entry.names:
            if not any(replace(entry, names=(pattern,)).matches(name) for name in names):
                raise UserError(
                    f"generate.concepts names {pattern!r}, which is none of the concepts: they are "
                    f"called {', '.join(names)}{nearest(pattern, names)}"
                )
    if entries and not any(drawn(concept, entries) for concept in concepts):
        raise UserError(
            f"generate.concepts leaves none of {', '.join(names)} to draw: leave one out of an "
            "entry with drawn: false"
        )


def folder_prompts(concept: Concept, kind: str, count: int) -> list[Prompt]:
    """Prompts for images of the user's own, whose attributes nobody wrote down."""
    descriptor = concept.descriptor
    if kind == "train":
        texts: Sequence[str] = concept.captions
    elif not descriptor:
        raise UserError(
            f"prompts of type {kind!r} need the words that stand for {concept.name!r}: begin each "
            f"of its {len(concept.captions)} captions with the same 'trigger class,', list its "
            "trigger and class_word in manifest.jsonl, leave it out with {names: "
            f"[{concept.name}], drawn: false}} in generate.concepts, or ask for "
            "generate.types=[train] only"
        )
    elif kind == "trigger":
        texts = [descriptor]
    elif kind == "alter":
        texts = [t.format(descriptor) for t in ALTER.get(concept.category, ALTER[""])]
    elif concept.category == "style":
        return []  # a style cannot be asked for in another style
    else:
        texts = [template.format(descriptor) for template in STYLE]
    return [
        Prompt(
            kind=kind,
            index=index,
            text=text,
            scored_text=scored(text, concept.trigger, concept.class_word),
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
    run: Run,
    diffusion: Diffusion,
    asked: Sequence[Prompt],
    folder: Path,
    title: str,
    remedy: str,
) -> list[Path]:
    """Images as PNG, then the table that lists them; returns all files of the folder.

    Images that are there already, and whole, are not drawn again.

    Batches are always cut at the same places: an image depends on its batch in the last bits, and
    a stage that was interrupted has to end with the images it would have made at once. Where
    memory ran out, batches are drawn in pieces, and images differ in the last bits from those of a
    machine with more. The size of the pieces is kept in the folder, so this stage still ends the
    same after an interruption, as long as memory runs out at the same batch.

    Raises `NoPicture` for a batch with an image that is not finite; `remedy` says what to do then.
    None of that batch is written.
    """
    size, at_once = run.generate.batch_size, pieces(folder)
    for batch in track(batches(asked, size), title):
        paths = [image_path(folder, prompt) for prompt in batch]
        if all(is_whole(path) for path in paths):
            continue
        before = replace(at_once)
        try:
            images = diffusion.sample(
                [prompt.text for prompt in batch],
                [run.generate.seed + prompt.index for prompt in batch],
                steps=run.generate.steps,
                guidance=run.generate.guidance,
                at_once=at_once,
            )
        except NoMemory as error:
            raise NoMemory(
                f"{error}, so no generate.batch_size is small enough (it is {size}): end what else "
                "uses that memory, ask for fewer --workers, or draw on the processor, with "
                "trainer.accelerator=cpu"
            ) from None
        except NoPicture as error:
            raise NoPicture(f"{title}: {error}; {remedy}") from None
        if at_once != before:  # first of all: what is drawn again is to be cut likewise
            with atomic(folder / PIECES) as temporary:
                temporary.write_text(json.dumps(asdict(at_once)) + "\n")
        for path, image in zip(paths, images, strict=True):
            write_image(path, image)
    table = pd.DataFrame([row(prompt, run.generate.seed) for prompt in asked])
    with atomic(folder / TABLE) as temporary:
        table.to_parquet(temporary, index=False)
    cut = [folder / PIECES] if (folder / PIECES).is_file() else []
    return [*(image_path(folder, prompt) for prompt in asked), folder / TABLE, *cut]


def is_whole(image: Path) -> bool:
    """Whether an image has been drawn, and every byte of it can be decoded."""
    try:
        return image.is_file() and read_png(image) is not None
    except UserError:
        return False


def pieces(folder: Path) -> AtOnce:
    """The pieces in which this folder's batches are drawn."""
    file = folder / PIECES
    if not file.is_file():
        return AtOnce()
    try:
        return AtOnce(**read_json(file))
    except TypeError as error:
        raise Damaged(file, "it is no size of pieces; delete it") from error


def batches(asked: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """Each concept's prompts in batches of their own."""
    of_one = [list(group) for _, group in itertools.groupby(asked, lambda prompt: prompt.folder)]
    return [mine[i : i + size] for mine in of_one for i in range(0, len(mine), size)]


def show(run: Run, record: Record) -> None:
    """The copy that W&B gets: one grid of images for each type of prompt."""
    made = read_table(record.path / STAGE)
    with tracking.track(run, record, STAGE) as tracker:
        each = -(-(GRID_SIDE**2) // made["concept"].nunique())  # images of a concept
        for kind, rows in made.groupby("kind", sort=False):
            shown = rows.groupby("concept", sort=False).head(each).head(GRID_SIDE**2)
            caption = "; ".join(dict.fromkeys(shown["prompt"]))
            tracker.image(f"samples/{kind}", tiled(shown["file"].tolist()), caption)


def tiled(files: Sequence[str]) -> NDArray[np.uint8]:
    """Images of one size side by side, row by row, as near to a square as their number allows."""
    images = [read_png(Path(file)) for file in files]
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
        "file": str(image_path(Path(), prompt)),
        "concept": prompt.concept,
        "attributes": json.dumps(dict(prompt.attributes), sort_keys=True),
        **{f"scored_{rule}": text for rule, text in sorted(prompt.scored_text.items())},
    }


def read_table(folder: Path) -> pd.DataFrame:
    """The rows of a folder that `render` completed, its pictures' paths made absolute."""
    path = folder / TABLE
    if not path.is_file():
        raise UserError(f"{path} does not exist: generate that run's images first")
    table = read_parquet(path, ("file", "kind", "index", "prompt", "seed", "concept"))
    table["file"] = [str(folder / name) for name in table["file"]]
    return table


def stage_of(base: Record) -> str:
    """What a run's marks call the images in a folder of the base model."""
    return f"{BASE}/{base.path.name}/{STAGE}"


def base_folder(run: Run, record: Record) -> Path:
    """Where the base model's images for this run's prompts lie, beside the folders of runs.

    Named by what they depend on and nothing else, so every adapter of a concept finds the same,
    in whichever study it is.
    """
    depends = {
        "model": fingerprint(placed(run.model)),
        "concept": run.data.concept,
        "images": record.facts("data")["digest"],
        "generate": run.to_dict()["generate"],
    }
    text = json.dumps(depends, sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return record.path.parent / BASE / f"{run.data.title}-{digest}"


def image_path(folder: Path, prompt: Prompt) -> Path:
    return folder / prompt.folder / prompt.kind / f"{prompt.index:04d}.png"


def write_image(path: Path, image_HWC: NDArray[np.uint8]) -> None:
    with atomic(path, durable=False) as temporary:
        Image.fromarray(image_HWC).save(temporary, format="PNG")
