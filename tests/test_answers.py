"""docs/answers.md names tests that exist, for each of its 25 lines, or says that there is none."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs" / "answers.md").read_text().splitlines()
    if re.match(r"\| \d+ \|", line)
]


def names_in(path: Path) -> set[str]:
    functions = ast.walk(ast.parse(path.read_text()))
    return {node.name for node in functions if isinstance(node, ast.FunctionDef)}


def test_there_are_25():
    assert [int(number) for number, *_ in ROWS] == list(range(1, 26))
    assert all(len(row) == 3 for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_each_is_answered_or_open(row):
    answer = row[2]
    named = NAMED.findall(answer)
    assert named or "**open:**" in answer
    assert answer.count("::") == len(named), "a test that is not written as `file::test`"
    for file, name in named:
        assert name.startswith("test_"), name
        assert name in names_in(ROOT / file), f"{file} has no {name}"
