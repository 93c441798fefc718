"""Kernels of updates of low rank, T = B A, for the adapters that have one in some form.

    y += gamma B (A x)            dB = gamma sum gy (A x)^T
    gx += gamma A^T (B^T gy)      dA = gamma sum (B^T gy) x^T

A has the layer's kernel; B acts on one tap. Where B and A are themselves made of smaller factors,
an adapter says how: `pair` makes them, `pair_grads` takes their gradients back.
"""

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lyco_lab.adapters.kernel import FORM_DENSE, FORM_TOKENS, SIDE_TOKENS, Plan, Sizes
from lyco_lab.adapters.plan import PASS, TokenKernel, skinny
from lyco_lab.adapters.shapes import Factors, Shape


@dataclass(frozen=True)
class LowRank(TokenKernel):
    """gamma B A, with B of P x R and A of R x Q."""

    shape: Shape
    gamma: float
    rank: int

    @abc.abstractmethod
    def pair(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """B of P x R, and A of R x (inputs and kernel of the layer)."""

    @abc.abstractmethod
    def pair_grads(self, factors: Factors, gb_PR: Tensor, ga_RQ: Tensor) -> Factors:
        """The factors' gradients from those of B and A."""

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        side, tokens = low_rank_costs(sizes, self.rank)
        form = sizes.N * (PASS + self.form_work())
        dense = sizes.T * sizes.N + sizes.N * self.dense_work()
        return {
            SIDE_TOKENS: 2 * side + tokens,
            FORM_TOKENS: 2 * form + tokens,
            FORM_DENSE: 2 * form + dense,
        }

    def form_work(self) -> float:
        """Multiply-adds per entry of W to form W'."""
        return self.rank

    def dense_work(self) -> float:
        """Multiply-adds per entry of W from its gradient to those of the factors."""
        return 4 * self.rank

    def form(self, weight: Tensor, factors: Factors, out: Tensor | None = None) -> Tensor:
        b_PR, a_RQ = self.pair(factors)
        w_PQ = weight.flatten(1)
        into = None if out is None else out.flatten(1)
        formed = torch.addmm(w_PQ, b_PR, a_RQ.flatten(1), alpha=self.gamma, out=into)
        return formed.view_as(weight)

    def side_(self, op: Any, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        b_PR, a_RQ = self.pair(factors)
        y = op.widen_(y, op.narrow(x, a_RQ), b_PR, self.gamma)
        return y

    def token_grads(
        self, op: Any, gy: Tensor, x: Tensor, factors: Factors, gx: Tensor | None
    ) -> Factors:
        b_PR, a_RQ = self.pair(factors)
        gh = op.down(gy, b_PR).mul_(self.gamma)
        ga_RQ = op.grad_weight(gh, x, a_RQ)
        gb_PR = op.outer(gy, op.narrow(x, a_RQ)).mul(self.gamma)
        if gx is not None:
            op.side_(gx, gh, a_RQ)
        return self.pair_grads(factors, gb_PR, ga_RQ)

    def dense_grads(self, gw: Tensor, factors: Factors) -> Factors:
        b_PR, a_RQ = self.pair(factors)
        gw_PQ = gw.flatten(1)
        gb_PR = self.gamma * (gw_PQ @ a_RQ.flatten(1).t())
        ga_RQ = (self.gamma * (b_PR.t() @ gw_PQ)).view_as(a_RQ)
        return self.pair_grads(factors, gb_PR, ga_RQ)


@dataclass(frozen=True)
class PlainPair(LowRank):
    """Where B and A are the factors themselves."""

    def pair(self, factors: Factors) -> tuple[Tensor, Tensor]:
        return factors["b_PR"], factors["a_RQ"]

    def pair_grads(self, factors: Factors, gb_PR: Tensor, ga_RQ: Tensor) -> Factors:
        return {"b_PR": gb_PR, "a_RQ": ga_RQ}


def low_rank_costs(sizes: Sizes, rank: int) -> tuple[float, float]:
    """Of the change of the output, or of the input's gradient; and of the factors' gradients."""
    ends = sizes.T * (sizes.P + sizes.Q)
    slow = rank * skinny(rank)
    return ends * (slow + 10), 2 * ends * slow
