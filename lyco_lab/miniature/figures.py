"""What stands in a scene: anime characters, film-like people, stuffed toys, objects.

Each `draw_KIND(frame, scene, rng, image)` draws one subject in its own units (see frame.py).
Shapes are chosen so that every attribute survives at 64 x 64: eyes, spots and stripes are at
least four pixels wide there.
"""

import math
import random

from PIL import Image, ImageDraw

from lyco_lab.miniature.frame import CANVAS, Color, Frame, dark, jitter, light
from lyco_lab.miniature.vocabulary import RGB, SKINS, Scene

INK: Color = (28, 26, 36)
WHITE: Color = (252, 252, 252)
FELT: Color = (74, 50, 40)
BAND: Color = (205, 60, 60)


def _skin(scene: Scene, rng: random.Random, choices: int = 4) -> Color:
    named = scene.look.get("skin")
    return SKINS[int(named)] if named is not None else rng.choice(SKINS[:choices])


def _star(x: float, y: float, r: float) -> list[tuple[float, float]]:
    radii = (r, 0.42 * r) * 5
    return [
        (x + q * math.sin(k * math.pi / 5), y + q * math.cos(k * math.pi / 5))
        for k, q in enumerate(radii)
    ]


def draw_character(f: Frame, scene: Scene, rng: random.Random, image: Image.Image) -> None:
    """Anime proportions: the head takes two fifths, the eyes a fifth of the head."""
    hair, outfit = scene["hair"], scene["outfit"]
    hair_color = jitter(RGB[scene["hair_color"]], rng)
    cloth = jitter(RGB[scene["outfit_color"]], rng)
    skin, head = _skin(scene, rng, 3), 0.68
    if hair == "long":
        f.rect(-0.27, 0.26, 0.27, 0.72, hair_color)
        f.ellipse(0, 0.26, 0.27, 0.05, hair_color)
    if hair == "twin":
        for side in (-1, 1):
            f.ellipse(side * 0.35, 0.50, 0.12, 0.27, hair_color)
    if hair == "spiky":
        for angle in range(-60, 61, 30):
            t = math.radians(angle)
            tip = (0.46 * math.sin(t), head + 0.03 + 0.38 * math.cos(t))
            left = (0.24 * math.sin(t - 0.42), head + 0.23 * math.cos(t - 0.42))
            right = (0.24 * math.sin(t + 0.42), head + 0.23 * math.cos(t + 0.42))
            f.polygon([left, tip, right], hair_color)
        for side in (-1, 1):
            f.polygon(
                [(side * 0.2, head + 0.1), (side * 0.42, head - 0.03), (side * 0.2, head - 0.1)],
                hair_color,
            )
    f.rect(-0.11, 0, -0.02, 0.14, skin)
    f.rect(0.02, 0, 0.11, 0.14, skin)
    _character_outfit(f, outfit, cloth, skin)
    f.ellipse(0, head, 0.22, 0.20, skin)
    f.dome(0, head + 0.02, 0.255, 0.24, hair_color)
    if hair in ("long", "twin"):
        f.rect(-0.27, head - 0.14, -0.17, head + 0.06, hair_color)
        f.rect(0.17, head - 0.14, 0.27, head + 0.06, hair_color)
    if hair == "horned":
        for side in (-1, 1):
            horn = [(0.10, 0.20), (0.21, 0.13), (0.30, 0.37)]
            f.polygon([(side * x, head + y) for x, y in horn], (250, 226, 180))
    for side in (-1, 1):
        f.ellipse(side * 0.095, head - 0.055, 0.052, 0.07, INK)
        f.ellipse(side * 0.095 + 0.015, head - 0.03, 0.02, 0.025, WHITE)
    f.rect(-0.035, head - 0.165, 0.035, head - 0.143, (190, 70, 75))
    if scene["accessory"] == "hat":
        f.rect(-0.33, head + 0.12, 0.33, head + 0.175, FELT)
        f.rect(-0.19, head + 0.15, 0.19, head + 0.34, FELT)
        f.rect(-0.19, head + 0.17, 0.19, head + 0.22, BAND)
    if scene["accessory"] == "glasses":
        for side in (-1, 1):
            f.ring(side * 0.105, head - 0.05, 0.095, 0.1, INK, 0.034)
        f.rect(-0.03, head - 0.06, 0.03, head - 0.035, INK)
    if scene["accessory"] == "star":
        f.polygon(_star(0.17, head + 0.17, 0.12), RGB["yellow"])


