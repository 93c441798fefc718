"""The world as a folder: what data/ reads."""

import numpy as np
import pytest
from PIL import Image

from lyco_lab.data.folder import read
from lyco_lab.errors import UserError
from lyco_lab.miniature.concepts import CONCEPTS
from lyco_lab.miniature.export import write
from lyco_lab.miniature.vocabulary import caption
from lyco_lab.miniature.world import pictures


def test_the_folder_holds_the_world_and_every_concept(tmp_path):
    write(tmp_path / "out", 5, seed=2)
    data, drawn = read(tmp_path / "out" / "world"), pictures(5, seed=2)
    assert data.captions == [caption(s) for s in drawn.scenes]
    for item, pixels in zip(data.items, drawn.pixels, strict=True):
        assert np.array_equal(np.asarray(Image.open(item.file)), pixels)
    for name, subject in CONCEPTS.items():
        assert len(read(tmp_path / "out" / "concepts" / name).items) == subject.images


def test_writing_again_changes_nothing_and_foreign_files_are_refused(tmp_path):
    write(tmp_path, 2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    write(tmp_path, 2)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds other files .thesis.tex."):
        write(tmp_path, 2)
