"""The page in a real browser: what it shows has a size, and nothing runs out of the window.

Chromium prints the page after its script has run. The page itself has none, so it is put in a
frame of the wanted width, and a script beside the frame writes down what it measures.
"""

import html as html_module
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lyco_lab.analyse import analyse
from lyco_lab.report import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = {"desktop": 1280, "phone": 390}

HARNESS = """<!doctype html><meta charset="utf-8"><pre id="measured">nothing</pre>
<iframe id="frame" style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>
<script>
document.getElementById("frame").onload = (event) => {{
  const inside = event.target.contentDocument, root = inside.documentElement;
  const size = (selector) => [...inside.querySelectorAll(selector)].map((e) => {{
    const box = e.getBoundingClientRect();
    return [box.left, box.right, box.width, box.height];
  }});
  const images = [...inside.images];
  document.getElementById("measured").textContent = JSON.stringify({{
    width: root.clientWidth,
    scrollWidth: Math.max(root.scrollWidth, inside.body.scrollWidth),
    grids: size("[id^=grid-] table"),
    grid_windows: size("[id^=grid-] .scroll"),
    charts: size("#scatter svg.chart"),
    marks: size("#scatter svg.chart .mark").length,
    curves: size("#losses svg.chart path.line").length,
    verdict: inside.querySelector("#gamma-verdict .count").innerText,
    table: size("#results table"),
    text: Math.min(...[...inside.querySelectorAll("svg.chart text.name")].map(
      (e) => e.getBoundingClientRect().height)),
    images: images.length,
    drawn: images.filter((image) => image.naturalWidth > 0 && image.width > 40).length,
    sections: size("header, section"),
  }});
}};
</script>
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason="no chromium found on this machine"),
]


@pytest.fixture(scope="module")
def report(evaluated) -> str:
    study, root = evaluated
    return page.write(study, root, *analyse(study, root)).read_text()


@pytest.fixture(scope="module", params=WIDTHS, ids=list(WIDTHS))
def measured(request, report, tmp_path_factory) -> dict:
    """What the browser found at one width."""
    folder = tmp_path_factory.mktemp("browser")
    unguarded = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report)
    harness = folder / "harness.html"
    width = WIDTHS[request.param]
    harness.write_text(HARNESS.format(width=width, page=html_module.escape(unguarded)))
    dom = dump(harness, folder / "profile")
    text = re.search(r'<pre id="measured">(.*?)</pre>', dom, re.DOTALL).group(1)
    assert text != "nothing", "the page did not load"
    return json.loads(html_module.unescape(text)) | {"asked": width}


def dump(file: Path, profile: Path) -> str:
    command = [
        str(BROWSER), *FLAGS, f"--user-data-dir={profile}", "--window-size=1400,1000",
        "--virtual-time-budget=20000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_nothing_runs_out_of_the_window(measured):
    assert measured["width"] <= measured["asked"]
    assert measured["scrollWidth"] <= measured["width"]
    for left, right, *_ in measured["sections"] + measured["grid_windows"] + measured["charts"]:
        assert left >= 0 and right <= measured["width"] + 0.5


def test_the_grid_is_there_with_every_image_drawn(measured):
    assert len(measured["grids"]) == 2
    assert all(width > 300 and height > 300 for *_, width, height in measured["grids"])
    kael, neon = 9 * 8, 7 * 6  # columns times rows; neon has no style prompts and 4 of alter
    assert measured["images"] == measured["drawn"] == kael + neon


def test_the_scatter_is_there_and_can_be_read(measured):
    assert len(measured["charts"]) == 2
    assert all(width > 250 and height > 180 for *_, width, height in measured["charts"])
    assert measured["marks"] == 8 + 6
    assert measured["text"] >= 9  # pixels
    assert measured["curves"] == 6 + 4


def test_the_verdict_is_there_with_its_count(measured):
    assert " ".join(measured["verdict"].split()) == "120 of 120 losses bitwise equal"


def test_the_table_is_there(measured):
    assert measured["table"][0][3] > 300
