"""What is here to work with, and what is missing for what. Nothing is fetched, sent or asked.

Every package that is needed is imported, and every folder written to, since being there is not
enough. What is not needed for everything may be missing or broken: that is said, and no error.
Whatever is said may be shown to others: home is ~, and names of users and secrets are left out.

At the top only the standard library is imported, for this has to work where others do not.
"""

import contextlib
import getpass
import importlib
import io
import json
import netrc
import os
import platform
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lyco_lab.errors import UserError
from lyco_lab.workers import cores

if TYPE_CHECKING:
    from rich.console import Console

OK, MISSING, BROKEN = "ok", "missing", "broken"  # broken: no run can do without it

# What pyproject.toml asks for, and a name in each package that only a working one has.
REQUIRED = {
    "torch": "torch.nn.Module",
    "lightning": "lightning.pytorch.Trainer",
    "diffusers": "diffusers.UNet2DConditionModel",
    "transformers": "transformers.CLIPTextModel",
    "wandb": "wandb.init",
    "safetensors": "safetensors.torch.load_file",
    "numpy": "numpy.ndarray",
    "pandas": "pandas.DataFrame",
    "pyarrow": "pyarrow.parquet.write_table",
    "pillow": "PIL.Image.open",
    "omegaconf": "omegaconf.OmegaConf",
    "pyyaml": "yaml.safe_load",
    "sympy": "sympy.Symbol",
    "matplotlib": "matplotlib.figure.Figure",
    "rich": "rich.table.Table",
    "typer": "typer.Typer",
    "jinja2": "jinja2.Environment",
}

# Features that need more: the packages, each with a name to import from it or None where it is
# enough that it is installed, and what they come with.
EXTRAS: dict[str, tuple[str, dict[str, str | None]]] = {
    "optimizer prodigy": ("optimizers", {"prodigyopt": "prodigyopt.Prodigy"}),
    "optimizer schedulefree": ("optimizers", {"schedulefree": "schedulefree.AdamWScheduleFree"}),
    "optimizer adamw8bit": ("optimizers", {"bitsandbytes": "bitsandbytes.optim.AdamW8bit"}),
    "the project's tests": ("dev", dict.fromkeys(("pytest", "pytest-xdist", "hypothesis"))),
    "tests against others": ("dev", dict.fromkeys(("lycoris-lora", "peft", "lion-pytorch"))),
    "lint and types": ("dev", dict.fromkeys(("ruff", "mypy"))),
}
PROGRAMS = {
    "commits in records": ("git",),
    "tests of the report": ("chromium", "chromium-browser"),
}

# Two distributions of one code. A version named here runs as soon as it is imported.
LIGHTNING = ("lightning", "pytorch-lightning")
STOLEN = ("2.6.2", "2.6.3")
UNSAFE_BELOW = "2.6.6"

NATIVE = {  # what a processor calls its instructions for a precision
    "bf16": {"amx_bf16", "avx512_bf16", "bf16"},
    "fp16": {"amx_fp16", "avx512_fp16", "fphp"},
}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
SWITCHES = {"0", "1", "true", "false", "yes", "no", "on", "off"}
SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
LITTLE_BYTES = 2**30  # of space; a checkpoint of a large adapter is not much smaller


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    found: str
    state: str = OK
    remedy: str = ""
    section: str = ""


def examine(out: Path) -> list[Check]:
    """Everything, in order. `out`: where runs are to be kept."""
    sections: dict[str, Callable[[], Iterator[Check]]] = {
        "versions": versions,
        "devices": devices,
        "precision": precisions,
        "folders": lambda: folders(out),
        "network": network,
        "features": features,
        "embedded model": embedded,
    }
    checks = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own, of what is said here anyway
        for section, look in sections.items():
            try:
                for check in look():
                    checks.append(replace(check, section=section))
            except Exception as error:  # the machines where this happens are those examined
                found = f"cannot be looked at: {in_words(error)}"
                checks.append(Check("the rest", found, BROKEN, section=section))
    homes = {str(Path.home()), str(Path.home().resolve())}
    secrets = {value for name, value in os.environ.items() if SECRET.search(name)}

    def hide(text: str) -> str:
        return private(text, homes=homes, secrets=secrets, user=user_name())

    return [replace(c, found=hide(c.found), remedy=hide(c.remedy)) for c in checks]


def works(checks: Iterable[Check]) -> bool:
    return all(check.state != BROKEN for check in checks)


