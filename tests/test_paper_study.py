"""The paper's 26 configurations as a study: what they are, what is missing here, what it costs."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lyco_lab import cli, costs, longer
from lyco_lab.config import Data, Model, load_study
from lyco_lab.data.stage import look
from lyco_lab.dry_run import plan
from lyco_lab.errors import UserError
from lyco_lab.gamma import classes
from lyco_lab.generate import ask
from lyco_lab.lacking import lacking
from tests.data import pictures

FOLDER = Path(__file__).parents[1] / "experiments" / "paper" / "sd15"
# kind, size, alpha or None where it has no effect, preset, learning rate: the paper's appendix D.
LORA = [
    ("lora", 8, 4, "attn-mlp", 5e-4), ("lora", 32, 16, "attn-mlp", 5e-4),
    ("lora", 32, 1, "attn-mlp", 5e-4), ("lora", 8, 4, "full", 5e-4),
    ("lora", 8, 4, "attn-only", 5e-4), ("lora", 8, 4, "attn-mlp", 1e-4),
    ("lora", 8, 4, "attn-mlp", 1e-3),
]  # fmt: skip
LOHA = [
    ("loha", 4, 2, "attn-mlp", 5e-4), ("loha", 16, 8, "attn-mlp", 5e-4),
    ("loha", 16, 1, "attn-mlp", 5e-4), ("loha", 4, 2, "full", 5e-4),
    ("loha", 4, 2, "attn-only", 5e-4), ("loha", 4, 2, "attn-mlp", 1e-3),
    ("loha", 4, 2, "attn-mlp", 1e-4),
]  # fmt: skip
LOKR = [
    ("lokr", 8, None, "attn-mlp", 5e-4), ("lokr", 4, None, "attn-mlp", 5e-4),
    ("lokr", 12, None, "attn-mlp", 5e-4), ("lokr", 8, None, "full", 5e-4),
    ("lokr", 8, None, "attn-only", 5e-4), ("lokr", 8, None, "attn-mlp", 1e-3),
    ("lokr", 8, None, "attn-mlp", 1e-4),
]  # fmt: skip
NATIVE = [
    ("native", None, None, "attn-mlp", 1e-6), ("native", None, None, "full", 1e-6),
    ("native", None, None, "attn-only", 1e-6), ("native", None, None, "attn-mlp", 5e-6),
    ("native", None, None, "attn-mlp", 5e-7),
]  # fmt: skip


def words(run):
    adapter = run.adapter
    size = adapter.get("factor", adapter.get("rank"))
    alpha = None if adapter["kind"] in ("lokr", "native") else adapter["alpha"]
    return adapter["kind"], size, alpha, run.model.preset, run.train.lr


@pytest.fixture
def one(tmp_path):
    """A study of the first run alone: all 234 take a minute."""
    text = (FOLDER / "study.yaml").read_text()
    head = text[: text.index("  - name: lora-32\n")].replace("[23, 24, 25]", "[23]")
    head = head.replace("[6950, 20850, 34750]", "[34750]")
    folder = tmp_path / "one"
    folder.mkdir()
    base = json.dumps(str(FOLDER.parents[1] / "base.yaml"))
    (folder / "study.yaml").write_text(head.replace("../../base.yaml", base))
    return folder


def key(row):
    return tuple(map(str, row))


@pytest.fixture(scope="module")
def study():
    """With the first of its seeds and the last of its lengths."""
    return load_study(FOLDER, ["seed=23", "train.steps=34750"])


@pytest.fixture(scope="module")
def first_seeds(study):
    """Those 26 with shapes of Stable Diffusion 1.5, which is not here itself."""
    return lacking(study)


def test_the_26_configurations(study):
    listed = [*LORA, *LOHA, *LOKR, *NATIVE]
    assert len(listed) == 26
    expected = [(k, n, a if a is None else float(a), p, lr) for k, n, a, p, lr in listed]
    assert sorted(map(words, study.runs), key=key) == sorted(expected, key=key)


@pytest.mark.slow
def test_each_has_three_seeds_and_three_lengths(study):
    """78 trainings, of which each leaves the adapters of 10, 30 and 50 epochs."""
    runs = load_study(FOLDER).runs
    assert len(runs) == 234
    trainings = longer.lines(runs)
    assert len(trainings) == 78
    for line in trainings:
        assert [run.train.steps for run in line] == [695 * epochs for epochs in (10, 30, 50)]
    for seed in (23, 24, 25):
        again = [replace(line[-1], name=line[-1].name.replace(f"seed{seed}", "seed23"), seed=23)
                 for line in trainings if line[-1].seed == seed]  # fmt: skip
        assert again == list(study.runs)


def test_norms_train_with_all_layers_and_not_otherwise(study, first_seeds):
    from lyco_lab.gamma import layers

    full = [run for run in study.runs if run.model.train_norm]
    assert full == [run for run in study.runs if run.model.preset == "full"]
    assert {run.adapter["kind"] for run in full} == {"lora", "loha", "lokr", "native"}
    run = next(run for run in first_seeds.study.runs if run.model.train_norm)
    assert sum(layer.beside for layer in layers(run)) == 2 * 22 + 4 * 16


def test_the_recipe(study):
    for run in study.runs:
        train, data = run.train, run.data
        assert run.optimizer["kind"] == "adamw8bit"
        assert (run.optimizer["betas"], run.optimizer["weight_decay"]) == ((0.9, 0.99), 0.1)
        assert (train.batch_size, train.warmup_steps, train.schedule) == (8, 3500, "constant")
        assert (train.grad_clip, train.caption_dropout) == (1.0, 0.05)
        assert (data.resolution, data.buckets, data.upscale) == (512, (320, 960, 64), False)
        assert not (data.flip or data.shuffle_tags or data.prior)
        assert (train.min_snr_gamma, train.noise_offset, run.options.dropout) == (None, None, 0.0)
        assert run.model.text_encoder and train.text_encoder_lr is None
        assert (run.model.weights, run.model.precision, run.model.clip_skip) == (
            "non-ema", "bf16", 1
        )  # fmt: skip
        assert run.model.max_token_length == 150


def test_lokr_is_of_full_blocks_that_alpha_does_not_scale(first_seeds):
    from lyco_lab.gamma import layers

    names = (
        "lokr-factor-4-seed23-steps34750",
        "lokr-full-seed23-steps34750",
    )  # the largest blocks, and all layers
    for run in map(first_seeds.study.run, names):
        assert {layer.gamma for layer in layers(run)} == {1.0}
        lokr = [layer for layer in layers(run) if not layer.beside]
        assert {factor for layer in lokr for factor in layer.scaled} == {"c_US", "d_VT"}


def test_the_classes_are_the_papers(study):
    with (FOLDER / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 43
    assert sum(row["evaluated"] == "1" for row in rows) == 39
    assert len({row["class"] for row in rows}) == 28
    assert sum(int(row["images"]) for row in rows) == 1706
    samples = sum(int(row["images"]) * int(row["repeats"]) for row in rows)
    assert samples == 5560
    assert {run.train.steps for run in study.runs} == {50 * samples // 8}
    assert {run.generate.images_per_type for run in study.runs} == {100}
    images = {}
    for row in rows:
        images[row["category"]] = images.get(row["category"], 0) + int(row["images"])
    assert images == {"anime": 571, "movie": 276, "style": 776, "toy": 53, "scene": 30}
    for name in {row["class"] for row in rows}:  # one number of repeats, as a folder's name holds
        assert len({row["repeats"] for row in rows if row["class"] == name}) == 1


@pytest.mark.slow
def test_none_of_them_is_another(first_seeds):
    assert all(len(each.runs) == 1 for each in classes(first_seeds.study.runs))
    assert len(classes(first_seeds.study.runs)) == 26


def test_what_is_missing_is_said_with_the_command(first_seeds):
    model, images = first_seeds.said
    assert "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --include" in model
    assert "model.path=" in model
    assert "--dry-run data.folder=YOURS" in images


def test_a_model_that_is_here_is_wrong_by_itself(study, tmp_path):
    """A folder that exists is no missing model, whatever is the matter with it."""
    run = replace(study.runs[0], model=replace(study.runs[0].model, path=str(tmp_path)))
    found = lacking(replace(study, runs=(run,)))
    assert not found.models
    assert found.study.runs[0].model == run.model


def test_costs_are_the_papers_table(study):
    table = costs.stated(FOLDER)
    assert len(table) == 16
    by_run = {run.name: costs.variant(run.name, list(table)) for run in study.runs}
    assert None not in by_run.values()
    assert by_run["lora-seed23-steps34750"] == by_run["lora-lr-1e-3-seed23-steps34750"] == "lora"
    assert by_run["lora-32-alpha-1-seed23-steps34750"] == "lora-32"
    assert by_run["native-full-seed23-steps34750"] == "native-full"
    assert (table["lokr-factor-12"].hours, table["lokr-factor-12"].memory_gb) == (4.4, 15.8)
    assert all(row.source for row in table.values())


@pytest.mark.parametrize(
    "text", ["run,hours\n", "run,hours,steps,memory_gb,source\nlora,long,1,1,x\n"]
)
def test_a_table_of_costs_that_cannot_be_read(tmp_path, text):
    (tmp_path / "costs.csv").write_text(text)
    with pytest.raises(UserError, match="costs.csv"):
        costs.stated(tmp_path)


def test_estimates_are_sums(first_seeds):
    runs = first_seeds.study.runs[:2]
    study = replace(first_seeds.study, runs=runs)
    plans = plan(study, first_seeds.models, first_seeds.images)
    said = "\n".join(costs.estimates(study, plans, {}))
    assert "generating: images, and those of the base model (? concepts x 4 types x 100" in said
    assert f"{2 * 34750:,} steps, {2 * 34750 * 8:,} samples" in said
    adapters = sum(each.params for each in plans) * 4 / 2**30
    assert f"disk: {adapters:.1f} GiB" in said
    assert "hours: 10 of training for 2 runs" in said  # 4.9 + 5
    begun = {run.name: 20850 for run in runs}  # 3/5 of it
    said = "\n".join(costs.estimates(study, plans, begun))
    assert f"{2 * 13900:,} steps" in said and "hours: 4 of training" in said
    assert [each.images for each in plans] == [0, 0]


def test_of_the_43_sub_classes_39_are_drawn(study, tmp_path):
    """14,900 images of a checkpoint, as the paper says."""
    with (FOLDER / "classes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [row["class"] for row in rows]
    for row in rows:
        number = names.index(row["class"])
        folder = tmp_path / "in" / f"{row['repeats']}_{row['class'].lower()}" / row["sub_class"]
        tag = f", {row['sub_class']}" if row["sub_class"] not in ("", "others") else ""
        for i in range(2):
            caption = f"v{number} thing{tag}, tag {i}"
            pictures.image(folder / f"{i}.png", seed=number, caption=caption)
    run = replace(study.runs[0], model=Model(), data=Data(folder=str(tmp_path / "in")))
    small = replace(study, runs=(run,))
    (planned,) = plan(small)
    assert (planned.images, planned.concepts, planned.drawn) == (86, 39, 14_900)
    said = "\n".join(costs.estimates(small, [planned], {}))
    assert "39 concepts x 4 types x 100 - 700 (a style is not drawn in styles) = 14,900" in said
    asked = ask(run, look(run).concepts)
    evaluated = {
        "/".join(filter(None, (row["class"].lower(), row["sub_class"])))
        for row in rows if row["evaluated"] == "1"
    }  # fmt: skip
    assert {prompt.concept for prompt in asked} == evaluated
    descriptors = {p.text for p in asked if p.kind == "trigger"}
    assert len(descriptors) == 39  # no two are asked for in the same words


def test_the_dry_run_goes_to_its_end_without_weights_and_images(one, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli.app, ["run", str(one), "--dry-run"])
    assert done.exit_code == 2
    assert "192 unet + 72 text_encoder" in done.stdout
    assert "4,718,592" in done.stdout
    assert "by configuration" in done.stdout
    assert "error: missing: model.path" in done.stderr
    assert "; data.folder is 'paper-images'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_the_dry_run_finds_what_is_wrong_without_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = ["run", str(FOLDER), "--dry-run", "train.warmup_steps=99999"]
    done = CliRunner().invoke(cli.app, asked)
    assert done.exit_code == 2
    assert "train.warmup_steps is 99999" in done.stderr
