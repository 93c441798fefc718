"""LoKr: the update is a Kronecker product of a small block and a larger one.

    W' = W + gamma * C (x) D

Outputs and inputs are split as P = U V and Q = S T, with U and S the largest divisors that exceed
neither `factor` nor the square root; the left block C is U x S, the right block D is V x T. A
kernel's taps stay in the right block. `unbalanced` gives the left block the larger part of the
outputs instead.

    D full          always with `full_matrix`, and where a rank would save nothing: R >= max(V, T)/2
    D = B A         otherwise
    D = M x1 B x2 A for kernels of several taps with `tucker`, with a core M of R x R channels
    C = C1 C2       with `decompose_both`, where R < max(U, S)/2; C is full otherwise

gamma is alpha / R, or alpha / sqrt(R); where no block is factored alpha has no meaning and gamma is
`full_alpha`, for which files have no place: they hold it in C. A very large rank asks for full
blocks everywhere, as all of the paper's runs do.

A token passes through the update without its being formed: its S groups of T inputs go through D
each, and C mixes the groups:  y[u] = sum_s C[u, s] D x[s].  With D = B A, C mixes at the rank.

Shapes: P = U V outputs, Q = S T inputs, R the rank, k the kernel, N samples (1 for a linear layer).

References:
    KronA: Parameter Efficient Tuning with Kronecker Adapter (Edalati et al., 2022),
    https://arxiv.org/abs/2212.10650
    Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
    (Yeh et al., 2024), https://arxiv.org/abs/2309.14859, section 3.2 and equation 5
    A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA (Kalajdzievski, 2023),
    https://arxiv.org/abs/2312.03732
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Generator, Tensor

from lyco_lab.adapters.base import Layer, OfRank, Ranked
from lyco_lab.adapters.geometry import Linear
from lyco_lab.adapters.kernel import FORM_DENSE, FORM_TOKENS, SIDE_TOKENS, Plan, Sizes
from lyco_lab.adapters.plan import PASS, TokenKernel, skinny
from lyco_lab.adapters.shapes import Factors, Shape
from lyco_lab.errors import UserError
from lyco_lab.linalg import kaiming, kron, split, through_core, through_core_grads
from lyco_lab.settings import POSITIVE, SIZE, Within


@dataclass(frozen=True)
class LoKr(Ranked):
    rank: Annotated[int, SIZE] = 10000  # as large as this: the right block is a full matrix
    # The update is scaled by alpha / rank where a block is factored
    alpha: Annotated[float, POSITIVE] = 1.0
    # The left block has at most this many rows and columns
    factor: Annotated[int, Within(2, 10**6)] = 8
    full_matrix: bool = False  # keep both blocks full whatever the rank
    decompose_both: bool = False  # factor the left block as well, where the rank is small enough
    tucker: bool = False  # convolutions of more than one tap: the right block in Tucker form
    unbalanced: bool = False  # the left block has the larger part of the outputs
    rank_stabilised: bool = False  # scale by alpha / sqrt(rank) instead
    # What scales the update where both blocks are full
    full_alpha: Annotated[float, POSITIVE] = 1.0

    file_algo: ClassVar = "lokr"
    # The layout transposes B where there is a core.
    file_names: ClassVar = {
        "c_US": "lokr_w1",
        "c_UR": "lokr_w1_a",
        "c_RS": "lokr_w1_b",
        "d_VT": "lokr_w2",
        "b_VR": "lokr_w2_a",
        "b_RV": "lokr_w2_a",
        "a_RT": "lokr_w2_b",
        "m_RRk": "lokr_t2",
    }

    scaling: ClassVar = ("c_US", "c_UR")
    zero: ClassVar = ("d_VT", "a_RT")
    # Not of the left block: the sum over its rank is another one, and terms of both would be
    # dropped together.
    components: ClassVar = {"b_VR": 1, "b_RV": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.factor, bool) or not isinstance(self.factor, int) or self.factor < 2:
            self.refuse("factor", self.factor, "a whole number >= 2")
        self.check_scale("full_alpha", "1 leaves the update unscaled")

    def sizes(self, shape: Shape) -> tuple[int, int, int, int]:
        """(U, V, S, T) of a weight."""
        for side, size in zip(("outputs", "inputs"), shape, strict=False):
            if split(size, self.factor)[0] == 1:
                divisor = next((d for d in range(2, math.isqrt(size) + 1) if size % d == 0), None)
                remedy = f"a factor of at least {divisor}, or " if divisor else ""
                raise UserError(
                    f"LoKr with factor {self.factor} cannot split {size} {side} into two blocks: "
                    f"it needs {remedy}this layer left out"
                )
        U, V = split(shape[0], self.factor)
        if self.unbalanced:
            U, V = V, U
        return U, V, *split(shape[1], self.factor)

    def is_full(self, shape: Shape) -> bool:
        """Whether the right block is."""
        _, V, _, T = self.sizes(shape)
        return self.full_matrix or 2 * self.rank_of(shape) >= max(V, T)

    def left_is_full(self, shape: Shape) -> bool:
        U, _, S, _ = self.sizes(shape)
        small = self.decompose_both and 2 * self.rank_of(shape) < max(U, S)
        return self.full_matrix or not small

    def is_unfactored(self, shape: Shape) -> bool:
        return self.is_full(shape) and self.left_is_full(shape)

    def fitted(self, shape: Shape) -> OfRank:
        """Where blocks are full, or a smaller rank would factor one that is, this one.

        Full blocks have no rank to cut down. On a layer of few outputs, whose right block is as
        wide as the layer and 2 high, they have fewer entries than factored ones.
        """
        if self.is_unfactored(shape):
            return self
        smaller: Any = super().fitted(shape)
        mine = self.is_full(shape), self.left_is_full(shape)
        same: bool = mine == (smaller.is_full(shape), smaller.left_is_full(shape))
        return smaller if same else self

    def has_core(self, shape: Shape) -> bool:
        return self.tucker and math.prod(shape[2:]) > 1 and not self.is_full(shape)

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        shape = tuple(weight.shape)
        U, V, S, T = self.sizes(shape)
        R, kernel = self.rank_of(shape), shape[2:]
        if self.left_is_full(shape):
            left = {"c_US": kaiming(weight, U, S, fan_in=S, rng=rng)}
        else:
            left = {
                "c_UR": kaiming(weight, U, R, fan_in=R, rng=rng),
                "c_RS": kaiming(weight, R, S, fan_in=S, rng=rng),
            }
        if self.is_full(shape):
            return left | {"d_VT": weight.new_zeros(V, T, *kernel)}
        taps = math.prod(kernel)
        if not self.has_core(shape):
            return left | {
                "b_VR": kaiming(weight, V, R, fan_in=R, rng=rng),
                "a_RT": weight.new_zeros(R, T * taps),
            }
        return left | {
            "b_RV": kaiming(weight, R, V, fan_in=V, rng=rng),
            "a_RT": weight.new_zeros(R, T),
            "m_RRk": kaiming(weight, R, R, *kernel, fan_in=R * taps, rng=rng),
        }

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        _, V, _, T = self.sizes(shape)
        right = right_block(factors, T, shape[2:]).view(V, T, *shape[2:])
        return kron(left_block(factors), right)

    def change(self, layer: Layer, x: Tensor, factors: Factors) -> Tensor:
        shape = layer.shape
        if not layer.multiplies or layer.groups > 1:
            return super().change(layer, x, factors)
        U, _, S, T = self.sizes(shape)
        b_VR, a_RT = right_pair(factors, T, shape[2:])
        c_US = (self.gamma(shape) * left_block(factors)).to(x.dtype)

        def mix(h: Tensor) -> Tensor:
            """The groups of each position by C, and up from the rank where there is one."""
            mixed = c_US @ h.unflatten(-1, (S, -1))
            if b_VR is not None:
                mixed = mixed @ b_VR.to(h.dtype).t()
            return mixed.flatten(-2)

        return layer.outputs(layer.narrow_each(x, a_RT, S), mix)

    def kernel(self, shape: Shape) -> "Blocks":
        kind = Full if self.is_full(shape) else Factored
        return kind(shape, self.gamma(shape), *self.sizes(shape), self.rank_of(shape))

    def gamma(self, shape: Shape) -> float:
        if self.is_unfactored(shape):
            return self.full_alpha
        return super().gamma(shape)

    def with_gamma(self, gamma: float) -> OfRank:
        return replace(super().with_gamma(gamma), full_alpha=gamma)  # type: ignore[call-arg]

    def file_alpha(self, shape: Shape) -> float:
        if self.is_unfactored(shape):
            return float(self.rank_of(shape))  # of which readers make gamma = 1
        return super().file_alpha(shape)

    def to_file(self, shape: Shape, factors: Factors) -> Factors:
        if self.is_unfactored(shape):
            factors = factors | {"c_US": self.full_alpha * factors["c_US"]}
        return super().to_file(shape, factors)

    def from_file(self, shape: Shape, tensors: Factors) -> Factors:
        factors = super().from_file(shape, tensors)
        if self.is_unfactored(shape):
            factors["c_US"] = factors["c_US"] / self.full_alpha
        return factors

    def num_params(self, shape: Shape) -> int:
        U, V, S, T = self.sizes(shape)
        R, taps = self.rank_of(shape), math.prod(shape[2:])
        left = U * S if self.left_is_full(shape) else R * (U + S)
        if self.is_full(shape):
            return left + V * T * taps
        if self.has_core(shape):
            return left + R * (V + T + R * taps)
        return left + R * (V + T * taps)

    def max_rank(self, shape: Shape) -> int:
        U, V, S, T = self.sizes(shape)
        R = self.rank_of(shape)
        left, right = min(U, S), min(V, T * math.prod(shape[2:]))
        if not self.left_is_full(shape):
            left = min(left, R)
        return left * (right if self.is_full(shape) else min(right, R))


def left_block(factors: Factors) -> Tensor:
    return factors["c_US"] if "c_US" in factors else factors["c_UR"] @ factors["c_RS"]


def left_grads(factors: Factors, gc_US: Tensor) -> Factors:
    if "c_US" in factors:
        return {"c_US": gc_US}
    return {"c_UR": gc_US @ factors["c_RS"].t(), "c_RS": factors["c_UR"].t() @ gc_US}


def right_pair(factors: Factors, T: int, kernel: Shape) -> tuple[Tensor | None, Tensor]:
    """B, if the right block is factored, and A of R x T, or the whole block, with the kernel."""
    if "d_VT" in factors:
        return None, factors["d_VT"]
    if "m_RRk" in factors:
        return factors["b_RV"].t(), through_core(factors["m_RRk"], factors["a_RT"])
    return factors["b_VR"], factors["a_RT"].view(-1, T, *kernel)


def right_block(factors: Factors, T: int, kernel: Shape) -> Tensor:
    """D unrolled, V x (T and the kernel)."""
    b_VR, a_RT = right_pair(factors, T, kernel)
    return a_RT.flatten(1) if b_VR is None else b_VR @ a_RT.flatten(1)


def right_grads(factors: Factors, gb_VR: Tensor | None, ga_RT: Tensor) -> Factors:
    """Of the factors, from those of what `right_pair` gives; ga_RT may be unrolled."""
    if gb_VR is None:
        return {"d_VT": ga_RT.reshape(factors["d_VT"].shape)}
    if "m_RRk" in factors:
        core, a_RT = factors["m_RRk"], factors["a_RT"]
        gm_RRk, ga = through_core_grads(core, a_RT, ga_RT.reshape(*a_RT.shape, *core.shape[2:]))
        return {"b_RV": gb_VR.t(), "a_RT": ga, "m_RRk": gm_RRk}
    return {"b_VR": gb_VR, "a_RT": ga_RT.reshape(factors["a_RT"].shape)}


@dataclass(frozen=True)
class Blocks(TokenKernel):
    """gamma C (x) D."""

    shape: Shape
    gamma: float
    U: int
    V: int
    S: int
    T: int
    R: int

    @abc.abstractmethod
    def token_costs(self, sizes: Sizes) -> tuple[float, float]:
        """Of the change of the output, or of the input; and of the factors' gradients."""

    def costs(self, sizes: Sizes) -> dict[Plan, float]:
        side, tokens = self.token_costs(sizes)
        form = sizes.N * PASS
        dense = sizes.T * sizes.N + 3 * sizes.N * PASS
        return {
            SIDE_TOKENS: 2 * side + tokens,
            FORM_TOKENS: 2 * form + tokens,
            FORM_DENSE: 2 * form + dense,
        }

    def right_pair(self, factors: Factors) -> tuple[Tensor | None, Tensor]:
        return right_pair(factors, self.T, self.shape[2:])

    def form(self, weight: Tensor, factors: Factors, out: Tensor | None = None) -> Tensor:
        d_VT = right_block(factors, self.T, self.shape[2:])
        w_UVST = self._split(weight)
        into = None if out is None else self._split(out)
        left, right = left_block(factors)[:, None, :, None], d_VT[None, :, None, :]
        formed = torch.addcmul(w_UVST, left, right, value=self.gamma, out=into)
        return formed.view(weight.shape)

    def dense_grads(self, gw: Tensor, factors: Factors) -> Factors:
        b_VR, a_RT = self.right_pair(factors)
        a_RT = a_RT.flatten(1)
        d_VT = a_RT if b_VR is None else b_VR @ a_RT
        c_US = left_block(factors)
        # Both gradients contract it: the entries of one block as one axis, those of the other too.
        gw_UsVt = self._split(gw).transpose(1, 2).reshape(c_US.numel(), d_VT.numel())
        gc_US = self.gamma * (gw_UsVt @ d_VT.flatten()).view_as(c_US)
        gd_VT = self.gamma * (c_US.flatten() @ gw_UsVt).view_as(d_VT)
        if b_VR is None:
            right = right_grads(factors, None, gd_VT)
        else:
            right = right_grads(factors, gd_VT @ a_RT.t(), b_VR.t() @ gd_VT)
        return left_grads(factors, gc_US) | right

    def _split(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.U, self.V, self.S, -1)


