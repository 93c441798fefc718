"""What training reads of a user's pictures is what the models say of them, as they are now."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from lyco_lab.config import Data, Run
from lyco_lab.config import Model as ModelSettings
from lyco_lab.data import cache, fingerprint, folder, scan, stage
from lyco_lab.data.batches import Batches, draw
from lyco_lab.data.folder import read_image
from lyco_lab.data.stored import Stored
from lyco_lab.diffusion.model import Diffusion, load
from lyco_lab.errors import UserError
from lyco_lab.record import Record
from tests.data import pictures

SIZES = ((64, 64), (96, 64), (64, 96), (100, 70), (128, 128))
BUCKETS = {"resolution": 64, "buckets": (32, 96, 8)}


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    monkeypatch.setattr(scan, "SETTLED_NS", -(10**12))
    monkeypatch.setattr("lyco_lab.data.check.SETTLED_NS", -(10**12))


@pytest.fixture(scope="module")
def diffusion(tiny_sd):
    return load(tiny_sd)


@pytest.fixture
def encoded(monkeypatch):
    """How many images and captions the models were given, as a test goes on."""
    seen = {"images": 0, "captions": 0}
    for name, method in (("images", "encode_images"), ("captions", "encode_text")):
        original = getattr(Diffusion, method)

        def counted(self, given, *rest, name=name, original=original):
            seen[name] += len(given)
            return original(self, given, *rest)

        monkeypatch.setattr(Diffusion, method, counted)
    return seen


@pytest.fixture
def begin(tmp_path, tiny_sd):
    """begin(flip=True) -> a run on tmp_path/in, and what it trains on; again, as a later one."""

    def begin(diffusion, text_encoder=False, out="runs", place="in", **data):
        model = ModelSettings(path=str(tiny_sd), text_encoder=text_encoder)
        where = {} if "toml" in data else {"folder": str(tmp_path / place)}
        run = Run(name="r", study="s", model=model, data=Data(**where, **data))
        shutil.rmtree(tmp_path / out / run.folder_name, ignore_errors=True)
        record = Record.open(tmp_path / out, run)
        stage.prepare(run, record)
        return stage.material(run, stage.dataset(run, record), diffusion)

    return begin


def batch_of(stored, step=0, size=4, seed=0, dropout=0.0, ranks=1, rank=0):
    order = stored.order(size, seed, rank, ranks)
    return draw(stored, order, step, timesteps=1000, caption_dropout=dropout)


def rows(stored, entries, flip=False):
    indices = torch.tensor(entries)
    flips = torch.full((len(entries),), flip)
    return stored.pictures(indices, flips, torch.zeros(len(entries), 2))


def pixels(diffusion, image):
    found = diffusion.encode_images(np.array(image)[None])
    return found.mean_NCHW[0], found.std_NCHW[0]


# It is what the models say


def test_latents_are_of_each_image_at_its_bucket(tmp_path, diffusion, begin):
    root = pictures.folder(tmp_path / "in", SIZES)
    stored = begin(diffusion, **BUCKETS)
    assert isinstance(stored, Stored)
    for entry, (width, height) in enumerate(SIZES):
        w, h = stored.samples.sizes_E2[entry].tolist()
        image = read_image(root / f"{entry}.png")
        scale = max(w / width, h / height)
        size = (round(width * scale), round(height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS) if size != image.size else image
        left, top = (size[0] - w) // 2, (size[1] - h) // 2
        found = rows(stored, [entry])
        mean, std = pixels(diffusion, image.crop((left, top, left + w, top + h)))
        torch.testing.assert_close(found.latents.mean_BCHW[0], mean)
        torch.testing.assert_close(found.latents.std_BCHW[0], std)
        assert found.sizes.original_N2.tolist() == [[height, width]]
        assert found.sizes.corner_N2.tolist() == [[top, left]]
        assert found.sizes.target_N2.tolist() == [[h, w]]
        assert found.weights is None and found.prior_B is None


def test_it_is_what_memory_holds_where_nothing_is_asked_for(
    diffusion, begin, tiny_concept, tmp_path
):
    shutil.copytree(tiny_concept, tmp_path / "in")
    stored = begin(diffusion)
    held = cache.build(diffusion, folder.read(tmp_path / "in"), text_states=True)
    assert isinstance(held, cache.Cache)
    for step in range(4):
        one, other = (batch_of(m, step, dropout=0.3) for m in (stored, held))
        assert torch.equal(one.indices_B, other.indices_B)
        for name in ("latents_BCHW", "noise_BCHW", "timesteps_B"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        torch.testing.assert_close(one.text["hidden"], other.text["hidden"])
        assert all(torch.equal(a, b) for a, b in zip(one.sizes, other.sizes, strict=True))


def test_mirrored_images_have_latents_of_their_own(tmp_path, diffusion, begin, encoded):
    root = pictures.folder(tmp_path / "in")
    stored = begin(diffusion, flip=True)
    assert encoded["images"] == 6
    mirrored = read_image(root / "1.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mean, _ = pixels(diffusion, mirrored)
    torch.testing.assert_close(rows(stored, [1], flip=True).latents.mean_BCHW[0], mean)
    shown = torch.cat([batch_of(stored, s).latents_BCHW for s in range(50)])
    means = [rows(stored, [i], flip=f).latents.mean_BCHW for i in range(3) for f in (False, True)]
    nearest = torch.stack([(shown - m).square().mean((1, 2, 3)) for m in means]).argmin(0)
    flips = (nearest % 2).float().mean().item()
    assert abs(flips - 0.5) < 0.12


def test_masks_weigh_what_they_cover(tmp_path, diffusion, begin):
    root = pictures.folder(tmp_path / "in")
    half = np.zeros((64, 64), np.uint8)
    half[:, :32] = 255
    Image.fromarray(half).save(root / "1.mask.png")
    stored = begin(diffusion, masks="files", flip=True)
    weights = rows(stored, [0, 1]).weights
    assert weights.shape == (2, 1, 16, 16)
    assert (weights[0] == 1).all()
    assert (weights[1, :, :, :8] == 1).all() and (weights[1, :, :, 8:] == 0).all()
    flipped = rows(stored, [1], flip=True).weights[0]
    assert (flipped[:, :, :8] == 0).all() and (flipped[:, :, 8:] == 1).all()


def test_what_is_transparent_counts_less(tmp_path, diffusion, begin):
    root = pictures.folder(tmp_path / "in", SIZES[:1])
    pixels = np.full((64, 64, 4), 100, np.uint8)
    pixels[:32, :, 3], pixels[32:, :, 3] = 255, 51
    Image.fromarray(pixels).save(root / "0.png")
    weights = rows(begin(diffusion, masks="alpha"), [0]).weights[0, 0]
    assert torch.allclose(weights[:8], torch.tensor(1.0))
    assert torch.allclose(weights[8:], torch.tensor(0.2))


def test_a_mask_of_another_size_is_refused(tmp_path, diffusion, begin):
    root = pictures.folder(tmp_path / "in")
    pictures.image(root / "1.mask.png", 32, 64, mode="L")
    with pytest.raises(UserError, match="mask of another size: 1.mask.png is 32 x 64 pixels, ne"):
        begin(diffusion, masks="files")
    begin(diffusion, masks="files", bad_files="drop")


def test_random_cuts_are_encoded_as_they_come(tmp_path, diffusion, begin, encoded):
    pictures.folder(tmp_path / "in", ((128, 64),))
    stored = begin(diffusion, crop="random", latents="live")
    assert encoded["images"] == 0 and not list((tmp_path / "runs/cache").glob("latents/*/*"))
    corners = {tuple(batch_of(stored, s, 1).sizes.corner_N2[0].tolist()) for s in range(20)}
    assert len(corners) > 8 and all(top == 0 and 0 <= left <= 64 for top, left in corners)
    again = begin(diffusion, crop="random", latents="live")
    assert torch.equal(batch_of(stored, 3).latents_BCHW, batch_of(again, 3).latents_BCHW)


def test_live_latents_are_those_that_would_be_kept(tmp_path, diffusion, begin):
    pictures.folder(tmp_path / "in", SIZES)
    kept, live = (begin(diffusion, latents=how, **BUCKETS) for how in ("fp32", "live"))
    for step in range(5):
        one, other = batch_of(kept, step), batch_of(live, step)
        torch.testing.assert_close(one.latents_BCHW, other.latents_BCHW)
        assert all(torch.equal(a, b) for a, b in zip(one.sizes, other.sizes, strict=True))


def test_half_precision_takes_half_the_disk(tmp_path, diffusion, begin):
    pictures.folder(tmp_path / "in")
    begin(diffusion, latents="fp32", out="a")
    stored = begin(diffusion, latents="fp16", out="b")
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / out / "cache/latents").rglob("*.safetensors"))
        for out in ("a", "b")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    assert batch_of(stored).latents_BCHW.dtype == torch.float32


# Captions


def test_captions_are_read_once_and_dropped_in_each_step(tmp_path, diffusion, begin, encoded):
    root = pictures.folder(tmp_path / "in")
    (root / "1.txt").write_text((root / "0.txt").read_text())
    stored = begin(diffusion, prefix="a photo of ")
    assert encoded["captions"] == 3  # two that differ, and the empty one
    batch = batch_of(stored)
    said = {i: stored.index.captions()[i] for i in range(3)}
    assert said[0].startswith("a photo of sks dog")
    for i, hidden in zip(batch.indices_B.tolist(), batch.text["hidden"], strict=True):
        expected = diffusion.encode_text([said[i]])["hidden"][0]
        torch.testing.assert_close(hidden, expected)
    dropped = batch_of(stored, dropout=1.0).text["hidden"]
    empty = diffusion.encode_text([""])["hidden"].expand_as(dropped)
    torch.testing.assert_close(dropped, empty)


def test_no_dropout_is_kept(tmp_path, diffusion, begin):
    pictures.folder(tmp_path / "in")
    stored = begin(diffusion)
    names = sorted(p.name for p in (tmp_path / "runs/cache/text").iterdir())
    for step in range(3):
        batch_of(stored, step, dropout=1.0)
    batch = batch_of(stored, dropout=0.0)
    assert not torch.equal(batch.text["hidden"], batch_of(stored, dropout=1.0).text["hidden"])
    assert names == sorted(p.name for p in (tmp_path / "runs/cache/text").iterdir())


def test_drawn_tags_are_token_numbers_in_every_step(tmp_path, diffusion, begin, encoded):
    pictures.folder(tmp_path / "in", SIZES[:1])
    stored = begin(diffusion, shuffle_tags=True, keep_tags=1)
    assert encoded["captions"] == 0
    seen = set()
    for step in range(20):
        (ids,) = batch_of(stored, step, size=1).text["ids"]
        seen.add(tuple(ids.tolist()))
    wanted = ["sks dog, tag 0, outside", "sks dog, outside, tag 0"]
    assert seen == {tuple(ids) for ids in diffusion.tokenize(wanted)["ids"].tolist()}
    dropped = batch_of(stored, dropout=1.0).text["ids"]
    assert torch.equal(dropped[0], diffusion.tokenize([""])["ids"][0])


def test_text_encoders_that_train_get_token_numbers(tmp_path, diffusion, begin, encoded):
    pictures.folder(tmp_path / "in")
    stored = begin(diffusion, text_encoder=True)
    batch = batch_of(stored)
    said = [stored.index.captions()[i] for i in batch.indices_B.tolist()]
    assert torch.equal(batch.text["ids"], diffusion.tokenize(said)["ids"])
    assert encoded["captions"] == 0


def test_captions_that_are_cut_are_counted_by_image(tmp_path, diffusion, begin, capsys):
    root = pictures.folder(tmp_path / "in")
    for name in ("0.txt", "1.txt"):
        (root / name).write_text("word " * 40)
    assert begin(diffusion).cut_captions == 2
    (kept,) = (tmp_path / "runs/cache/text").glob("cut-*")
    good = kept.read_bytes()
    for spoilt in (good, b"3" + good[1:], good[:-1], b"", b"2"):
        kept.write_bytes(spoilt)
        capsys.readouterr()
        assert begin(diffusion).cut_captions == 2
        assert ("captions are counted anew" in capsys.readouterr().out) == (spoilt != good)
        assert kept.read_bytes() == good


@pytest.fixture(scope="module")
def longer(tiny_sd):
    """longer(60) -> a model that reads so many tokens of a caption, 30 at once."""
    return lambda tokens: load(ModelSettings(path=str(tiny_sd), max_token_length=tokens))


def test_captions_are_kept_at_each_length_by_itself(tmp_path, begin, longer, encoded):
    """Whatever other lengths there are in the cache beside it, and counted where they are cut."""
    root = pictures.folder(tmp_path / "in")
    for number, length in enumerate((30, 31, 61)):
        (root / f"{number}.txt").write_text("ab" * (length // 2) + "a" * (length % 2))
    seen = []
    for tokens, cut, new in ((None, 2, 4), (30, 2, 0), (60, 1, 4), (90, 0, 4), (60, 1, 0)):
        model, before = longer(tokens), encoded["captions"]
        stored = begin(model)
        assert (stored.cut_captions, encoded["captions"] - before) == (cut, new)
        for dropout in (0.0, 1.0):
            batch = batch_of(stored, dropout=dropout)
            captions = stored.index.captions()
            said = ["" if dropout else captions[i] for i in batch.indices_B.tolist()]
            hidden = model.encode_text(said)["hidden"]
            assert batch.text["hidden"].shape == (4, (tokens or 30) + 2, 32)
            torch.testing.assert_close(batch.text["hidden"], hidden)
        seen.append(stored.text_print)
    assert seen[0] == seen[1] and seen[2] == seen[4] and len(set(seen)) == 3


@pytest.mark.parametrize("drawn", [{"shuffle_tags": True}, {"text_encoder": True}], ids=str)
def test_long_captions_that_are_read_in_each_step_are_of_all_chunks(
    tmp_path, begin, longer, encoded, drawn
):
    root = pictures.folder(tmp_path / "in", SIZES[:1])
    (root / "0.txt").write_text("abcdefghijklmnopqrstuvwxyz, " * 2 + "ABC")
    model = longer(60)
    stored = begin(model, **drawn)
    orders = {tuple(batch_of(stored, step, size=1).text["ids"][0].tolist()) for step in range(20)}
    z = "abcdefghijklmnopqrstuvwxyz"
    tags = [[z, z, "ABC"], [z, "ABC", z], ["ABC", z, z]][: 3 if "shuffle_tags" in drawn else 1]
    said = model.tokenize([", ".join(one) for one in tags])["ids"].tolist()
    assert orders == {tuple(ids) for ids in said}
    dropped = batch_of(stored, size=1, dropout=1.0).text["ids"]
    assert torch.equal(dropped, model.tokenize([""])["ids"]) and dropped.shape == (1, 64)
    assert stored.cut_captions == 0 and encoded["captions"] == 0


def test_each_source_may_drop_captions_at_its_own_rate(tmp_path, diffusion, begin):
    for name in "ab":
        pictures.folder(tmp_path / name)
    (tmp_path / "x.toml").write_text(
        '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\n'
        f'[[datasets.subsets]]\nimage_dir = "{tmp_path / "a"}"\ncaption_dropout_rate = 1.0\n'
        f'[[datasets.subsets]]\nimage_dir = "{tmp_path / "b"}"\n'
    )
    stored = begin(diffusion, toml=str(tmp_path / "x.toml"))
    batch = batch_of(stored, size=12)
    empty = diffusion.encode_text([""])["hidden"][0]
    for i, hidden in zip(batch.indices_B.tolist(), batch.text["hidden"], strict=True):
        assert torch.allclose(hidden, empty, atol=1e-5) == (i < 3)


# Prior images


def test_prior_images_take_their_share_and_weight(tmp_path, diffusion, begin):
    pictures.folder(tmp_path / "in", ((64, 64), (96, 64)))
    pictures.folder(tmp_path / "5_dog", ((128, 128), (120, 110), (200, 70)))
    settings = BUCKETS | {"prior": str(tmp_path / "5_dog"), "prior_weight": 0.25}
    stored = begin(diffusion, **settings, prior_share=0.25)
    for step in range(8):
        batch = batch_of(stored, step, size=4)
        assert batch.prior_B.sum() == 1
        assert torch.equal(batch.weights.flatten(), torch.where(batch.prior_B, 0.25, torch.ones(4)))
        assert batch.latents_BCHW.shape[0] == 4
    record = json.loads(next((tmp_path / "runs").glob("*/done/data.json")).read_text())["facts"]
    assert (record["images"], record["prior_images"]) == (2, 3)


def test_masks_and_prior_weights_multiply(tmp_path, diffusion, begin):
    root = pictures.folder(tmp_path / "in", ((64, 64),))
    pictures.folder(tmp_path / "prior", ((64, 64),))
    half = np.full((64, 64), 51, np.uint8)
    Image.fromarray(half).save(root / "0.mask.png")
    stored = begin(diffusion, masks="files", prior=str(tmp_path / "prior"), prior_weight=0.5)
    weights = rows(stored, [0, 1]).weights
    torch.testing.assert_close(weights[0], torch.full((1, 16, 16), 0.2))
    torch.testing.assert_close(weights[1], torch.full((1, 16, 16), 0.5))


def test_prior_images_that_fit_no_size_are_an_error(tmp_path, diffusion, begin):
    pictures.folder(tmp_path / "in", ((96, 64),))
    pictures.folder(tmp_path / "prior", ((64, 64),))
    with pytest.raises(UserError, match="trained at 72 x 48 pixels|no prior image is that large"):
        begin(diffusion, resolution=80, buckets=(32, 96, 8), prior=str(tmp_path / "prior"))


# It cannot be out of date


def test_nothing_is_encoded_twice(tmp_path, diffusion, begin, encoded):
    pictures.folder(tmp_path / "in", SIZES)
    first = begin(diffusion, **BUCKETS)
    assert encoded == {"images": 5, "captions": 6}
    again = begin(diffusion, **BUCKETS)
    assert encoded == {"images": 5, "captions": 6}
    for step in range(5):
        assert torch.equal(batch_of(first, step).latents_BCHW, batch_of(again, step).latents_BCHW)


def test_touched_renamed_and_copied_images_keep_their_latents(tmp_path, diffusion, begin, encoded):
    root = pictures.folder(tmp_path / "in")
    begin(diffusion)
    os.utime(root / "0.png")
    (root / "1.png").rename(root / "9.png")
    (root / "1.txt").rename(root / "9.txt")
    shutil.copytree(root, tmp_path / "copy")
    begin(diffusion)
    begin(diffusion, place="copy")
    assert encoded == {"images": 3, "captions": 4}


def test_an_edited_image_gets_new_latents(tmp_path, diffusion, begin, encoded):
    root = pictures.folder(tmp_path / "in")
    old = rows(begin(diffusion), [1]).latents.mean_BCHW
    stamp = (root / "1.png").stat()
    pictures.image(root / "1.png", seed=77)
    os.utime(root / "1.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    stored = begin(diffusion)
    assert encoded["images"] == 4
    mean, _ = pixels(diffusion, read_image(root / "1.png"))
    new = rows(stored, [1]).latents.mean_BCHW
    torch.testing.assert_close(new[0], mean)
    assert not torch.allclose(new, old)


def test_an_edited_caption_is_read_anew(tmp_path, diffusion, begin, encoded):
    root = pictures.folder(tmp_path / "in")
    begin(diffusion)
    (root / "1.txt").write_text("another thing")
    stored = begin(diffusion)
    assert encoded == {"images": 3, "captions": 5}
    hidden = stored.texts(torch.tensor([1]), torch.tensor([False]), lambda place: 0)["hidden"]
    torch.testing.assert_close(hidden, diffusion.encode_text(["another thing"])["hidden"])


def test_an_edited_mask_is_seen(tmp_path, diffusion, begin):
    root = pictures.folder(tmp_path / "in")
    for value in (255, 0):
        Image.fromarray(np.full((64, 64), value, np.uint8)).save(root / "1.mask.png")
        weights = rows(begin(diffusion, masks="files"), [1]).weights
        assert (weights == value / 255).all()


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_another_model_finds_nothing(tmp_path, tiny_sd, begin, encoded, part):
    pictures.folder(tmp_path / "in")
    begin(load(tiny_sd))
    assert encoded == {"images": 3, "captions": 4}
    other = load(tiny_sd)
    weights = next(iter(getattr(other, part).parameters()))
    weights.data.view(-1)[0] += 1e-3
    begin(other)
    assert encoded == {"images": 3 * (1 + (part == "vae")), "captions": 4 * (2 - (part == "vae"))}


def test_a_tokenizer_is_the_same_however_it_was_used(tiny_sd):
    tokenizer = load(tiny_sd).tokenizer
    before = fingerprint.tokenizer(tokenizer)
    tokenizer("abc", truncation=False)
    assert fingerprint.tokenizer(tokenizer) == before
    tokenizer("abc", padding="max_length", max_length=9, truncation=True)
    assert fingerprint.tokenizer(tokenizer) == before
    tokenizer.model_max_length = 16
    assert fingerprint.tokenizer(tokenizer) != before


def test_other_settings_of_the_vae_are_another_vae(tmp_path, tiny_sd, begin, encoded):
    pictures.folder(tmp_path / "in")
    begin(load(tiny_sd))
    other = load(tiny_sd)
    other.vae.register_to_config(scaling_factor=0.5)
    begin(other)
    assert encoded["images"] == 6


def test_other_settings_of_the_model_are_other_texts(tmp_path, diffusion, begin, encoded):
    pictures.folder(tmp_path / "in")
    begin(diffusion)
    begin(replace(diffusion, dtype=torch.bfloat16))
    assert encoded["images"] == 3


@pytest.mark.parametrize(
    "settings", [{"resolution": 96}, {"flip": True}, {"masks": "alpha"}, {"latents": "fp16"}]
)
def test_sizes_flips_masks_and_precision_are_kept_apart(
    tmp_path, diffusion, begin, encoded, settings
):
    pictures.folder(tmp_path / "in", ((128, 128),) * 3)
    for given in ({}, settings, settings, {}):
        begin(diffusion, **given)
    assert encoded["images"] == 6


@pytest.mark.parametrize("what", ["latents", "text"])
@pytest.mark.parametrize("when", ["before the start", "in the midst"])
def test_a_damaged_file_is_made_anew_with_the_same_bits(
    tmp_path, diffusion, begin, capsys, what, when
):
    pictures.folder(tmp_path / "in")
    stored = begin(diffusion)
    before = [batch_of(stored, step) for step in range(3)]
    (file,) = (tmp_path / "runs/cache" / what).rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4] = bytes(255 - b for b in data[middle : middle + 4])
    if when == "before the start":
        file.write_bytes(data)
        stored = begin(diffusion)
    else:
        with open(file, "r+b") as opened:
            opened.write(data)
    capsys.readouterr()
    after = [batch_of(stored, step) for step in range(3)]
    assert "was damaged, and is made anew" in capsys.readouterr().out
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.latents_BCHW, other.latents_BCHW)
        assert torch.equal(one.text["hidden"], other.text["hidden"])


def test_a_build_that_was_stopped_goes_on(tmp_path, diffusion, begin, encoded, monkeypatch):
    pictures.folder(tmp_path / "in", ((64, 64),) * 40)
    monkeypatch.setattr("lyco_lab.data.stored.SHARD_BYTES", 1)
    original = Diffusion.encode_images

    def stopping(self, images, *rest):
        if encoded["images"] >= 32:
            raise KeyboardInterrupt
        return original(self, images, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Diffusion, "encode_images", stopping)
        with pytest.raises(KeyboardInterrupt):
            begin(diffusion)
    stored = begin(diffusion)
    assert encoded["images"] == 40
    assert len({batch_of(stored, s, 1).latents_BCHW.sum().item() for s in range(40)}) == 40


def test_a_latent_that_is_not_finite_names_its_image(tmp_path, diffusion, begin, monkeypatch):
    pictures.folder(tmp_path / "in")
    original = Diffusion.encode_images

    def overflowing(self, images, *rest):
        latents = original(self, images, *rest)
        latents.mean_NCHW[1, 0, 0, 0] = torch.nan
        return latents

    monkeypatch.setattr(Diffusion, "encode_images", overflowing)
    with pytest.raises(UserError, match="latent of .*1.png that is not finite in fp32"):
        begin(diffusion)


# Processes


def test_two_processes_see_the_halves_of_a_batch(tmp_path, diffusion, begin):
    pictures.folder(tmp_path / "in", SIZES)
    stored = begin(diffusion, **BUCKETS, flip=True)
    for step in range(4):
        whole = batch_of(stored, step, size=4, dropout=0.5)
        halves = [batch_of(stored, step, size=2, dropout=0.5, ranks=2, rank=r) for r in (0, 1)]
        for name in ("indices_B", "latents_BCHW", "noise_BCHW", "timesteps_B"):
            joined = torch.cat([getattr(half, name) for half in halves])
            assert torch.equal(joined, getattr(whole, name))
        joined = torch.cat([half.text["hidden"] for half in halves])
        assert torch.equal(joined, whole.text["hidden"])


def test_two_processes_draw_the_tags_that_one_would(tmp_path, diffusion, begin):
    root = pictures.folder(tmp_path / "in", ((64, 64),))
    (root / "0.txt").write_text("a, b, c, d, e, f, g")
    stored = begin(diffusion, shuffle_tags=True)
    whole = batch_of(stored, size=4).text["ids"]
    halves = [batch_of(stored, size=2, ranks=2, rank=r).text["ids"] for r in (0, 1)]
    assert torch.equal(torch.cat(halves), whole)
    assert len({tuple(row) for row in whole.tolist()}) == 4


def test_a_run_goes_on_where_it_was(tmp_path, diffusion, begin):
    pictures.folder(tmp_path / "in", SIZES)
    settings = BUCKETS | {"flip": True, "shuffle_tags": True, "tag_dropout": 0.3}

    def batches(start):
        stored = begin(diffusion, **settings)
        order = stored.order(3, 0)
        return list(Batches(stored, order, start, 9, timesteps=1000, caption_dropout=0.2))

    for one, other in zip(batches(0)[5:], batches(5), strict=True):
        assert torch.equal(one.latents_BCHW, other.latents_BCHW)
        assert torch.equal(one.text["ids"], other.text["ids"])
