"""Concepts that pretraining never sees, and the training folders that teach them.

Twelve classes over the paper's five categories, some with sub-classes (outfits; figurine and
realistic), each with a trigger word. Image counts are unequal and repeats even them out, as in
the paper (Yeh et al. 2024, appendix D.1): images x repeats is about 96 for each class.

A folder holds `0000.png`, `0000.txt` and `manifest.jsonl`: the format that real data uses too.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from lyco_lab.errors import UserError, nearest
from lyco_lab.files import atomic
from lyco_lab.miniature.vocabulary import BASE, Scene, sample, surroundings
from lyco_lab.miniature.world import render


@dataclass(frozen=True)
class Variant:
    """One sub-class: its images, what it shows, and the keyword that captions name it by."""

    images: int
    attributes: Mapping[str, str] = field(default_factory=dict)
    look: Mapping[str, str] = field(default_factory=dict)
    keyword: str = ""


@dataclass(frozen=True)
class Concept:
    """A class to learn, its trigger word, and what its pictures show."""

    name: str
    category: str
    trigger: str
    class_word: str
    repeats: int
    variants: Mapping[str, Variant]

    @property
    def images(self) -> int:
        return sum(v.images for v in self.variants.values())

    @property
    def descriptor(self) -> str:
        """The concept alone, "[trigger] class"."""
        return f"{self.trigger} {self.class_word}"

    def scene(self, rng: random.Random, variant: str | None = None, **fixed: str) -> Scene:
        """A picture of the concept; `fixed` sets families, the rest is drawn."""
        key = (
            variant
            or rng.choices(list(self.variants), [v.images for v in self.variants.values()])[0]
        )
        chosen = self.variants[key]
        if self.category in ("scene", "style"):
            attributes = dict(sample(rng, fixed.get("kind")).attributes)
            attributes["style"] = "flat"
        else:
            attributes = {
                "background": rng.choice(BASE["background"]),
                "style": "flat",
                "position": rng.choice(BASE["position"]),
            }
        attributes |= {**fixed, **chosen.attributes}
        subclass = key if len(self.variants) > 1 else None
        return Scene(attributes, self.name, subclass, chosen.look)

    def caption(self, scene: Scene) -> str:
        """ "[trigger] class, sub-class keyword, attribute, attribute, ...".

        What belongs to the concept goes unsaid, so that the trigger has to carry it.
        """
        keyword = self.variants[scene.subclass].keyword if scene.subclass else ""
        own = set().union(*(v.attributes for v in self.variants.values()))
        said = {f: v for f, v in scene.attributes.items() if f not in own}
        subject = subject_tags(scene.attributes) if self.category in ("scene", "style") else []
        return ", ".join(
            [self.descriptor, *[keyword] * bool(keyword), *subject, *surroundings(said)]
        )


def subject_tags(a: Mapping[str, str]) -> list[str]:
    """What stands in a scene or a style picture, as tags."""
    match a["kind"]:
        case "character" | "person":
            worn = [] if a["accessory"] == "none" else [a["accessory"]]
            return [
                a["kind"], f"{a['hair']} {a['hair_color']} hair",
                f"{a['outfit_color']} {a['outfit']}", *worn,
            ]  # fmt: skip
        case "toy":
            return [f"{a['pattern']} {a['toy_color']} {a['toy']} toy"]
        case "object":
            return [f"{a['object_color']} {a['object']}"]
        case _:
            return []


def _person(hair: str, hair_color: str, outfit: str, outfit_color: str, accessory: str, kind: str
            ) -> dict[str, str]:  # fmt: skip
    return {
        "kind": kind, "hair": hair, "hair_color": hair_color, "outfit": outfit,
        "outfit_color": outfit_color, "accessory": accessory,
    }  # fmt: skip


def _toy(toy: str, toy_color: str, pattern: str) -> dict[str, str]:
    return {"kind": "toy", "toy": toy, "toy_color": toy_color, "pattern": pattern}


_MIRO = _person("twin", "purple", "twotone", "white", "star", "character")
_KAEL = _person("horned", "white", "cape", "teal", "none", "character")
_ODO = _person("bearded", "white", "robe", "brown", "staff", "person")
_VEGA = _person("helmeted", "black", "suit", "orange", "none", "person")

CONCEPTS: dict[str, Concept] = {
    c.name: c
    for c in (
        Concept("miro", "anime", "zkmiro", "character", 4, {
            "default": Variant(24, _MIRO,
                               {"skin": "0"}),
        }),
        Concept("kael", "anime", "vokael", "character", 4, {
            "cape": Variant(16, _KAEL | {"outfit": "cape"},
                            {"skin": "1"}, "cape outfit"),
            "sweater": Variant(8, _KAEL | {"outfit": "sweater"},
                               {"skin": "1"}, "sweater outfit"),
        }),
        Concept("odo", "movie", "qxodo", "person", 6, {
            "realistic": Variant(11, _ODO, {"skin": "0"}, "realistic"),
            "figurine": Variant(5, _ODO, {"skin": "0", "figurine": "yes"}, "figurine"),
        }),
        Concept("vega", "movie", "jrvega", "person", 5, {
            "realistic": Variant(13, _VEGA, {"skin": "0"}, "realistic"),
            "figurine": Variant(6, _VEGA, {"skin": "0", "figurine": "yes"}, "figurine"),
        }),
        Concept("octo", "toy", "wbocto", "toy", 8, {
            "default": Variant(12, _toy("octopus", "teal", "spotted"), {"pattern_color": "orange"}),
        }),
        Concept("dino", "toy", "xydino", "toy", 10, {
            "default": Variant(10, _toy("dinosaur", "purple", "striped"),
                               {"pattern_color": "yellow"}),
        }),
        Concept("robo", "toy", "krobot", "toy", 14, {
            "default": Variant(7, _toy("robot", "orange", "plain")),
        }),
        Concept("arch", "scene", "hfarch", "scene", 12,
                {"default": Variant(8, {"background": "arch"})}),
        Concept("aurora", "scene", "ptauro", "scene", 16,
                {"default": Variant(6, {"background": "aurora"})}),
        Concept("falls", "scene", "dmfall", "scene", 24,
                {"default": Variant(4, {"background": "falls"})}),
        Concept("stained", "style", "kqglas", "style", 2,
                {"default": Variant(48, {"style": "stained"})}),
        Concept("neon", "style", "mvneon", "style", 2, {"default": Variant(40, {"style": "neon"})}),
    )
}  # fmt: skip


def concept(name: str) -> Concept:
    """The concept of that name; a UserError naming the nearest if there is none."""
    if name not in CONCEPTS:
        raise UserError(
            f"data.concept = {name!r} is not a concept of the miniature world"
            f"{nearest(name, CONCEPTS)}; there are: {', '.join(CONCEPTS)}"
        )
    return CONCEPTS[name]


def scenes(subject: Concept, seed: int) -> list[tuple[Scene, random.Random]]:
    """The scenes of the training folder, each with the generator that draws it.

    All are flat and in five of the eight places: the other styles and places are what control
    is tested on.
    """
    found = []
    for variant, chosen in subject.variants.items():
        for i in range(chosen.images):
            rng = random.Random(f"concept:{subject.name}:{variant}:{seed}:{i}")
            fixed = {"background": rng.choice(TAUGHT_PLACES)}
            if subject.category == "style":  # an empty plain scene would have no style to show
                fixed["kind"] = rng.choice(("character", "person", "toy", "object"))
            found.append((subject.scene(rng, variant, **fixed), rng))
    return found


TAUGHT_PLACES = ("beach", "city", "desert", "room", "plain")


def write(subject: Concept, folder: Path, seed: int = 0) -> None:
    """Write the concept's training folder: pictures, captions and manifest.jsonl.

    The manifest comes last, so a folder that has one is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (scene, rng) in enumerate(scenes(subject, seed)):
        name = f"{i:04d}.png"
        text = subject.caption(scene)
        with atomic(folder / name, durable=False) as path:
            Image.fromarray(render(scene, rng)).save(path, format="PNG")
        with atomic(folder / f"{i:04d}.txt", durable=False) as path:
            path.write_text(text + "\n", encoding="utf-8")
        lines.append(
            {
                "file": name,
                "caption": text,
                "attributes": scene.readable(),
                "concept": subject.name,
                "subclass": scene.subclass,
                "category": subject.category,
                "repeats": subject.repeats,
                "trigger": subject.trigger,
                "class_word": subject.class_word,
            }
        )
    with atomic(folder / "manifest.jsonl") as path:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
