"""BOFT: the outputs are rotated by a butterfly of block rotations.

    W' = R_m ... R_2 R_1 W,    R_i = P_i diag(R_i1, ..., R_iN) P_i^T,    N = P / b = 2^p,  m = p + 1

Each R_in = (I + Q)(I - Q)^-1 with Q = B - B^T rotates b rows; together the m stages mix all P rows
with m P b parameters, where one rotation of them would take P^2. Write a row's number as

    row = t h + j,    h = b / 2,    j < h,    t of p + 1 binary digits

Then a block of stage i holds the b rows that agree in all digits of t except the i-th, ordered by
(j, digit), and is numbered by the other digits. b is the largest even number up to `block_size`
for which P / b is a power of two, LyCORIS' rule for its `lora_dim`; the number of stages is always
p + 1, the most that there can be.

q consecutive stages leave all but q digits alone, so they are one block diagonal rotation with
blocks of 2^q h rows. Stages are fused that way to blocks of about 40 rows, which spares passes over
the rows. R - I is the sum of what each fused stage changes, E_i (R_(i-1) ... R_1), of which none is
a difference of nearly equal numbers.

Shapes: P outputs, m stages of N blocks of b x b, G fused blocks of n x n.

References:
    Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization (Liu et al., 2024),
    https://arxiv.org/abs/2311.06243
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lyco_lab.adapters.kernel import (
    FORM_DENSE,
    FORM_TOKENS,
    SIDE_TOKENS,
    Kernel,
    Plan,
    Saved,
    Sizes,
)
from lyco_lab.adapters.rotation import Rotation, skew, skew_grad, with_identity
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.errors import UserError
from lyco_lab.linalg import (
    butterfly_block,
    cayley_grad,
    cayley_inverse,
    cayley_offset,
    odd_part,
)

FUSED_ROWS = 40  # as many rows has a fused block at most, where one stage has not more
PASS = 100.0  # per entry and pass: rows are also copied into blocks and back, unlike plan.PASS


@dataclass(frozen=True)
class BOFT(Rotation):
    file_algo: ClassVar = "boft"

    def blocks_shape(self, shape: Shape) -> Shape:
        P = shape[0]
        b = butterfly_block(P, self.block_size)
        if b is None:
            least = 2 * odd_part(P)
            remedy = f"a block_size of at least {least}, or " if least <= P else ""
            raise UserError(
                f"BOFT with block_size {self.block_size} cannot rotate {P} outputs, which are no "
                f"power of two times an even number up to that: it needs {remedy}this layer left "
                "out"
            )
        N = P // b
        return N.bit_length(), N, b, b

    def turn(self, blocks: Tensor, rows_PC: Tensor) -> Tensor:
        moved_mNbb = cayley_offset(skew(blocks, self.limit(rows_PC.shape[0])))
        total: Tensor | None = None
        for stages in fusions(moved_mNbb.shape):
            e_Gnn = stages.fused(moved_mNbb).to(rows_PC.dtype)
            current = rows_PC if total is None else rows_PC + total
            step = stages.scatter(e_Gnn @ stages.gather(current))
            total = step if total is None else total + step
        assert total is not None
        return total

    def moved(self, shape: Shape) -> int:
        # Only the first stage turned, R - I has no zero eigenvalue since b is even; so in general.
        return shape[0]

    def kernel(self, shape: Shape) -> "Butterfly | None":
        if self.rescaled:
            return None  # what a scale near zero makes of the output cannot be undone
        return Butterfly(self.blocks_shape(shape), self.limit(shape[0]))


@dataclass(frozen=True)
class Stages:
    """`count` consecutive stages of a butterfly, from number `first`."""

    first: int
    count: int
    half: int  # h

    @property
    def rows(self) -> int:
        """n of a fused block."""
        return self.half << self.count

    def gather(self, rows_PC: Tensor) -> Tensor:
        """The rows of each fused block: (G, n, C)."""
        spread = rows_PC.unflatten(0, (-1, 1 << self.count, 1 << self.first, self.half))
        return spread.transpose(1, 2).reshape(-1, self.rows, rows_PC.shape[1])

    def scatter(self, fused_GnC: Tensor) -> Tensor:
        """Back from `gather`."""
        C = fused_GnC.shape[-1]
        spread = fused_GnC.view(-1, 1 << self.first, 1 << self.count, self.half, C)
        return spread.transpose(1, 2).reshape(-1, C)

    def within(self, stage: int, fused_GnC: Tensor) -> Tensor:
        """What each block of the `stage`-th of these stages acts on: (G n / b, b, C)."""
        G, _, C = fused_GnC.shape
        spread = fused_GnC.reshape(G, -1, 2, 1 << stage, self.half, C)
        return spread.permute(0, 1, 3, 4, 2, 5).reshape(-1, 2 * self.half, C)

    def without(self, stage: int, acted_XbC: Tensor) -> Tensor:
        """Back from `within`."""
        hi, C = 1 << (self.count - 1 - stage), acted_XbC.shape[-1]
        spread = acted_XbC.view(-1, hi, 1 << stage, self.half, 2, C)
        return spread.permute(0, 1, 4, 2, 3, 5).reshape(-1, self.rows, C)

    def of(self, stage: int, blocks_mNbb: Tensor) -> Tensor:
        """The blocks of a stage in the order of `within`: (G n / b, b, b)."""
        hi, lo, b = 1 << (self.count - 1 - stage), 1 << stage, 2 * self.half
        spread = blocks_mNbb[self.first + stage].view(-1, hi, lo, 1 << self.first, b, b)
        return spread.permute(0, 3, 1, 2, 4, 5).reshape(-1, b, b)

    def back(self, stage: int, blocks_Xbb: Tensor) -> Tensor:
        """Back from `of`."""
        hi, lo, b = 1 << (self.count - 1 - stage), 1 << stage, 2 * self.half
        spread = blocks_Xbb.view(-1, 1 << self.first, hi, lo, b, b)
        return spread.permute(0, 2, 3, 1, 4, 5).reshape(-1, b, b)

    def fused(self, moved_mNbb: Tensor) -> Tensor:
        """S - I for the product S of the stages, from R - I of each block: (G, n, n)."""
        eye = torch.eye(self.rows, dtype=moved_mNbb.dtype, device=moved_mNbb.device)
        total = torch.zeros_like(eye).expand(moved_mNbb.shape[1] >> (self.count - 1), -1, -1)
        for stage in range(self.count):
            step = self.of(stage, moved_mNbb) @ self.within(stage, eye + total)
            total = total + self.without(stage, step)
        return total

    def diagonal(self, stage: int, m_Gnn: Tensor) -> Tensor:
        """The blocks of M that belong to the blocks of a stage: (G n / b, b, b)."""
        hi, lo, h = 1 << (self.count - 1 - stage), 1 << stage, self.half
        spread = m_Gnn.view(-1, hi, 2, lo, h, hi, 2, lo, h)
        kept = spread.diagonal(dim1=1, dim2=5).diagonal(dim1=2, dim2=5)  # G g j g' j' hi lo
        return kept.permute(0, 5, 6, 2, 1, 4, 3).reshape(-1, 2 * h, 2 * h)

    def stage_grads(self, r_mNbb: Tensor, cross_Gnn: Tensor) -> list[Tensor]:
        """gR of each stage, from sum v u^T for the outputs u of the stages and their gradients v.

        With u_s = R_s u_(s-1) and v_(s-1) = R_s^T v_s the sum one stage earlier is R_s^T M R_s.
        """
        grads = []
        for stage in reversed(range(self.count)):
            r_Xbb = self.of(stage, r_mNbb)
            grads.append(self.back(stage, self.diagonal(stage, cross_Gnn) @ r_Xbb))
            if stage:
                for _ in range(2):
                    turned = self.without(stage, r_Xbb.mT @ self.within(stage, cross_Gnn))
                    cross_Gnn = turned.mT
                cross_Gnn = cross_Gnn.contiguous()
        return grads[::-1]


def fusions(blocks_shape: Shape) -> list[Stages]:
    """All stages, in as few groups as FUSED_ROWS allows, of sizes that differ by one at most."""
    m, _, b, _ = blocks_shape
    most = max(1, (FUSED_ROWS // (b // 2)).bit_length() - 1)
    groups = -(-m // most)
    starts = [-(-m * i // groups) for i in range(groups + 1)]
    return [Stages(i, j - i, b // 2) for i, j in zip(starts, starts[1:], strict=False)]


@dataclass(frozen=True)
class Butterfly(Kernel):
    """The rotations undone, one fused group after the other: u_(i-1) = S_i^T u_i.

        v = gy, u = y - b        M_i = sum v_i u_i^T        v_(i-1) = S_i^T v_i

    M_i, in blocks, holds the gradients of all stages of the group. Positions take the part of the
    columns of u and v; or, in the dense plan, u = W' and v = sum gy x^T and the columns are the
    weight's, of which there are fewer where positions abound. Otherwise only the output is kept for
    the backward pass, and an operation that changes it in place makes autograd raise an error.
    """

    blocks_shape: Shape
    limit: float

    def keeps(self, plan: Plan) -> bool:
        return plan.grads == "dense"

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        groups = fusions(self.blocks_shape)
        first = PASS + groups[0].rows
        once = sum(PASS + stages.rows for stages in groups)  # all groups, or sums M of all
        undone = once + 2 * (once - first)
        ends = sizes.T * sizes.P
        return {
            SIDE_TOKENS: ends * (once + undone + first),
            FORM_TOKENS: 2 * sizes.N * once + ends * undone,
            FORM_DENSE: sizes.N * (2 * once + undone + sizes.T),
        }

    def forward(
        self, op: Any, plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        k_mNbb = cayley_inverse(skew(factors["blocks"], self.limit))
        groups = self.fused(k_mNbb)
        if plan.apply == "form":
            y = op.product(x, rotate(groups, weight.flatten(1)).view(weight.shape), bias)
        else:
            z = op.product(x, weight)
            y = op.unrows(rotate(groups, op.rows(z)), z.shape).contiguous()
            if bias is not None:
                y += op.channels(bias)
        return y, (k_mNbb,) if self.keeps(plan) else (k_mNbb, y)

    def backward(
        self, op: Any, plan: Plan, gy: Tensor, saved: Saved, need_gx: bool
    ) -> tuple[Tensor | None, Factors]:
        k_mNbb, *own = saved.kept
        gy, weight = gy.contiguous(), saved.weight
        r_mNbb = with_identity(2 * k_mNbb, -1.0)
        groups = self.fused(k_mNbb)
        gx = None
        if plan.grads == "dense":
            adapted = rotate(groups, weight.flatten(1)).view(weight.shape)
            if need_gx:
                gx, gw = op.grads(gy, saved.input(), adapted)
            else:
                gw = op.grad_weight(gy, saved.input(), adapted)
            gr_mNbb, _ = undo(groups, r_mNbb, adapted.flatten(1), gw.flatten(1), False)
        else:
            u_PC, v_PC = op.rows(own[0]), op.rows(gy)
            if saved.bias is not None:
                u_PC = u_PC - saved.bias.unsqueeze(1)
            side = need_gx and plan.apply == "side"
            gr_mNbb, v_PC = undo(groups, r_mNbb, u_PC, v_PC, side)
            if side:
                gz = op.unrows(v_PC, gy.shape).contiguous()
                gx = op.grad_input(gz, saved.x_shape, weight)
            elif need_gx:
                adapted = rotate(groups, weight.flatten(1)).view(weight.shape)
                gx = op.grad_input(gy, saved.x_shape, adapted)
        gq_mNbb = cayley_grad(k_mNbb, gr_mNbb)
        return gx, {"blocks": skew_grad(saved.factors["blocks"], self.limit, gq_mNbb)}

    def fused(self, k_mNbb: Tensor) -> list[tuple[Stages, Tensor]]:
        moved_mNbb = with_identity(2 * k_mNbb, -2.0)
        return [
            (stages, with_identity(stages.fused(moved_mNbb)))
            for stages in fusions(self.blocks_shape)
        ]


def rotate(groups: list[tuple[Stages, Tensor]], rows_PC: Tensor) -> Tensor:
    for stages, s_Gnn in groups:
        rows_PC = stages.scatter(s_Gnn @ stages.gather(rows_PC))
    return rows_PC


def undo(
    groups: list[tuple[Stages, Tensor]], r_mNbb: Tensor, u_PC: Tensor, v_PC: Tensor, whole: bool
) -> tuple[Tensor, Tensor]:
    """gR of every stage; with `whole`, also what v is before all of them."""
    grads: list[Tensor] = []
    for stages, s_Gnn in reversed(groups):
        v_GnC, u_GnC = stages.gather(v_PC), stages.gather(u_PC)
        grads = stages.stage_grads(r_mNbb, v_GnC @ u_GnC.mT) + grads
        if stages.first:
            u_PC = stages.scatter(s_Gnn.mT @ u_GnC)
        if stages.first or whole:
            v_PC = stages.scatter(s_Gnn.mT @ v_GnC)
    return torch.stack(grads), v_PC
