"""The paper's tables and numbers, and that main.tex asks only for what a script makes."""

import importlib
import re

import pytest

from lyco_lab.optimizers import OPTIMIZERS
from paper import data, latex
from paper.paths import PAPER
from paper.tables import adapters, exponents, numbers
from tests.paper import tables

SCRIPTS = sorted(path.stem for path in (PAPER / "tables").glob("*.py"))
MAIN = (PAPER / "main.tex").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_table_is_built_from_tables(name, tmp_path):
    script = importlib.import_module(f"paper.tables.{name}")
    out = tmp_path / "out"
    options = {"--table": tables.results(tmp_path), "--gamma": tables.losses(tmp_path)}
    script.main([str(word) for option in (options | {"--out": out}).items() for word in option])
    assert [path.name for path in out.iterdir()] == [f"{name}.tex"]
    assert (out / f"{name}.tex").read_text().startswith("\\")


def test_rows_are_means_over_concepts_without_the_gamma_pair(tmp_path):
    pairs = data.gamma_pairs(tables.losses(tmp_path))
    rows = adapters.rows(data.compared(data.results(tables.results(tmp_path)), pairs))
    names = [row[0] for row in rows]
    assert names == ["base model", "LoRA", "LoHa", "Native", "training images"]
    assert rows[2][1:3] == ["0.60", "0.65"]
    assert rows[1][-1] == r"91\,136"
    assert rows[0][-1] == rows[-1][-1] == latex.NOTHING


def test_the_exponents_are_those_that_rewrite_runs():
    rows = {row[0]: row[1:] for row in exponents.rows()}
    assert len(rows) == len(OPTIMIZERS)
    assert rows["AdamW"] == ["$s$", "$s^{-1}$", "$s^{-1}$", latex.NOTHING]
    assert rows["SGD"] == ["$s^{2}$", latex.NOTHING, "$s^{-2}$", latex.NOTHING]
    assert rows["Prodigy"][0] == latex.NOTHING and rows["Prodigy"][-1] == "d0: $s$"
    assert rows["Adadelta"][:2] == ["$s^{2}$", "$s^{-2}$"]


def test_the_numbers_count_runs_and_bits(tmp_path):
    table = data.results(tables.results(tmp_path))
    found = numbers.macros(table, data.gamma_pairs(tables.losses(tmp_path, steps=9, wrong_at=2)))
    assert found == {
        "conceptCount": "2",
        "adapterCount": "3",
        "runCount": "6",
        "pairedSteps": "9",
        "equalSteps": "8",
    }


def test_main_asks_only_for_what_a_script_makes(tmp_path):
    asked = set(re.findall(r"\{(?:figures|tables)/build/(\w+)\}", MAIN))
    made = {path.stem for kind in ("figures", "tables") for path in (PAPER / kind).glob("*.py")}
    assert asked == made
    found = numbers.macros(
        data.results(tables.results(tmp_path)), data.gamma_pairs(tables.losses(tmp_path))
    )
    for macro in found:
        assert rf"\{macro}{{}}" in MAIN


def test_no_result_is_typed_by_hand():
    body = MAIN.split(r"\maketitle")[1].split(r"\begin{thebibliography}")[0]
    body = re.sub(r"\\(?:cite|label|ref|setlength|begin\{\w+\}\[[^]]*\])\S*", "", body)
    body = re.sub(r"\$[^$]*\$|\\begin\{equation\}.*?\\end\{equation\}", "", body, flags=re.DOTALL)
    assert re.findall(r"\d+", body) == []


def test_escaping_and_numbers():
    assert latex.escape("a_b & 50%") == r"a\_b \& 50\%"
    assert latex.number(1234567.0, 0) == r"1\,234\,567"
    assert latex.number(-0.5, 2) == "$-$0.50"
    assert latex.number(float("nan"), 2) == latex.NOTHING
