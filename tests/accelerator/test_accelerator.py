"""Training, sampling and encoders on an accelerator that is not there (fake.py).

Its device can be registered once in a process, for good. So the checks run in a process of their
own, and what they say is shown where one fails.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def checked(mark: str) -> str:
    files = sorted(map(str, HERE.glob("check_*.py")))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", mark, *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("mark", ["not slow", "slow"], ids=["few", "all"])
def test_tensors_are_on_the_device_and_the_processor_waits_where_it_may(mark):
    assert " passed" in checked(mark)
