"""Algorithms that give the same bits each time, or the names of the operations that have none.

A training begins strictly: an operation without an exact algorithm is an error, which ends it at
the first step that needs one. It is then begun again, and such operations only warn; their names
are kept with the run, which claims no bits. To warn from the start would not do: torch's fused
attention has an exact backward pass, and takes it only where anything else is an error.

    attention          flash and memory-efficient, in their exact form, and the plain one; cuDNN's
                       has no exact backward pass
    products           cuBLAS with a workspace of its own for each stream
    convolutions       by cuDNN's exact algorithms, chosen without timing them
    float32            in full, not in TF32
"""

import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lyco_lab.errors import UserError

# Looked at with a process's first product on a GPU, whichever stage that is in.
WORKSPACE = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
ATTENTION = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
NAMED = re.compile(
    r"(.+?) (?:does not have a deterministic implementation"
    r"|defaults to a non-deterministic algorithm)"
)
OF_CUBLAS = "is not deterministic because it uses CuBLAS"


class Inexact(UserError):
    """An operation has no exact algorithm on this device."""

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"{operation} has no exact algorithm on this device, so no two runs are sure to be "
            "equal bit for bit"
        )
        self.operation = operation


def operation(message: str) -> str | None:
    """The operation that torch says has no exact algorithm, in an error or a warning."""
    if OF_CUBLAS in message:
        return f"cuBLAS with CUBLAS_WORKSPACE_CONFIG={WORKSPACE}"
    found = NAMED.match(message)
    return found[1] if found else None


@dataclass
class Exactness:
    """How exact a training is."""

    threads: int  # sums are split among them
    operations: set[str] = field(default_factory=set)  # without an exact algorithm

    def facts(self, device: str) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "threads": self.threads,
            "nondeterministic": sorted(self.operations),
        }
        if device == "cuda":
            facts["kernels"] = {
                "attention": [backend.name.lower() for backend in ATTENTION],
                "cublas_workspace": WORKSPACE,
                "cudnn_benchmark": False,
                "tf32": False,
            }
        return facts


@contextmanager
def exact(
    threads: int | None, *, strict: bool = True, operations: Iterable[str] = ()
) -> Iterator[Exactness]:
    """Exact algorithms, where there are any.

    A run that goes on takes the number of threads it began with. Unless `strict`, operations
    without an exact algorithm join those that are known of before.
    """
    memory: Any = torch.utils.deterministic
    cudnn: Any = torch.backends.cudnn
    products: Any = torch.backends.cuda.matmul
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_warn_always_enabled(),
        memory.fill_uninitialized_memory,
        cudnn.benchmark,
        cudnn.allow_tf32,
        products.allow_tf32,
        torch.get_num_threads(),
    )
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.set_warn_always(not strict)  # not only once in a process
    memory.fill_uninitialized_memory = False  # a debugging aid that costs time
    cudnn.benchmark = cudnn.allow_tf32 = products.allow_tf32 = False
    if threads is not None and threads != torch.get_num_threads():
        print(f"going on with {threads} threads, as this run began")
        torch.set_num_threads(threads)
    found = Exactness(torch.get_num_threads(), set(operations))
    try:
        with sdpa_kernel(list(ATTENTION)), _noting(found.operations):
            yield found
    except RuntimeError as error:
        if strict and (name := operation(str(error))) is not None:
            raise Inexact(name) from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.set_warn_always(before[2])
        memory.fill_uninitialized_memory = before[3]
        cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32 = before[4:7]
        torch.set_num_threads(before[7])


@contextmanager
def _noting(operations: set[str]) -> Iterator[None]:
    """Warnings of operations without an exact algorithm are noted instead of shown."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if (name := operation(str(message))) is not None:
            operations.add(name)
        else:
            shown(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=NAMED.pattern)
        warnings.filterwarnings("always", message=f".*{OF_CUBLAS}")
        shown, warnings.showwarning = warnings.showwarning, show
        yield
