"""One small study, made once and read by all tests of what comes after training."""

import functools
from pathlib import Path

import pytest

from lyco_lab.config import Study
from tests.report import fake_study


@functools.cache
def small_study(root: Path) -> tuple[Study, Path]:
    """The study and the folder of its runs: two concepts, one a style, four images per type."""
    with pytest.MonkeyPatch.context() as patch:
        return fake_study.make(root, patch, concepts=("kael", "neon"), images_per_type=4), root
