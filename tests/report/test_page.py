"""The page: whole in itself, complete, honest about its numbers, and the same when made again."""

import dataclasses
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from lyco_lab.analyse import analyse
from lyco_lab.analyse.gamma_pair import compare
from lyco_lab.analyse.table import quoted
from lyco_lab.engines import local
from lyco_lab.evaluate.stage import FOREIGN, foreign
from lyco_lab.generate import read_table
from lyco_lab.record import Record
from lyco_lab.report import grids, page
from lyco_lab.report.page import differences, short_name
from lyco_lab.report.table import Form, form_of, table_rows, written
from lyco_lab.states import fail


class Elements(HTMLParser):
    """All elements of a page with their attributes, and a check that tags are closed in order."""

    VOID = {"meta", "link", "img", "br", "input"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def analysed(evaluated):
    study, root = evaluated
    return study, root, *analyse(study, root)


@pytest.fixture(scope="module")
def html(analysed) -> str:
    return page.write(*analysed).read_text()


@pytest.fixture(scope="module")
def elements(html) -> Elements:
    return Elements(html)


def test_tags_are_balanced(elements):
    assert elements.open == []


def test_the_parts_that_are_promised_are_there(elements):
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"results", "grid-kael", "grid-neon", "scatter", "losses", "gamma-verdict"} <= set(ids)
    targets = {a["href"][1:] for a in elements.all("a")}
    assert targets <= set(ids)


def test_nothing_outside_the_page_is_asked_for(html, elements):
    for tag, attributes in elements.found:
        for name in ("src", "href", "srcset", "data", "action"):
            link = attributes.get(name) or "#"
            assert link.startswith(("data:", "#")), f"<{tag} {name}={link[:60]}>"
    assert not elements.all("script")
    outside_images = re.sub(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]+", "", html)
    assert "url(" not in outside_images and "@import" not in outside_images
    assert "://" not in outside_images
    policy = next(m["content"] for m in elements.all("meta") if "http-equiv" in m)
    assert "default-src 'none'" in policy


def test_every_image_says_its_model_its_prompt_and_its_seed(analysed, elements):
    study, root, *_ = analysed
    alts = [image["alt"] for image in elements.all("img")]
    assert all(alts)
    made = read_table(root / study.run("lokr-kael").folder_name / "generate")
    for row in made[made["kind"] == "style"].head(2).itertuples():
        assert f"lokr: {row.prompt} (seed {row.seed})" in alts
        assert f"base model: {row.prompt} (seed {row.seed})" in alts
    assert sum(alt.startswith("training image: ") for alt in alts) == 9 + 7


def test_grids_show_the_very_files_that_were_scored(analysed):
    study, root, *_ = analysed
    table = read_table(root / study.run("lora-kael").folder_name / "generate")
    columns = grids.choose_columns([table])
    row = grids.model_row("lora", "run", 0, table, columns, Path)
    for column, cell in zip(columns, row.cells, strict=True):
        files = table[(table["kind"] == column.kind) & (table["index"] == column.index)]["file"]
        assert cell.uri == grids.data_uri(Path(files.iloc[0]))
    kinds = ["train", *["trigger"] * 2, *["alter"] * 4, *["style"] * 2]
    assert [column.kind for column in columns] == kinds
    assert len({c.prompt for c in columns if c.kind == "alter"}) == 4


