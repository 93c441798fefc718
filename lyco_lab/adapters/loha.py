"""LoHa: the update is the elementwise product of two low-rank matrices.

    W' = W + gamma * (B1 @ A1) * (B2 @ A2)          gamma = alpha / R, or alpha / sqrt(R)

The update has rank up to R**2, where LoRA with the same R has rank R and half the parameters.
A convolution is unrolled, or with `tucker` each half is a small core M of R x R channels that has
the kernel, between maps of a single tap:

    (B A)[p, q, k]  =  sum_rs B[r, p] M[r, s, k] A[s, q]

The elementwise product is itself a low-rank product, of rank R**2: row p of B holds the products
B1[p, r] B2[p, s], row (r, s) of A the products A1[r, q] A2[s, q]. That is how tokens pass through
the update without its being formed.

Shapes: P outputs, Q inputs (times the taps of a kernel, without a core), R the rank of each half,
k the kernel.

References:
    FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning
    (Hyeon-Woo et al., 2022), https://arxiv.org/abs/2108.06098
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), https://arxiv.org/abs/2309.14859
    A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski, 2023),
    https://arxiv.org/abs/2312.03732
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Generator, Tensor

from lyco_lab.adapters.base import Layer, Ranked
from lyco_lab.adapters.lowrank import LowRank
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.linalg import through_core, through_core_grads, unrolled
from lyco_lab.settings import POSITIVE, SIZE


@dataclass(frozen=True)
class LoHa(Ranked):
    rank: Annotated[int, SIZE] = 4
    alpha: Annotated[float, POSITIVE] = 2.0  # the update is scaled by alpha / rank
    tucker: bool = False  # convolutions of more than one tap: both halves in Tucker form
    rank_stabilised: bool = False  # scale by alpha / sqrt(rank) instead

    file_algo: ClassVar = "loha"
    # The layout transposes B where there is a core.
    file_names: ClassVar = {
        "b1_PR": "hada_w1_a",
        "b1_RP": "hada_w1_a",
        "a1_RQ": "hada_w1_b",
        "m1_RRk": "hada_t1",
        "b2_PR": "hada_w2_a",
        "b2_RP": "hada_w2_a",
        "a2_RQ": "hada_w2_b",
        "m2_RRk": "hada_t2",
    }

    scaling: ClassVar = ("b2_PR", "b2_RP")
    zero: ClassVar = ("b2_PR", "b2_RP")
    components: ClassVar = {"b2_PR": 1, "b2_RP": 0}

    def has_core(self, shape: Shape) -> bool:
        return self.tucker and math.prod(shape[2:]) > 1

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        shape = tuple(weight.shape)
        P, Q = unrolled(shape)
        R = self.rank_of(shape)

        def normal(*shape: int, std: float) -> Tensor:
            return weight.new_empty(shape).normal_(std=std, generator=rng)

        # One zero factor makes the update vanish. Zeroing a second one would also zero every
        # gradient, and training could never leave this point.
        if not self.has_core(shape):
            return {
                "b1_PR": normal(P, R, std=0.1),
                "a1_RQ": normal(R, Q, std=1.0),
                "b2_PR": weight.new_zeros(P, R),
                "a2_RQ": normal(R, Q, std=1.0),
            }
        return {
            "b1_RP": normal(R, P, std=0.1),
            "a1_RQ": normal(R, shape[1], std=1.0),
            "m1_RRk": normal(R, R, *shape[2:], std=0.1),
            "b2_RP": weight.new_zeros(R, P),
            "a2_RQ": normal(R, shape[1], std=1.0),
            "m2_RRk": normal(R, R, *shape[2:], std=0.1),
        }

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        (b1_PR, a1_RQ), (b2_PR, a2_RQ) = halves(factors)
        return ((b1_PR @ a1_RQ.flatten(1)) * (b2_PR @ a2_RQ.flatten(1))).view(shape)

    def change(self, layer: Layer, x: Tensor, factors: Factors) -> Tensor:
        shape = layer.shape
        P, Q = unrolled(shape)
        # As a pair while that is well below the weight's size.
        if not layer.multiplies or 2 * self.rank_of(shape) ** 2 * (P + Q) > P * Q:
            return super().change(layer, x, factors)
        b_PR, a_RQ = khatri_rao(*halves(factors))
        # With a kernel of several taps but no core, A is unrolled.
        h = layer.narrow(x, a_RQ.view(-1, *shape[1:]))
        return layer.widen(h, self.gamma(shape) * b_PR)

    def kernel(self, shape: Shape) -> "Hadamard":
        R = self.rank_of(shape)
        return Hadamard(shape, self.gamma(shape), R * R, R)

    def num_params(self, shape: Shape) -> int:
        R = self.sized(shape)
        if self.has_core(shape):
            return 2 * R * (shape[0] + shape[1] + R * math.prod(shape[2:]))
        return 2 * R * sum(unrolled(shape))

    def max_rank(self, shape: Shape) -> int:
        return min(self.rank_of(shape) ** 2, *unrolled(shape))


Half = tuple[Tensor, Tensor]


def halves(factors: Factors) -> tuple[Half, Half]:
    """B of P x R and A of R x (inputs and kernel), of each half."""
    if "m1_RRk" not in factors:
        return (factors["b1_PR"], factors["a1_RQ"]), (factors["b2_PR"], factors["a2_RQ"])
    return (
        (factors["b1_RP"].t(), through_core(factors["m1_RRk"], factors["a1_RQ"])),
        (factors["b2_RP"].t(), through_core(factors["m2_RRk"], factors["a2_RQ"])),
    )


def khatri_rao(first: Half, second: Half) -> Half:
    """The pair of rank R**2 whose product is the elementwise product of the two halves'."""
    (b1_PR, a1_RQ), (b2_PR, a2_RQ) = first, second
    b_PRR = b1_PR[:, :, None] * b2_PR[:, None, :]
    return b_PRR.flatten(1), (a1_RQ[:, None] * a2_RQ).flatten(0, 1)


