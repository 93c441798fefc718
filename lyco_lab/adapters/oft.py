"""Diag-OFT: the outputs are rotated in blocks.

    W' = R W,    R = diag(R_1, ..., R_N),    R_n = (I + Q_n) (I - Q_n)^-1,    Q_n = B_n^T - B_n

b rows of W, neighbours, are rotated by each block; b is the largest divisor of the number of
outputs that exceeds neither `block_size` nor its root. So there are at least b blocks, which is
what LyCORIS takes for granted when it reads a file. Its own `lora_dim` means the same, except
where it divides the outputs and exceeds their root: b is then P / lora_dim there, 5 for 64 on 320
outputs, where it is 16 here. The transposition in Q is LyCORIS' as well.

Shapes: P outputs, N blocks of b x b.

References:
    Controlling Text-to-Image Diffusion by Orthogonal Finetuning (Qiu et al., 2023),
    https://arxiv.org/abs/2306.07280
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lyco_lab.adapters.kernel import FORM_TOKENS, SIDE_TOKENS, Kernel, Plan, Saved, Sizes
from lyco_lab.adapters.plan import PASS
from lyco_lab.adapters.rotation import Rotation, blockwise, skew, skew_grad, with_identity
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.errors import UserError
from lyco_lab.linalg import cayley_grad, cayley_inverse, cayley_offset, split


@dataclass(frozen=True)
class OFT(Rotation):
    file_algo: ClassVar = "diag-oft"

    def blocks_shape(self, shape: Shape) -> Shape:
        b, N = split(shape[0], self.block_size)
        if b == 1:
            P = shape[0]
            divisor = next((d for d in range(2, math.isqrt(P) + 1) if P % d == 0), None)
            remedy = f"a block_size of at least {divisor}, or " if divisor else ""
            raise UserError(
                f"OFT with block_size {self.block_size} cannot split {P} outputs into blocks: "
                f"it needs {remedy}this layer left out"
            )
        return N, b, b

    def turn(self, blocks: Tensor, rows_PC: Tensor) -> Tensor:
        moved_Nbb = cayley_offset(skew(blocks.mT, self.limit(rows_PC.shape[0])))
        N, b, _ = moved_Nbb.shape
        turned_NbC = moved_Nbb.to(rows_PC.dtype) @ rows_PC.view(N, b, -1)
        return turned_NbC.view(N * b, -1)

    def moved(self, shape: Shape) -> int:
        # R - I = 2 Q K is of the rank of Q, and a skew matrix of odd size is singular.
        N, b, _ = self.blocks_shape(shape)
        return N * (b - b % 2)

    def kernel(self, shape: Shape) -> "Blocks | None":
        if self.rescaled:
            return None  # what a scale near zero makes of the output cannot be undone
        return Blocks(self.blocks_shape(shape)[-1], self.limit(shape[0]))


@dataclass(frozen=True)
class Blocks(Kernel):
    """The rotation undone: all that the backward pass needs besides R is the layer's own output.

        y = R z + b        gR = sum gy z^T = (sum gy (y - b)^T) R

    of which only the diagonal blocks are formed. An operation that changes the output in place
    makes autograd raise an error in the backward pass.
    """

    size: int
    limit: float

    keeps_input = False

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        ends, shared = sizes.T * sizes.P, sizes.T * sizes.P * self.size
        return {
            FORM_TOKENS: 2 * sizes.N * (PASS + self.size) + shared,
            SIDE_TOKENS: 2 * ends * (PASS + self.size) + shared,
        }

    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        k_Nbb = cayley_inverse(skew(factors["blocks"].mT, self.limit))
        r_Nbb = with_identity(2 * k_Nbb, -1.0)
        if plan.apply == "form":
            y = op.product(x, rotated(r_Nbb, weight), bias)
        else:
            y = self.rotated_outputs(op, r_Nbb, op.product(x, weight))
            if bias is not None:
                y += op.channels(bias)
        return y, (k_Nbb, y)

    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        k_Nbb, y = saved.kept
        r_Nbb, gy = with_identity(2 * k_Nbb, -1.0), gy.contiguous()
        cross_Nbb = blockwise(op, gy, self.size) @ blockwise(op, y, self.size).mT
        if cross_Nbb.dim() == 4:
            cross_Nbb = cross_Nbb.sum(0)
        if saved.bias is not None:
            gb_Nb1 = op.sum_positions(gy).view(-1, self.size, 1)
            cross_Nbb = cross_Nbb - gb_Nb1 * saved.bias.view(-1, 1, self.size)
        gq_Nbb = cayley_grad(k_Nbb, cross_Nbb @ r_Nbb)
        blocks = saved.factors["blocks"]
        grads = {"blocks": skew_grad(blocks.mT, self.limit, gq_Nbb).mT}
        if not need_gx:
            return None, grads
        if plan.apply == "form":
            return op.grad_input(gy, saved.x_shape, rotated(r_Nbb, saved.weight)), grads
        gz = self.rotated_outputs(op, r_Nbb.mT, gy)
        return op.grad_input(gz, saved.x_shape, saved.weight), grads

    def rotated_outputs(self, op: Any, r_Nbb: Tensor, z: Tensor) -> Tensor:
        """R z."""
        blocks = blockwise(op, z, self.size)
        if blocks.dim() == 4:
            return (r_Nbb @ blocks).view(z.shape)
        return (blocks.mT @ r_Nbb.mT).transpose(0, 1).reshape(z.shape)


def rotated(r_Nbb: Tensor, weight: Tensor) -> Tensor:
    N, b, _ = r_Nbb.shape
    return (r_Nbb @ weight.reshape(N, b, -1)).view(weight.shape)
