"""Long texts are read chunk by chunk and joined, and short ones as they always were."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lyco_lab.config import Model
from lyco_lab.diffusion import word
from lyco_lab.diffusion.model import fingerprint, load, sound
from lyco_lab.diffusion.skeleton import skeleton
from lyco_lab.errors import UserError

WINDOW = 32  # of the tiny models
INNER = WINDOW - 2
FAMILIES = ["sd1", "sd2", "sdxl"]
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def long(tiny_of):
    """long("sd2", 3) -> a tiny model that reads three windows; filled up as its family's are."""
    known = {}

    def long(family, chunks):
        if (family, chunks) not in known:
            tokens = None if chunks is None else chunks * INNER
            diffusion = load(Model(path=str(tiny_of(family)), max_token_length=tokens))
            # Two of the real families fill up with a token that is not the end's.
            name = {"sd2": "tokenizer", "sdxl": "tokenizer_2"}.get(family)
            if name is not None:
                getattr(diffusion, name).pad_token = "!"
            known[family, chunks] = diffusion
        return known[family, chunks]

    return long


def letters(count):
    """A text of so many tokens."""
    return "".join("abcdefg"[i % 7] for i in range(count))


def by_hand(diffusion, text, chunks):
    """Rows and pooled state of a text, by the definition: a list of tokens and a row at a time."""
    pairs = [(diffusion.text_encoder, diffusion.tokenizer)]
    if hasattr(diffusion, "text_encoder_2"):
        pairs.append((diffusion.text_encoder_2, diffusion.tokenizer_2))
    found, pooled = [], None
    for encoder, tokenizer in pairs:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        rows = []
        for k in range(chunks):
            ids = [tokenizer.bos_token_id, *tokens[k * INNER : (k + 1) * INNER]]
            ids.append(tokenizer.eos_token_id)
            ids += [tokenizer.pad_token_id] * (WINDOW - len(ids))
            with torch.no_grad():
                said = encoder(torch.tensor([ids]), output_hidden_states=True)
            states = said.hidden_states[-2] if len(pairs) == 2 else said.last_hidden_state
            if k == 0:
                rows.append(states[0, 0])
                pooled = getattr(said, "text_embeds", None)
            rows += [states[0, place] for place in range(1, WINDOW - 1)]
            if k == chunks - 1:
                rows.append(states[0, WINDOW - 1])
        found.append(torch.stack(rows))
    hidden = torch.cat(found, -1)
    if len(pairs) == 1:
        return hidden, None
    empty = 0 if not tokens and diffusion.empty_is_zero else 1
    return empty * hidden, empty * pooled[0]


TEXTS = st.lists(st.text("ab ,!A", max_size=110), min_size=1, max_size=3)


@each_family
@settings(max_examples=10)
@given(texts=TEXTS, chunks=st.integers(1, 3))
def test_chunks_are_read_apart_and_joined(long, family, texts, chunks):
    diffusion = long(family, chunks)
    said = diffusion.encode_text(texts)
    assert said["hidden"].shape[:2] == (len(texts), chunks * INNER + 2)
    for i, text in enumerate(texts):
        hidden, pooled = by_hand(diffusion, text, chunks)
        torch.testing.assert_close(said["hidden"][i], hidden)
        if pooled is not None:
            torch.testing.assert_close(said["pooled"][i], pooled)
    assert ("pooled" in said) == (family == "sdxl")
    later = diffusion.read(diffusion.tokenize(texts))
    assert all(torch.equal(later[name], rows) for name, rows in said.items())


@pytest.mark.parametrize("clip_skip", [2, 3])
def test_layers_are_skipped_in_every_chunk(tiny_of, clip_skip):
    model = Model(path=str(tiny_of("sd1")), clip_skip=clip_skip, max_token_length=2 * INNER)
    diffusion = load(model)
    hidden, _ = by_hand(diffusion, letters(40), 2)
    torch.testing.assert_close(diffusion.encode_text([letters(40)])["hidden"][0], hidden)


@each_family
@given(count=st.integers(0, INNER))
def test_a_text_that_fits_has_the_rows_it_had_and_then_those_of_nothing(long, family, count):
    """All rows but the last of the short run; then the empty text's, without its first."""
    short, two = long(family, None), long(family, 2)
    text = letters(count)
    alone, joined = short.encode_text([text]), two.encode_text([text])
    torch.testing.assert_close(joined["hidden"][0, : WINDOW - 1], alone["hidden"][0, : WINDOW - 1])
    if count or family != "sdxl":  # whose empty text is zeros, and no chunk's is where a text is
        nothing, _ = by_hand(dataclasses.replace(short, **no_zeros(short)), "", 1)
        torch.testing.assert_close(joined["hidden"][0, WINDOW - 1 :], nothing[1:])
    if family == "sdxl":
        torch.testing.assert_close(joined["pooled"], alone["pooled"])


def no_zeros(diffusion):
    return {"empty_is_zero": False} if hasattr(diffusion, "empty_is_zero") else {}


@each_family
@pytest.mark.parametrize("chunks", [None, 1, 2, 3])
def test_what_is_behind_the_last_chunk_is_cut_and_nothing_before(long, family, chunks):
    diffusion = long(family, chunks)
    most = INNER * (chunks or 1)
    for count in range(most - 2, most + 1):
        assert not diffusion.too_long(letters(count))
    assert diffusion.too_long(letters(most + 1))
    whole, cut, other = diffusion.encode_text(
        [letters(most), letters(most - 1) + "xyz", letters(most - 1) + "xyw"]
    )["hidden"]
    assert torch.equal(cut, other)
    assert not torch.equal(whole, cut)  # a word may be cut, so its last token is another


