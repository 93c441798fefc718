"""The gamma theorem as code: what must move, and how far, when gamma is folded away.

An additive adapter trains W' = W + gamma * T(A), where T is homogeneous of degree m in its
factors: T(a * A) = a**m * T(A). Write s = gamma ** (1 / m). A run with gamma and a run without it
have the same W' at every step, hence the same losses and images, when in the second run

    the factors start at  s * A
    lr                ->  lr * s**c            c = 2 for SGD, c = 1 for Adam and AdamW
    every other setting   moves by its own power of s, listed in `POWERS`

What is not listed (momentum, betas, schedule, warm-up, batch) stays. The powers are derived from
the update rules in theory/sgd.py, theory/adam.py and theory/gradient_clipping.py, which compare
their solutions with the table below; the degree m belongs to the layer, not to the adapter's name
(LoKr has 2 where its right block is a full matrix and 3 where it is factored).

When s is a power of two, scaling by it is exact in binary floating point, and the two runs agree
bit for bit. Clipping by global norm is the exception to keep in mind: it needs every clipped
factor to share one s, and torch adds 1e-6 to the norm, which does not scale.

References:
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), Theorem 1, https://arxiv.org/abs/2309.14859
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from lyco_lab.errors import UserError, nearest

# The power of s by which each setting moves. Weight decay is coupled (added to the gradient) in
# SGD and Adam, decoupled (applied to the factors) in AdamW.
POWERS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "sgd": MappingProxyType({"lr": 2, "weight_decay": -2, "grad_clip": -1}),
        "adam": MappingProxyType({"lr": 1, "eps": -1, "weight_decay": -2, "grad_clip": -1}),
        "adamw": MappingProxyType({"lr": 1, "eps": -1, "weight_decay": -1, "grad_clip": -1}),
    }
)


@dataclass(frozen=True)
class Rewrite:
    """The settings of the run without gamma. None: the run does not use that setting."""

    init_scale: float  # multiplies the factors an adapter's `init` returns
    lr: float
    eps: float | None = None
    weight_decay: float | None = None
    grad_clip: float | None = None


def exponent(optimizer: str) -> int:
    """The c of lr -> lr * s**c."""
    return _powers(optimizer)["lr"]


def scale(gamma: float, degree: int) -> float:
    """s = gamma ** (1 / degree), exact whenever s is a power of two."""
    if not (math.isfinite(gamma) and gamma > 0):
        raise UserError(f"gamma must be finite and positive to be folded away, got {gamma}")
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise UserError(f"the degree of homogeneity must be an integer >= 1, got {degree}")
    mantissa, exponent_plus_1 = math.frexp(gamma)
    if mantissa == 0.5 and (exponent_plus_1 - 1) % degree == 0:
        # 1 / degree is rounded, so the power below may miss by one unit in the last place, and
        # with it the bitwise equality of the two runs.
        return math.ldexp(1.0, (exponent_plus_1 - 1) // degree)
    return float(gamma ** (1.0 / degree))


def is_power_of_two(s: float) -> bool:
    """Whether multiplying by `s` is exact in binary floating point."""
    return s > 0 and math.isfinite(s) and math.frexp(s)[0] == 0.5


def rewrite(
    gamma: float, degree: int, optimizer: str, hyper: Mapping[str, float | None]
) -> Rewrite:
    """The settings under which gamma = 1 trains as `hyper` does under `gamma`.

    `hyper` holds `lr` and any of `init_scale` (default 1), `eps`, `weight_decay`, `grad_clip`.
    It speaks of layers of one degree; a model that mixes degrees needs one rewrite for each.
    """
    known = [field.name for field in fields(Rewrite)]
    for name in hyper:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"gamma moves {', '.join(known)}, not '{name}'{hint}")
    lr = hyper.get("lr")
    if lr is None:
        raise UserError(f"a rewrite needs the run's lr, got only {sorted(hyper)}")
    init_scale = hyper.get("init_scale", 1.0)
    if init_scale is None:
        raise UserError("init_scale must be a number, got None")

    s = scale(gamma, degree)
    powers = _powers(optimizer)

    def moved(name: str) -> float | None:
        value = hyper.get(name)
        return None if value is None else value * s ** powers.get(name, 0)

    return Rewrite(
        init_scale=init_scale * s,
        lr=lr * s ** powers["lr"],
        eps=moved("eps"),
        weight_decay=moved("weight_decay"),
        grad_clip=moved("grad_clip"),
    )


def _powers(optimizer: str) -> Mapping[str, int]:
    if optimizer not in POWERS:
        hint = nearest(optimizer, list(POWERS))
        raise UserError(
            f"the gamma theorem is worked out for {', '.join(POWERS)}, not '{optimizer}'{hint}"
        )
    return POWERS[optimizer]
