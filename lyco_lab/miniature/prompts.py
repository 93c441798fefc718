"""What a model is asked to draw of a concept, and what the picture then has to show.

Four kinds, as in the paper (Yeh et al. 2024, appendix D.3):

    train    the captions of the training folder
    trigger  "[trigger] class" alone
    alter    the concept where, or with what, it was never shown
    style    the concept in five styles it was never shown in (not for style concepts)

Each prompt carries the attributes that it asks for, which the oracle can read off the result.
"""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lyco_lab.errors import UserError, nearest
from lyco_lab.miniature.concepts import TAUGHT_PLACES, Concept, concept, scenes, subject_tags
from lyco_lab.miniature.vocabulary import BASE, UNREADABLE, sample, surroundings

KINDS = ("train", "trigger", "alter", "style")
Kind = Literal["train", "trigger", "alter", "style"]
UNTAUGHT_PLACES = tuple(
    place for place in BASE["background"] if place not in TAUGHT_PLACES
)  # forest, night, snow
UNTAUGHT_STYLES = tuple(style for style in BASE["style"] if style != "flat")


@dataclass(frozen=True)
class Prompt:
    """`scored_text` maps the handling of the trigger to the text that a picture is scored with:

    keep: the prompt as it is; class: without the trigger; drop: without trigger and class word.
    `folder`: where the images of its concept lie, if there are several.
    """

    kind: str
    index: int
    text: str
    scored_text: Mapping[str, str]
    attributes: Mapping[str, str]
    concept: str
    folder: str = ""


def prompts(name: str, kind: str, count: int, seed: int = 0) -> list[Prompt]:
    """`count` prompts of one kind, going round its distinct ones; none for a style in styles."""
    if kind not in KINDS:
        raise UserError(
            f"generate.types: {kind!r} is not one of {', '.join(KINDS)}{nearest(kind, KINDS)}"
        )
    subject = concept(name)
    asked = {"train": _train, "trigger": _trigger, "alter": _alter, "style": _style}[kind](
        subject, random.Random(f"prompts:{name}:{kind}:{seed}")
    )
    return [
        Prompt(
            kind=kind,
            index=i,
            text=text,
            scored_text=scored(text, subject),
            attributes=attributes,
            concept=subject.name,
        )
        for i, (text, attributes) in enumerate(itertools.islice(itertools.cycle(asked), count))
    ]


def scored(text: str, subject: Concept) -> dict[str, str]:
    rest = [phrase for phrase in text.split(", ") if phrase != subject.descriptor]
    return {
        "keep": text,
        "class": ", ".join([subject.class_word, *rest]),
        "drop": ", ".join(rest) or subject.class_word,
    }


Asked = list[tuple[str, dict[str, str]]]


def _train(subject: Concept, rng: random.Random) -> Asked:
    return [(subject.caption(s), s.readable()) for s, _ in scenes(subject, 0)]


def _trigger(subject: Concept, rng: random.Random) -> Asked:
    """What all variants share is what the name alone should bring back."""
    first, *others = (v.attributes for v in subject.variants.values())
    shared = {f: v for f, v in first.items() if all(o.get(f) == v for o in others)}
    return [(subject.descriptor, shared)]


def _alter(subject: Concept, rng: random.Random) -> Asked:
    own = set().union(*(v.attributes for v in subject.variants.values()))
    asked: Asked = []
    for i in range(10):
        place = UNTAUGHT_PLACES[i % len(UNTAUGHT_PLACES)]
        position = BASE["position"][i // len(UNTAUGHT_PLACES) % 3]
        attributes = {"position": position, "background": place}
        tags: list[str] = []
        if subject.category in ("scene", "style"):
            standing = dict(sample(rng, ("object", "toy", "character")[i % 3]).attributes)
            tags = subject_tags(standing)
            around = ("position", "background", "style")
            attributes |= {f: v for f, v in standing.items() if f not in around}
        if subject.category != "style":
            attributes["style"] = "flat"
        said = {f: v for f, v in attributes.items() if f not in own}
        shown = attributes | ({"style": subject.name} if subject.category == "style" else {})
        readable = {
            f: v for f, v in said.items() if f not in UNREADABLE.get(shown.get("style", ""), ())
        }
        asked.append((", ".join([subject.descriptor, *tags, *surroundings(said)]), readable))
    return asked


def _style(subject: Concept, rng: random.Random) -> Asked:
    if subject.category == "style":
        return []
    return [
        (", ".join([subject.descriptor, f"{style} style"]), {"style": style})
        for style in UNTAUGHT_STYLES
    ]
