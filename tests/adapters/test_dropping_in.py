"""An adapter is one file: a new one, dropped into a copy of the package, passes the contract."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEW = '''"""Shift: every weight of an output row gains the same number.

    W' = W + alpha * v 1^T
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from lyco_lab.adapters.base import Additive, OfAlpha
from lyco_lab.adapters.shapes import Factors, Shape


@dataclass(frozen=True)
class Shift(OfAlpha, Additive):
    file_algo: ClassVar = "shift"
    file_names: ClassVar = {"v_P": "shift"}
    scaling: ClassVar = ("v_P",)
    zero: ClassVar = ("v_P",)

    def init(self, weight: Tensor, rng: Generator) -> Factors:
        return {"v_P": weight.new_zeros(weight.shape[0])}

    def transform(self, factors: Factors, shape: Shape) -> Tensor:
        return factors["v_P"].view(-1, *[1] * (len(shape) - 1)).expand(shape)

    def num_params(self, shape: Shape) -> int:
        return shape[0]

    def max_rank(self, shape: Shape) -> int:
        return 1
'''
FAULTS = [("return 1\n", "return 2\n"), ('zero: ClassVar = ("v_P",)', "zero: ClassVar = ()")]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_new_file_is_all_it_takes(tmp_path, fault):
    """And a false claim in it is found."""
    for part in ("lyco_lab", "tests", "pyproject.toml"):
        source = ROOT / part
        ignore = shutil.ignore_patterns("__pycache__", "weights")
        if source.is_dir():
            shutil.copytree(source, tmp_path / part, ignore=ignore)
        else:
            shutil.copy(source, tmp_path / part)
    text = NEW if fault is None else NEW.replace(*fault)
    (tmp_path / "lyco_lab/adapters/shift.py").write_text(text)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "shift or Shift"]
        + ["tests/adapters/test_contract.py", "tests/test_architecture.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed)", run.stdout)}
    assert counts.get("passed", 0) >= 15, run.stdout[-3000:] + run.stderr[-3000:]
    assert counts.get("failed", 0) == (0 if fault is None else 1), run.stdout[-3000:]
