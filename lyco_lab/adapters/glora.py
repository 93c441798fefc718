"""GLoRA: a low-rank change of what the layer sees, and a low-rank update.

    W' = W + gamma * (W A1 A2 + B1 B2)           gamma = alpha / R, or alpha / sqrt(R) (rsLoRA)

A1 A2 mixes the input channels, each tap of a kernel alike; B1 B2 is as in LoRA, with the kernel in
B2. LyCORIS' form of the paper's equation 1, whose scaling, prompt and bias terms are left out.

    W' x = W (x + gamma A1 A2 x) + gamma B1 B2 x

so that W is only multiplied by. On a single tap the change is of rank 2 R as it stands,
[W A1 | B1] [A2; B2], and goes the way of LoRA's.

Shapes: P outputs, Q inputs, R the rank, k the kernel.

References:
    One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning (Chavan et al., 2023),
    https://arxiv.org/abs/2306.07967
    A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski, 2023),
    https://arxiv.org/abs/2312.03732
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Generator, Tensor

from lyco_lab.adapters.base import Layer, OfRank
from lyco_lab.adapters.kernel import FORM_DENSE, SIDE_TOKENS, Kernel, Plan, Saved, Sizes
from lyco_lab.adapters.lowrank import PlainPair, low_rank_costs
from lyco_lab.adapters.plan import PASS, skinny
from lyco_lab.adapters.shapes import Factors, Shape, Terms
from lyco_lab.linalg import kaiming, unrolled
from lyco_lab.settings import POSITIVE, SIZE


@dataclass(frozen=True)
class GLoRA(OfRank):
    rank: Annotated[int, SIZE] = 8
    alpha: Annotated[float, POSITIVE] = 4.0  # the update is scaled by alpha / rank
    rank_stabilised: bool = False  # scale by alpha / sqrt(rank) instead

    file_algo: ClassVar = "glora"
    file_names: ClassVar = {
        "a1_QR": "a1.weight",
        "a2_RQ": "a2.weight",
        "b1_PR": "b1.weight",
        "b2_RQ": "b2.weight",
    }
    scaling: ClassVar = ("a1_QR", "b1_PR")
    zero: ClassVar = ("a2_RQ", "b2_RQ")
    components: ClassVar = {"a1_QR": 1, "b1_PR": 1}
    reads_weight: ClassVar = False

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        P, Q, *kernel = weight.shape
        R = self.rank_of(tuple(weight.shape))
        return {
            "a1_QR": kaiming(weight, Q, R, fan_in=R, rng=rng),
            "a2_RQ": weight.new_zeros(R, Q),
            "b1_PR": kaiming(weight, P, R, fan_in=R, rng=rng),
            "b2_RQ": weight.new_zeros(R, Q, *kernel),
        }

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        a1_QR, a2_RQ = factors["a1_QR"], factors["a2_RQ"]
        mixed = ((weight.movedim(1, -1) @ a1_QR) @ a2_RQ).movedim(-1, 1)
        added = (factors["b1_PR"] @ factors["b2_RQ"].flatten(1)).view(weight.shape)
        return self.gamma(tuple(weight.shape)) * (mixed + added)

    def change(self, layer: Layer, x: Tensor, factors: Factors) -> Tensor:
        if not layer.multiplies:
            return super().change(layer, x, factors)
        gamma = self.gamma(layer.shape)
        mix = Mix(gamma * factors["a1_QR"], factors["a2_RQ"])
        h = layer.narrow(x, factors["b2_RQ"])
        return layer.base(layer.inputs(x, mix)) + layer.widen(h, gamma * factors["b1_PR"])

    def kernel(self, shape: Shape) -> "Joined | Apart":
        kind = Apart if math.prod(shape[2:]) > 1 else Joined
        return kind(shape, self.gamma(shape), self.rank_of(shape))

    def terms(self, shape: Shape) -> Terms:
        return (("a1_QR", "a2_RQ"), ("b1_PR", "b2_RQ"))

    def num_params(self, shape: Shape) -> int:
        return self.sized(shape) * (2 * shape[1] + sum(unrolled(shape)))

    def max_rank(self, shape: Shape) -> int:
        R, taps = self.rank_of(shape), math.prod(shape[2:])
        return min(min(R, shape[1]) * taps + R, *unrolled(shape))


@dataclass(frozen=True)
class Mix:
    """A1 A2 on the inputs, of each group alike where they are grouped."""

    a1_QR: Tensor
    a2_RQ: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        of_group = v.unflatten(-1, (-1, self.a2_RQ.shape[1]))
        mixed = (of_group @ self.a2_RQ.to(v.dtype).t()) @ self.a1_QR.to(v.dtype).t()
        return mixed.flatten(-2)


@dataclass(frozen=True)
class Joined(Kernel):
    """A single tap: the pair [W A1 | B1] and [A2; B2].

    Beside the weight of a linear layer, A1 goes on its input: W A1 would read all of the weight.
    """

    shape: Shape
    gamma: float
    rank: int

    @property
    def joint(self) -> PlainPair:
        return PlainPair(self.shape, self.gamma, 2 * self.rank)

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        through = sizes.N * 2 * self.rank * skinny(self.rank)  # W A1, and W^T of its gradient
        costs = {plan: cost + through for plan, cost in self.joint.costs(sizes).items()}
        if len(self.shape) == 2:
            side, tokens = low_rank_costs(Sizes(sizes.T, sizes.P, 3 * sizes.Q), self.rank)
            costs[SIDE_TOKENS] = 2 * side + tokens
        return costs

    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if plan.apply == "side" and len(self.shape) == 2:
            return self._beside(op, x, weight, bias, factors)
        wa_PR = (factors["a1_QR"].t() @ weight.flatten(1).t()).t()
        y, _ = self.joint.forward(op, plan, x, weight, bias, self._pair(wa_PR, factors))
        return y, (wa_PR,)

    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        if plan.apply == "side" and len(self.shape) == 2:
            return self._beside_grads(op, gy, saved, need_gx)
        R, pair = self.rank, self._pair(saved.kept[0], saved.factors)
        gx, grads = self.joint.backward(op, plan, gy, replace(saved, factors=pair), need_gx)
        gb_PR, ga_RQ = grads["b_PR"], grads["a_RQ"]
        ga1_RQ = gb_PR[:, :R].t().contiguous() @ saved.weight.flatten(1)
        return gx, {
            "a1_QR": ga1_RQ.t(),
            "a2_RQ": ga_RQ[:R].flatten(1),
            "b1_PR": gb_PR[:, R:],
            "b2_RQ": ga_RQ[R:],
        }

    def _beside(
        self, op: Any, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        R, both_RQ = self.rank, torch.cat([factors["a2_RQ"], factors["b2_RQ"]])
        h = op.narrow(x, both_RQ)
        u = torch.addmm(x.reshape(len(h), -1), h[:, :R], factors["a1_QR"].t(), alpha=self.gamma)
        y = op.product(u.view(x.shape), weight, bias)
        return op.widen_(y, h[:, R:], factors["b1_PR"], self.gamma), (h,)

    def _beside_grads(
        self, op: Any, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        R, factors, (h,) = self.rank, saved.factors, saved.kept
        both_RQ = torch.cat([factors["a2_RQ"], factors["b2_RQ"]])
        gx = op.grad_input(gy, saved.x_shape, saved.weight)  # of u, to begin with
        gh = torch.cat([op.down(gx, factors["a1_QR"]), op.down(gy, factors["b1_PR"])], 1)
        gh = gh.mul_(self.gamma)
        gboth_RQ = op.grad_weight(gh, saved.input(), both_RQ)
        grads = {
            "a1_QR": op.outer(gx, h[:, :R]).mul(self.gamma),
            "a2_RQ": gboth_RQ[:R],
            "b1_PR": op.outer(gy, h[:, R:]).mul(self.gamma),
            "b2_RQ": gboth_RQ[R:],
        }
        return (op.side_(gx, gh, both_RQ) if need_gx else None), grads

    def _pair(self, wa_PR: Tensor, factors: Factors) -> Factors:
        b2_RQ = factors["b2_RQ"]
        return {
            "b_PR": torch.cat([wa_PR, factors["b1_PR"]], 1),
            "a_RQ": torch.cat([factors["a2_RQ"].view_as(b2_RQ), b2_RQ]),
        }


@dataclass(frozen=True)
class Apart(Kernel):
    """A convolution of several taps: A1 A2 on its input, B1 B2 on its output."""

    shape: Shape
    gamma: float
    rank: int

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        side, tokens = low_rank_costs(sizes, self.rank)
        channels = Sizes(sizes.T, self.shape[1], self.shape[1])
        mix, mix_tokens = low_rank_costs(channels, self.rank)
        return {
            SIDE_TOKENS: 2 * (side + mix) + tokens + mix_tokens,
            FORM_DENSE: sizes.N * (sizes.T + 2 * PASS + 12 * self.rank * skinny(self.rank)),
        }

    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        if plan.apply == "form":
            return op.product(x, self._form(weight, factors), bias), ()
        h_a = factors["a2_RQ"] @ x.flatten(2)
        u = torch.baddbmm(x.flatten(2), _each(factors["a1_QR"], x), h_a, alpha=self.gamma)
        h_b = op.narrow(x, factors["b2_RQ"])
        y = op.product(u.view_as(x), weight, bias)
        return op.widen_(y, h_b, factors["b1_PR"], self.gamma), (h_a, h_b)

    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        x, factors, gamma = saved.input(), saved.factors, self.gamma
        if plan.apply == "form":
            if not need_gx:
                return None, self._dense_grads(op.grad_weight(gy, x, saved.weight), saved)
            gx, gw = op.grads(gy, x, self._form(saved.weight, factors))
            return gx, self._dense_grads(gw, saved)
        h_a, h_b = saved.kept
        gh_b = op.down(gy, factors["b1_PR"]).mul_(gamma)
        gu = op.grad_input(gy, saved.x_shape, saved.weight)
        flat_gu = gu.flatten(2)
        gh_a = (factors["a1_QR"].t() @ flat_gu).mul_(gamma)
        grads = {
            "a1_QR": (flat_gu @ h_a.transpose(1, 2)).sum(0) * gamma,
            "a2_RQ": (gh_a @ x.flatten(2).transpose(1, 2)).sum(0),
            "b1_PR": op.outer(gy, h_b).mul(gamma),
            "b2_RQ": op.grad_weight(gh_b, x, factors["b2_RQ"]),
        }
        if not need_gx:
            return None, grads
        gx = torch.baddbmm(flat_gu, _each(factors["a2_RQ"].t(), x), gh_a).view_as(gu)
        return op.side_(gx, gh_b, factors["b2_RQ"]), grads

    def _form(self, weight: Tensor, factors: Factors) -> Tensor:
        w_PQk = weight.flatten(2)
        wa_PRk = factors["a1_QR"].t() @ w_PQk
        formed = torch.baddbmm(w_PQk, _each(factors["a2_RQ"].t(), w_PQk), wa_PRk, alpha=self.gamma)
        b2_RQ = factors["b2_RQ"].flatten(1)
        formed.flatten(1).addmm_(factors["b1_PR"], b2_RQ, alpha=self.gamma)
        return formed.view_as(weight)

    def _dense_grads(self, gw: Tensor, saved: Saved) -> Factors:
        factors, gamma = saved.factors, self.gamma
        w_PQk, gw_PQk, gw_PN = saved.weight.flatten(2), gw.flatten(2), gw.flatten(1)
        wa_PRk, ga_PRk = factors["a1_QR"].t() @ w_PQk, factors["a2_RQ"] @ gw_PQk
        gb2_RN = factors["b1_PR"].t() @ gw_PN
        return {
            "a1_QR": gamma * torch.einsum("pqk,prk->qr", w_PQk, ga_PRk),
            "a2_RQ": gamma * torch.einsum("prk,pqk->rq", wa_PRk, gw_PQk),
            "b1_PR": gamma * (gw_PN @ factors["b2_RQ"].flatten(1).t()),
            "b2_RQ": gamma * gb2_RN.view_as(factors["b2_RQ"]),
        }


def _each(matrix: Tensor, batch: Tensor) -> Tensor:
    return matrix.expand(len(batch), *matrix.shape)
