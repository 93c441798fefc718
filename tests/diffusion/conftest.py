"""Tiny models of every family, made once."""

import functools
from pathlib import Path

import pytest

from tests.conftest import tiny_tokenizer
from tests.diffusion import tiny


@pytest.fixture(scope="session")
def tiny_of(tmp_path_factory):
    """tiny_of("sdxl") -> a diffusers folder; settings beyond that go to its scheduler."""

    @functools.cache
    def tiny_of(family: str, **settings) -> Path:
        folder = tmp_path_factory.mktemp(family)
        return tiny.save(family, folder, tiny_tokenizer(), **settings)

    return tiny_of
