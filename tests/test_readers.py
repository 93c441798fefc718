"""Readers take no more memory than the file needs, and no more of it than they may."""

import tracemalloc

import pytest

from lyco_lab.errors import UserError
from lyco_lab.readers import MIB, read_bytes


def test_a_high_limit_takes_no_memory(tmp_path):
    file = tmp_path / "small"
    content = bytes(range(256)) * 5000  # more than one piece
    file.write_bytes(content)
    tracemalloc.start()
    try:
        assert read_bytes(file, 2**32) == content
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def test_a_file_may_be_as_long_as_its_limit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert read_bytes(file, 3) == b"abc"
    with pytest.raises(UserError, match="3 bytes, more than the 2"):
        read_bytes(file, 2)


def test_what_has_no_size_is_cut_off_by_the_limit():
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_bytes("/proc/self/status", 10)
