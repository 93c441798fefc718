"""What rotations of a layer's outputs by small orthogonal blocks share.

    W' = D R(Q) W            R(Q) = (I + Q) (I - Q)^-1,    Q skew,    D = diag(1 + scale)

Q = B - B^T for trained blocks B, shrunk to the Frobenius norm `constraint * P` where it exceeds it
(over all blocks together, 0 for no limit). R is orthogonal whatever the blocks are, so without
`rescaled`, which trains D, W' has the singular values of W.

A strength s multiplies the blocks and the scale, before the limit: (1 + s scale) R(s Q) W, which
is a rotation for every s and W at 0. LyCORIS interpolates R instead and so leaves the rotations
between 0 and 1. Only W is rotated: the layer's bias stays as it is.

Files hold D itself, as LyCORIS does, in float64: 1 + scale has digits that float32 has not. Their
`alpha` is the constraint.

Shapes: P outputs, N blocks of b x b.
"""

import abc
import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NoReturn

import torch
from torch import Generator, Tensor

from lyco_lab.adapters.base import Adapter, Layer
from lyco_lab.adapters.plan import recomputed
from lyco_lab.adapters.shapes import Factors, Shape, Terms
from lyco_lab.errors import UserError
from lyco_lab.linalg import unrolled
from lyco_lab.settings import NOT_NEGATIVE, Within

TINY = 1e-8  # added to a norm before dividing by it, as LyCORIS does


@dataclass(frozen=True)
class Rotation(Adapter):
    """An adapter that rotates blocks of outputs, and may rescale each output."""

    # At most so many outputs are rotated together; LyCORIS' `lora_dim`
    block_size: Annotated[int, Within(2, 10**6)] = 16
    # Largest Frobenius norm of Q, per output; 0: none
    constraint: Annotated[float, NOT_NEGATIVE] = 0.0
    rescaled: bool = False  # train a factor for each output as well

    file_names: ClassVar = {"blocks": "oft_blocks", "scale": "rescale"}
    scaling: ClassVar = ("blocks", "scale")
    zero: ClassVar = ("blocks", "scale")
    no_degree: ClassVar = "a rotation by c Q is not a multiple of the rotation by Q"

    reads_weight = False

    def __post_init__(self) -> None:
        size, limit = self.block_size, self.constraint
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            self.refuse("block_size", size, "a whole number >= 2")
        if not (isinstance(limit, int | float) and math.isfinite(limit) and limit >= 0):
            self.refuse("constraint", limit, "a finite number >= 0; 0 sets no limit")

    @abc.abstractmethod
    def blocks_shape(self, shape: Shape) -> Shape:
        """(*, N, b, b), or an error where such blocks cannot rotate the outputs."""

    @abc.abstractmethod
    def turn(self, blocks: Tensor, rows_PC: Tensor) -> Tensor:
        """(R - I) rows, without the rounding of a difference."""

    @property
    def preserves(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset() if self.rescaled else frozenset({"singular values"})

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        factors = {"blocks": weight.new_zeros(self.blocks_shape(tuple(weight.shape)))}
        if self.rescaled:
            factors["scale"] = weight.new_zeros(weight.shape[0], *[1] * (weight.dim() - 1))
        return factors

    def delta(self, weight: Tensor, factors: Factors) -> Tensor:
        changed_PC = self._changed(weight.flatten(1), factors["blocks"], *_scales(factors))
        return changed_PC.view(weight.shape)

    def _changed(self, rows_PC: Tensor, blocks: Tensor, scale: Tensor | None = None) -> Tensor:
        """(D R - I) rows."""
        turned = self.turn(blocks, rows_PC)
        if scale is None:
            return turned
        return turned + scale.view(-1, 1).to(rows_PC.dtype) * (rows_PC + turned)

    def change(self, layer: Layer, x: Tensor, factors: Factors) -> Tensor:
        # The outputs of one group of a convolution see other inputs than those of another, so
        # there the rotated weight is more than a rotation of outputs.
        if not layer.multiplies or layer.groups > 1:
            return super().change(layer, x, factors)

        def changed(z: Tensor, *values: Tensor) -> Tensor:
            return self._changed(z.reshape(-1, z.shape[-1]).t(), *values).t().reshape(z.shape)

        values = (factors["blocks"], *_scales(factors))
        return layer.outputs(layer.base(x), lambda z: recomputed(changed, z, *values))

    def num_params(self, shape: Shape) -> int:
        return math.prod(self.blocks_shape(shape)) + (shape[0] if self.rescaled else 0)

    def max_rank(self, shape: Shape) -> int:
        P, Q = unrolled(shape)
        return min(P if self.rescaled else self.moved(shape), Q)

    @abc.abstractmethod
    def moved(self, shape: Shape) -> int:
        """The rank of R - I."""

    def gamma(self, shape: Shape) -> None:
        return None

    def with_gamma(self, gamma: float) -> NoReturn:
        raise UserError(f"{type(self).__name__} has no gamma: {self.no_degree}")

    def terms(self, shape: Shape) -> Terms:
        return ()

    def file_alpha(self, shape: Shape) -> float:
        return float(self.constraint)

    def to_file(self, shape: Shape, factors: Factors) -> Factors:
        tensors = super().to_file(shape, factors)
        if self.rescaled:
            tensors["rescale"] = 1 + tensors["rescale"].double()
        return tensors

    def from_file(self, shape: Shape, tensors: Factors) -> Factors:
        factors = super().from_file(shape, tensors)
        if self.rescaled:
            factors["scale"] = factors["scale"].double() - 1
        return factors

    def limit(self, outputs: int) -> float:
        """The largest norm of Q; 0: none."""
        return self.constraint * outputs


def _scales(factors: Factors) -> tuple[Tensor, ...]:
    return (factors["scale"],) if "scale" in factors else ()


def skew(blocks: Tensor, limit: float) -> Tensor:
    """Q of the blocks."""
    q = blocks - blocks.mT
    if limit:
        q = q * (limit / (torch.linalg.vector_norm(q) + TINY)).clamp(max=1)
    return q


def skew_grad(blocks: Tensor, limit: float, gq: Tensor) -> Tensor:
    """The blocks' gradient from that of Q."""
    if limit:
        q = blocks - blocks.mT
        norm = torch.linalg.vector_norm(q)
        share = limit / (norm + TINY)
        along = (gq * q).sum() / ((norm + TINY) * norm)
        gq = torch.where(share < 1, share * (gq - along * q), gq)
    return gq - gq.mT


def with_identity(blocks: Tensor, times: float = 1.0) -> Tensor:
    """Blocks + times * I."""
    return blocks + times * torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)


def blockwise(op: Any, y: Tensor, size: int) -> Tensor:
    """A view of a layer's output by blocks of rows: (*, N, size, positions)."""
    if op.first(y) is y:
        return y.reshape(-1, y.shape[-1]).t().unflatten(0, (-1, size))
    return y.flatten(2).unflatten(1, (-1, size))
