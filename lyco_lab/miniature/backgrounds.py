"""The places a scene can be in. Each function `name(rng) -> image` draws one, 256 x 256."""

import random
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from lyco_lab.miniature.frame import CANVAS, Color, canvas, dark, jitter

Background = Callable[[random.Random], Image.Image]


def _gradient(top: Color, bottom: Color) -> Image.Image:
    t = np.linspace(0, 1, CANVAS)[:, None, None]
    column = np.array(top) * (1 - t) + np.array(bottom) * t
    return Image.fromarray(np.broadcast_to(column, (CANVAS, CANVAS, 3)).astype(np.uint8).copy())


def _horizon(rng: random.Random) -> int:
    return int(CANVAS * rng.uniform(0.52, 0.60))


def plain(rng: random.Random) -> Image.Image:
    return canvas(jitter(rng.choice([(250, 250, 250), (226, 232, 240), (244, 236, 220)]), rng, 4))


def beach(rng: random.Random) -> Image.Image:
    image, y = _gradient((120, 190, 250), (205, 235, 255)), _horizon(rng)
    d = ImageDraw.Draw(image)
    d.rectangle([0, y, CANVAS, y + 46], fill=jitter((30, 120, 200), rng))
    d.rectangle([0, y + 46, CANVAS, CANVAS], fill=jitter((240, 220, 160), rng))
    x = rng.choice([40, 215])
    d.ellipse([x - 24, 16, x + 24, 64], fill=(255, 240, 120))
    return image


def forest(rng: random.Random) -> Image.Image:
    image, y = _gradient((170, 215, 170), (120, 180, 120)), _horizon(rng)
    d = ImageDraw.Draw(image)
    d.rectangle([0, y + 30, CANVAS, CANVAS], fill=jitter((70, 120, 50), rng))
    for step in range(6):
        x, w = 22 + 42 * step + rng.uniform(-12, 12), rng.uniform(28, 40)
        foot, h = y + rng.uniform(20, 50), rng.uniform(120, 170)
        d.rectangle([x - 6, foot - 20, x + 6, foot], fill=(90, 60, 35))
        leaf = jitter((25, 95, 45), rng, 14)
        d.polygon([(x - w, foot - 18), (x + w, foot - 18), (x, foot - h)], fill=leaf)
    return image


def city(rng: random.Random) -> Image.Image:
    image, y = _gradient((165, 185, 215), (225, 225, 230)), _horizon(rng)
    d = ImageDraw.Draw(image)
    x = -rng.randint(0, 12)
    while x < CANVAS:
        w, top = rng.choice([44, 60]), rng.randint(24, 100)
        wall = jitter(rng.choice([(110, 115, 130), (145, 122, 115), (92, 110, 142)]), rng)
        d.rectangle([x, top, x + w, CANVAS], fill=wall)
        for wy in range(top + 12, y + 50, 28):
            for wx in range(x + 8, x + w - 12, 20):
                d.rectangle([wx, wy, wx + 11, wy + 15], fill=(243, 232, 150))
        x += w
    d.rectangle([0, y + 60, CANVAS, CANVAS], fill=(90, 90, 96))
    return image


def night(rng: random.Random) -> Image.Image:
    image, y = _gradient((12, 14, 50), (40, 40, 100)), _horizon(rng)
    d = ImageDraw.Draw(image)
    for _ in range(14):
        x, sy, q = rng.uniform(0, CANVAS), rng.uniform(0, y), rng.uniform(3, 5)
        d.ellipse([x - q, sy - q, x + q, sy + q], fill=(255, 255, 220))
    x = rng.choice([44, 212])
    d.ellipse([x - 26, 18, x + 26, 70], fill=(250, 245, 210))
    d.ellipse([x - 10, 14, x + 38, 62], fill=(18, 20, 58))
    d.rectangle([0, y + 40, CANVAS, CANVAS], fill=(20, 32, 42))
    return image


def snow(rng: random.Random) -> Image.Image:
    image, y = _gradient((175, 197, 222), (215, 228, 242)), _horizon(rng)
    d = ImageDraw.Draw(image)
    x = rng.uniform(60, 196)
    d.polygon([(x - 120, y + 30), (x + 120, y + 30), (x, 36)], fill=(140, 157, 186))
    d.polygon([(x - 40, 86), (x + 40, 86), (x, 36)], fill=(250, 250, 255))
    d.rectangle([0, y + 30, CANVAS, CANVAS], fill=(248, 250, 255))
    for _ in range(22):
        fx, fy, q = rng.uniform(0, CANVAS), rng.uniform(0, y + 20), rng.uniform(4, 7)
        d.ellipse([fx - q, fy - q, fx + q, fy + q], fill=(255, 255, 255))
    return image