def versions() -> Iterator[Check]:
    needed = requirements()
    at_least = needed.get("python")
    version = platform.python_version()
    fits = at_least is None or at_least.contains(version)
    found = f"{version}, {platform.system()} {platform.machine()}"
    yield Check("python", found, *(() if fits else (BROKEN, f"needs {at_least}")))
    if needed:
        yield Check("lyco-lab", metadata.version("lyco-lab"))
    else:
        remedy = "pip install --editable . in the checkout"
        yield Check("lyco-lab", "not installed: needed versions unknown", MISSING, remedy)
    stolen = [name for name in LIGHTNING if installed(name) in STOLEN]
    for name, place in REQUIRED.items():
        unsafe = bool(stolen) and name in LIGHTNING
        check = package(name, None if unsafe else place, needed.get(name))
        yield check if check.state == OK else replace(check, state=BROKEN)
        if name == "torch" and check.state == OK:
            yield Check("torch is built for", build())
        if name in LIGHTNING:
            yield from lightning_faults()


def requirements() -> dict[str, Any]:
    """Distribution -> the versions that the installed lyco-lab asks for; {} in a bare checkout."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about = metadata.metadata("lyco-lab")
    except metadata.PackageNotFoundError:
        return {}
    asked = [Requirement(line) for line in about.get_all("Requires-Dist") or []]
    python = {"python": SpecifierSet(about["Requires-Python"])}
    return python | {one.name.lower(): one.specifier for one in asked if len(one.specifier)}


def installed(name: str) -> str | None:
    """Its version, without importing it."""
    try:
        return metadata.version(name) or "of no known version"
    except metadata.PackageNotFoundError:
        return None


def package(name: str, place: str | None, needed: Any, extra: str | None = None) -> Check:
    """Whether a package is installed, can be imported, and has a version that is asked for."""
    what = f"{name}{needed or ''}" if extra is None else f"lyco-lab[{extra}]"
    remedy = f"pip install '{what}'"
    version = installed(name)
    if version is None:
        return Check(name, "not installed", MISSING, remedy)
    if place is not None:
        try:
            imported(place)
        except Exception as error:  # whatever its own code raises
            found = f"{version}, but importing it fails: {in_words(error)}"
            return Check(name, found, MISSING, f"pip install --force-reinstall '{what}'")
    if needed is not None and not needed.contains(version, prereleases=True):
        return Check(name, f"{version}, but {needed} is needed", MISSING, remedy)
    return Check(name, version)


def imported(place: str) -> Any:
    """The named thing of a module. What the module prints or warns of is not shown."""
    module, _, name = place.rpartition(".")
    unheard = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(unheard),
        contextlib.redirect_stderr(unheard),
    ):
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(module), name)


def lightning_faults() -> Iterator[Check]:
    """Versions that must not be used, by the name of the distribution that has them."""
    from packaging.version import InvalidVersion, Version

    remedy = (
        f"pip install --upgrade 'lightning>={UNSAFE_BELOW}' 'pytorch-lightning>={UNSAFE_BELOW}'"
    )
    for name in LIGHTNING:
        version = installed(name)
        if version in STOLEN:
            found = (
                f"{name} {version} is a known-bad version: it steals passwords, tokens and keys "
                "when it is imported, which was not done here (GHSA-w37p-236h-pfx3)"
            )
            changed = "uninstall it, change everything secret that this account could read, then "
            yield Check("known-bad Lightning", found, BROKEN, changed + remedy)
            continue
        try:
            unsafe = version is not None and Version(version) < Version(UNSAFE_BELOW)
        except InvalidVersion:
            continue
        if unsafe:
            found = f"{name} {version} runs code hidden in checkpoints (GHSA-qqmf-gpg7-g8gw)"
            yield Check("known-bad Lightning", found, BROKEN, remedy)


def build() -> str:
    import torch

    version: Any = torch.version
    if version.hip is not None:
        return f"ROCm {version.hip}"
    if version.cuda is not None:
        return f"CUDA {version.cuda}"
    return "processors, and Apple's MPS" if torch.backends.mps.is_built() else "processors alone"


def devices() -> Iterator[Check]:
    model = cpuinfo().get("model name") or platform.processor() or platform.machine()
    yield Check("processor", f"{model}, {os.cpu_count()} cores, {cores()} of them for this process")
    yield Check("memory", memory())
    torch = working_torch()
    if torch is None:
        return
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            free, _ = torch.cuda.mem_get_info(index)
            size = f"{gib(about.total_memory)}, {gib(free)} of it free"
            found = f"{about.name}, {size}, compute capability {about.major}.{about.minor}"
            yield Check(f"GPU {index}", found)
    elif os.path.exists("/proc/driver/nvidia/version") or shutil.which("nvidia-smi"):
        found = f"NVIDIA's driver is here, but torch, built for {build()}, finds no GPU"
        yield Check("GPU", found, MISSING, "install torch for CUDA, or see to the driver")
    else:
        yield Check("GPU", "none: the processor trains and draws")
    here = torch.backends.mps.is_available()
    yield Check("MPS", "here, but not used by lyco_lab" if here else "none")


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first core; {} elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    lines = (line.partition(":") for line in text.splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def memory() -> str:
    """Of the machine, and what a container allows of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    words = gib(total)
    with contextlib.suppress(OSError, TypeError):
        free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        words += f", {gib(int(free[1]) * 1024)} of it free"  # type: ignore[index]
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of the second kind, and the first
        with contextlib.suppress(OSError, ValueError):
            limit = int((Path("/sys/fs/cgroup") / file).read_text())
            words += f"; this container may use {gib(limit)}" if limit < total else ""
            break
    return words


