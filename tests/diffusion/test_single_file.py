"""A model in one file is the model it was made of; what cannot be read is refused unopened."""

import dataclasses
import pickle

import pytest
import safetensors.torch
import torch

from lyco_lab.config import Model
from lyco_lab.diffusion.model import fingerprint, load, sound
from lyco_lab.diffusion.original_names import unet as unet_names
from lyco_lab.diffusion.skeleton import parts, skeleton
from lyco_lab.diffusion.sources import single_file
from lyco_lab.errors import UserError
from tests.diffusion import original

FAMILIES = ("sd1", "sd2", "sdxl")


@pytest.mark.parametrize("layout", ["safetensors", "ckpt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_has_the_folder_s_weights(model_of, tiny_configs, family, layout):
    expected, found = load(model_of(family, "folder")), load(model_of(family, layout))
    assert type(found) is type(expected)
    assert found.objective.name == expected.objective.name
    assert torch.equal(found.objective.alphas_T, expected.objective.alphas_T)
    for name, theirs in {**expected.parts, "vae": expected.vae}.items():
        ours = found.vae if name == "vae" else found.parts[name]
        theirs, ours = theirs.state_dict(), ours.state_dict()
        assert theirs.keys() == ours.keys()
        for key, weight in theirs.items():
            assert torch.equal(ours[key], weight), (name, key)
            assert not ours[key].is_meta and ours[key].dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_same_denoiser_and_vae_from_these_files(tiny_of, family):
    """So the files that the tests write are in the original layout indeed."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = tiny_of(family)
    for cls, name in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        found = cls.from_single_file(
            original.tensors(folder), config=str(folder), subfolder=name, local_files_only=True
        )
        expected = original.part(folder, name)
        assert {key for key, _ in found.named_parameters()} == expected.keys()
        for key, weight in found.state_dict().items():
            assert torch.equal(weight, expected[key]), key


@pytest.mark.parametrize("family", FAMILIES)
def test_the_networks_can_be_run(model_of, tiny_configs, family):
    """Nothing is left without numbers, in no file as it is: positions, say."""
    expected, found = load(model_of(family, "folder")), load(model_of(family, "safetensors"))
    ids = expected.tokenize(["a red cat", "dog"])
    theirs, ours = expected.read(ids), found.read(ids)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name])
    assert found.sample(["cat"], [0], 2, 3.0).shape == (1, 64, 64, 3)


def test_half_precision_files_train_in_float32(tiny_of, tiny_configs, tmp_path, model_of):
    half = {k: v.half() for k, v in original.tensors(tiny_of("sd1")).items()}
    file = original.save_safetensors(half, tmp_path / "half.safetensors")
    model = Model(path=str(file), tokenizer=model_of("sd1", "ckpt").tokenizer)
    assert {p.dtype for p in load(model).unet.parameters()} == {torch.float32}
    assert {p.dtype for p in load(model, torch.bfloat16).unet.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load(model, torch.bfloat16).vae.parameters()} == {torch.float32}


@pytest.fixture
def both(tiny_of, tiny_configs, tmp_path):
    """both(weights) -> a model in a file with an average, which is off by 1."""
    found = original.with_average(original.tensors(tiny_of("sd1")), 1.0)
    path = original.save_ckpt(found, tmp_path / "both.ckpt")

    def both(weights=None):
        tokenizer = str(tiny_of("sd1") / "tokenizer")
        return Model(path=str(path), tokenizer=tokenizer, weights=weights)

    return both


def test_of_weights_and_their_average_one_has_to_be_chosen(both, tiny_of):
    with pytest.raises(UserError, match="two sets of weights.*model.weights=non-ema or"):
        load(both())
    expected = original.part(tiny_of("sd1"), "unet")
    for weights, off in (("non-ema", 0.0), ("ema", 1.0)):
        found = load(both(weights)).unet.state_dict()
        assert all(torch.equal(found[key], expected[key] + off) for key in expected)
    assert fingerprint(both("ema")) != fingerprint(both("non-ema"))


@pytest.mark.parametrize("layout", ["folder", "ckpt"])
def test_of_one_set_of_weights_none_can_be_chosen(model_of, tiny_configs, layout):
    model = dataclasses.replace(model_of("sd1", layout), weights="ema")
    with pytest.raises(UserError, match="model.weights is 'ema', but .* one set"):
        load(model)


class Payload:
    """What a malicious checkpoint would do: leave a mark when it is opened."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_without_running_it(tiny_of, tmp_path, zipped):
    mark = tmp_path / "mark"
    path = tmp_path / "evil.ckpt"
    found = {"state_dict": original.tensors(tiny_of("sd1")), "callbacks": Payload(mark)}
    torch.save(found, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="evil.ckpt' needs code to be unpickled") as caught:
        load(Model(path=str(path)))
    assert "\n" not in str(caught.value) and not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark))).close()  # it would have
    assert mark.exists()


