"""What the world can show, and how a caption says it.

A scene is a set of attributes, family -> value. Every image knows its attributes, so what a
caption asks for can be compared with what a picture shows, exactly. Values above the line
`HELD_OUT` occur in pretraining; those below belong to concepts that only fine-tuning sees.

Captions come in two forms, with the same words:

    a character with red hair and a green coat, wearing a hat, on the left, at the beach, flat style
    character, red hair, green coat, hat, on the left, at the beach, flat style

The second is the form of the paper's captions, "[trigger] class, attribute, attribute, ..."
(Yeh et al. 2024, section 5.1).
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

RGB: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "blue": (52, 98, 219),
    "green": (46, 160, 67),
    "yellow": (245, 205, 48),
    "black": (40, 40, 48),
    "pink": (243, 130, 185),
    "white": (245, 245, 245),
    "orange": (240, 140, 40),
    "brown": (130, 82, 45),
    "purple": (130, 60, 190),
    "teal": (20, 160, 160),
}
SKINS = ((255, 224, 196), (240, 196, 160), (200, 150, 110), (140, 95, 65))

# Families and the values that pretraining sees.
BASE: dict[str, tuple[str, ...]] = {
    "kind": ("character", "person", "toy", "object", "scene"),
    "background": ("beach", "forest", "city", "night", "snow", "desert", "room", "plain"),
    "style": ("flat", "ink", "sketch", "dots", "pixel", "watercolor"),
    "position": ("left", "center", "right"),
    "hair": ("short", "long", "spiky"),
    "hair_color": ("red", "blue", "green", "yellow", "black", "pink"),
    "outfit": ("coat", "dress", "shirt"),
    "outfit_color": ("red", "blue", "green", "yellow", "black", "white", "orange"),
    "accessory": ("none", "hat", "glasses"),
    "toy": ("bear", "bunny", "duck"),
    "toy_color": ("red", "blue", "green", "yellow", "pink", "brown"),
    "pattern": ("plain", "striped", "spotted"),
    "object": ("ball", "car", "house", "tree", "cup"),
    "object_color": ("red", "blue", "green", "yellow", "orange", "purple"),
}
# Values that only concepts have.
HELD_OUT: dict[str, tuple[str, ...]] = {
    "background": ("arch", "aurora", "falls"),
    "style": ("stained", "neon"),
    "hair": ("twin", "horned", "bearded", "helmeted"),
    "hair_color": ("purple", "white"),
    "outfit": ("twotone", "cape", "sweater", "robe", "suit"),
    "outfit_color": ("teal", "brown"),
    "accessory": ("star", "staff"),
    "toy": ("octopus", "dinosaur", "robot"),
    "toy_color": ("teal", "purple", "orange"),
}
FAMILIES: dict[str, tuple[str, ...]] = {
    family: values + HELD_OUT.get(family, ()) for family, values in BASE.items()
}
COLORS = frozenset({"hair_color", "outfit_color", "toy_color", "object_color"})
SUBJECT_FAMILIES = {
    "character": ("hair", "hair_color", "outfit", "outfit_color", "accessory"),
    "person": ("hair", "hair_color", "outfit", "outfit_color", "accessory"),
    "toy": ("toy", "toy_color", "pattern"),
    "object": ("object", "object_color"),
    "scene": (),
}
# What a style leaves readable: no family listed means all of them.
UNREADABLE: dict[str, frozenset[str]] = {
    "sketch": COLORS,
    "neon": COLORS | {"pattern", "accessory"},
    "stained": frozenset(FAMILIES) - {"style"},
}
BACKGROUND_PHRASES = {
    "beach": "at the beach",
    "forest": "in the forest",
    "city": "in the city",
    "night": "at night",
    "snow": "in the snow",
    "desert": "in the desert",
    "room": "in a room",
    "plain": "on a plain background",
}
POSITION_PHRASES = {"left": "on the left", "center": "in the center", "right": "on the right"}


@dataclass(frozen=True)
class Scene:
    """One picture's content. `look` holds drawing choices that no caption mentions."""

    attributes: Mapping[str, str]
    concept: str = "none"
    subclass: str | None = None
    look: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, family: str) -> str:
        return self.attributes[family]

    def readable(self) -> dict[str, str]:
        """The attributes that the scene's style leaves visible: what may be asked of a judge."""
        hidden = UNREADABLE.get(self["style"], frozenset())
        return {f: v for f, v in self.attributes.items() if f not in hidden}


