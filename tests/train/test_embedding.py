"""A word that trains: its vectors move, and nothing else of the text encoders; all is reloaded."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lyco_lab.config import Embedding, Generate
from lyco_lab.data.stage import prepare
from lyco_lab.diffusion import word
from lyco_lab.diffusion.model import load
from lyco_lab.errors import UserError
from lyco_lab.formats import embedding, kohya
from lyco_lab.generate import generate
from lyco_lab.record import Record
from lyco_lab.train import train
from lyco_lab.train.module import Training
from tests.conftest import CLASS, TRIGGER, tiny_tokenizer
from tests.diffusion import tiny
from tests.train.test_stage import rows

WORD = Embedding(token=TRIGGER, init="c", lr=1e-2)


@pytest.fixture
def of_word(begin, tmp_path):
    """A run with a word, and its folder."""

    def of_word(where="word", embedding=WORD, data=None, **settings):
        run, _ = begin(where, **({"steps": 4} | settings))
        run = dataclasses.replace(run, embedding=embedding, data=data or run.data)
        record = Record.open(tmp_path / where, run)
        prepare(run, record)
        return run, record

    return of_word


def vectors(record):
    return embedding.load(record.path / "embeddings" / f"{TRIGGER}.safetensors")


def test_a_new_word_begins_as_what_it_is_told(tiny_sd):
    plain, taught = load(tiny_sd), load(tiny_sd)
    word.add(taught, TRIGGER, word.mean(taught, "c"))
    assert word.occurs(taught, TRIGGER, f"a {TRIGGER}, b") and TRIGGER.upper() != TRIGGER
    assert word.occurs(taught, TRIGGER, f"a {TRIGGER.upper()} b")
    for text in ("a", f"{TRIGGER}s", f"x{TRIGGER}", ""):
        assert not word.occurs(taught, TRIGGER, text)
    for said, meant in (
        (f"a {TRIGGER} b", "a c b"),
        ("a b", "a b"),
        (f"{TRIGGER}s", f"{TRIGGER}s"),
    ):
        expected = plain.encode_text([meant])["hidden"]
        assert torch.equal(taught.encode_text([said])["hidden"], expected)
    assert (plain.encode_text([f"a {TRIGGER} b"])["hidden"] != expected).any()


def test_several_words_begin_as_their_mean(tiny_sd):
    diffusion = load(tiny_sd)
    table = diffusion.text_encoder.get_input_embeddings().weight
    ids = diffusion.tokenizer("c d", add_special_tokens=False).input_ids
    assert len(ids) == 2
    torch.testing.assert_close(
        word.mean(diffusion, "c d")["text_encoder"], table[ids].mean(0, keepdim=True)
    )


@pytest.mark.parametrize("text_encoder", [False, True])
def test_only_the_word_and_the_factors_move(of_word, monkeypatch, text_encoder):
    run, record = of_word(text_encoder=text_encoder)
    kept = []
    made = Training.__init__
    monkeypatch.setattr(
        Training, "__init__", lambda self, *a: (made(self, *a), kept.append(self))[0]
    )
    start = word.mean(load(run.model.path), "c")["text_encoder"]
    train(run, record)
    (module,) = kept
    (own,) = module.words.values()
    fresh = load(run.model.path)
    assert torch.equal(own.base.weight, fresh.text_encoder.get_input_embeddings().weight)
    assert own.base.weight.grad is None
    for mounted in module.mounted.values():
        mounted.detach()
    module.diffusion.text_encoder.set_input_embeddings(own.base)
    for part, model in fresh.parts.items():
        ours = module.diffusion.parts[part].state_dict()
        assert all(torch.equal(ours[name], w) for name, w in model.state_dict().items())
    saved = vectors(record)["text_encoder"]
    assert torch.equal(saved, own.vector_1D) and not torch.equal(saved, start)
    # Adam's steps are of lr, in the warm-up of half of it.
    assert float((saved - start).abs().max()) <= 1e-2 * (0.5 + 3) * 1.01
    assert record.facts("train")["trainable_params"] == saved.numel() + sum(
        m.num_params for m in module.mounted.values()
    )


def test_the_layout_is_what_other_programs_read(of_word):
    from diffusers import StableDiffusionPipeline

    run, record = of_word()
    train(run, record)
    file = record.path / "embeddings" / f"{TRIGGER}.safetensors"
    assert {key: tuple(t.shape) for key, t in load_file(file).items()} == {"emb_params": (1, 32)}
    pipeline = StableDiffusionPipeline.from_pretrained(run.model.path)
    pipeline.load_textual_inversion(str(file), token=TRIGGER)
    theirs, _ = pipeline.encode_prompt(f"a {TRIGGER} b", "cpu", 1, False)
    diffusion = load(run.model.path)
    word.add(diffusion, TRIGGER, embedding.load(file))
    ours = diffusion.encode_text([f"a {TRIGGER} b"])["hidden"]
    torch.testing.assert_close(ours, theirs.float(), atol=1e-6, rtol=1e-5)


def test_a_vector_is_not_drawn_to_zero_and_has_its_own_rate(of_word):
    run, _ = of_word(optimizer={"kind": "adamw", "weight_decay": 0.5})
    from lyco_lab.train.stage import mount, training

    diffusion = load(run.model.path)
    module = training(run, diffusion, mount(run, diffusion))
    groups = {group["name"]: group for group in module.optimizer.param_groups}
    own = groups["text_encoder, embedding"]
    assert (own["lr"], own["weight_decay"]) == (1e-2, 0.0)
    assert groups["unet"]["weight_decay"] == 0.5
    assert [p is module.words["text_encoder"].vector_1D for p in own["params"]] == [True]


def test_a_run_with_a_word_that_was_stopped_goes_on_bit_for_bit(of_word, results, interrupted):
    settings = {"steps": 8, "ema_decay": 0.6}
    run, straight = of_word("straight", **settings)
    train(run, straight)
    run, record = of_word("stopped", **settings)
    interrupted(run, record, after=6)
    train(run, record)
    assert results(record) == results(straight)
    assert torch.equal(vectors(record)["text_encoder"], vectors(straight)["text_encoder"])


def test_blocks_computed_twice_change_no_bit_of_a_word(of_word, results):
    found = []
    for where, twice in (("once", False), ("twice", True)):
        run, record = of_word(where, gradient_checkpointing=twice)
        train(run, record)
        found.append((rows(record), vectors(record)["text_encoder"]))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_images_are_generated_with_the_word_and_the_base_model_s_without(of_word):
    run, _ = of_word(text_encoder=True)
    asked = Generate(types=("trigger",), images_per_type=1, steps=2, batch_size=1)
    run = dataclasses.replace(run, generate=asked)
    record = Record.open(of_word("images")[1].path.parent, run)
    prepare(run, record)
    train(run, record)
    generate(run, record)

    def drawn(diffusion):
        return diffusion.sample([f"{TRIGGER} {CLASS}"], [1000], steps=2, guidance=5.0)[0]

    def shown(folder):
        with Image.open(folder / "trigger" / "0000.png") as image:
            return np.asarray(image)

    plain, taught = load(run.model.path), load(run.model.path)
    base = drawn(plain)
    word.add(taught, TRIGGER, vectors(record))
    for mounted in kohya.apply(record.path / "adapter.safetensors", taught.parts).values():
        mounted.merge()
    assert (shown(record.path / "generate") == drawn(taught)).all()
    (folder,) = (record.path.parent / "base").iterdir()
    assert (shown(folder) == base).all()


# Other families


def test_each_text_encoder_of_sdxl_has_its_vector(tmp_path):
    folder = tiny.save("sdxl", tmp_path / "sdxl", tiny_tokenizer())
    plain, taught = load(folder), load(folder)
    # As the genuine SDXL's configuration has it.
    for diffusion in (plain, taught):
        diffusion.text_encoder_2.text_model.eos_token_id = 2
    texts, asked = ["a b", "", "c"], word.mean(taught, "c")
    before = taught.encode_text(texts)
    word.add(taught, TRIGGER, asked)
    for name, rows_ in taught.encode_text(texts).items():
        assert torch.equal(rows_, before[name]), name
    expected = plain.encode_text(["a c b"])
    for name, rows_ in taught.encode_text([f"a {TRIGGER} b"]).items():
        assert torch.equal(rows_, expected[name]), name
    embedding.save(tmp_path / "x.safetensors", asked)
    assert sorted(load_file(tmp_path / "x.safetensors")) == ["clip_g", "clip_l"]
    for name, vector in embedding.load(tmp_path / "x.safetensors").items():
        assert torch.equal(vector, asked[name])


# What cannot work


def test_a_word_that_no_caption_has_is_an_error(of_word):
    run, record = of_word(embedding=Embedding(token="absent", init="c"))
    with pytest.raises(UserError, match="embedding.token is 'absent', but none of the 6 captions"):
        train(run, record)


def test_a_word_that_is_a_token_is_an_error(tiny_sd):
    diffusion = load(tiny_sd)
    with pytest.raises(UserError, match="'c' is a token of the text_encoder already"):
        word.add(diffusion, "c", word.mean(diffusion, "a"))


def test_vectors_of_another_model_are_refused(tiny_sd, tmp_path):
    diffusion = load(tiny_sd)
    with pytest.raises(UserError, match="a vector of 8 numbers for the text_encoder, whose .* 32"):
        word.add(diffusion, TRIGGER, {"text_encoder": torch.zeros(1, 8)})
    both = {"text_encoder": torch.zeros(1, 32), "text_encoder_2": torch.zeros(1, 32)}
    with pytest.raises(UserError, match="but the model's text encoders are text_encoder"):
        word.add(diffusion, TRIGGER, both)
    with pytest.raises(UserError, match="cannot read .*none.safetensors: no such file"):
        embedding.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_text("no")
    with pytest.raises(UserError, match="bad.safetensors is damaged: it is no safetensors file"):
        embedding.load(tmp_path / "bad.safetensors")
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(b"")
    embedding.save(kept, {"text_encoder": torch.zeros(1, 4)})
    assert list(load_file(kept)) == ["emb_params"]


def test_no_gamma_of_such_a_run_is_moved(of_word):
    from lyco_lab.gamma import obstacle

    run, _ = of_word()
    assert "vector of a token trains beside" in obstacle(run)
    assert not obstacle(dataclasses.replace(run, embedding=Embedding()))