def precisions() -> Iterator[Check]:
    """Half precisions: whether there are instructions for them, and what a product takes."""
    torch = working_torch()
    if torch is None:
        return
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        whole_s = product_s(torch, device, torch.float32)
        for name, dtype in kinds.items():
            place = f"{name}, {'processor' if device == 'cpu' else 'GPU 0'}"
            try:
                share = product_s(torch, device, dtype) / whole_s
            except Exception as error:
                yield Check(place, f"cannot be computed with: {in_words(error)}", MISSING)
                continue
            how = on_processor(name) if device == "cpu" else on_gpu(torch, name)
            yield Check(place, f"{how}; a matrix product takes {share:.2g} of float32's time")


def on_processor(name: str) -> str:
    flags = (cpuinfo().get("flags") or cpuinfo().get("Features") or "").split()
    if not flags:
        return "works, natively or not"
    native = sorted(NATIVE[name] & set(flags))
    return f"native ({', '.join(native)})" if native else "emulated"


def on_gpu(torch: Any, name: str) -> str:
    if torch.version.hip is not None:
        return "native"
    if name == "bf16":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cuda.get_device_capability() >= (5, 3)
    return "native" if native else "emulated"


def product_s(torch: Any, device: str, dtype: Any, size: int = 512, rounds: int = 5) -> float:
    """Seconds that a product of two square matrices takes, in the best of a few rounds."""
    # The processor's own seconds do not depend on what else the machine does.
    now = time.process_time if device == "cpu" else time.perf_counter
    matrix = torch.linspace(-1, 1, size * size, device=device).reshape(size, size).to(dtype)
    times = []
    for _ in range(rounds + 1):  # the first is slow
        began = now()
        (matrix @ matrix)[0, 0].item()  # waits for the GPU
        times.append(now() - began)
    return min(times[1:])


def folders(out: Path) -> Iterator[Check]:
    yield folder("runs (--out)", out, BROKEN)
    try:
        yield folder("temporary files", Path(tempfile.gettempdir()), BROKEN)
    except OSError as error:
        yield Check("temporary files", f"no folder for them: {in_words(error)}", BROKEN, "TMPDIR=…")
    yield folder("Hugging Face cache", hugging_face_cache(), MISSING)


def folder(name: str, path: Path, otherwise: str) -> Check:
    """Whether a folder, or the one that it would be made in, can be written in; `otherwise` not."""
    path = path.absolute()
    existing = next(p for p in (path, *path.parents) if os.path.exists(p))
    words = f"{path}" + ("" if existing == path else " (not there yet)")
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0")
            file.flush()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return Check(name, f"{words}: cannot be written in, {reason}", otherwise, "choose another")
    free = shutil.disk_usage(existing).free
    words = f"{words}, writable, {gib(free)} free"
    return Check(name, words, *(() if free >= LITTLE_BYTES else (MISSING, "free some space")))