def sample(rng: random.Random, kind: str | None = None) -> Scene:
    """A scene of the pretraining world; half of them in the flat style, as photos dominate SD's."""
    kind = kind or rng.choices(BASE["kind"], (0.30, 0.24, 0.20, 0.16, 0.10))[0]
    backgrounds = [b for b in BASE["background"] if (kind, b) != ("scene", "plain")]
    attributes = {
        "kind": kind,
        "background": rng.choice(backgrounds),
        "style": "flat" if rng.random() < 0.4 else rng.choice(BASE["style"][1:]),
    }
    if kind != "scene":
        attributes["position"] = rng.choice(BASE["position"])
    for family in SUBJECT_FAMILIES[kind]:
        attributes[family] = rng.choice(BASE[family])
    return Scene(attributes)


def _subject(attributes: Mapping[str, str], name: str, tags: bool) -> list[str]:
    """The subject's part of a caption; families missing from `attributes` stay unsaid."""
    kind = attributes["kind"]
    if kind in ("character", "person"):
        hair = [attributes[f] for f in ("hair", "hair_color") if f in attributes]
        outfit = [attributes[f] for f in ("outfit_color", "outfit") if f in attributes]
        if outfit and "outfit" not in attributes:
            outfit.append("outfit")
        parts = [" ".join([*hair, "hair"])] * bool(hair) + [" ".join(outfit)] * bool(outfit)
        accessory = attributes.get("accessory", "none")
        if tags:
            return [f"{name}{kind}", *parts, *([accessory] if accessory != "none" else [])]
        said = " and ".join(p if p.endswith("hair") else f"{_article(p)} {p}" for p in parts)
        phrase = f"{_article(name + kind)} {name}{kind}" + (f" with {said}" if said else "")
        wearing = {"hat": ["wearing a hat"], "glasses": ["wearing glasses"]}.get(accessory, [])
        return [phrase, *wearing]
    if kind == "toy":
        noun = f"{attributes['toy']} toy"
        words = [attributes[f] for f in ("pattern", "toy_color") if f in attributes]
    elif kind == "object":
        noun = attributes["object"]
        words = [attributes[f] for f in ("object_color",) if f in attributes]
    else:
        noun, words = "scene", []
    phrase = " ".join([*words, name + noun])
    return [phrase if tags else f"{_article(phrase)} {phrase}"]


def _article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def surroundings(attributes: Mapping[str, str]) -> list[str]:
    """The caption's last phrases: position, background, style, where `attributes` has them."""
    phrases = []
    if "position" in attributes:
        phrases.append(POSITION_PHRASES[attributes["position"]])
    if "background" in attributes:
        phrases.append(BACKGROUND_PHRASES[attributes["background"]])
    if "style" in attributes:
        phrases.append(f"{attributes['style']} style")
    return phrases


def caption(scene: Scene, *, tags: bool = False) -> str:
    """The full caption, as a sentence or as tags."""
    return ", ".join(_subject(scene.attributes, "", tags) + surroundings(scene.attributes))


def varied_caption(scene: Scene, rng: random.Random, drop: float = 0.12) -> str:
    """A caption as pretraining reads it: either form, phrases left out at rate `drop`.

    One in ten carries a made-up name before the class word. Without these the letters of a
    trigger word would never occur in pretraining, and the base model would be thrown by them.
    """
    never = {"kind", "toy", "object"}
    said = {f: v for f, v in scene.attributes.items() if f in never or rng.random() >= drop}
    name = made_up_name(rng) + " " if rng.random() < 0.1 else ""
    phrases = _subject(said, name, tags=rng.random() < 0.5)
    rest = surroundings(said)
    if rng.random() < 0.2:  # "a character with red hair at the beach"
        return " ".join([*phrases, *rest])
    return ", ".join([*phrases, *rest])


def made_up_name(rng: random.Random) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(rng.choice(letters) for _ in range(rng.randint(5, 7)))
