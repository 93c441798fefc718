"""What `model.path` means: folders with several sets of weights, and the hub's local cache."""

import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch

from lyco_lab.config import Model
from lyco_lab.diffusion.model import fingerprint, load, sound
from lyco_lab.diffusion.skeleton import parts, skeleton
from lyco_lab.errors import UserError
from tests.diffusion import original

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy(tiny_of, tmp_path):
    return shutil.copytree(tiny_of("sd1"), tmp_path / "copy")


def add(folder, offset, variant, part="unet"):
    """Another set of a part's weights, off by `offset`."""
    (file,) = (folder / part).glob("*.safetensors")
    found = {key: tensor + offset for key, tensor in original.part(folder, part).items()}
    file = file.with_name(f"{file.stem}.{variant}.safetensors")
    return original.save_safetensors(found, file, format="pt")


def off_by(loaded, folder, part="unet"):
    theirs = original.part(folder, part)
    key = "conv_in.bias" if part == "unet" else "final_layer_norm.bias"
    key = next(k for k in theirs if k.endswith(key))
    return (loaded.parts[part].state_dict()[key] - theirs[key]).mean().item()


def test_trained_and_averaged_weights_of_a_folder_are_chosen(copy, tiny_of):
    add(copy, 1.0, "non_ema")
    for opening in (load, sound, lambda path: parts(path, True)):
        with pytest.raises(UserError, match="two sets of weights.*model.weights=non-ema or"):
            opening(copy)
    chosen = {w: load(Model(path=str(copy), weights=w)) for w in ("ema", "non-ema")}
    assert off_by(chosen["ema"], tiny_of("sd1")) == 0
    assert off_by(chosen["non-ema"], tiny_of("sd1")) == pytest.approx(1)


def test_a_folder_may_hold_half_precision_only_or_as_well(copy, tiny_of):
    for part in ("unet", "text_encoder"):
        half = add(copy, 0.25, "fp16", part)
    loaded = load(copy)
    assert off_by(loaded, tiny_of("sd1")) == off_by(loaded, tiny_of("sd1"), "text_encoder") == 0
    (copy / UNET).unlink()
    (half.parent / "model.safetensors").unlink()
    loaded = load(copy)
    assert off_by(loaded, tiny_of("sd1")) == pytest.approx(0.25)
    assert off_by(loaded, tiny_of("sd1"), "text_encoder") == pytest.approx(0.25)


def test_non_ema_alone_is_one_set_of_weights(copy, tiny_of):
    add(copy, 1.0, "non_ema")
    (copy / UNET).unlink()
    assert off_by(load(copy), tiny_of("sd1")) == pytest.approx(1)
    with pytest.raises(UserError, match="has one set of weights"):
        load(Model(path=str(copy), weights="non-ema"))


def test_weights_in_pickles_are_read_as_data(copy, tiny_of):
    torch.save(original.part(copy, "unet"), copy / UNET.replace(".safetensors", ".bin"))
    with_both = fingerprint(copy)
    (copy / UNET).unlink()
    assert off_by(load(copy), tiny_of("sd1")) == 0
    assert fingerprint(copy) != with_both == fingerprint(tiny_of("sd1"))


class Malicious:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return Path.touch, (self.place,)


@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
@pytest.mark.parametrize("kind", ["code", "code in an archive", "text", "nothing", "half"])
def test_what_is_no_checkpoint_is_a_line_and_runs_no_code(copy, tmp_path, part, kind):
    (file,) = (copy / part).glob("*.safetensors")
    file.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    weights, trace = copy / part / name, tmp_path / "it ran"
    if kind == "code":
        weights.write_bytes(pickle.dumps({"weight": Malicious(trace)}, protocol=2))
    elif kind == "code in an archive":
        torch.save({"weight": Malicious(trace)}, weights)
    else:
        torch.save({"weight": torch.ones(1000)}, weights)
        whole = weights.read_bytes()
        shown = {"text": b"version https://git-lfs", "nothing": b"", "half": whole[:2000]}
        weights.write_bytes(shown[kind])
    with pytest.raises(UserError, match=f"cannot load {part} of") as raised:
        load(copy)
    assert "\n" not in str(raised.value) and not trace.exists()
    if kind == "code in an archive":
        assert "needs code to be unpickled" in str(raised.value)


def test_a_tokenizer_beside_a_folder_s_own_is_refused(copy):
    with pytest.raises(UserError, match="a tokenizer of its own: leave it null"):
        load(Model(path=str(copy), tokenizer=str(copy / "tokenizer")))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty local cache of the hub, and no network."""

    def connect(*arguments):
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fetched(hub: Path, name: str, folder: Path) -> None:
    """As `hf download` leaves a repository."""
    where = hub / f"models--{name.replace('/', '--')}"
    (where / "refs").mkdir(parents=True)
    (where / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, where / "snapshots" / ("0" * 40))


def test_a_name_of_the_hub_means_what_was_fetched_before(tiny_of, hub):
    with pytest.raises(UserError) as caught:
        load("owner/name")
    assert "neither here nor in the hub's local cache; fetch it with: hf download owner/name " in (
        str(caught.value)
    )
    assert "--include '*.json'" in str(caught.value) and "\n" not in str(caught.value)
    fetched(hub, "owner/name", tiny_of("sdxl"))
    assert off_by(load("owner/name"), tiny_of("sdxl")) == 0
    assert parts("owner/name", False) == ("unet",)
    assert fingerprint("owner/name") == fingerprint(tiny_of("sdxl"))


def test_the_command_s_patterns_fetch_what_is_loaded(tiny_of, hub, tmp_path):
    """And not the rest of a repository: whole checkpoints, other frameworks' weights."""
    from fnmatch import fnmatch

    from lyco_lab.diffusion.sources.hub import FETCHED

    for family in ("sd1", "sdxl", "sd3-t5"):
        kept = tmp_path / family
        for file in tiny_of(family).rglob("*.*"):
            name = file.relative_to(tiny_of(family))
            if any(fnmatch(str(name), pattern) for pattern in FETCHED):
                (kept / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, kept / name)
        assert fingerprint(load_whole(kept)) == fingerprint(tiny_of(family))
    for name in (
        "model.ckpt",
        "v1-5.safetensors",
        "unet/model.bin",
        "safety_checker/x.safetensors",
    ):
        assert not any(fnmatch(name, pattern) for pattern in FETCHED)


def load_whole(folder):
    load(folder)
    return folder


def test_a_cached_vocabulary_serves_single_files(tiny_of, tiny_configs, hub, tmp_path):
    fetched(hub, "openai/clip-vit-large-patch14", tiny_of("sd1") / "tokenizer")
    file = original.save_safetensors(original.tensors(tiny_of("sd1")), tmp_path / "a.safetensors")
    assert (
        load(file).tokenize(["a"])["ids"].tolist()
        == load(tiny_of("sd1")).tokenize(["a"])["ids"].tolist()
    )


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no/such/folder", "'no/such/folder', which does not exist"),
        ("missing.safetensors", "model.path='missing.safetensors' does not exist"),
        ("missing", "'missing', which does not exist"),
    ],
)
def test_places_that_are_none_are_refused(path, words):
    with pytest.raises(UserError, match=words):
        load(path)


def test_a_broken_configuration_names_its_file(copy):
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot load unet of .*unet/config.json' is not a valid"):
        load(copy)
    with pytest.raises(UserError, match="cannot read unet/config.json"):
        skeleton(Model(path=str(copy)), "unet")
    (copy / "text_encoder" / "config.json").unlink()
    with pytest.raises(UserError, match="has no text_encoder/config.json"):
        load(copy)
