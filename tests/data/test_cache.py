"""The cache holds what the models say of each image and caption."""

import pytest
import torch

from lyco_lab.data import cache
from lyco_lab.data.folder import read
from lyco_lab.diffusion.model import load
from lyco_lab.errors import UserError


@pytest.fixture(scope="module")
def diffusion(tiny_sd):
    return load(tiny_sd)


@pytest.fixture(scope="module")
def dataset(tiny_concept):
    return read(tiny_concept)


def test_text_states_are_the_encoder_s_and_end_with_the_empty_caption(diffusion, dataset):
    built = cache.build(diffusion, dataset, text_states=True)
    assert built.latents.mean_NCHW.shape == (6, 4, 16, 16)
    assert set(built.text) == {"hidden"}
    hidden = built.text["hidden"]
    assert hidden.shape == (7, 32, 32)
    torch.testing.assert_close(hidden[-1:], diffusion.encode_text([""])["hidden"])
    expected = diffusion.encode_text([dataset.captions[2]])["hidden"]
    torch.testing.assert_close(hidden[2:3], expected)
    assert not hidden.requires_grad


def test_sizes_are_those_before_and_after_the_largest_square_was_cut_out(diffusion, tmp_path):
    from PIL import Image

    for i, size in enumerate([(64, 64), (128, 96), (40, 100)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a")
    sizes = cache.build(diffusion, read(tmp_path), text_states=True).sizes
    assert sizes.original_N2.tolist() == [[64, 64], [96, 128], [100, 40]]
    assert sizes.corner_N2.tolist() == [[0, 0], [0, 10], [48, 0]]  # of 64 x 85 and 160 x 64
    assert sizes.target_N2.tolist() == [[64, 64]] * 3


def test_tokens_are_kept_where_the_text_encoder_trains(diffusion, dataset):
    built = cache.build(diffusion, dataset, text_states=False)
    assert set(built.text) == {"ids"}
    ids = diffusion.tokenize([*dataset.captions, ""])["ids"]
    assert torch.equal(built.text["ids"], ids)


def test_captions_that_are_cut_are_counted(diffusion, tiny_concept, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_concept, tmp_path / "long")
    (folder / "manifest.jsonl").unlink()
    (folder / "0001.txt").write_text("word " * 20)
    assert cache.build(diffusion, read(folder), text_states=True).cut_captions == 1


def test_a_latent_that_is_not_finite_names_its_image(tiny_sd, dataset, monkeypatch):
    diffusion = load(tiny_sd)
    encode = type(diffusion).encode_images

    def overflowing(self, images):
        latents = encode(self, images)
        latents.mean_NCHW[3, 0, 0, 0] = torch.inf
        return latents

    monkeypatch.setattr(type(diffusion), "encode_images", overflowing)
    with pytest.raises(UserError, match="latent of .*0003.png that is not finite"):
        cache.build(diffusion, dataset, text_states=True)