def test_old_checkpoints_are_read_too(tiny_of, tiny_configs, tmp_path):
    path = tmp_path / "old.ckpt"
    torch.save(original.tensors(tiny_of("sd1")), path, _use_new_zipfile_serialization=False)
    found = load(Model(path=str(path), tokenizer=str(tiny_of("sd1") / "tokenizer")))
    expected = original.part(tiny_of("sd1"), "unet")
    assert all(torch.equal(w, expected[key]) for key, w in found.unet.state_dict().items())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.ckpt", b"", "is not a whole checkpoint"),
        ("a.ckpt", b"no pickle at all", "needs code to be unpickled, or is no checkpoint"),
        ("a.safetensors", b"", "is not a whole .safetensors file"),
        ("a.safetensors", b"\xff" * 100, "is not a whole .safetensors file"),
        ("a.txt", b"weights", "a file has to be a .safetensors or a .ckpt"),
    ],
)
def test_files_that_are_no_model_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_cut_off_is_refused(tiny_of, tiny_configs, tmp_path):
    for suffix, save in (("ckpt", original.save_ckpt), ("safetensors", original.save_safetensors)):
        path = save(original.tensors(tiny_of("sd1")), tmp_path / f"cut.{suffix}")
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(UserError, match="is not a whole"):
            load(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.diffusion_model.out.2.bias"), "lacks model.diffusion_model.out.2"),
        (lambda t: t.pop("first_stage_model.quant_conv.bias"), "lacks first_stage_model.quant"),
        (
            lambda t: t.update({"model.diffusion_model.out.0.bias": torch.zeros(3)}),
            r"out.0.bias has shape \(3,\), conv_norm_out.bias of the unet needs \(16,\)",
        ),
        (
            lambda t: [t.pop(key) for key in list(t) if key.startswith("cond_stage_model.")],
            "is not a whole Stable Diffusion 1.x, 2.x or XL",
        ),
    ],
)
def test_a_file_that_lacks_something_says_what(tiny_of, tiny_configs, tmp_path, change, words):
    found = original.tensors(tiny_of("sd1"))
    change(found)
    path = original.save_safetensors(found, tmp_path / "partial.safetensors")
    with pytest.raises(UserError, match=words):
        load(Model(path=str(path), tokenizer=str(tiny_of("sd1") / "tokenizer")))


def test_what_sd_2_predicts_has_to_be_said(model_of, tiny_configs, tiny_of, tmp_path):
    model = dataclasses.replace(model_of("sd2", "safetensors"), prediction=None)
    for opening in (load, sound):
        with pytest.raises(UserError, match="does not say what it predicts: set model.prediction"):
            opening(model)
    noted = original.save_safetensors(
        original.tensors(tiny_of("sd2")),
        tmp_path / "noted.safetensors",
        **{"modelspec.prediction_type": "v"},
    )
    assert load(dataclasses.replace(model, path=str(noted))).objective.name == "v_prediction"
    base = load(dataclasses.replace(model, prediction="epsilon"))
    assert base.objective.name == "epsilon" and base.unet.config.sample_size == 64


