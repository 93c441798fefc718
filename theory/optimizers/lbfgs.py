"""Theorem. L-BFGS with a fixed rate is, once it remembers a pair, equivariant under
(theta, g) -> (s theta, g / s) with lr kept, and with no other power of s. Its first step is not,
with any one power; nor are its stopping rules, as long as their tolerance_change is not zero.

Proof. It remembers pairs of a change y of the gradient and the change x of the factors that made
it, which scale by 1 / s and by s. Their products <x, y> stay, and x / <x, y> <y, .> and
<x, y> / <y, y> are of the degrees that take a gradient, 1 / s, to a direction d, which scales by s:
it is a Newton step. So lr stays. Which pairs are kept depends on <x, y>, that is, not on s; where
none was kept yet, the loss having curved downwards so far, a step along -g needs lr s**2.

The first step has no pairs. It is along -g, at the rate lr min(1, 1 / |g|_1), whose degree in g is
1 where |g|_1 < 1 and 0 where it is larger: lr would have to move by s**2 or by s. (With |g|_1
known, a rate of its own for this step makes the two runs equal.) It stops where |g| is below
tolerance_grad, which can move by 1 / s; and where the change of a factor, of degree 1, or that of
the loss, of degree 0, is below one tolerance_change, which cannot move as both do.               []

`step` is what torch.optim.LBFGS does in one iteration, with a history of two pairs. Its line search
looks at losses and slopes along d at multiples of d, which stay, but for a bound on the interval's
length, which does not move. It is not among the optimisers of lyco_lab, as its gradients must come
from one batch.
"""

from collections.abc import Iterator
from functools import partial

import sympy as sp

from theory import Check, Counterexample
from theory._equivariance import Rule, Values, column, proved, solve, symbols

HYPER = symbols("lr", positive=True)
FIRST = {name: column(name, 2) for name in ("theta", "grad")}
SECOND = FIRST | {name: column(name, 2) for name in ("previous", "move")}
LATER = SECOND | {name: column(name, 2) for name in ("x", "y")}
WEIGHTS = {"theta": 1, "grad": -1, "previous": -1, "move": 1, "x": 1, "y": -1}


def dot(a: sp.Matrix, b: sp.Matrix) -> sp.Expr:
    return (a.T * b)[0]


def newton(grad: sp.Matrix, pairs: list[tuple[sp.Matrix, sp.Matrix]]) -> sp.Matrix:
    """Minus the gradient, times the inverse Hessian that the pairs (x, y) suggest."""
    direction = -grad
    shares = []
    for x, y in reversed(pairs):
        shares.append(dot(x, direction) / dot(x, y))
        direction -= shares[-1] * y
    x, y = pairs[-1]
    direction *= dot(x, y) / dot(y, y)
    for (x, y), share in zip(pairs, reversed(shares), strict=True):
        direction += (share - dot(y, direction) / dot(x, y)) * x
    return direction


def step(state: Values, hyper: Values, small: bool | None = None) -> dict[str, sp.Matrix]:
    """`small`: whether |g|_1 < 1, at the first step; None, for numbers, looks."""
    theta, grad, lr = state["theta"], state["grad"], hyper["lr"]
    if "previous" not in state:
        size = sum(map(sp.Abs, grad))
        small = size < 1 if small is None else small
        move = -lr * grad if small else -lr / size * grad
        return {"theta": theta + move, "previous": grad, "move": move}
    new = (state["move"], grad - state["previous"])
    pairs = [(state["x"], state["y"]), new] if "x" in state else [new]
    move = lr * newton(grad, pairs)
    kept = {"x": new[0], "y": new[1]}
    return {"theta": theta + move, "previous": grad, "move": move, **kept}


NONE = {"previous": None, "move": None, "x": None, "y": None}
RULES = (
    (
        Rule("L-BFGS, second step", step, SECOND, WEIGHTS, HYPER, {}, NONE),
        Rule("L-BFGS, later step", step, LATER, WEIGHTS, HYPER, {}, NONE),
    ),
)
SMALL, LARGE = (
    Rule("L-BFGS, first step", partial(step, small=small), FIRST, WEIGHTS, HYPER, {"lr": power})
    for small, power in ((True, 2), (False, 1))
)


def room(state: Values, hyper: Values) -> dict[str, sp.Expr]:
    """What its stopping rules look at, less their tolerances (of one entry)."""
    return {
        "room for grad": sp.Abs(state["grad"]) - hyper["tolerance_grad"],
        "room for move": sp.Abs(state["move"]) - hyper["tolerance_change of factors"],
        "room for loss": sp.Abs(state["loss"]) - hyper["tolerance_change of the loss"],
    }


TOLERANCES = ("tolerance_grad", "tolerance_change of factors", "tolerance_change of the loss")
SIZES = {"grad": -1, "move": 1, "loss": 0}
STOPPING = Rule(
    "L-BFGS's stopping rules",
    room,
    symbols(" ".join(SIZES), real=True),
    {name: w for x, w in SIZES.items() for name in (x, f"room for {x}")},
    {name: sp.Symbol(name, positive=True) for name in TOLERANCES},
    {"tolerance_grad": -1, "tolerance_change of factors": 1},
)


def identities() -> Iterator[Check]:
    for rules in RULES:
        yield from proved(*rules)
    for rule, size in ((SMALL, "|g|_1 < 1"), (LARGE, "|g|_1 > 1")):
        for identity in proved(rule):
            yield type(identity)(f"{identity.claim}, {size}", identity.difference)
    claim = "L-BFGS: no power of lr is that of both first steps"
    yield Counterexample(claim, sp.Integer(solve(SMALL)["lr"] - solve(LARGE)["lr"]))
    yield from proved(STOPPING)
    powers = solve(STOPPING)
    claim = "L-BFGS: no power of one tolerance_change is that of both"
    yield Counterexample(claim, sp.Integer(powers[TOLERANCES[1]] - powers[TOLERANCES[2]]))
