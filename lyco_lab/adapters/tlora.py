"""T-LoRA: singular vectors of the weight, trained, and fewer of them the noisier the input.

    W' = W + gamma * (P diag(m l) Q - P0 diag(m l0) Q0)              gamma = alpha / R
    m_i(t) = 1 where i < r(t), else 0
    r(t) = floor((T - t) / T * (R - r_min)) + r_min

P, l and Q start as R singular vectors and values P0, l0, Q0 of W, so orthogonal; the untrained
copies take the start away again. They are kept with the factors, as W alone would not give back
the signs of singular vectors. `start_from` says which are taken: the largest ("principal"), the
smallest ("last") or those around the middle. Each sample of a batch has the rank of its own
timestep. With `min_rank` left out the rank is whole at any timestep, which the paper calls
Ortho-LoRA, and a layer can be merged. The norm of W' - W, and what files hold, is at whole rank.

W' - W is of degree 3 in all six factors scaled alike. Scaling the trained three alone is another
start, at which W' is not W; that the untrained move with them is what the degree claims. As P0 is
subtracted from P before anything is multiplied, and so is diag(l0) Q0, two scalings of one product
agree bit for bit only where each untrained factor has the scale of its twin; else to rounding.

Shapes: P outputs, Q inputs (times the taps of a kernel, which is unrolled), R the rank.

Reference:
    T-LoRA: Single Image Diffusion Model Customization Without Overfitting
    (Soboleva et al., 2025), https://arxiv.org/abs/2507.05964, section 3
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Generator, Tensor

from lyco_lab.adapters.base import Layer, Ranked
from lyco_lab.adapters.lowrank import LowRank
from lyco_lab.adapters.shapes import Factors, Shape, Terms
from lyco_lab.errors import UserError
from lyco_lab.linalg import unrolled
from lyco_lab.settings import POSITIVE, SIZE, Within

STARTS = ("principal", "last", "middle")


@dataclass(frozen=True)
class TLoRA(Ranked):
    rank: Annotated[int, SIZE] = 8
    alpha: Annotated[float, POSITIVE] = 8.0  # the update is scaled by alpha / rank
    start_from: str = "principal"  # which singular vectors: principal, last or middle
    # At timestep T; None: the whole rank at any timestep
    min_rank: Annotated[int | None, SIZE] = None
    # T; 1 for models that are told t / 1000, as Flux is
    last_timestep: Annotated[float, Within(1e-6, 1e9)] = 1000.0

    file_algo: ClassVar = "tlora"
    file_names: ClassVar = {
        "p_PR": "p_layer.weight",
        "l_1R": "lambda_layer",
        "q_RQ": "q_layer.weight",
        "p0_PR": "base_p",
        "l0_1R": "base_lambda",
        "q0_RQ": "base_q",
    }
    scaling: ClassVar = ("l_1R", "l0_1R")
    components: ClassVar = {"l_1R": 1, "l0_1R": 1}
    untrained: ClassVar = frozenset({"p0_PR", "l0_1R", "q0_RQ"})
    twins: ClassVar = {"p0_PR": "p_PR", "l0_1R": "l_1R", "q0_RQ": "q_RQ"}
    reads_weight: ClassVar = True  # to start from

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start_from not in STARTS:
            self.refuse("start_from", self.start_from, f"one of {', '.join(STARTS)}")
        least = self.min_rank
        whole = isinstance(least, int) and not isinstance(least, bool)
        if least is not None and not (whole and least >= 1):
            self.refuse("min_rank", least, "null or a whole number >= 1")
        if not (math.isfinite(self.last_timestep) and self.last_timestep > 0):
            self.refuse("last_timestep", self.last_timestep, "a finite number > 0")

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        shape = tuple(weight.shape)
        R = self.rank_of(shape)
        u, s, vh = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        first = {"principal": 0, "last": len(s) - R, "middle": (len(s) - R) // 2}[self.start_from]
        taken = slice(first, first + R)
        start = {"p": u[:, taken], "l": s[None, taken], "q": vh[taken]}
        return {
            "p_PR": start["p"].clone(memory_format=torch.contiguous_format),
            "l_1R": start["l"].clone(),
            "q_RQ": start["q"].reshape(R, *shape[1:]).clone(),
            "p0_PR": start["p"].clone(memory_format=torch.contiguous_format),
            "l0_1R": start["l"].clone(),
            "q0_RQ": start["q"].reshape(R, *shape[1:]).clone(),
        }

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        b_PR, a_RQ = pair(factors)
        return (b_PR @ a_RQ.flatten(1)).view(shape)

    def change(self, layer: Layer, x: Tensor, factors: Factors) -> Tensor:
        gate = factors.get("gate")
        if not layer.multiplies:
            if gate is not None and len(gate) > 1:
                raise UserError(
                    "TLoRA needs the same timestep for the whole batch on an embedding and on a "
                    f"grouped convolution, got {len(gate)}: leave such layers out"
                )
            if gate is not None:
                factors = factors | {name: factors[name] * gate for name in self.scaling}
            return super().change(layer, x, factors)
        b_PR, a_RQ = pair(factors)
        h = layer.narrow(x, a_RQ)
        if gate is not None:
            if len(gate) not in (1, len(x)):
                raise UserError(
                    f"TLoRA got {len(gate)} timesteps and a batch of {len(x)} at one of its "
                    "layers: call the model with one timestep, or with one for each sample"
                )
            both = torch.cat([gate, gate], 1).to(h.dtype)
            h = layer.outputs(h, lambda rows: rows * _per_sample(both, rows))
        return layer.widen(h, self.gamma(layer.shape) * b_PR)

    def kernel(self, shape: Shape) -> "Pair":
        return Pair(shape, self.gamma(shape), 2 * self.rank_of(shape))

    def needs_timestep(self) -> bool:
        return self.min_rank is not None

    def gate(self, timesteps: Tensor, factors: Factors) -> Tensor:
        """1 for each of the first r(t) ranks, 0 for the others, in a row per timestep."""
        singular = factors["l_1R"]
        used = self.used(timesteps.to(singular.device, torch.float64), singular.shape[1])
        ranks = torch.arange(singular.shape[1], device=singular.device)
        return (ranks < used[:, None]).to(singular.dtype)

    def used(self, timesteps: Tensor, rank: int) -> Tensor:
        """r(t)."""
        assert self.min_rank is not None
        share = (self.last_timestep - timesteps) / self.last_timestep
        return (share.clamp(0, 1) * (rank - self.min_rank)).floor() + self.min_rank

    def terms(self, shape: Shape) -> Terms:
        return (("p_PR", "l_1R", "q_RQ"), ("p0_PR", "l0_1R", "q0_RQ"))

    def num_params(self, shape: Shape) -> int:
        R = self.sized(shape)
        if self.min_rank is not None and self.min_rank > R:
            self.refuse("min_rank", self.min_rank, f"at most the rank, which is {R} here")
        return R * (1 + sum(unrolled(shape)))

    def max_rank(self, shape: Shape) -> int:
        return min(2 * self.rank_of(shape), *unrolled(shape))


def _per_sample(gate: Tensor, rows: Tensor) -> Tensor:
    """The gate's rows against (sample, ..., component)."""
    if len(gate) == 1:
        return gate[0]
    return gate.view(len(gate), *[1] * (rows.dim() - 2), -1)


