"""Mathematics that several adapters share.

Shapes: a weight is (P, Q, *kernel), P outputs and Q inputs. Where a matrix is meant, it is the
unrolled weight P x QK with K the product of the kernel's sides, so that a kernel's taps are the
fastest index of a column, as `weight.flatten(1)` lays them out.
"""

import math

import torch
from torch import Generator, Tensor


def unrolled(shape: tuple[int, ...]) -> tuple[int, int]:
    """(P, QK): the sides of the matrix that a weight of this shape unrolls to."""
    return shape[0], math.prod(shape[1:])


def split(size: int, factor: int) -> tuple[int, int]:
    """size = u * v with u the largest divisor that exceeds neither `factor` nor sqrt(size).

    This is the paper's rule (its equation 5). lycoris-lora's `factorization` differs where
    `factor` divides `size` and exceeds its root: 1024 by 64 is (16, 64) there and (32, 32) here.
    Its loader applies its own rule, so it cannot read a LoKr file with factored blocks that holds
    such a layer, as `conv_in` with 4 inputs is by a factor of 4; full blocks it can.
    """
    u = max(1, min(factor, math.isqrt(size)))
    while size % u:  # seldom far; a cache would hide this function from torch.compile
        u -= 1
    return u, size // u


def kron(left_US: Tensor, right_VTk: Tensor) -> Tensor:
    """Kronecker product on the channel axes, (U V, S T, *kernel); the kernel is the right one's.

    Unrolled, it is the ordinary Kronecker product of `left_US` and the unrolled `right_VTk`.
    """
    (U, S), (V, T), kernel = left_US.shape, right_VTk.shape[:2], right_VTk.shape[2:]
    product_UVSTk = left_US.view(U, 1, S, 1) * right_VTk.reshape(1, V, 1, -1)
    return product_UVSTk.view(U * V, S * T, *kernel)


def through_core(core_RRk: Tensor, a_RQ: Tensor) -> Tensor:
    """The kernel of R x Q channels that does the work of a single tap A and then of a core.

    out[r, q, k] = sum_s core[r, s, k] A[s, q]
    """
    return (core_RRk.movedim(1, -1) @ a_RQ).movedim(-1, 1).contiguous()


def through_core_grads(core_RRk: Tensor, a_RQ: Tensor, grad_RQk: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of core and A from that of `through_core`."""
    grad_RkQ = grad_RQk.movedim(1, -1)
    core_NR = core_RRk.movedim(1, -1).flatten(0, -2)  # N the pairs of an output and a tap
    return (grad_RkQ @ a_RQ.t()).movedim(-1, 1), core_NR.t() @ grad_RkQ.flatten(0, -2)


def kaiming(like: Tensor, *shape: int, fan_in: int, rng: Generator) -> Tensor:
    """Uniform on +-1/sqrt(fan_in), with the dtype and device of `like`.

    The same as torch's `kaiming_uniform_` with a = sqrt(5), with which its own layers start.
    """
    bound = 1 / math.sqrt(fan_in)
    return like.new_empty(shape).uniform_(-bound, bound, generator=rng)


def cayley_inverse(q: Tensor) -> Tensor:
    """K = (I - Q)^-1 of skew blocks Q, for the rotation R = (I + Q) (I - Q)^-1 = 2 K - I."""
    return torch.linalg.inv(torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) - q)


def cayley_offset(q: Tensor) -> Tensor:
    """R - I = 2 Q K with the relative precision of Q, which a difference of R and I has not."""
    return 2 * (q @ cayley_inverse(q))


def cayley_grad(k: Tensor, gr: Tensor) -> Tensor:
    """The gradient of Q from that of R: since R = 2 K - I, 2 K^T gR K^T."""
    return 2 * (k.mT @ gr @ k.mT)


def butterfly_block(size: int, most: int) -> int | None:
    """The largest even b <= `most` for which size / b is a power of two; None where there is none.

    This is lycoris-lora's `power2factorization`.
    """
    b, largest = 2 * odd_part(size), None
    while b <= min(size, most):
        b, largest = 2 * b, b
    return largest


def odd_part(size: int) -> int:
    return size // (size & -size)
