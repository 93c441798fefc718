"""Views on small made-up images, for the tests of metrics."""

import numpy as np

from lyco_lab.evaluate.base import Encoded, Images, View
from tests.evaluate.fakes import FakeJudges, noise_images

JUDGES = FakeJudges()


def view_of(
    images: Images,
    real: Images | None = None,
    base: Images | None = None,
    kind: str = "alter",
    prompts: list[str] | None = None,
    texts: list[str] | None = None,
    attributes: list[dict[str, str]] | None = None,
    concepts: list[str] | None = None,
) -> View:
    n = len(images)
    encoded = Encoded(images, JUDGES)
    prompts = prompts or [f"prompt {i // 2}" for i in range(n)]
    return View(
        kind=kind,
        images=encoded,
        real=encoded if real is None else Encoded(real, JUDGES),
        base=None if base is None else Encoded(base, JUDGES),
        texts=texts or prompts,
        prompts=prompts,
        attributes=attributes or [{"hue": "red", "light": "bright"} for _ in range(n)],
        concepts=concepts or ["vokael"] * n,
    )


def random_view(n: int, m: int, seed: int, kind: str) -> View:
    """A view with everything a metric may ask for, some of it inapplicable."""
    rng = np.random.default_rng(seed)
    wishes: list[dict[str, str]] = [{}, {"hue": "green"}, {"hue": "red", "light": "dark"}]
    return view_of(
        noise_images(n, seed),
        real=noise_images(m, seed + 1),
        base=noise_images(n, seed + 2),
        kind=kind,
        prompts=[f"prompt {i}" for i in rng.integers(0, 3, n)],
        attributes=[wishes[i] for i in rng.integers(0, 3, n)],
        concepts=[("", "vokael")[i] for i in rng.integers(0, 2, n)],
    )