def _character_outfit(f: Frame, outfit: str, cloth: Color, skin: Color) -> None:
    def sleeves(color: Color, wide: float, low: float) -> None:
        for side in (-1, 1):
            arm = [(0.12, 0.46), (wide, low + 0.05), (wide - 0.07, low), (0.08, 0.36)]
            f.polygon([(side * x, y) for x, y in arm], color)

    if outfit == "coat":
        f.polygon([(-0.15, 0.47), (0.15, 0.47), (0.20, 0.06), (-0.20, 0.06)], cloth)
        sleeves(dark(cloth, 0.82), 0.30, 0.18)
        f.rect(-0.022, 0.06, 0.022, 0.47, dark(cloth, 0.5) if sum(cloth) > 200 else (150, 150, 160))
        f.rect(-0.13, 0, -0.02, 0.07, (66, 46, 40))
        f.rect(0.02, 0, 0.13, 0.07, (66, 46, 40))
    elif outfit in ("dress", "twotone"):
        sleeves(skin, 0.26, 0.22)
        f.polygon([(-0.09, 0.47), (0.09, 0.47), (0.34, 0.10), (-0.34, 0.10)], cloth)
        if outfit == "twotone":
            f.polygon([(-0.20, 0.30), (0.20, 0.30), (0.34, 0.10), (-0.34, 0.10)], RGB["orange"])
    elif outfit in ("shirt", "sweater"):
        f.rect(-0.14, 0.08, 0.14, 0.26, (70, 75, 95))
        f.rect(-0.15, 0.24, 0.15, 0.47, cloth)
        sleeves(cloth, 0.29, 0.26)
        if outfit == "sweater":
            f.rect(-0.15, 0.39, 0.15, 0.44, RGB["white"])
            f.rect(-0.15, 0.29, 0.15, 0.34, RGB["white"])
    elif outfit == "cape":
        f.polygon([(-0.12, 0.47), (0.12, 0.47), (0.37, 0.03), (-0.37, 0.03)], RGB["red"])
        f.rect(-0.13, 0.08, 0.13, 0.47, cloth)
        f.rect(-0.13, 0.22, 0.13, 0.29, RGB["yellow"])