# Entries that are worked on at a time: what a core's own cache holds.
BLOCK = 1 << 17


@dataclass(frozen=True)
class Hadamard(LowRank):
    half_rank: int  # `rank` is its square

    def form_work(self) -> float:
        return 2 * self.half_rank

    def dense_work(self) -> float:
        return 6 * self.half_rank

    def pair(self, factors: Factors) -> tuple[Tensor, Tensor]:
        b_PR, a_RQ = khatri_rao(*halves(factors))
        return b_PR, a_RQ.view(-1, *self.shape[1:])

    def pair_grads(self, factors: Factors, gb_PR: Tensor, ga_RQ: Tensor) -> Factors:
        (b1_PR, a1_RQ), (b2_PR, a2_RQ) = halves(factors)
        R = self.half_rank
        gb_PRR, ga_RRQ = gb_PR.reshape(-1, R, R), ga_RQ.reshape(R, R, -1)
        a1_RQ, a2_RQ = a1_RQ.flatten(1), a2_RQ.flatten(1)
        return self._factor_grads(
            factors,
            (gb_PRR * b2_PR[:, None, :]).sum(2),
            (ga_RRQ * a2_RQ).sum(1),
            (gb_PRR * b1_PR[:, :, None]).sum(1),
            (ga_RRQ * a1_RQ[:, None]).sum(0),
        )

    def _factor_grads(
        self, factors: Factors, gb1_PR: Tensor, ga1_RQ: Tensor, gb2_PR: Tensor, ga2_RQ: Tensor
    ) -> Factors:
        if "m1_RRk" not in factors:
            return {"b1_PR": gb1_PR, "a1_RQ": ga1_RQ, "b2_PR": gb2_PR, "a2_RQ": ga2_RQ}
        grads = {"b1_RP": gb1_PR.t(), "b2_RP": gb2_PR.t()}
        for half, ga_RQ in (("1", ga1_RQ), ("2", ga2_RQ)):
            m, a = f"m{half}_RRk", f"a{half}_RQ"
            ga_RQ = ga_RQ.view(self.half_rank, *self.shape[1:])
            grads[m], grads[a] = through_core_grads(factors[m], factors[a], ga_RQ)
        return grads

    def form(self, weight: Tensor, factors: Factors, out: Tensor | None = None) -> Tensor:
        (b1_PR, a1_RQ), (b2_PR, a2_RQ) = halves(factors)
        a1_RQ, a2_RQ = a1_RQ.flatten(1), a2_RQ.flatten(1)
        w_PQ = weight.flatten(1)
        formed = torch.empty_like(w_PQ) if out is None else out.flatten(1)
        for rows in blocks(w_PQ):
            t_PQ = (b1_PR[rows] @ a1_RQ).mul_(b2_PR[rows] @ a2_RQ)
            torch.add(w_PQ[rows], t_PQ, alpha=self.gamma, out=formed[rows])
        return formed.view(weight.shape)

    def dense_grads(self, gw: Tensor, factors: Factors) -> Factors:
        (b1_PR, a1_RQ), (b2_PR, a2_RQ) = halves(factors)
        a1_RQ, a2_RQ = a1_RQ.flatten(1), a2_RQ.flatten(1)
        gw_PQ = gw.flatten(1)
        gb1_PR, gb2_PR = (torch.empty_like(b1_PR) for _ in range(2))
        ga1_RQ, ga2_RQ = torch.zeros_like(a1_RQ), torch.zeros_like(a2_RQ)
        for rows in blocks(gw_PQ):
            b1, b2, g_PQ = b1_PR[rows], b2_PR[rows], gw_PQ[rows]
            g1_PQ, g2_PQ = (b2 @ a2_RQ).mul_(g_PQ), (b1 @ a1_RQ).mul_(g_PQ)
            gb1_PR[rows] = g1_PQ @ a1_RQ.t()
            gb2_PR[rows] = g2_PQ @ a2_RQ.t()
            ga1_RQ.addmm_(b1.t(), g1_PQ)
            ga2_RQ.addmm_(b2.t(), g2_PQ)
        scaled = (grad.mul_(self.gamma) for grad in (gb1_PR, ga1_RQ, gb2_PR, ga2_RQ))
        return self._factor_grads(factors, *scaled)


def blocks(w_PQ: Tensor) -> Iterator[slice]:
    """The rows of a matrix, some at a time; all at once for a compiler, which would unroll them."""
    P, Q = w_PQ.shape
    step = P if torch.compiler.is_compiling() else max(1, BLOCK // Q)
    for start in range(0, P, step):
        yield slice(start, start + step)
