"""Which runs are compared: a run with gamma = 1, another with another gamma, and the claim.

The runs are short, but nothing in them is idle: learning rates at which W' moves visibly and
stably, decay, gradients that are clipped, a warm-up, an eps that shows.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from lyco_lab import adapters, optimizers
from lyco_lab.config import Run
from lyco_lab.config.checks import choose
from lyco_lab.config.compose import Layer, build, check_keys, nest, parse_overrides
from lyco_lab.config.groups import PLAIN, Group
from lyco_lab.config.run import PRECISIONS
from lyco_lab.config.values import number as decimal
from lyco_lab.errors import UserError, nearest
from lyco_lab.gamma import (
    CARRIERS,
    Equivalence,
    equivalent,
    is_power_of_two,
    layers,
    obstacle,
    out_of_range,
    rewrite,
    scales_to,
)

COMMAND_LINE = "the command line"
STEPS = 50
RANK = 4
CONCEPT = "kael"

PRESET = "attn-only"  # of layers, for adapters that need no convolution

# What --all asks for, on 2 cores within 10 minutes: Tucker form stands for convolutions, as it has
# layers of degree 2 and of degree 3.
ADAPTERS = ("lora", "tucker", "loha", "lokr", "lokr-factored", "native", "ia3", "glora", "dora")
OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor", "radam", "schedulefree")

# Words for an adapter that are not the name of its kind, and kinds that need more than a rank to
# show what they are: the adapter, and the preset of layers it is for.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "locon": ({"kind": "lora", "rank": RANK}, "full"),
    "tucker": ({"kind": "lora", "rank": RANK, "tucker": True}, "full"),
    "lokr-factored": ({"kind": "lokr", "rank": 2}, PRESET),
    "dora": ({"kind": "dora", "of": {"kind": "lora", "rank": RANK}}, PRESET),
    "dylora": ({"kind": "dylora", "rank": RANK, "block_size": 2}, PRESET),
    "tlora": ({"kind": "tlora", "rank": RANK, "min_rank": 2}, PRESET),
}

# Settings at which an optimizer moves W' visibly and stays stable: a learning rate, and what is not
# as usual. Any other begins at LR, and has the EPS and the DECAY that it has fields for; a decay
# that is added to the gradient, which is small, is smaller than one that is taken off the factors.
# Which those are is said here, and not taken from the powers that are to be verified.
LR, EPS = 3e-3, 1e-7
DECAY, DECAY_IN_GRADIENT = 0.05, 1e-5
IN_GRADIENT = {
    "adadelta", "adagrad", "adam", "adamax", "asgd", "nadam", "radam", "rmsprop", "sgd",
}  # fmt: skip
RECIPES: dict[str, tuple[float, dict[str, Any]]] = {
    "sgd": (30.0, {"momentum": 0.9}),
    "asgd": (300.0, {}),
    "lion": (5e-4, {}),
    "prodigy": (1.0, {"d0": 1e-4}),
    "adagrad": (1e-2, {}),
    "muon": (LR, {"eps": 1e-4}),  # beside the norm of a whole gradient
    "adafactor": (0.1, {"eps2": 0.03}),
    "adadelta": (10.0, {}),
    "rprop": (1e-4, {}),
}


@dataclass(frozen=True)
class Case:
    """Two runs, and whether the theorem makes them one."""

    adapter: str  # as asked for
    optimizer: str
    gamma: float
    carry: str
    keep: str | None  # the setting that A has from R, unmoved
    base: Run  # R
    other: Run  # A
    strength: float  # of A's adapter: gamma, where the adapter has none of its own
    scales: tuple[float, ...]  # the s that occur
    claim: Equivalence | None  # None: no claim
    no_claim: str  # why

    @property
    def name(self) -> str:
        words = [self.adapter, self.optimizer, self.base.model.precision]
        words.append(f"gamma={as_power(self.gamma)}")
        if self.carry != "all":
            words.append(f"carry={self.carry}")
        return " ".join([*words, f"keep={self.keep}"] if self.keep else words)

    @property
    def in_bits(self) -> bool:
        """Whether a difference in one bit is one: nothing is rounded differently."""
        exact = self.base.optimizer_value().exact
        return exact and all(map(is_power_of_two, self.scales))

    @property
    def predicted(self) -> bool:
        """Whether a difference is predicted, as a setting that should move was kept."""
        return bool(self.keep) and self.claim is not None and not self.claim.equal

    @property
    def denied(self) -> str:
        """Why the comparison of settings does not confirm what the rewriting claims; "" if it does.

        Both are parts of the theorem's code. Where they disagree, one of them is wrong, whatever
        the training shows.
        """
        if self.claim is None or self.keep:
            return ""
        if not self.claim.equal:
            return f"gamma.rewrite claims that A is R, gamma.equivalent that {self.claim.reason}"
        if self.in_bits and not self.claim.bitwise:
            return (
                "gamma.rewrite scales by powers of two alone, gamma.equivalent says that A and R "
                f"are {self.claim.reason}"
            )
        return ""


def cases(
    adapters_: Sequence[str],
    optimizers_: Sequence[str],
    gammas: Sequence[float],
    precisions: Sequence[str],
    *,
    carry: str = "all",
    keep: str | None = None,
    settings: Sequence[str] = (),
) -> list[Case]:
    """Every combination. `settings` are key=value of both runs."""
    choose("--carry", carry, CARRIERS)
    for precision in precisions:
        choose("--dtype", precision, PRECISIONS)
    given = parse_overrides(settings)
    _check_settings(given)
    return [
        case
        for adapter, optimizer, precision in itertools.product(adapters_, optimizers_, precisions)
        for case in _of_base(base(adapter, optimizer, precision, given), adapter, optimizer,
                             gammas, carry, keep)
    ]  # fmt: skip


def _of_base(
    run: Run, adapter: str, optimizer: str, gammas: Sequence[float], carry: str, keep: str | None
) -> Iterator[Case]:
    for number in gammas:
        strength, why = 1.0, _obstacle(run, number, carry)
        scales: tuple[float, ...] = ()
        if not why:
            other = rewrite(run, number, carry=carry)
            scales = tuple(sorted(set(scales_to(run, number, carry=carry).values())))
            other = kept(run, other, keep) if keep else other
            why = out_of_range(other)  # it is moved and trained all the same
        elif keep:
            raise UserError(f"--keep is {keep!r}, but no setting moves: {why}")
        elif _has_gamma(run):
            other = with_gamma(run, number)
        else:
            other, strength = run, number
        other = replace(other, name="A")
        claim = None if why else equivalent(other, run)
        yield Case(
            adapter, optimizer, number, carry, keep, run, other, strength, scales, claim, why
        )


def _obstacle(run: Run, number: float, carry: str) -> str:
    """Why the theorem says nothing of this run; "" where it does."""
    if why := obstacle(run):
        return why
    try:
        rewrite(run, number, carry=carry)
    except UserError as error:
        return str(error)
    return ""


def _has_gamma(run: Run) -> bool:
    return all(layer.terms for layer in layers(run))


def with_gamma(run: Run, number: float) -> Run:
    """The run with another gamma and no other change."""
    return replace(run, adapter=adapters.describe(run.adapter_value().with_gamma(number)))


def base(adapter: str, optimizer: str, precision: str, given: dict[str, Any]) -> Run:
    """R: a short run with gamma = 1 on every layer."""
    described, preset = adapter_of(adapter)
    moved_by, lr = optimizer_of(optimizer)
    steps = given.get("train.steps", STEPS)
    whole = isinstance(steps, int) and steps > 0
    defaults = {
        "model": {"precision": precision, "preset": preset},
        "adapter": described,
        "optimizer": moved_by,
        "train": {
            "steps": STEPS,
            "batch_size": 1,
            "lr": lr,
            "warmup_steps": min(5, steps - 1) if whole else 5,
            "grad_clip": 0.01,
        },
    }
    if not any(key.startswith("data") for key in given):
        defaults["data"] = {"concept": CONCEPT}
    recipe = Layer("the recipe of lyco-lab verify", defaults)
    run = build("R", "verify", [recipe, Layer(COMMAND_LINE, given)])
    return with_gamma(run, 1.0) if _has_gamma(run) else run


def adapter_of(word: str) -> tuple[dict[str, Any], str]:
    """The adapter of a word, small enough to be quick, and the preset of layers it is for."""
    if word in VARIANTS:
        return VARIANTS[word]
    known = sorted({*adapters.ADAPTERS, *VARIANTS})
    if word not in adapters.ADAPTERS:
        hint = nearest(word, known)
        raise UserError(f"--adapter is {word!r}, needs one of {', '.join(known)}{hint}")
    rank = {field.name: field.default for field in fields(adapters.ADAPTERS[word])}.get("rank")
    small = isinstance(rank, int) and rank <= 64  # a larger one says: no rank
    return {"kind": word, **({"rank": RANK} if small else {})}, PRESET


def optimizer_of(word: str) -> tuple[dict[str, Any], float]:
    """The optimizer of a word, and its learning rate."""
    known = optimizers.OPTIMIZERS
    if word not in known:
        hint = nearest(word, known)
        raise UserError(f"--optimizer is {word!r}, needs one of {', '.join(sorted(known))}{hint}")
    lr, own = RECIPES.get(word, (LR, {}))
    names = {field.name for field in fields(known[word])}
    common = {"eps": EPS, "weight_decay": DECAY_IN_GRADIENT if word in IN_GRADIENT else DECAY}
    common = {key: value for key, value in common.items() if key in names}
    return {"kind": word, **common, **own}, lr


def kept(run: Run, moved: Run, setting: str) -> Run:
    """`moved`, but for one setting that it has from `run`."""
    rule = run.optimizer_value()
    movable = list(dict.fromkeys(("lr", "init_scale", "grad_clip", *rule.powers)))
    if setting not in movable:
        kind = run.optimizer["kind"]
        raise UserError(
            f"--keep is {setting!r}, which does not move with gamma: for {kind!r} that can be "
            f"{', '.join(movable)}{nearest(setting, movable)}"
        )
    if run.train.groups:
        raise UserError("--keep needs a run without train.groups, whose settings move as well")
    of_rule = setting in run.optimizer
    groups = tuple(_without(group, setting, of_rule) for group in moved.train.groups)
    groups = tuple(g for g in groups if replace(g, layers=("*",), factors=("*",)) != PLAIN)
    moved = replace(moved, train=replace(moved.train, groups=groups))
    if of_rule:
        return replace(moved, optimizer={**moved.optimizer, setting: run.optimizer[setting]})
    names = ("lr", "text_encoder_lr") if setting == "lr" else (setting,)
    train = {name: getattr(run.train, name) for name in names}
    return replace(moved, train=replace(moved.train, **train))


def _without(group: Group, setting: str, of_rule: bool) -> Group:
    """The group with no multiple of its own for the setting."""
    if of_rule:
        own = {key: value for key, value in group.optimizer.items() if key != setting}
        return replace(group, optimizer=own)
    plain: dict[str, Any] = {"clip" if setting == "grad_clip" else setting: 1.0}
    return replace(group, **plain)


def _check_settings(given: dict[str, Any]) -> None:
    check_keys(nest(given, COMMAND_LINE), COMMAND_LINE)
    flags = {"adapter.kind": "--adapter", "optimizer.kind": "--optimizer",
             "model.precision": "--dtype"}  # fmt: skip
    for key in given:
        first, _, last = key.rpartition(".")
        if key in flags:
            raise UserError(f"{key} is what {flags[key]} says: leave one of them out")
        if key in ("trainer.devices", "trainer.strategy"):
            raise UserError(f"{key} is of no use here: what is compared is trained on one device")
        if key in ("trainer.callbacks", "trainer.loggers"):
            raise UserError(f"{key} is of no use here: what is compared trains by itself")
        if first == "embedding":
            raise UserError(f"{key} is of no use here: adapters alone are compared")
        if first.startswith("adapter") and last.endswith("alpha"):
            raise UserError(f"{key} is what --gamma says, and 1 in the run it is compared with")


def parse_gamma(text: str) -> float:
    """ "2^-12" or "0.03"."""
    parts = [decimal(part) for part in text.strip().replace("**", "^").split("^")]
    value: Any = math.nan
    if None not in parts and len(parts) <= 2:
        try:
            value = functools.reduce(operator.pow, (float(part or 0) for part in parts))
        except (OverflowError, ZeroDivisionError):
            value = math.inf
    if not (isinstance(value, float) and math.isfinite(value) and value > 0):
        raise UserError(f"--gamma is {text!r}, needs a finite number > 0, as 0.03 or 2^-6")
    return value


def as_power(number: float) -> str:
    """0.25 -> "2^-2"; 0.03 -> "0.03"."""
    if is_power_of_two(number):
        return f"2^{math.frexp(number)[1] - 1}"
    return f"{number:.6g}"