def desert(rng: random.Random) -> Image.Image:
    image, y = _gradient((250, 190, 110), (255, 226, 160)), _horizon(rng)
    d = ImageDraw.Draw(image)
    dune = [(0, y + 20), (80, y - 16), (170, y + 24), (256, y - 6), (256, 256), (0, 256)]
    d.polygon(dune, fill=jitter((215, 150, 80), rng))
    for x in (rng.uniform(18, 60), rng.uniform(196, 238)):
        foot, green = y + 40, (50, 130, 70)
        d.rounded_rectangle([x - 9, foot - 76, x + 9, foot], 9, fill=green)
        d.rounded_rectangle([x - 30, foot - 56, x - 17, foot - 26], 6, fill=green)
        d.rectangle([x - 26, foot - 38, x, foot - 26], fill=green)
    return image


def room(rng: random.Random) -> Image.Image:
    wall = jitter((216, 180, 160), rng, 8)
    image, y = canvas(wall), _horizon(rng)
    d = ImageDraw.Draw(image)
    for x in range(0, CANVAS, 32):
        d.rectangle([x, 0, x + 15, CANVAS], fill=dark(wall, 0.94))
    d.rectangle([0, y + 50, CANVAS, CANVAS], fill=(140, 90, 60))
    x = rng.choice([14, 172])
    d.rectangle([x, 26, x + 70, 100], fill=(250, 250, 250))
    d.rectangle([x + 8, 34, x + 62, 92], fill=(140, 200, 245))
    d.line([x + 35, 26, x + 35, 100], fill=(250, 250, 250), width=8)
    return image


def arch(rng: random.Random) -> Image.Image:
    image, y = _gradient((150, 60, 150), (250, 150, 130)), _horizon(rng)
    d = ImageDraw.Draw(image)
    d.rectangle([0, y + 40, CANVAS, CANVAS], fill=(120, 50, 40))
    x = 128 + rng.uniform(-20, 20)
    d.rounded_rectangle([x - 105, 40, x + 105, y + 60], 84, fill=(180, 70, 45))
    d.rounded_rectangle([x - 62, 86, x + 62, y + 80], 58, fill=(250, 175, 140))
    d.rectangle([x - 62, y + 40, x + 62, y + 80], fill=(120, 50, 40))
    return image


def aurora(rng: random.Random) -> Image.Image:
    image, y = _gradient((8, 20, 40), (15, 60, 80)), _horizon(rng)
    a = np.asarray(image).astype(np.float32)
    xs, ys = np.arange(CANVAS, dtype=np.float32), np.arange(CANVAS, dtype=np.float32)[:, None]
    phase = rng.uniform(0, 6)
    for k, (color, top) in enumerate((((60, 255, 150), 60), ((170, 90, 255), 95))):
        wave = ys - (top + 22 * np.sin(xs / 30 + phase + 1.3 * k))
        glow = np.exp(-(np.minimum(wave, 0) ** 2) / 60 - np.maximum(wave, 0) / 26)
        a += glow[:, :, None] * np.array(color, dtype=np.float32) * 0.8
    a = np.clip(a, 0, 255)
    shore = y + 30
    a[shore:] = a[shore - (CANVAS - shore) : shore][::-1] * 0.6
    return Image.fromarray(a.astype(np.uint8))


def falls(rng: random.Random) -> Image.Image:
    image, y = _gradient((200, 225, 235), (170, 205, 215)), _horizon(rng)
    d = ImageDraw.Draw(image)
    x = 128 + rng.uniform(-40, 40)
    rock = jitter((95, 85, 105), rng, 6)
    d.rectangle([0, 44, CANVAS, y + 44], fill=rock)
    for k in range(6):
        left = 43 * k + rng.uniform(-8, 8)
        d.rectangle([left, 44 + 12 * (k % 3), left + 18, y + 44], fill=dark(rock, 0.82))
    d.rectangle([x - 44, 40, x + 44, y + 60], fill=(120, 215, 235))
    for k in range(-2, 3):
        d.rectangle([x + 17 * k - 4, 40, x + 17 * k + 4, y + 60], fill=(235, 252, 255))
    d.rectangle([0, y + 44, CANVAS, CANVAS], fill=(25, 125, 140))
    d.ellipse([x - 74, y + 30, x + 74, y + 72], fill=(240, 252, 255))
    return image


BACKGROUNDS: dict[str, Background] = {
    f.__name__: f
    for f in (beach, forest, city, night, snow, desert, room, plain, arch, aurora, falls)
}
