"""The page says what the code does: its tables are those of the optimizers and of the theorems."""

import re
import shlex
from pathlib import Path

import pytest

import theory
from lyco_lab.optimizers import OPTIMIZERS
from theory import theorems
from theory.homogeneity import UPDATES

HERE = Path(theory.__file__).parent
PAGE = (HERE / "README.md").read_text()
DIGITS = str.maketrans("⁻⁰¹²³", "-0123")


def table(heading):
    """The rows of the first table below a heading, as lists of cells."""
    _, _, rest = PAGE.partition(f"\n## {heading}\n")
    lines = [line for line in rest.split("\n## ")[0].splitlines() if line.startswith("|")]
    assert len(lines) > 2, heading
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def powers(cell):
    """`lr` s², `eps` s⁻¹: setting -> power."""
    found = {}
    for part in cell.split(", "):
        name, power = re.fullmatch(r"`(\w+)` s([⁻⁰¹²³]*)", part).groups()
        found[name] = int(power.translate(DIGITS) or 1)
    return found


ROWS = {row[0].strip("`"): row[1:] for row in table("Optimizers")}


def test_every_optimizer_has_a_row():
    assert ROWS.keys() == OPTIMIZERS.keys()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_row_is_what_the_optimizer_claims(name):
    k, p, moves, remarks, file = ROWS[name]
    optimizer = OPTIMIZERS[name]
    assert powers(moves) == dict(optimizer.powers)
    assert 1 + int(k) - int(p) == optimizer.powers.get("lr", 0)
    assert bool(optimizer.one_scale) == ("one s for all" in remarks)
    assert bool(optimizer.averages) == ("the average" in remarks)
    assert bool(optimizer.coarse) == ("unless s is a power of two" in remarks.lower())
    assert optimizer.exact
    assert (HERE / "optimizers" / file.strip("`")).is_file()


def test_the_degrees_are_those_of_the_theorem():
    stated = {name: degree for name, _, degree in table("Degrees")}
    proved = {update.name: update.degree for update in UPDATES}
    assert stated.pop("any of the products, with a trained scalar") == "one more"
    assert {name: int(degree) for name, degree in stated.items()}.items() <= proved.items()
    families = {name.split(",")[0] for name in proved if "with a scalar" not in name}
    assert families - {name.split(",")[0] for name in stated} == {"norm"}


def test_every_theorem_is_on_the_page():
    stated = set(re.findall(r"`((?:optimizers/)?\w+\.py)`", PAGE))
    stated |= {f"optimizers/{row[-1].strip('`')}" for row in ROWS.values()}
    files = {path for path, _ in theorems()}
    assert {path for path in files if not {path, Path(path).name} & stated} == set()
    for path in stated:
        assert (HERE / path).is_file() or (HERE / "optimizers" / path).is_file(), path


def test_what_it_tells_to_run_is_there():
    tests = re.findall(r"`pytest ([^`]+)`", PAGE)
    assert len(tests) > 10
    for path in (path for command in tests for path in shlex.split(command)):
        assert (HERE.parent / path).exists(), path


def test_every_link_within_the_page_leads_somewhere():
    headings = {h.lower().replace(" ", "-") for h in re.findall(r"^## (.+)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\(#([\w-]+)\)", PAGE)) <= headings