def hugging_face_cache() -> Path:
    """Where the hub's files are kept, by the rules of huggingface_hub."""
    given = os.environ
    home = given.get("HF_HOME", f"{given.get('XDG_CACHE_HOME', '~/.cache')}/huggingface")
    path = given.get("HF_HUB_CACHE", given.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub"))
    return Path(os.path.expandvars(os.path.expanduser(path)))


def network() -> Iterator[Check]:
    """What may use the network. It is not tried."""
    for name in OFFLINE:
        value = os.environ.get(name)
        shown = value if value is None or value.lower() in SWITCHES else "set"
        yield Check(name, "not set" if shown is None else shown)
    yield Check("models", "never fetched by a run")
    try:
        yield Check("W&B", logged_in())
    except LookupError:
        remedy = "wandb login"
        yield Check("W&B", "not logged in, which --wandb online needs", MISSING, remedy)


def logged_in() -> str:
    """Where W&B finds a key; it is not shown, and not tried. `LookupError` without one."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(name):
            return f"a key in {name}"
    url = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    host = url.rpartition("://")[2].partition("/")[0].rpartition("@")[2]
    given = os.environ.get("NETRC")
    for file in map(Path, [given] if given else ["~/.netrc", "~/_netrc"]):
        try:
            known = netrc.netrc(file.expanduser()).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if known and known[2]:
            return f"a key for {host} in {file.expanduser()}"
    raise LookupError(host)


def features() -> Iterator[Check]:
    needed = requirements()
    for feature, (extra, packages) in EXTRAS.items():
        checks = [package(n, place, needed.get(n), extra) for n, place in packages.items()]
        faults = [check for check in checks if check.state != OK]
        found = ", ".join(f"{check.name} {check.found}" for check in faults or checks)
        yield Check(feature, found, *((MISSING, faults[0].remedy) if faults else ()))
    for feature, names in PROGRAMS.items():
        place = next(filter(None, map(shutil.which, names)), None)
        if place is None:
            yield Check(feature, f"no {' or '.join(names)}", MISSING, f"install {names[0]}")
        else:
            yield Check(feature, place)


def embedded() -> Iterator[Check]:
    """The weights that come with the library: whole, and which they are."""
    from lyco_lab import miniature

    try:
        path = miniature.path()
    except UserError as error:
        yield Check("weights", "not there", BROKEN, str(error))
        return
    opened = imported("safetensors.safe_open")
    files = sorted(path.rglob("*.safetensors"))
    for file in files:
        try:
            with opened(file, "numpy") as tensors:  # compares the file's length with its header
                tensors.keys()
        except Exception as error:
            found = f"{file.relative_to(path)} is damaged: {in_words(error)}"
            yield Check("weights", found, BROKEN, "install the package again")
            return
    size = sum(file.stat().st_size for file in files)
    yield Check("weights", f"{len(files)} files, {size / 2**20:.1f} MiB, whole")
    if working_torch() is not None:
        from lyco_lab.diffusion.model import fingerprint

        yield Check("fingerprint", fingerprint(path))


def working_torch() -> Any:
    """torch, or None where it cannot be imported, which is said once, among the versions."""
    with contextlib.suppress(Exception):
        imported(REQUIRED["torch"])
        return importlib.import_module("torch")
    return None


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def in_words(error: Exception) -> str:
    """An error's kind, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def private(text: str, *, homes: Iterable[str], secrets: Iterable[str], user: str) -> str:
    """The text without what is nobody's business."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= 6:  # "false" is none
            text = text.replace(secret, "***")
    for home in sorted(homes, key=len, reverse=True):
        if home != "/":
            text = re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text)
    if user and user != "root":
        text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "USER", text)
    return text


def user_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a number without a name, as in some containers
        return ""


def as_json(checks: Iterable[Check]) -> str:
    """{"works": …, "checks": {section: {name: {found, state, remedy}}}}"""
    checks = list(checks)
    sections: dict[str, dict[str, Mapping[str, str]]] = {}
    for check in checks:
        about = asdict(check)
        section, name = about.pop("section"), about.pop("name")
        sections.setdefault(section, {})[name] = about
    return json.dumps({"works": works(checks), "checks": sections}, indent=2)


def show(checks: Iterable[Check], console: "Console") -> None:
    """A table, and what to do about what is not as it should be."""
    from rich.table import Table
    from rich.text import Text

    checks, colours = list(checks), {OK: "green", MISSING: "yellow", BROKEN: "red"}
    table = Table(box=None, pad_edge=False, show_header=False)
    section = None
    for check in checks:
        if check.section != section:
            section = check.section
            table.add_row(Text(f"\n{section}" if table.rows else section, style="bold"))
        found = Text(check.found + (f"\n{check.remedy}" if check.remedy else ""))
        table.add_row(Text(check.state, style=colours[check.state]), Text(check.name), found)
    console.print(table)
    broken = [check.name for check in checks if check.state == BROKEN]
    if broken:
        console.print("\nbroken:", style="red", end=" ")
    console.print(", ".join(broken) if broken else "\nRuns can be made.")
