"""What the benchmarks count is counted right, their goals are judged right, and they run.

No time is asserted here.
"""

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parent / "benchmarks"
SCRIPTS = sorted(path for path in FOLDER.glob("adapter_*.py"))


@pytest.fixture(scope="module")
def load():
    """A file of the folder as a module; as for its scripts, the folder is on the path."""
    sys.path.append(str(FOLDER))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries say when they are imported
        yield importlib.import_module
    sys.path.remove(str(FOLDER))


@pytest.fixture
def measure(load):
    return load("_measure")


def test_what_autograd_keeps_is_counted_by_storage(measure):
    x = torch.randn(5, 7, requires_grad=True)
    size = 4 * 35
    hidden = measure.kept(lambda x: x.exp().sin().sum(), x, [])  # exp(x), for exp and for sin
    assert hidden == measure.Kept(size, size, False, False)
    assert measure.kept(lambda x: x.exp(), x, []) == measure.Kept(0, 0, False, True)
    assert measure.kept(lambda x: x.sin(), x, []) == measure.Kept(0, 0, True, False)

    def views(x):
        y = x.exp()
        return (y[:2].sin().sum() + y[2:].cos().sum()) * 1.0

    assert measure.kept(views, x, []) == measure.Kept(size, size, False, False)

    def two(x):
        return (x.exp().sin() @ torch.ones(7, 3)).tanh().sum()

    # exp(x); the ones, which are no parameter; tanh.
    assert measure.kept(two, x, []) == measure.Kept(size + 4 * 21 + 4 * 15, size, False, False)


def test_parameters_are_not_counted(measure):
    x = torch.randn(3, 4, requires_grad=True)
    layer = nn.Linear(4, 5).requires_grad_(False)
    assert measure.kept(layer, x, layer.parameters()) == measure.Kept(0, 0, False, False)
    assert measure.kept(layer, x, []).bytes == 4 * 20
    factor = nn.Parameter(torch.randn(4))
    assert measure.kept(lambda x: x * factor, x, [factor]) == measure.Kept(0, 0, True, False)


def test_a_round_makes_each_call_once_and_ratios_stay_within_it(measure):
    made = []
    calls = {name: (lambda name=name: made.append(name)) for name in "abc"}
    times = measure.interleaved(calls, 2)
    assert made == list("abcabc")
    assert {name: len(taken) for name, taken in times.items()} == dict.fromkeys("abc", 2)
    assert measure.ratio([2.0, 30.0, 9.0], [1.0, 10.0, 9.0]) == 2.0


@pytest.mark.slow
def test_a_process_of_its_own_answers_or_says_why_not(measure, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.append({str(FOLDER)!r})\n"
        "import os, _measure\n"
        "def perform(task):\n"
        "    if task == 'wait': __import__('time').sleep(60)\n"
        "    return {'half': task['twice'] / 2, 'seen': os.environ['SEEN']}\n"
        "assert _measure.answer(perform)\n"
    )
    assert measure.isolated(str(script), {"twice": 6}, env={"SEEN": "yes"}) == {
        "half": 3.0,
        "seen": "yes",
    }
    assert measure.isolated(str(script), {}) == {"error": "KeyError: 'twice'"}
    stopped = measure.isolated(str(script), "wait", minutes=0.0005)
    assert stopped == {"error": "stopped after 0.0005 minutes"}


def test_results_are_added_row_by_row(measure, tmp_path):
    path = tmp_path / "deep" / "results.json"
    measure.update(
        path, {"rows": {"a": {"ratio": 1.0, "saved": {"bytes": 3}}, "b": {"ratio": 2.0}}}
    )
    measure.update(path, {"rows": {"a": {"error": "no"}, "c": {"merge_s": 1.0}}})
    assert json.loads(path.read_text()) == {
        "rows": {"a": {"error": "no"}, "b": {"ratio": 2.0}, "c": {"merge_s": 1.0}}
    }