def draw_person(f: Frame, scene: Scene, rng: random.Random, image: Image.Image) -> None:
    """Film-like proportions, lit from the left. A figurine stands on a disc, with a glossy edge."""
    hair, outfit = scene["hair"], scene["outfit"]
    hair_color = jitter(RGB[scene["hair_color"]], rng)
    cloth = jitter(RGB[scene["outfit_color"]], rng)
    skin, head = _skin(scene, rng), 0.82
    if scene.look.get("figurine"):
        f.ellipse(0, 0.0, 0.36, 0.07, (60, 60, 70))
        f.ellipse(0, 0.02, 0.33, 0.055, (150, 150, 165))
    if hair == "long":
        f.rect(-0.165, 0.55, 0.165, 0.84, hair_color)
    if hair == "spiky":
        for angle in range(-75, 76, 30):
            t = math.radians(angle)
            tip = (0.27 * math.sin(t), head + 0.27 * math.cos(t))
            left = (0.13 * math.sin(t - 0.5), head + 0.13 * math.cos(t - 0.5))
            right = (0.13 * math.sin(t + 0.5), head + 0.13 * math.cos(t + 0.5))
            f.polygon([left, tip, right], hair_color)
    trousers = cloth if outfit == "suit" else (60, 62, 80)
    f.rect(-0.12, 0, -0.015, 0.40, trousers)
    f.rect(0.015, 0, 0.12, 0.40, dark(trousers, 0.75))
    hem, half = {
        "coat": (0.14, 0.18), "dress": (0.12, 0.29), "shirt": (0.36, 0.15),
        "robe": (0.02, 0.27), "suit": (0.36, 0.16), "sweater": (0.34, 0.16),
    }[outfit]  # fmt: skip
    if outfit == "dress":  # bare legs below it
        f.rect(-0.11, 0, -0.02, 0.2, skin)
        f.rect(0.02, 0, 0.11, 0.2, dark(skin, 0.85))
    f.polygon([(-0.15, 0.69), (0.15, 0.69), (half, hem), (-half, hem)], cloth)
    f.polygon([(0.02, 0.69), (0.15, 0.69), (half, hem), (0.04, hem)], dark(cloth, 0.75))
    arm = skin if outfit == "dress" else dark(cloth, 0.88)
    for side, shade in ((-1, 1.0), (1, 0.78)):
        points = [(0.13, 0.69), (0.20, 0.65), (0.25, 0.38), (0.18, 0.38)]
        f.polygon([(side * x, y) for x, y in points], dark(arm, shade))
        f.ellipse(side * 0.215, 0.36, 0.04, 0.04, skin)
    if outfit == "coat":
        seam = dark(cloth, 0.45) if sum(cloth) > 200 else (150, 150, 160)
        f.rect(-0.02, hem, 0.02, 0.69, seam)
        f.rect(-0.17, 0.40, 0.17, 0.45, seam)
    f.rect(-0.045, 0.66, 0.045, 0.74, dark(skin, 0.85))
    f.ellipse(0, head, 0.125, 0.135, skin)
    if hair == "helmeted":
        f.ellipse(0, head, 0.18, 0.18, (235, 235, 240))
        f.rounded(-0.13, head - 0.07, 0.13, head + 0.08, 0.04, (40, 70, 120))
        f.rect(-0.16, 0.44, 0.16, 0.50, (230, 230, 235))
    else:
        f.dome(0, head + 0.02, 0.15, 0.16, hair_color)
        for side in (-1, 1):
            f.ellipse(side * 0.052, head - 0.015, 0.024, 0.028, INK)
        if hair == "long":
            f.rect(-0.165, head - 0.10, -0.105, head + 0.04, hair_color)
            f.rect(0.105, head - 0.10, 0.165, head + 0.04, hair_color)
        if hair == "short":
            for side in (-1, 1):  # sideburns, which a hat leaves visible
                f.rect(
                    side * 0.13 - 0.025, head - 0.05, side * 0.13 + 0.025, head + 0.06, hair_color
                )
        if hair == "bearded":
            beard = [(-0.12, -0.04), (0.12, -0.04), (0.08, -0.22), (0, -0.32), (-0.08, -0.22)]
            f.polygon([(x, head + y) for x, y in beard], hair_color)
        f.rect(-0.04, head - 0.09, 0.04, head - 0.07, (160, 65, 65))
    if scene["accessory"] == "hat":
        f.rect(-0.23, head + 0.07, 0.23, head + 0.11, FELT)
        f.rect(-0.13, head + 0.10, 0.13, head + 0.23, FELT)
        f.rect(-0.13, head + 0.11, 0.13, head + 0.15, BAND)
    if scene["accessory"] == "glasses":
        for side in (-1, 1):
            f.rect(side * 0.06 - 0.05, head - 0.06, side * 0.06 + 0.05, head + 0.03, INK)
        f.rect(-0.13, head - 0.005, 0.13, head + 0.025, INK)
    if scene["accessory"] == "staff":
        f.rect(0.245, 0, 0.285, 0.94, (110, 70, 40))
        f.ellipse(0.265, 0.97, 0.065, 0.065, (90, 220, 255))