class Factored(Blocks):
    """D = B A. C mixes what A gives, at the rank."""

    def token_costs(self, sizes: Sizes) -> tuple[float, float]:
        slow = self.R * skinny(self.R)
        ends, mix = sizes.T * (sizes.P + sizes.Q), sizes.T * self.U * self.S
        return ends * (slow + 10) + mix * slow, 2 * (ends + mix) * slow

    def side_(self, op: Any, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        b_VR, a_RT = self.right_pair(factors)
        assert b_VR is not None
        each = each_group(op)
        h = mix(each.narrow(each.split(x, self.S), a_RT), left_block(factors))
        return in_place(y, lambda y: each.widen_(each.split(y, self.U), h, b_VR, self.gamma))

    def token_grads(
        self, op: Any, gy: Tensor, x: Tensor, factors: Factors, gx: Tensor | None
    ) -> Factors:
        b_VR, a_RT = self.right_pair(factors)
        assert b_VR is not None
        each, c_US = each_group(op), left_block(factors)
        xs, gys = each.split(x, self.S), each.split(gy, self.U)
        h, gh = each.narrow(xs, a_RT), each.down(gys, b_VR).mul_(self.gamma)
        gc_US = cross(gh, h, self.U, self.S)
        gb_VR = each.outer(gys, mix(h, c_US)).mul(self.gamma)
        gh = mix(gh, c_US.t())
        ga_RT = each.grad_narrow(gh, xs, a_RT)
        if gx is not None:
            in_place(gx, lambda gx: each.side_(each.split(gx, self.S), gh, a_RT))
        return left_grads(factors, gc_US) | right_grads(factors, gb_VR, ga_RT)


class Full(Blocks):
    """D itself. C mixes inputs or outputs of D, whichever is less work."""

    def _inner(self) -> bool:
        """Whether C is to mix the inputs of D."""
        taps = math.prod(self.shape[2:])
        outer = self.S * self.V * (self.T * taps + self.U)
        return self.U * self.T * (self.S + self.V * taps) < outer

    def token_costs(self, sizes: Sizes) -> tuple[float, float]:
        count, width = (self.U, self.T) if self._inner() else (self.S, self.V)
        ends = count * self.V * sizes.Q / self.S
        mixes = self.U * self.S * width * skinny(self.S) + 10 * count * width
        side = sizes.T * (ends + mixes + 10 * (sizes.P + sizes.Q) / 2)
        return side, sizes.T * (ends + 2 * mixes)

    def side_(self, op: Any, y: Tensor, x: Tensor, factors: Factors) -> Tensor:
        c_US, d_VT, each = left_block(factors), factors["d_VT"], each_group(op)
        xs = each.split(x, self.S)
        if self._inner():
            h = mix(xs, c_US)
            return in_place(y, lambda y: each.apply_(each.split(y, self.U), h, d_VT, self.gamma))
        h = mix(each.apply(xs, d_VT), c_US)
        return in_place(y, lambda y: each.split(y, self.U).add_(h, alpha=self.gamma))

    def token_grads(
        self, op: Any, gy: Tensor, x: Tensor, factors: Factors, gx: Tensor | None
    ) -> Factors:
        c_US, d_VT, each = left_block(factors), factors["d_VT"], each_group(op)
        xs, gys = each.split(x, self.S), each.split(gy, self.U)
        if self._inner():
            xs = xs.contiguous()
            gh = each.back(gys, xs, d_VT, len(xs) // self.S * self.U)
            gc_US = cross(gh, xs, self.U, self.S)
            gd_VT = each.grad_apply(gys, mix(xs, c_US), d_VT)
            if gx is not None:
                back = mix(gh, c_US.t())
                in_place(gx, lambda gx: each.split(gx, self.S).add_(back, alpha=self.gamma))
        else:
            gys = gys.contiguous()
            gc_US = cross(gys, each.apply(xs, d_VT), self.U, self.S)
            gh = mix(gys, c_US.t())
            gd_VT = each.grad_apply(gh, xs, d_VT)
            if gx is not None:
                in_place(gx, lambda gx: each.back_(each.split(gx, self.S), gh, d_VT, self.gamma))
        grads = left_grads(factors, self.gamma * gc_US)
        return grads | right_grads(factors, None, self.gamma * gd_VT)


def mix(h: Tensor, c_US: Tensor) -> Tensor:
    """sum_s C[u, s] h[s], of activations (N S, ...) that lie sample by sample, group by group."""
    U, S = c_US.shape
    return shared(c_US, h.reshape(-1, S, h[0].numel())).view(-1, *h.shape[1:])


def shared(left: Tensor, rights: Tensor) -> Tensor:
    """left @ right of each; `matmul` would transpose and copy to make one product of it."""
    return torch.bmm(left.expand(len(rights), -1, -1), rights)


def add_products_(ys: Tensor, lefts: Tensor, right: Tensor, scale: float) -> None:
    """y += scale * left @ right for each, in place."""
    rights = right.expand(len(lefts), -1, -1)
    if torch.compiler.is_compiling():  # which loses how the matrices of `ys` lie in memory
        ys.add_(torch.bmm(lefts, rights), alpha=scale)
    else:
        ys.baddbmm_(lefts, rights, alpha=scale)


def cross(gh: Tensor, h: Tensor, U: int, S: int) -> Tensor:
    """The gradient of C in gh = mix(h, C)."""
    flat_gh, flat_h = gh.reshape(-1, U, gh[0].numel()), h.reshape(-1, S, h[0].numel())
    return (flat_gh @ flat_h.transpose(1, 2)).sum(0)


def in_place(y: Tensor, act: Callable[[Tensor], object]) -> Tensor:
    """`act` on y itself, or on a contiguous copy where its channels cannot be split otherwise."""
    split = y.contiguous()
    act(split)
    return y if split is y else y.copy_(split)


@dataclass(frozen=True)
class Samples:
    """The products on groups of channels of a convolution: groups are more samples."""

    op: Any

    def split(self, y: Tensor, count: int) -> Tensor:
        groups: Tensor = self.op.groups(y, count)
        return groups

    def narrow(self, xs: Tensor, a_RT: Tensor) -> Tensor:
        h: Tensor = self.op.narrow(xs, a_RT)
        return h

    apply = narrow

    def widen_(self, ys: Tensor, h: Tensor, b_VR: Tensor, scale: float) -> None:
        self.op.widen_(ys, h, b_VR, scale)

    def apply_(self, ys: Tensor, h: Tensor, d_VT: Tensor, scale: float) -> None:
        ys.add_(self.op.narrow(h, d_VT), alpha=scale)

    def down(self, gys: Tensor, b_VR: Tensor) -> Tensor:
        gh: Tensor = self.op.down(gys, b_VR)
        return gh

    def back(self, gys: Tensor, xs: Tensor, d_VT: Tensor, count: int) -> Tensor:
        gh: Tensor = self.op.grad_input(gys, (count, *xs.shape[1:]), d_VT)
        return gh

    def back_(self, gxs: Tensor, gh: Tensor, d_VT: Tensor, scale: float) -> None:
        gxs.add_(self.op.grad_input(gh, tuple(gxs.shape), d_VT), alpha=scale)

    def side_(self, gxs: Tensor, gh: Tensor, a_RT: Tensor) -> None:
        self.op.side_(gxs, gh, a_RT)

    def outer(self, gys: Tensor, h: Tensor) -> Tensor:
        gb_VR: Tensor = self.op.outer(gys, h)
        return gb_VR

    def grad_narrow(self, gh: Tensor, xs: Tensor, a_RT: Tensor) -> Tensor:
        ga_RT: Tensor = self.op.grad_weight(gh, xs, a_RT)
        return ga_RT

    grad_apply = grad_narrow


class Tokens:
    """The same of a linear layer: a matrix for each group, side by side in the input's memory.

    What `narrow` gives has the rank before the tokens, in which order skinny products are fast;
    what `apply` gives has the tokens first, as inputs and outputs have them.
    """

    def split(self, y: Tensor, count: int) -> Tensor:
        return y.reshape(-1, count, y.shape[-1] // count).transpose(0, 1)

    def narrow(self, xs: Tensor, a_RT: Tensor) -> Tensor:
        return shared(a_RT, xs.transpose(1, 2))

    def apply(self, xs: Tensor, d_VT: Tensor) -> Tensor:
        return torch.bmm(xs, d_VT.t().expand(len(xs), -1, -1))

    def widen_(self, ys: Tensor, h: Tensor, b_VR: Tensor, scale: float) -> None:
        self.apply_(ys, h.transpose(1, 2), b_VR, scale)

    def apply_(self, ys: Tensor, h: Tensor, d_VT: Tensor, scale: float) -> None:
        add_products_(ys, h, d_VT.t(), scale)

    def down(self, gys: Tensor, b_VR: Tensor) -> Tensor:
        return shared(b_VR.t(), gys.transpose(1, 2))

    def back(self, gys: Tensor, xs: Tensor, d_VT: Tensor, count: int) -> Tensor:
        return torch.bmm(gys, d_VT.expand(len(gys), -1, -1))

    def back_(self, gxs: Tensor, gh: Tensor, d_VT: Tensor, scale: float) -> None:
        add_products_(gxs, gh, d_VT, scale)

    def side_(self, gxs: Tensor, gh: Tensor, a_RT: Tensor) -> None:
        self.back_(gxs, gh.transpose(1, 2), a_RT, 1.0)

    def outer(self, gys: Tensor, h: Tensor) -> Tensor:
        return (h @ gys).sum(0).t()

    def grad_narrow(self, gh: Tensor, xs: Tensor, a_RT: Tensor) -> Tensor:
        return (gh @ xs).sum(0)

    def grad_apply(self, gh: Tensor, xs: Tensor, d_VT: Tensor) -> Tensor:
        return (gh.transpose(1, 2) @ xs).sum(0)


def each_group(op: Any) -> Any:
    """The products of a layer on each group of its channels, all of them at once."""
    return Tokens() if isinstance(op, Linear) else Samples(op)