def test_a_page_needs_the_tables_alone_and_says_what_is_gone(evaluated, html, tmp_path):
    study, whole = evaluated
    root = tmp_path / "runs"
    shutil.copytree(whole, root)
    (root / study.name / ".part-killed").mkdir()
    scores = (root / study.name / "results.csv").read_bytes()
    gone = [*root.glob("*/generate"), *root.glob("base/*/*/"), *root.glob("*/adapter.safetensors")]
    for path in gone:
        if path.name not in ("done", "evaluate"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    name = study.run("lora-neon").folder_name
    (root / name / "train" / "metrics.csv").write_text("step,loss\n1,0.1\n")
    before = analyse(study, root)
    again = page.write(study, root, *before).read_text()
    assert (root / study.name / "results.csv").read_bytes() == scores
    assert not list((root / study.name).glob(".part-*"))  # of a kill
    assert "missing or\n    damaged" in again and "adapter.safetensors is gone" in again
    elements = Elements(again)
    assert all(image["alt"].startswith("training image: ") for image in elements.all("img"))
    cells = [cell for cell in elements.all("td") if cell.get("class") == "gone"]
    assert len(cells) == len(Elements(html).all("img")) - len(elements.all("img"))
    assert f"{name}/train/metrics.csv" not in html
    assert again.count('<path class="line ') == html.count('<path class="line ') - 1


def test_runs_without_results_are_named_and_the_others_compared(evaluated, html, tmp_path):
    study, whole = evaluated
    root = tmp_path / "runs"
    shutil.copytree(whole, root)
    lost = "<b>of</b> & memory"
    record = Record(root / study.run("lora-gamma-kael").folder_name)
    record.undo("train")
    fail(record, "train", lost, "Traceback")
    Record(root / study.run("lokr-neon").folder_name).undo("evaluate")
    outcome = local.conclude(study, root)
    assert {each.name for each in outcome.missing} == {"lora-gamma-kael", "lokr-neon"}
    assert "lokr-neon" not in set(outcome.results["run"]) and outcome.verdicts == []
    page = outcome.report.read_text()
    said = re.sub(r"\s+", " ", page)
    assert "2 of 10 runs have no results" in said and "8 of 10 runs" in said
    assert "<b>lora-gamma-kael</b> failed in train: &lt;b&gt;of&lt;/b&gt; &amp; memory" in said
    assert "<b>lokr-neon</b> evaluate is not done" in said
    assert "lora-gamma-kael and lora-rewritten-kael: not available, since lora-gamma-kael" in said
    ids = [a["id"] for _, a in Elements(page).found if "id" in a]
    assert "gamma-verdict" in ids and "no results" not in html
    # The others look as they do on the whole page.
    assert set(re.findall(r"<li><svg.*?</li>", page)) < set(re.findall(r"<li><svg.*?</li>", html))


def test_columns_are_what_all_models_were_given(analysed):
    study, root, *_ = analysed
    table = read_table(root / study.run("lora-kael").folder_name / "generate")
    fewer = table[table["index"] < 3]
    reseeded = table.assign(seed=table["seed"] + (table["kind"] == "style"))
    assert all(column.index < 3 for column in grids.choose_columns([table, fewer]))
    assert {c.kind for c in grids.choose_columns([table, reseeded])} == {
        "train",
        "trigger",
        "alter",
    }
    assert grids.choose_columns([table, table.assign(seed=0)]) == ()


def test_large_images_are_shown_reduced(tmp_path):
    from PIL import Image

    Image.new("RGB", (600, 300), "red").save(tmp_path / "large.png")
    assert grids.data_uri(tmp_path / "large.png").startswith("data:image/webp")


def test_the_verdict_names_the_number_of_losses_compared(html):
    section = html[html.index('id="gamma-verdict"') :]
    assert re.search(r"<b>120</b> of 120 losses\s+bitwise equal", section)
    assert "adapter.alpha" in section


def test_an_unequal_pair_is_not_dressed_up(analysed):
    study, root, results, verdicts = analysed
    found = verdicts[0]
    off = compare(found.gamma_run, found.rewritten_run, {1: 0.5, 2: 0.5}, {1: 0.5, 2: 0.25})
    other = dataclasses.replace(study, name="other")
    html = page.write(other, root, results, [off]).read_text()
    assert "Not equal" in html and 'class="verdict fails"' in html
    assert "first at step 2" in html
    assert "bitwise equal</p>" not in html


def test_a_study_without_pairs_has_no_verdict(analysed):
    study, root, results, _ = analysed
    html = page.write(dataclasses.replace(study, name="pairless"), root, results, []).read_text()
    assert "gamma-verdict" not in html


def test_words_of_the_study_are_text_and_not_markup(analysed):
    study, root, results, verdicts = analysed
    question = "Is <script>alert(1)</script> & 'quotes' safe?"
    odd = dataclasses.replace(study, name="odd", question=question)
    html = page.write(odd, root, results, verdicts).read_text()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_the_same_study_gives_the_same_page(analysed, html):
    assert page.write(*analysed).read_text() == html


def test_the_best_run_of_each_column_is_marked_ties_included(analysed):
    _, _, results, _ = analysed
    rows = results[results["concept"] == "kael"].assign(label=lambda frame: frame["run"])
    columns = quoted()
    table = table_rows(rows, {}, dict.fromkeys(columns, Form(0, 2)))
    runs = [row for row in table if row.role == "run"]
    for i, (metric, _) in enumerate(columns.values()):
        values = {row.cells[i].text for row in runs}
        best = (max if metric.better == "higher" else min)(values, key=float)
        for row in table:
            marked = row.role == "run" and len(values) > 1 and row.cells[i].text == best
            assert row.cells[i].best == marked


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (0.5, Form(0, 2), "0.50"),
        (-0.001, Form(0, 2), "0.00"),
        (-0.5, Form(0, 1), "−0.5"),
        (0.0024, Form(3, 2), "2.40"),
        (float("nan"), Form(0, 2), ""),
    ],
)
def test_numbers_are_written_in_their_columns_form(value, form, text):
    assert written(value, form) == text