def draw_toy(f: Frame, scene: Scene, rng: random.Random, image: Image.Image) -> None:
    """A plush body cut from patterned cloth, with its face sewn on."""
    kind, fur = scene["toy"], jitter(RGB[scene["toy_color"]], rng)
    silhouette = Image.new("L", (CANVAS, CANVAS), 0)
    body = f.on(ImageDraw.Draw(silhouette))
    if kind == "bear":
        body.ellipse(0, 0.27, 0.28, 0.27, 255)
        body.ellipse(0, 0.66, 0.25, 0.22, 255)
        for side in (-1, 1):
            body.ellipse(side * 0.21, 0.85, 0.11, 0.11, 255)
            body.ellipse(side * 0.31, 0.36, 0.10, 0.15, 255)
            body.ellipse(side * 0.19, 0.07, 0.14, 0.09, 255)
    elif kind == "bunny":
        body.ellipse(0, 0.24, 0.25, 0.24, 255)
        body.ellipse(0, 0.56, 0.23, 0.20, 255)
        for side in (-1, 1):
            body.ellipse(side * 0.12, 0.84, 0.075, 0.21, 255)
            body.ellipse(side * 0.25, 0.30, 0.08, 0.12, 255)
            body.ellipse(side * 0.16, 0.06, 0.13, 0.08, 255)
    elif kind == "duck":
        body.ellipse(-0.02, 0.27, 0.36, 0.27, 255)
        body.ellipse(0.16, 0.68, 0.22, 0.21, 255)
        body.polygon([(-0.30, 0.30), (-0.50, 0.56), (-0.18, 0.48)], 255)
    elif kind == "octopus":
        body.ellipse(0, 0.60, 0.35, 0.35, 255)
        for k in range(5):
            body.ellipse(-0.38 + 0.19 * k, 0.20, 0.09, 0.22, 255)
    elif kind == "dinosaur":
        for x, y in ((-0.42, 0.2), (-0.30, 0.36), (-0.20, 0.54), (-0.06, 0.74)):
            spike = [(x - 0.11, y - 0.03), (x + 0.09, y), (x - 0.06, y + 0.19)]
            f.polygon(spike, RGB["orange"])
        body.ellipse(-0.02, 0.25, 0.29, 0.25, 255)
        body.ellipse(0.15, 0.68, 0.23, 0.18, 255)
        body.polygon([(-0.12, 0.40), (0.20, 0.40), (0.26, 0.68), (0, 0.68)], 255)
        body.polygon([(-0.18, 0.36), (-0.54, 0.04), (-0.08, 0.06)], 255)
        for x in (-0.16, 0.12):
            body.rect(x - 0.08, 0, x + 0.08, 0.12, 255)
    elif kind == "robot":
        body.rect(-0.24, 0.12, 0.24, 0.54, 255)
        body.rect(-0.20, 0.57, 0.20, 0.88, 255)
        for side in (-1, 1):
            body.rect(side * 0.32 - 0.07, 0.18, side * 0.32 + 0.07, 0.50, 255)
            body.rect(side * 0.13 - 0.09, 0, side * 0.13 + 0.09, 0.13, 255)
        f.rect(-0.02, 0.86, 0.02, 1.0, INK)
        f.ellipse(0, 1.0, 0.06, 0.06, RGB["red"])
    cloth = Image.new("RGB", (CANVAS, CANVAS), fur)
    _pattern(f.on(ImageDraw.Draw(cloth)), scene, fur, rng)
    image.paste(cloth, (0, 0), silhouette)
    _toy_face(f, kind, fur)


def _pattern(f: Frame, scene: Scene, fur: Color, rng: random.Random) -> None:
    thread = light(fur, 0.68) if scene["toy_color"] != "yellow" else (190, 115, 15)
    if "pattern_color" in scene.look:
        thread = RGB[scene.look["pattern_color"]]
    if scene["pattern"] == "striped":
        start = rng.uniform(0, 0.1)
        for k in range(7):
            f.rect(-1, start + 0.2 * k, 1, start + 0.2 * k + 0.09, thread)
    if scene["pattern"] == "spotted":
        for i in range(-3, 4):
            for j in range(6):
                f.ellipse(0.23 * (i + 0.5 * (j % 2)), 0.08 + 0.19 * j, 0.07, 0.07, thread)


