"""The folder listing is the pipeline: imports point one way, and nothing heavy comes too early."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "lyco_lab"

# A module may import its own package and whatever stands before it.
ORDER = (
    "errors", "interrupts", "files", "readers", "settings", "user_classes", "kinds", "seeds",
    "linalg", "waits", "record", "integrity", "states", "progress", "console", "workers",
    "adapters", "optimizers", "config", "devices", "formats", "diffusion", "miniature", "gamma",
    "fold", "data", "tracking", "train", "longer", "verify", "generate", "evaluate", "adopt",
    "analyse", "report", "dry_run", "lacking", "costs", "engines", "doctor", "import_config", "cli",
    "__main__",
)  # fmt: skip
USERS = ("experiments", "theory", "paper", "tests")  # import the library; it imports none of them
SHARED = {
    "adapters": {
        "adapted_layer", "attention", "base", "forward", "geometry", "kernel", "layer_adapter",
        "layers", "lowrank", "merging", "mount", "options", "plan", "rescale", "rotation", "shapes",
        "targeting",
    },
    "evaluate": {"base", "stage"},
    "optimizers": {"base"},
    "engines": set(),
}  # fmt: skip


def imported(path: Path, package: str) -> Iterator[str]:
    """Full names of all modules that the file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            stem = f"{base}{node.module or ''}".strip(".")
            yield stem
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def sources(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def part_of(path: Path) -> str:
    """lyco_lab/adapters/lora.py -> adapters."""
    return path.relative_to(LIBRARY).with_suffix("").parts[0]


def violations(path: Path, part: str) -> list[str]:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = []
    for name in imported(path, package):
        first, *rest = name.split(".")
        if first in USERS:
            found.append(name)
        if first == "lyco_lab" and rest and rest[0] in ORDER:
            later = ORDER.index(rest[0]) > ORDER.index(part)
            found += [name] * later
    return found


@pytest.mark.parametrize("path", sources(LIBRARY), ids=lambda p: str(p.relative_to(LIBRARY)))
def test_imports_point_one_way(path):
    part = part_of(path)
    if part == "__init__":  # names of all parts, each imported when it is used
        part = ORDER[-1]
    assert part in ORDER, f"{part} has no place in the order of imports yet"
    assert violations(path, part) == []


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import one another, by whatever way round."""
    sorter = TopologicalSorter(graph)
    try:
        sorter.prepare()
    except CycleError as error:
        return [error.args[1]]
    return []


def modules(folder: Path) -> dict[str, set[str]]:
    """The modules below a package, and which of each other they import, wherever in a file."""
    paths = {}
    for path in sources(folder):
        name = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        paths[name.removesuffix(".__init__")] = path
    paths.pop(folder.name)  # names of all parts, each imported when it is used
    found = {}
    for name, path in paths.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        others = {other for other in imported(path, package) if other in paths}
        found[name] = {other for other in others if not f"{name}.".startswith(f"{other}.")}
    return found


def test_no_modules_import_one_another():
    assert circles(modules(LIBRARY)) == []


def test_a_circle_is_seen(tmp_path):
    package = tmp_path / "ours"
    package.mkdir()
    for name, text in {
        "__init__": "",
        "a": "from ours import b",
        "b": "def f():\n    from ours.c import g",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ours.a import x",
    }.items():
        (package / f"{name}.py").write_text(text)
    ((first, *others),) = circles(modules(package))
    assert first == others[-1] and {first, *others} == {"ours.a", "ours.b", "ours.c"}


def test_the_check_sees_what_it_should(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "lyco_lab" / "adapters" / "x.py"
    file.parent.mkdir(parents=True)
    wrong = ["import lyco_lab.config", "from lyco_lab import train", "import theory",
             "from lyco_lab.config import Run", "from ..config import Run",
             "def f():\n    from lyco_lab.report import page"]  # fmt: skip
    right = ["import torch", "from lyco_lab.adapters import base", "from lyco_lab import linalg",
             "from . import base", "from ..linalg import kron"]  # fmt: skip
    for line in wrong:
        file.write_text(line)
        assert violations(file, "adapters"), line
    for line in right:
        file.write_text(line)
        assert not violations(file, "adapters"), line


@pytest.mark.parametrize("package", SHARED)
def test_members_of_a_family_do_not_import_each_other(package):
    files = [path for path in sources(LIBRARY / package) if path.stem != "__init__"]
    members = {path.stem for path in files} - SHARED[package]
    for path in files:
        if path.stem in members:
            siblings = {f"lyco_lab.{package}.{member}" for member in members - {path.stem}}
            assert not siblings & set(imported(path, f"lyco_lab.{package}")), path


def test_one_lightning():
    # `pytorch_lightning` is a second tree of the same classes; mixing the two fails far from here.
    for folder in (LIBRARY, *(ROOT / name for name in USERS)):
        for path in sources(folder):
            assert "pytorch_lightning" not in {n.split(".")[0] for n in imported(path, "")}, path


def test_randomness_never_comes_from_a_global_generator():
    banned = {"torch.manual_seed", "torch.seed", "random.seed", "np.random.seed",
              "numpy.random.seed", "L.seed_everything", "lightning.seed_everything"}  # fmt: skip
    recipe = (
        LIBRARY / "miniature" / "pretrain"
    )  # builds whole networks; layers draw from nowhere else
    for path in sources(LIBRARY):
        nodes = ast.walk(ast.parse(path.read_text()))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        assert recipe in path.parents or not banned & calls, path


def test_the_command_line_imports_nothing_heavy():
    heavy = ["torch", "lightning", "diffusers", "transformers", "wandb", "pandas", "numpy",
             "matplotlib", "sympy"]  # fmt: skip
    script = f"import sys, lyco_lab.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