def test_a_section_of_the_report_is_replaced_and_nothing_else(measure, tmp_path):
    path = tmp_path / "report.md"
    path.write_text("before\n<!-- one -->\nold\n<!-- end of one -->\nafter\n")
    for text in ("new\n", "newer"):
        measure.write_section("one", text, path)
    assert path.read_text() == "before\n<!-- one -->\n\nnewer\n\n<!-- end of one -->\nafter\n"
    with pytest.raises(SystemExit, match="no section <!-- two -->"):
        measure.write_section("two", "", path)
    page = measure.REPORT.read_text()
    for name in ("layers in float32", "layers in bfloat16", "unet", "merge"):
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- end of {name} -->") == 1


def result(ratio, saved=0, largest=0, plan=""):
    kept = {"bytes": saved, "largest": largest, "input": True, "output": False}
    return {"ratio": ratio, "ms": ratio, "saved": kept, "params": 1, "plan": plan}


def judged(layers, shape, rows):
    found = {"machine": "m", "dtype": "float32", "shapes": {shape: {"rows": rows}}}
    tables = layers.Tables(found, judge=True)
    return tables.text(found), tables.scores


def test_goals_of_layers(load):
    layers = load("adapter_layers")
    shape = "lin320-320@4096"
    rows = {
        "base": result(1.0),
        "ours/lora": result(1.10, plan="side/tokens"),
        "ours/lora [side/tokens]": result(1.20),
        "ours/lora [form/tokens]": result(1.00),
        "ours/lora [reference]": result(0.5),
        "lycoris/lora/bypass": result(1.6),
        "peft/lora": result(1.53),
        "peft/dora": result(1.0),
    }
    text, scores = judged(layers, shape, rows)
    assert scores == {
        "time": [True],  # 1.10 <= 1.15
        "lead on others": [False],  # 1.53 / 1.10 < 1.4
        "saved bytes": [True],
        "largest tensor": [True],
        "choice of plan": [False],  # 1.20 / 1.00 > 1.15
    }
    assert "3 of 5 goals met" in text
    assert "| lora ours | 1.39 (peft) ✗ |" in text
    assert "| lora ours | side/tokens (1.20 of form/tokens) ✗ |" in text
    assert "| lora lycoris bypass | 1.60 |" in text

    kept = 4 * 320 * 10 + 4  # four bytes more than DoRA's goal
    rows = {"base": result(1.0), "ours/dora": result(1.31, kept, 4 * 320 * 320)}
    rows |= {"peft/dora": result(1.7), "lycoris/dora/rebuild": result(2.5)}
    _, scores = judged(layers, shape, rows)
    assert scores == {
        "time": [False],
        "lead on others": [True, False],  # 1.25 times peft, and not twice lycoris
        "saved bytes": [False],
        "largest tensor": [False],
    }
    _, scores = judged(layers, "lin768-320@77", {"base": result(1.0), "ours/lora": result(9.0)})
    assert "time" not in scores  # a millisecond


def test_every_goal_is_of_a_contestant(load):
    layers, merge, unet = (load(f"adapter_{name}") for name in ("layers", "merge", "unet"))
    names = {name.split("/")[1] for name in load("_peers").contestants() if "ours/" in name}
    for goals in (layers.GOALS, layers.LEADS, merge.PASSES, merge.LEADS, unet.STEP):
        assert names >= goals.keys()


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_runs(script, tmp_path):
    only, path = "^(ours|peft)/lora", tmp_path / "results.json"
    command = [sys.executable, str(script), "--quick", "--only", only, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(path.read_text())
    rows = results["rows"] if "rows" in results else results["shapes"]["lin64-64@32"]["rows"]
    assert {"ours/lora", "peft/lora"} <= rows.keys()
    assert not any("error" in row for row in rows.values()), done.stdout


@pytest.mark.slow
def test_a_step_of_a_whole_model_is_the_same_with_checkpoints():
    command = [sys.executable, str(FOLDER / "full_size_step.py"), "--quick", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for precision in ("fp32", "bf16"):
        assert f"{precision}: the same bits" in done.stdout, done.stdout