@pytest.mark.parametrize(
    ("values", "form", "unit"),
    [
        ([0.4, 0.5, 0.0], Form(0, 2), ""),
        ([0.002, 0.003], Form(3, 2), "10⁻³"),
        ([2e-6, -9e-7], Form(6, 2), "10⁻⁶"),
        ([5.1, 7.3], Form(0, 2), ""),
        ([1234.0], Form(0, 0), ""),
        ([float("nan"), 0.0], Form(0, 2), ""),
    ],
)
def test_a_columns_usual_value_shows_its_digits(values, form, unit):
    assert form_of(pd.Series(values)) == form
    assert form.unit == unit


def test_names_lose_their_concept_and_differences_are_settings(evaluated):
    study, _ = evaluated
    assert short_name(study.run("lora-gamma-kael")) == "lora-gamma"
    pair = study.run("lora-gamma-kael"), study.run("lora-rewritten-kael")
    assert differences(*pair) == [("adapter.alpha", "2.0", "8.0")]


def test_it_says_what_judges_know_where_the_images_may_be_others(analysed, html, tmp_path):
    study, root, results, verdicts = analysed
    assert FOREIGN not in html
    own = dataclasses.replace(study.runs[0].data, concept=None, folder=str(tmp_path))
    assert foreign(dataclasses.replace(study.runs[0], data=own))
    elsewhere = dataclasses.replace(study.runs[0].model, path="/models/sd15")
    assert foreign(dataclasses.replace(study.runs[0], model=elsewhere))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "foreign", lambda run: run is study.runs[-1])
        text = page.write(study, root, results, verdicts).read_text()
    assert FOREIGN in " ".join(text.split())
    page.write(study, root, results, verdicts)


@pytest.mark.parametrize("lost", ["data.json", "train/metrics.csv"])
def test_what_is_not_shown_for_damage_is_named(analysed, tmp_path, lost):
    study, root, *rest = analysed
    copied = tmp_path / "runs"
    shutil.copytree(root, copied)
    folder = copied / study.runs[0].folder_name
    file = folder / ("done" if lost == "data.json" else "") / lost
    file.write_bytes(b"")
    said = page.write(study, copied, *rest).read_text()
    assert "missing or\n    damaged, and not shown here" in said
    assert str(file.relative_to(copied)) in said
