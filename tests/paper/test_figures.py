"""The paper's figures: built from tables alone, the same bytes each time, and true to the table."""

import importlib

import matplotlib
import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from lyco_lab.errors import UserError
from paper import data
from paper.figures import fidelity_controllability, gamma_equivalence
from paper.paths import PAPER
from tests.paper import tables

SCRIPTS = sorted(path.stem for path in (PAPER / "figures").glob("*.py"))


def words(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_figure_is_built_from_tables_the_same_each_time(name, tmp_path):
    script = importlib.import_module(f"paper.figures.{name}")
    table, gamma = tables.results(tmp_path), tables.losses(tmp_path)
    before = dict(matplotlib.rcParams)
    for out in ("once", "again"):
        options = {"--table": table, "--gamma": gamma, "--out": tmp_path / out}
        script.main([str(word) for option in options.items() for word in option])
    once, again = tmp_path / "once", tmp_path / "again"
    assert sorted(path.name for path in once.iterdir()) == [f"{name}.pdf", f"{name}.png"]
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in once.iterdir())
    assert (once / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    pixels = np.asarray(Image.open(once / f"{name}.png").convert("L"))
    assert pixels.shape[1] >= 1000
    assert pixels.min() < 100 < pixels.max()
    assert dict(matplotlib.rcParams) == before


def test_every_adapter_is_named_once_in_every_panel(tmp_path):
    pairs = data.gamma_pairs(tables.losses(tmp_path))
    figure = fidelity_controllability.draw(
        data.compared(data.results(tables.results(tmp_path)), pairs)
    )
    shown = words(figure)
    for concept in tables.CONCEPTS:
        assert shown.count(concept) == 1
    for name in ("LoRA", "LoHa", "Native", "base model"):
        assert shown.count(name) == len(tables.CONCEPTS)
    points = [ax.containers for ax in figure.axes]
    assert [len(panel) for panel in points] == [len(tables.SCORES)] * len(tables.CONCEPTS)


def test_names_lie_inside_and_clear_of_each_other(tmp_path):
    figure = fidelity_controllability.draw(data.results(tables.results(tmp_path)))
    figure.draw_without_rendering()
    for ax in figure.axes:
        inside = ax.get_window_extent()
        boxes = [text.get_window_extent() for text in ax.texts]
        assert len(boxes) == len(tables.SCORES)
        for index, box in enumerate(boxes):
            assert inside.x0 <= box.x0 and box.x1 <= inside.x1
            assert not any(box.overlaps(other) for other in boxes[:index])


def test_a_further_concept_starts_a_further_row(tmp_path):
    rows = [
        tables.result("r", f"concept {i}", "lora", 0.1 * i, 0.3) | {"run": f"r{i}"}
        for i in range(4)
    ]
    table = data.results(tables.write(tmp_path / "four.csv", rows))
    visible = [ax for ax in fidelity_controllability.draw(table).axes if ax.get_visible()]
    assert len(visible) == 4
    assert len({ax.get_subplotspec().rowspan.start for ax in visible}) == 2


def test_equal_losses_are_called_equal_with_their_number(tmp_path):
    pairs = data.gamma_pairs(tables.losses(tmp_path, steps=20))
    assert "all 20 losses are bitwise equal" in words(gamma_equivalence.draw(pairs))
    assert not gamma_equivalence.units_in_the_last_place(pairs[tables.PAIR]).any()


def test_one_wrong_bit_is_seen(tmp_path):
    pairs = data.gamma_pairs(tables.losses(tmp_path, steps=20, wrong_at=7))
    assert "19 of 20 losses are bitwise equal" in words(gamma_equivalence.draw(pairs))
    units = gamma_equivalence.units_in_the_last_place(pairs[tables.PAIR])
    assert units[6] == 1
    assert np.count_nonzero(units) == 1


def test_what_a_table_lacks_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing.csv does not exist: .*runs/demo"):
        data.results(tmp_path / "nothing.csv")
    bad = tables.write(tmp_path / "bad.csv", [{"run": "a", "concept": "b"}])
    with pytest.raises(UserError, match=r"bad.csv lacks the columns adapter, image_similarity"):
        data.results(bad)
    word = tables.write(tmp_path / "word.csv", [tables.result("a", "b", "lora", "high", 0.5)])
    with pytest.raises(UserError, match=r"word.csv: a metric is not a number"):
        data.results(word)
    loss = {"pair": "a = b", "step": 1, "loss_gamma": "?", "loss_rewritten": "0x1p0"}
    with pytest.raises(UserError, match=r"loss.csv: needs whole steps"):
        data.gamma_pairs(tables.write(tmp_path / "loss.csv", [loss]))
    empty = tmp_path / "empty.csv"
    empty.write_text("pair,step,loss_gamma,loss_rewritten\n")
    with pytest.raises(UserError, match=r"empty.csv has no rows"):
        data.gamma_pairs(empty)


def test_a_script_tells_what_is_wrong_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="does not exist"):
        data.script(lambda: gamma_equivalence.main(["--gamma", str(tmp_path / "none.csv")]))