def pair(factors: Factors) -> tuple[Tensor, Tensor]:
    """T as B A without the difference of two large products, which would lose a small change:

    P diag(l) Q - P0 diag(l0) Q0  =  (P - P0) diag(l) Q  +  P0 (diag(l) Q - diag(l0) Q0)
    """
    trained = _rows(factors["l_1R"], factors["q_RQ"])
    untrained = _rows(factors["l0_1R"], factors["q0_RQ"])
    moved_PR = factors["p_PR"] - factors["p0_PR"]
    b_PR = torch.cat([moved_PR, factors["p0_PR"]], 1)
    return b_PR, torch.cat([trained, trained - untrained])


def _rows(l_1R: Tensor, q_RQ: Tensor) -> Tensor:
    """diag(l) Q."""
    return l_1R.view(-1, *[1] * (q_RQ.dim() - 1)) * q_RQ


@dataclass(frozen=True)
class Pair(LowRank):
    def pair(self, factors: Factors) -> tuple[Tensor, Tensor]:
        return pair(factors)

    def pair_grads(self, factors: Factors, gb_PR: Tensor, ga_RQ: Tensor) -> Factors:
        R = factors["l_1R"].shape[1]
        grad = ga_RQ[:R] + ga_RQ[R:]  # of diag(l) Q
        return {
            "p_PR": gb_PR[:, :R],
            "l_1R": (grad * factors["q_RQ"]).flatten(1).sum(1)[None],
            "q_RQ": _rows(factors["l_1R"], grad),
        }