@each_family
def test_one_chunk_is_the_window_bit_for_bit(tiny_of, family):
    plain = load(tiny_of(family))
    model = Model(path=str(tiny_of(family)), max_token_length=INNER)
    one = load(model)
    texts = ["a red cat", letters(40), ""]
    for rows in ("tokenize", "encode_text"):
        found, expected = (getattr(d, rows)(texts) for d in (one, plain))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    images = [d.sample(texts, [1, 2, 3], steps=2, guidance=3.0) for d in (one, plain)]
    assert np.array_equal(*images)
    assert one.described == plain.described and one.chunks == plain.chunks == 1
    assert "ss_max_token_length" not in plain.described
    two = load(dataclasses.replace(model, max_token_length=2 * INNER))
    assert two.described == plain.described | {"ss_max_token_length": str(2 * INNER)}


@each_family
def test_images_see_the_whole_prompt_and_an_empty_one_as_long(long, family):
    prompts = [letters(INNER) + " a" * 20, letters(INNER) + "! b, " * 6]
    how = {"steps": 2, "guidance": 9.0, "seeds": [5, 5]}
    diffusion = long(family, 2)
    images = diffusion.sample(prompts, **how)
    assert np.abs(images[0].astype(int) - images[1]).max() > 1
    cut = long(family, None).sample(prompts, **how)
    assert np.array_equal(cut[0], cut[1])
    told = {}
    for kind, texts in (("", prompts), ("negative_", ["", ""])):
        hidden, pooled = zip(*(by_hand(diffusion, text, 2) for text in texts), strict=True)
        told[f"{kind}prompt_embeds"] = torch.stack(hidden)
        if family == "sdxl":
            told[f"{kind}pooled_prompt_embeds"] = torch.stack(pooled)
    expected = diffusion.pipeline()(
        **told,
        num_inference_steps=2,
        guidance_scale=9.0,
        generator=[torch.Generator().manual_seed(5) for _ in prompts],
        output_type="np",
    ).images
    assert np.abs(images - 255 * expected).max() < 1.01


def test_every_chunk_trains_the_text_encoder(tiny_of):
    """A row's gradient reaches the tokens of its own chunk, and of no other."""
    diffusion = load(Model(path=str(tiny_of("sd1")), max_token_length=3 * INNER))
    weight = diffusion.text_encoder.get_input_embeddings().weight.requires_grad_()
    ids = diffusion.tokenize(["a" * 20 + "b" * 60])
    hidden = diffusion.read(ids)["hidden"]
    for place, expected in ((1, "a"), (3 * INNER, "b")):
        (gradient,) = torch.autograd.grad(
            hidden[0, place].square().sum(), weight, retain_graph=True
        )
        moved = set(gradient.abs().sum(1).nonzero()[:, 0].tolist())
        token = diffusion.tokenizer.convert_tokens_to_ids(expected)
        assert token in moved
    assert diffusion.tokenizer.convert_tokens_to_ids("a") not in moved  # of the last chunk's row


@each_family
def test_a_word_counts_in_any_chunk(tiny_of, family):
    plain = load(Model(path=str(tiny_of(family)), max_token_length=2 * INNER))
    taught = load(Model(path=str(tiny_of(family)), max_token_length=2 * INNER))
    word.add(taught, "sks", word.mean(taught, "c"))
    for before in (3, 28, 29, 30, 31, 45):
        said, meant = (" ".join(["d"] * before + [one, "e"]) for one in ("sks", "c"))
        found, expected = taught.encode_text([said]), plain.encode_text([meant])
        for name in expected:
            assert torch.equal(found[name], expected[name])
        other = plain.encode_text([" ".join(["d"] * before + ["f", "e"])])["hidden"]
        assert not torch.equal(other, expected["hidden"])


@each_family
@pytest.mark.parametrize("tokens", [29, 32, 75])
def test_a_length_that_is_no_multiple_names_those_that_are(tiny_of, family, tokens):
    model = Model(path=str(tiny_of(family)), max_token_length=tokens)
    said = f"max_token_length is {tokens}, but .* reads 30 tokens at once, .* null, 30, 60, 90 or"
    for way in (load, sound, fingerprint, lambda model: skeleton(model, "unet")):
        with pytest.raises(UserError, match=said):
            way(model)


@pytest.mark.parametrize("family", ["sd3", "sd3-t5"])
def test_texts_that_t5_reads_have_a_length_of_their_own(tiny_of, family):
    for tokens in (INNER, 2 * INNER):
        with pytest.raises(UserError, match="is of the family 'sd3', whose texts .* needs null"):
            sound(Model(path=str(tiny_of(family)), max_token_length=tokens))


def test_a_length_is_a_number_of_tokens():
    for tokens in (0, -75):
        with pytest.raises(UserError, match=f"model.max_token_length is {tokens}, needs"):
            Model(max_token_length=tokens)


def test_a_tokenizer_of_another_length_is_refused(tiny_of, tmp_path):
    copy = shutil.copytree(tiny_of("sdxl"), tmp_path / "copy")
    file = copy / "tokenizer_2" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 20}))
    with pytest.raises(UserError, match="2 times 30, but the tokenizer_2 .* for 20 tokens"):
        load(Model(path=str(copy), max_token_length=2 * INNER))


def test_files_and_models_are_told_apart_by_the_length(tiny_of):
    path = str(tiny_of("sd1"))
    found = {fingerprint(Model(path=path, max_token_length=n)) for n in (None, 60, 90)}
    assert len(found) == 3