def test_marks_of_velocity_and_zero_terminal_snr_are_seen(tiny_of, tiny_configs, tmp_path):
    marks = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    found = original.tensors(tiny_of("sdxl")) | marks
    path = original.save_safetensors(found, tmp_path / "v.safetensors")
    loaded = load(Model(path=str(path), tokenizer=str(tiny_of("sdxl") / "tokenizer")))
    assert loaded.objective.name == "v_prediction"
    assert loaded.objective.alphas_T[-1] == 0


def test_keys_older_than_the_text_model_s_wrapper(tiny_of, tiny_configs, tmp_path):
    found = {k.replace(".text_model.", "."): v for k, v in original.tensors(tiny_of("sd1")).items()}
    path = original.save_safetensors(found, tmp_path / "older.safetensors")
    loaded = load(Model(path=str(path), tokenizer=str(tiny_of("sd1") / "tokenizer")))
    expected = original.part(tiny_of("sd1"), "text_encoder")
    assert all(
        torch.equal(weight, expected[key])
        for key, weight in loaded.text_encoder.state_dict().items()
    )


def test_the_vocabulary_has_to_come_from_somewhere(model_of, tiny_configs, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = dataclasses.replace(model_of("sd1", "ckpt"), tokenizer=None)
    with pytest.raises(UserError, match="set model.tokenizer to a folder .* hf download openai/"):
        load(model)
    with pytest.raises(UserError, match="model.tokenizer is '/nowhere', which is no folder"):
        load(dataclasses.replace(model, tokenizer="/nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="knows . tokens, its text encoder 514: .*missing"):
        load(dataclasses.replace(model, tokenizer=str(tmp_path / "empty")))


def test_short_texts_are_filled_up_as_the_family_does_it(model_of, tiny_configs):
    first = load(model_of("sd1", "ckpt")).tokenizer
    second = load(model_of("sd2", "ckpt")).tokenizer
    both = load(model_of("sdxl", "ckpt"))
    assert first.pad_token == both.tokenizer.pad_token == first.eos_token
    assert second.pad_token == both.tokenizer_2.pad_token == "!"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_needs_no_weights(model_of, tiny_configs, family):
    for part in parts(model_of(family, "folder"), True):
        expected = skeleton(model_of(family, "folder"), part).state_dict()
        found = skeleton(model_of(family, "safetensors"), part).state_dict()
        assert {k: t.shape for k, t in found.items()} == {k: t.shape for k, t in expected.items()}
        assert all(t.is_meta for t in found.values())


@pytest.mark.parametrize(
    ("layout", "counts"),
    [
        ("sd15", {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}),
        ("sd21", {"unet": 865_910_724, "text_encoder": 340_387_840, "vae": 83_653_863}),
        (
            "sdxl",
            {
                "unet": 2_567_463_684,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
                "vae": 83_653_863,
            },
        ),
    ],
)
def test_the_shipped_configurations_have_the_published_sizes(layout, counts):
    from diffusers import AutoencoderKL

    from lyco_lab.diffusion.families import of
    from lyco_lab.diffusion.model import imported

    class Shipped(single_file.SingleFile):
        def __init__(self):
            self.model, self.layout = Model(prediction="v_prediction"), layout

    source = Shipped()
    classes = {name: imported(cls) for name, cls in of(source).networks.items()}
    for part, count in counts.items():
        made = source.skeleton({**classes, "vae": AutoencoderKL}[part], part)
        assert sum(parameter.numel() for parameter in made.parameters()) == count
    names = {
        unet_names(k, source.config("unet"))[0]
        for k in source.skeleton(classes["unet"], "unet").state_dict()
    }
    assert "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight" in names
    assert all(key.split(".")[0] in ORIGINAL for key in names)


ORIGINAL = {"input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"}


def test_safetensors_are_not_read_whole_to_see_what_they_are(model_of, tiny_configs, monkeypatch):
    def reading(*arguments, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(safetensors.torch, "load_file", reading)
    monkeypatch.setattr("lyco_lab.diffusion.tensors.Tensors.__getitem__", reading)
    assert parts(Model(path=model_of("sdxl", "safetensors").path), True) == (
        "unet",
        "text_encoder",
        "text_encoder_2",
    )
