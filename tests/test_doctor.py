"""What is missing or broken is said and not raised; names and secrets are not said."""

import json
import os
import platform
import runpy
import shutil
import socket
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from hypothesis import assume, given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from typer.testing import CliRunner

from lyco_lab import cli, doctor, miniature
from lyco_lab.diffusion.model import fingerprint
from lyco_lab.doctor import BROKEN, MISSING, OK, Check

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SECTIONS = ("versions", "devices", "precision", "folders", "network", "features", "embedded model")


def named(lines):
    return [Requirement(line).name for line in lines]


def only(checks, name):
    (check,) = [check for check in checks if check.name == name]
    return check


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    """Of this machine, which has every package, while no socket can be opened."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args, **kwargs):
            raise AssertionError("the network was used")

        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        return doctor.examine(tmp_path_factory.mktemp("out") / "runs")


@pytest.fixture
def few(monkeypatch):
    """Only what is looked at quickly is, so that a test can afford all of it."""
    monkeypatch.setattr(doctor, "REQUIRED", {"rich": "rich.table.Table"})
    monkeypatch.setattr(doctor, "EXTRAS", {})
    monkeypatch.setattr(doctor, "precisions", lambda: iter(()))
    monkeypatch.setattr(doctor, "working_torch", lambda: None)


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: CliRunner().invoke(cli.app, ["doctor", *words])


def versions_are(monkeypatch, **others):
    """What is installed, but for a few distributions: another version, or None for not there."""
    others = {name.replace("_", "-"): version for name, version in others.items()}
    genuine = metadata.version

    def version(name):
        if name not in others:
            return genuine(name)
        if others[name] is None:
            raise metadata.PackageNotFoundError(name)
        return others[name]

    monkeypatch.setattr(metadata, "version", version)


def test_it_knows_what_the_project_asks_for():
    assert sorted(doctor.REQUIRED) == sorted(named(PROJECT["dependencies"]))
    extras = PROJECT["optional-dependencies"]
    for extra, lines in extras.items():
        packages = [p for e, several in doctor.EXTRAS.values() if e == extra for p in several]
        assert sorted(packages) == sorted(set(named(lines)) - {PROJECT["name"]}), extra
    assert {extra for extra, _ in doctor.EXTRAS.values()} == set(extras)


def test_it_starts_from_the_standard_library():
    script = (
        "import sys; known = set(sys.modules); import lyco_lab.doctor; "
        "print({m.split('.')[0] for m in set(sys.modules) - known} - sys.stdlib_module_names"
        " - {'__mp_main__'})"  # what multiprocessing calls the script
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "{'lyco_lab'}", done.stderr


@pytest.mark.slow
def test_all_that_is_needed_is_here(checks):
    assert doctor.works(checks), [check for check in checks if check.state == BROKEN]
    assert tuple(dict.fromkeys(check.section for check in checks)) == SECTIONS
    assert only(checks, "python").found.startswith(platform.python_version())
    for name in doctor.REQUIRED:
        assert only(checks, name).found == metadata.version(name)
    for feature in doctor.EXTRAS:
        assert only(checks, feature).state == OK
    for name in ("bf16, processor", "fp16, processor"):
        assert "of float32's time" in only(checks, name).found
    assert only(checks, "fingerprint").found == fingerprint(miniature.path())
    names = [(check.section, check.name) for check in checks]
    assert len(set(names)) == len(names)  # the JSON has them as keys


@pytest.mark.slow
def test_json_says_the_same(checks):
    read = json.loads(doctor.as_json(checks))
    assert read["works"] is True
    flat = [
        Check(name, **about, section=section)
        for section, several in read["checks"].items()
        for name, about in several.items()
    ]
    assert flat == checks


@pytest.mark.parametrize("required", [True, False])
def test_a_package_that_is_not_installed(few, command, monkeypatch, required):
    versions_are(monkeypatch, sympy=None)
    if required:
        monkeypatch.setitem(doctor.REQUIRED, "sympy", "sympy.Symbol")
    else:
        monkeypatch.setitem(doctor.EXTRAS, "proofs", ("dev", {"sympy": "sympy.Symbol"}))
    done = command()
    assert done.exit_code == (1 if required else 0)
    assert ("broken: sympy" in done.stdout) == required
    assert "sympy" in done.stdout and "not installed" in done.stdout
    assert ("pip install 'sympy" if required else "pip install 'lyco-lab[dev]'") in done.stdout


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("raise ImportError('libcudart.so.12: no such\\nmore')", "ImportError: libcudart.so.12"),
        ("raise OSError('bad library')", "OSError: bad library"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("x = 1", "AttributeError"),
        ("def f(:", "SyntaxError"),
        ("raise RuntimeError", "RuntimeError"),
    ],
)
@pytest.mark.parametrize("required", [True, False])
def test_a_package_that_cannot_be_imported(
    few, command, monkeypatch, tmp_path, statement, said, required
):
    versions_are(monkeypatch, broken_thing="1.0")
    (tmp_path / "broken_thing.py").write_text(
        f"import warnings; print('noise'); warnings.warn('noise', UserWarning)\n{statement}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        if required:
            monkeypatch.setitem(doctor.REQUIRED, "broken-thing", "broken_thing.Needed")
        else:
            monkeypatch.setitem(
                doctor.EXTRAS, "a feature", ("dev", {"broken-thing": "broken_thing.Needed"})
            )
        done = command("--json")
        read = json.loads(done.stdout)
    finally:
        sys.modules.pop("broken_thing", None)
    assert done.exit_code == (1 if required else 0) and read["works"] is not required
    about = read["checks"]["versions" if required else "features"]
    about = about["broken-thing" if required else "a feature"]
    assert about["state"] == (BROKEN if required else MISSING)
    assert said in about["found"] and "1.0" in about["found"] and "more" not in about["found"]


@pytest.mark.parametrize(
    ("version", "state"), [("0.1", BROKEN), ("2.4.0", OK), ("2.4.9", OK), ("2.5.0", BROKEN)]
)
def test_a_version_that_is_not_the_one_needed(few, monkeypatch, version, state):
    monkeypatch.setitem(doctor.REQUIRED, "omegaconf", "omegaconf.OmegaConf")
    versions_are(monkeypatch, omegaconf=version)
    check = only(doctor.versions(), "omegaconf")
    assert check.state == state and version in check.found
    assert ("<2.5" in check.found) == (state == BROKEN)


@pytest.mark.parametrize("name", doctor.LIGHTNING)
@pytest.mark.parametrize("version", doctor.STOLEN)
def test_a_known_bad_lightning_is_named_and_not_imported(few, monkeypatch, name, version):
    asked = []
    monkeypatch.setattr(doctor, "imported", asked.append)
    monkeypatch.setattr(doctor, "build", lambda: "this machine")
    monkeypatch.setitem(doctor.REQUIRED, "lightning", "lightning.pytorch.Trainer")
    versions_are(monkeypatch, lightning="2.6.6", pytorch_lightning="2.6.6")
    checks = list(doctor.versions())
    assert "known-bad Lightning" not in {check.name for check in checks}
    assert any("lightning" in place for place in asked)
    asked.clear()
    versions_are(monkeypatch, **{name.replace("-", "_"): version})
    fault = only(doctor.versions(), "known-bad Lightning")
    assert fault.state == BROKEN and f"{name} {version}" in fault.found
    assert "steals" in fault.found and "change everything secret" in fault.remedy
    assert not any("lightning" in place for place in asked)


@pytest.mark.parametrize(
    ("version", "bad"), [("2.5.6", True), ("2.6.5", True), ("2.6.6", False), ("2.10.0", False)]
)
def test_an_unsafe_lightning_is_named(monkeypatch, version, bad):
    versions_are(monkeypatch, lightning=version, pytorch_lightning=None)
    found = list(doctor.lightning_faults())
    assert [check.state for check in found] == [BROKEN] * bad
    assert all("checkpoints" in check.found and version in check.found for check in found)


def test_without_torch_the_rest_is_said(few, monkeypatch):
    checks = [*doctor.devices(), *doctor.embedded()]
    assert {"processor", "memory", "weights"} <= {check.name for check in checks}
    assert all(check.state == OK for check in checks)


@pytest.mark.parametrize("section", ["versions", "devices", "network", "embedded"])
def test_what_cannot_be_looked_at_is_said(few, command, monkeypatch, section):
    def fail():
        yield Check("first", "fine")
        raise RuntimeError("the driver has gone")

    monkeypatch.setattr(doctor, section, fail)
    done = command()
    assert done.exit_code == 1
    assert "the driver has gone" in done.stdout and "first" in done.stdout
    assert "temporary files" in done.stdout


@pytest.mark.parametrize(
    ("flags", "bf16", "fp16"),
    [
        ("fpu sse2 avx512_bf16 amx_bf16", "native (amx_bf16, avx512_bf16)", "emulated"),
        ("fp asimd fphp asimdhp bf16", "native (bf16)", "native (fphp)"),
        ("fpu avx2", "emulated", "emulated"),
        ("", "works, natively or not", "works, natively or not"),
    ],
)
def test_instructions_for_half_precision(monkeypatch, flags, bf16, fp16):
    key = "Features" if "asimd" in flags else "flags"
    monkeypatch.setattr(doctor, "cpuinfo", lambda: {key: flags} if flags else {})
    assert (doctor.on_processor("bf16"), doctor.on_processor("fp16")) == (bf16, fp16)


def gpus(capability, bf16):
    """What torch answers about two GPUs that are not here."""
    about = SimpleNamespace(
        name="Some GPU", total_memory=24 * 2**30, major=capability[0], minor=capability[1]
    )
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda index: about,
        mem_get_info=lambda index: ((20 + index) * 2**30, 24 * 2**30),
        get_device_capability=lambda: capability,
        is_bf16_supported=lambda including_emulation: bf16 or including_emulation,
    )
    return SimpleNamespace(
        cuda=cuda,
        version=SimpleNamespace(hip=None, cuda="12.8"),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: False)),
        float32="float32",
        bfloat16="bfloat16",
        float16="float16",
    )


@pytest.mark.parametrize(
    ("capability", "bf16", "fp16"),
    [((9, 0), "native", "native"), ((7, 5), "emulated", "native"), ((5, 2), "no", "emulated")],
)
def test_gpus_and_their_precisions(monkeypatch, capability, bf16, fp16):
    def product_s(torch, device, dtype):
        if (device, dtype, bf16) == ("cuda", "bfloat16", "no"):
            raise RuntimeError("no kernel for it")
        return {"float32": 2.0, "bfloat16": 0.5, "float16": 1.0}[dtype]

    torch = gpus(capability, bf16 == "native")
    monkeypatch.setattr(doctor, "working_torch", lambda: torch)
    monkeypatch.setattr(doctor, "product_s", product_s)
    first, second = (only(doctor.devices(), f"GPU {index}").found for index in (0, 1))
    version = ".".join(map(str, capability))
    assert first == f"Some GPU, 24.0 GiB, 20.0 GiB of it free, compute capability {version}"
    assert "21.0 GiB of it free" in second
    check = only(doctor.precisions(), "bf16, GPU 0")
    if bf16 == "no":
        assert check.state == MISSING and "no kernel for it" in check.found
    else:
        assert check.found == f"{bf16}; a matrix product takes 0.25 of float32's time"
    check = only(doctor.precisions(), "fp16, GPU 0")
    assert check.found == f"{fp16}; a matrix product takes 0.5 of float32's time"
    assert only(doctor.precisions(), "fp16, processor").state == OK


def test_a_gpu_that_torch_cannot_use(monkeypatch):
    torch = gpus((9, 0), True)
    torch.cuda.is_available = lambda: False
    monkeypatch.setattr(doctor, "working_torch", lambda: torch)
    monkeypatch.setattr(doctor, "build", lambda: "processors alone")
    for program, state in (("nvidia-smi", MISSING), (None, OK)):
        monkeypatch.setattr(shutil, "which", lambda name, found=program: found)
        monkeypatch.setattr(os.path, "exists", lambda path: False)
        check = only(doctor.devices(), "GPU")
        assert check.state == state
        assert ("torch, built for processors alone, finds no GPU" in check.found) == (
            state == MISSING
        )


def test_a_folder_is_written_to_and_left_as_it_was(tmp_path):
    check = doctor.folder("runs", tmp_path, BROKEN)
    assert check.state == OK and "writable" in check.found and "not there yet" not in check.found
    check = doctor.folder("runs", tmp_path / "a" / "b", BROKEN)
    assert check.state == OK and f"{tmp_path}/a/b (not there yet)" in check.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("otherwise", "status"), [(BROKEN, 1), (MISSING, 0)])
def test_a_folder_that_cannot_be_written_in(few, command, monkeypatch, tmp_path, otherwise, status):
    (tmp_path / "file").write_text("")
    check = doctor.folder("x", tmp_path / "file" / "runs", otherwise)
    assert check.state == otherwise and "cannot be written in, not a directory" in check.found
    if otherwise == BROKEN:
        done = command("--out", str(tmp_path / "file" / "runs"))
    else:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
        done = command()
    assert done.exit_code == status and "cannot be written in" in done.stdout


def test_a_folder_with_little_space(monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    for free, state in ((2**30 - 1, MISSING), (2**30, OK)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, n=free: usage._replace(free=n))
        assert doctor.folder("runs", tmp_path, BROKEN).state == state


def test_a_folder_on_a_full_disk(monkeypatch, tmp_path):
    with open("/dev/full", "wb", buffering=0) as full:  # has no space for a byte
        monkeypatch.setattr(doctor.tempfile, "TemporaryFile", lambda dir: full)
        check = doctor.folder("runs", tmp_path, BROKEN)
    assert check.state == BROKEN and "no space left on device" in check.found


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"XDG_CACHE_HOME": "/a"},
        {"HF_HOME": "~/b", "XDG_CACHE_HOME": "/a"},
        {"HUGGINGFACE_HUB_CACHE": "/c", "HF_HOME": "/b"},
        {"HF_HUB_CACHE": "$HOME/d", "HUGGINGFACE_HUB_CACHE": "/c"},
    ],
)
def test_the_cache_is_where_the_hub_has_it(monkeypatch, environment):
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    theirs = runpy.run_path(str(constants.__file__))["HF_HUB_CACHE"]
    assert doctor.hugging_face_cache() == Path(theirs)


def test_offline_switches(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "whatever this is")
    checks = list(doctor.network())
    assert only(checks, "HF_HUB_OFFLINE").found == "1"
    assert only(checks, "TRANSFORMERS_OFFLINE").found == "set"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert only(doctor.network(), "HF_HUB_OFFLINE").found == "not set"


@pytest.mark.parametrize(
    ("environment", "file", "state"),
    [
        ({}, None, MISSING),
        ({}, "machine api.wandb.ai\n  login user\n  password hunter22222\n", OK),
        ({}, "machine elsewhere.org login user password hunter22222\n", MISSING),
        ({}, "machine api.wandb.ai login user\n", MISSING),
        ({}, "what is this", MISSING),
        ({"WANDB_API_KEY": "hunter22222"}, None, OK),
        (
            {"WANDB_BASE_URL": "https://me:hunter22222@wandb.example.org/x"},
            "machine wandb.example.org login user password hunter22222\n",
            OK,
        ),
    ],
)
def test_the_login_is_seen_and_not_shown(monkeypatch, tmp_path, environment, file, state):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if file is not None:
        (tmp_path / ".netrc").write_text(file)
        (tmp_path / ".netrc").chmod(0o600)
    check = only(doctor.network(), "W&B")
    assert check.state == state
    assert "hunter" not in check.found


WORDS = st.text("abcdefghijkl.-_", min_size=3, max_size=8).filter(lambda w: w[0].isalpha())


@given(
    user=WORDS,
    home=st.lists(WORDS, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts)),
    secret=st.text("mnopqrst0123456789+/=", min_size=6, max_size=20),
    parts=st.lists(WORDS, max_size=3),
    order=st.permutations(range(5)),
)
def test_what_is_said_is_nobodys_business(user, home, secret, parts, order):
    pieces = [home, f"{home}/x", f"/scratch/{user}/y", f"for {user}:", f"key={secret}"]
    text = " ".join([*parts, *(pieces[i] for i in order)])
    said = doctor.private(text, homes={home, "/"}, secrets={secret, "false"}, user=user)
    assert secret not in said
    assert user not in said.replace("USER", "").split() and f"/{user}/" not in said
    assert home not in said.split() and f"{home}/" not in said
    assume(not any(user in word for word in (home, *parts, "for", "key", "scratch")))
    assert "~/x" in said and "/scratch/USER/y" in said and "for USER:" in said


def test_longer_names_are_other_names():
    said = doctor.private("/home/al and /home/alice2 at a", homes={"/home/al"}, secrets=(), user="")
    assert said == "~ and /home/alice2 at a"
    said = doctor.private("roots, root in / and /a/", homes={"/"}, secrets=(), user="root")
    assert said == "roots, root in / and /a/"


def test_home_and_secrets_are_hidden_everywhere(few, command, monkeypatch, tmp_path):
    home = tmp_path / "somebody"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "somebody")
    monkeypatch.setenv("SOME_TOKEN", "correct-horse")
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "correct-horse" / "hub"))
    for words in ((), ("--json",)):
        done = command(*words, "--out", str(home / "runs"))
        assert done.exit_code == 0, done.output
        assert "~/runs" in done.stdout and "~/***/hub" in done.stdout
        assert "somebody" not in done.output and "horse" not in done.output


@pytest.fixture
def weights(monkeypatch, tmp_path):
    folder = tmp_path / "weights"
    shutil.copytree(miniature.WEIGHTS, folder)
    monkeypatch.setattr(miniature, "WEIGHTS", folder)
    return folder


def test_weights_that_are_damaged(few, command, weights):
    assert command().exit_code == 0
    (file,) = (weights / "unet").glob("*.safetensors")
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"version https://git-lfs.github.com/spec/v1\n", b""):
        file.write_bytes(damaged)
        done = command()
        assert done.exit_code == 1
        assert f"unet/{file.name} is damaged" in done.stdout and "broken: weights" in done.stdout


def test_weights_that_are_not_there(few, command, weights):
    shutil.rmtree(weights)
    done = command()
    assert done.exit_code == 1
    assert "not there" in done.stdout and "lyco-lab pretrain" in " ".join(done.stdout.split())


def test_a_program_that_is_not_there(few, monkeypatch):
    monkeypatch.setenv("PATH", "")
    checks = list(doctor.features())
    assert {check.name: check.state for check in checks} == dict.fromkeys(doctor.PROGRAMS, MISSING)
    assert os.environ["PATH"] == ""