def _toy_face(f: Frame, kind: str, fur: Color) -> None:
    def eyes(y: float, apart: float, r: float) -> None:
        for side in (-1, 1):
            f.ellipse(side * apart, y, r, r * 1.15, INK)

    if kind == "bear":
        f.ellipse(0, 0.60, 0.12, 0.09, light(fur, 0.75))
        f.ellipse(0, 0.63, 0.045, 0.035, INK)
        eyes(0.73, 0.11, 0.042)
    elif kind == "bunny":
        f.ellipse(0, 0.50, 0.042, 0.034, (235, 100, 140))
        eyes(0.60, 0.10, 0.042)
    elif kind == "duck":
        f.ellipse(0.22, 0.75, 0.042, 0.05, INK)
        f.polygon([(0.33, 0.73), (0.56, 0.64), (0.33, 0.56)], (245, 130, 20))
    elif kind == "octopus":
        for side in (-1, 1):
            f.ellipse(side * 0.14, 0.60, 0.10, 0.115, WHITE)
            f.ellipse(side * 0.14, 0.58, 0.05, 0.065, INK)
        f.ellipse(0, 0.40, 0.06, 0.035, (230, 90, 110))
    elif kind == "dinosaur":
        f.ellipse(0.22, 0.72, 0.06, 0.065, WHITE)
        f.ellipse(0.235, 0.72, 0.032, 0.042, INK)
        f.rect(0.16, 0.575, 0.37, 0.60, INK)
    elif kind == "robot":
        for side in (-1, 1):
            f.rect(side * 0.1 - 0.055, 0.70, side * 0.1 + 0.055, 0.80, (150, 245, 255))
        f.rect(-0.11, 0.61, 0.11, 0.65, INK)


def draw_object(f: Frame, scene: Scene, rng: random.Random, image: Image.Image) -> None:
    kind, paint = scene["object"], jitter(RGB[scene["object_color"]], rng)
    if kind == "ball":
        f.ellipse(0, 0.36, 0.36, 0.36, paint)
        for start in (-35, 145):
            f.draw.pieslice(f.box(-0.36, 0, 0.36, 0.72), start, start + 70, fill=light(paint, 0.6))
    elif kind == "car":
        f.polygon([(-0.32, 0.36), (-0.20, 0.62), (0.20, 0.62), (0.34, 0.36)], paint)
        f.polygon([(-0.22, 0.38), (-0.14, 0.55), (0.15, 0.55), (0.24, 0.38)], (200, 230, 250))
        f.rounded(-0.52, 0.11, 0.52, 0.38, 0.06, paint)
        for side in (-1, 1):
            f.ellipse(side * 0.28, 0.12, 0.13, 0.13, INK)
            f.ellipse(side * 0.28, 0.12, 0.06, 0.06, (190, 190, 190))
    elif kind == "house":
        f.rect(-0.34, 0, 0.34, 0.44, light(paint, 0.6))
        f.polygon([(-0.46, 0.43), (0.46, 0.43), (0, 0.86)], paint)
        f.rect(-0.09, 0, 0.09, 0.26, dark(paint, 0.5))
        for side in (-1, 1):
            f.rect(side * 0.22 - 0.06, 0.2, side * 0.22 + 0.06, 0.33, (200, 230, 250))
    elif kind == "tree":
        f.rect(-0.07, 0, 0.07, 0.42, (110, 70, 40))
        f.ellipse(0, 0.66, 0.34, 0.30, paint)
        for side in (-1, 1):
            f.ellipse(side * 0.18, 0.52, 0.20, 0.18, paint)
    elif kind == "cup":
        f.ring(0.28, 0.32, 0.17, 0.18, paint, 0.08)
        f.polygon([(-0.30, 0.62), (0.30, 0.62), (0.22, 0), (-0.22, 0)], paint)
        f.ellipse(0, 0.62, 0.30, 0.06, dark(paint, 0.6))


# How tall each kind stands, and where its feet are, as fractions of the picture.
DRAWERS = {
    "character": (draw_character, (0.84, 0.94), (0.94, 0.98)),
    "person": (draw_person, (0.86, 0.94), (0.95, 0.99)),
    "toy": (draw_toy, (0.64, 0.78), (0.90, 0.96)),
    "object": (draw_object, (0.64, 0.78), (0.88, 0.95)),
}
