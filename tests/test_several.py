"""A folder of several concepts, from its captions to a study's tables: each is as it is alone."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lyco_lab.analyse.table import over, table
from lyco_lab.config import Data, Generate, Model, Run, Study, Train, Trainer, Wandb
from lyco_lab.config.asked import CATEGORIES, Asked
from lyco_lab.costs import estimates
from lyco_lab.data.concepts import Concept
from lyco_lab.data.stage import prepare
from lyco_lab.dry_run import plan
from lyco_lab.errors import UserError
from lyco_lab.evaluate.base import Score
from lyco_lab.evaluate.stage import evaluate, means
from lyco_lab.generate import ALTER, STYLE, ask, base_folder, batches, folders, generate, read_table
from lyco_lab.record import Record
from lyco_lab.report import page
from lyco_lab.train import train
from tests.data import pictures

TYPES = ("train", "trigger", "alter", "style")
FOLDERS = {
    "2_my dog": ("sks dog, outside", "sks dog, inside"),
    "ika/default": ("zwx girl, apron, rain", "zwx girl, apron", "zwx girl, apron, snow"),
    "ika/others": ("zwx girl, rain", "zwx girl, snow"),
    "4_Old Ink": ("veli style, a boat", "veli style, a house"),
}
STYLES = (Asked(names=("old*",), category="style"),)
NAMES = ["my dog", "Old Ink", "ika/default", "ika/others"]  # as the folders are walked


def concept(name: str, *captions: str, **words: str) -> Concept:
    return Concept(name, name.split("/")[0], tuple(range(len(captions))), captions, **words)


def run_of(how: Generate | None = None, **data) -> Run:
    data = data or {"folder": "somewhere"}
    return Run(name="r", study="several", data=Data(**data), generate=how or Generate())


@pytest.fixture(scope="session")
def joint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("joint")
    for number, (folder, captions) in enumerate(FOLDERS.items()):
        for i, caption in enumerate(captions):
            pictures.image(root / folder / f"{i}.png", seed=10 * number + i, caption=caption)
    return root


@pytest.fixture(scope="session")
def study(tiny_sd, joint, tmp_path_factory) -> tuple[Study, Path]:
    """A study whose one run has been through all its stages."""
    run = Run(
        name="lora",
        study="several",
        model=Model(path=str(tiny_sd)),
        data=Data(folder=str(joint)),
        adapter={"kind": "lora", "rank": 2, "alpha": 2.0},
        train=Train(steps=2, warmup_steps=0, batch_size=2),
        trainer=Trainer(accelerator="cpu"),
        generate=Generate(images_per_type=3, steps=2, batch_size=5, concepts=STYLES),
        wandb=Wandb(mode="disabled"),
    )
    root = tmp_path_factory.mktemp("runs")
    through(run, root, prepare, train, generate, evaluate)
    said = {"question": "Does it?", "expectation": "It does.", "pairs": ()}
    return Study(name="several", folder=root, runs=(run,), **said), root


def through(run: Run, root: Path, *stages) -> Record:
    record = Record.open(root, run)
    for stage in stages:
        stage(run, record)
    return record


@pytest.fixture(scope="session")
def joint_record(study) -> Record:
    return Record(study[1] / study[0].runs[0].folder_name)


def metrics(record: Record) -> dict:
    return json.loads((record.path / "evaluate" / "metrics.json").read_text())


# What is asked


def test_each_concept_is_asked_in_its_own_words_with_the_same_seeds(joint_record):
    made = read_table(joint_record.path / "generate")
    assert made["concept"].drop_duplicates().tolist() == NAMES
    for (name, kind), rows in made.groupby(["concept", "kind"]):
        assert rows["seed"].tolist() == [1000, 1001, 1002]
        assert rows["index"].tolist() == [0, 1, 2]
        if kind == "trigger":
            words = {"my dog": "sks dog", "Old Ink": "veli style", "ika/others": "zwx girl"}
            assert set(rows["prompt"]) == {words.get(name, "zwx girl, apron")}
    assert not ((made["concept"] == "Old Ink") & (made["kind"] == "style")).any()
    alter = made[(made["concept"] == "Old Ink") & (made["kind"] == "alter")]["prompt"]
    assert alter.tolist() == [text.format("veli style") for text in ALTER["style"][:3]]


def test_no_two_images_share_a_file(joint_record):
    made = read_table(joint_record.path / "generate")
    assert made["file"].is_unique and all(Path(file).is_file() for file in made["file"])
    assert len(made) == (4 * 4 - 1) * 3
    names = {Path(file).relative_to(joint_record.path / "generate").parts[0] for file in made.file}
    assert names == {"1-my-dog", "2-old-ink", "3-ika-default", "4-ika-others"}


@given(names=st.lists(st.text(min_size=1, max_size=90), min_size=2, max_size=30))
def test_folders_are_plain_distinct_and_short(names):
    found = folders([concept(name, "x") for name in names])
    assert len({name.lower() for name in found}) == len(names)
    for name in found:
        assert len(name) < 70 and name[0].isdigit()
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


WORDS = st.text("abcdefgh", min_size=1, max_size=6)


@given(
    words=st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=5),
    tags=st.lists(WORDS, min_size=1, max_size=4),
    categories=st.lists(st.sampled_from(["", "other", *CATEGORIES]), min_size=5, max_size=5),
    count=st.integers(1, 12),
)
def test_alone_or_together_the_prompts_are_the_same(words, tags, categories, count):
    many = [
        concept(f"c{i}", *(f"{t} {c}, {tag}" for tag in tags),
                trigger=t, class_word=c, category=categories[i])
        for i, (t, c) in enumerate(words)
    ]  # fmt: skip
    run = run_of(Generate(images_per_type=count))
    together = ask(run, many)
    for one in many:
        mine = [replace(p, concept="", folder="") for p in together if p.concept == one.name]
        assert mine == ask(run, [one])
        types = TYPES[:3] if one.category == "style" else TYPES
        assert [p.index for p in mine] == list(range(count)) * len(types)


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=5), size=st.integers(1, 6))
def test_a_batch_is_of_one_concept_and_cut_as_it_would_be_alone(counts, size):
    many = [concept(f"c{i}", *map(str, range(n))) for i, n in enumerate(counts)]
    for n in (4, 7):
        asked = ask(run_of(Generate(types=("train",), images_per_type=n)), many)
        found = batches(asked, size)
        assert [prompt for batch in found for prompt in batch] == asked
        each = [[p for p in asked if p.concept == name] for name in {p.concept: 0 for p in asked}]
        assert found == [batch for mine in each for batch in batches(mine, size)]
        assert max(map(len, found)) <= size
        assert all(len({prompt.concept for prompt in batch}) == 1 for batch in found)


def test_each_category_has_ten_places_for_its_descriptor():
    assert set(ALTER) == {"", *CATEGORIES}
    for texts in (*ALTER.values(), STYLE):
        assert all(text.count("{}") == 1 for text in texts)
        assert len(set(texts)) == len(texts)
    assert {len(texts) for texts in ALTER.values()} == {10}


THREE = [
    concept("Ann/a", "sks ann, a", trigger="sks", class_word="ann"),
    concept("Ann/others", "sks ann, b", trigger="sks", class_word="ann"),
    concept("house", "a house", "the house"),
]


def drawn(*entries: Asked, types=("train",)) -> list[str]:
    asked = ask(run_of(Generate(types=types, images_per_type=2, concepts=entries)), THREE)
    return list(dict.fromkeys(prompt.concept for prompt in asked))


def test_the_last_entry_that_says_something_holds():
    assert drawn() == ["Ann/a", "Ann/others", "house"]
    assert drawn(Asked(names=("*/OTHERS",), drawn=False)) == ["Ann/a", "house"]
    only = Asked(names=("*",), drawn=False), Asked(names=("ann/*",), drawn=True)
    assert drawn(*only) == ["Ann/a", "Ann/others"]
    assert drawn(*only, Asked(names=("*",), category="person")) == ["Ann/a", "Ann/others"]


def test_what_is_left_out_keeps_the_others_folders():
    every = ask(run_of(Generate(types=("train",))), THREE)
    some = ask(run_of(Generate(types=("train",), concepts=(
        Asked(names=("ann/a",), drawn=False),))), THREE)  # fmt: skip
    assert some == [prompt for prompt in every if prompt.concept != "Ann/a"]


def test_a_concept_without_words_is_named_with_what_to_do():
    with pytest.raises(
        UserError, match=r"'trigger' need the words .* 'house': begin each of its 2 captions"
    ):
        drawn(types=("trigger",))
    assert drawn(Asked(names=("house",), drawn=False), types=("trigger",)) == [
        "Ann/a",
        "Ann/others",
    ]


def test_names_of_no_concept_are_an_error_that_names_the_nearest():
    with pytest.raises(UserError, match=r"'hause', .* called Ann/a, .*did you mean 'house'"):
        drawn(Asked(names=("ann/*", "hause"), drawn=False))
    with pytest.raises(UserError, match="leaves none"):
        drawn(Asked(names=("*",), drawn=False))


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ({}, "needs patterns"),
        ({"names": ("a",)}, "give drawn or category"),
        ({"names": ("a",), "category": "castel"}, "did you mean 'castle'"),
        ({"names": ("a",), "category": "castle", "drawn": False}, "to what is not drawn"),
    ],
)
def test_entries_that_cannot_work(entry, part):
    with pytest.raises(UserError, match=part):
        Asked(**entry)


def test_entries_are_for_folders_and_move_no_hash():
    entries = (Asked(names=("*",), category="person"),)
    with pytest.raises(UserError, match="pictures of your own"):
        run_of(Generate(concepts=entries), concept="kael")
    plain, told = run_of(), run_of(Generate(concepts=entries))
    assert "concepts" not in plain.to_dict()["generate"]
    assert plain.hash != told.hash
    one = [concept("x", "sks man, a", trigger="sks", class_word="man")]
    texts = [p.text for p in ask(told, one) if p.kind == "alter"]
    assert texts[0] == ALTER["person"][0].format("sks man")


# What is scored


@pytest.fixture(scope="session")
def alone(study, joint, joint_record, tmp_path_factory) -> Record:
    """The same adapter, asked of one concept's folder alone."""
    run, root = study[0].runs[0], tmp_path_factory.mktemp("alone")
    run = replace(run, data=Data(folder=str(joint / "4_Old Ink")))
    record = through(run, root, prepare)
    shutil.copy(joint_record.path / "adapter.safetensors", record.path)
    record.finish("train", trainable_params=1, train_seconds=0.0)
    return through(run, root, generate, evaluate)


def test_alone_or_together_images_and_scores_are_the_same(joint_record, alone, study):
    mine = read_table(joint_record.path / "generate").query("concept == 'Old Ink'")
    theirs = read_table(alone.path / "generate")
    assert mine["prompt"].tolist() == theirs["prompt"].tolist()
    for here, there in zip(mine["file"], theirs["file"], strict=True):
        assert Path(here).read_bytes() == Path(there).read_bytes()
    assert {Path(file).parts[-2] for file in theirs["file"]} == set(TYPES[:3])
    assert metrics(joint_record)["concepts"]["Old Ink"] == metrics(alone)
    references = json.loads((base_of(joint_record, study) / "references-drop.json").read_text())
    (path,) = alone.path.parent.glob("base/*/references-drop.json")
    single = json.loads(path.read_text())
    assert {of: references[of]["concepts"]["Old Ink"] for of in ("base", "real")} == single


def base_of(record: Record, study) -> Path:
    return base_folder(study[0].runs[0], record)


def test_a_score_is_the_mean_over_classes_of_their_sub_classes(joint_record):
    found = metrics(joint_record)
    concepts = found.pop("concepts")
    assert list(concepts) == NAMES
    for kind, scores in found.items():
        for name, score in scores.items():
            value = {c: concepts[c].get(kind, {}).get(name, {}).get("mean") for c in NAMES}
            ika = [value[c] for c in NAMES[2:] if value[c] is not None]
            classes = [value[c] for c in NAMES[:2] if value[c] is not None]
            classes += [float(np.mean(ika))] if ika else []
            assert score["mean"] == pytest.approx(np.mean(classes), rel=1e-12)
            error = np.std(classes, ddof=1) / np.sqrt(len(classes))
            assert score["standard_error"] == pytest.approx(error, rel=1e-12)
            assert (score["n"], score["unit"]) == (len(classes), "class")
    assert found["style"]["style_loss"]["n"] == 2  # styles have none


def test_the_images_of_a_concept_are_compared_with_its_own(joint_record, joint, study):
    """By hand, for one score of each: the cosines with all images of its own folder."""
    from lyco_lab.data.folder import read
    from lyco_lab.evaluate.base import Encoded
    from lyco_lab.miniature import judges

    encoders = judges.load()
    made = read_table(joint_record.path / "generate").query("kind == 'train'")
    for name, folder in zip(NAMES, ("2_my dog", "4_Old Ink", "ika/default", "ika/others"),
                            strict=True):  # fmt: skip
        files = made[made["concept"] == name]["file"]
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        cosines = (
            Encoded(images, encoders).features_ND
            @ Encoded(read(joint / folder).images(64), encoders).features_ND.T
        )
        score = metrics(joint_record)["concepts"][name]["train"]["image_similarity"]["mean"]
        assert score == pytest.approx(float(cosines.mean()), rel=1e-9)


@given(
    values=st.lists(
        st.tuples(st.integers(0, 3), st.one_of(st.none(), st.floats(-5, 5))), min_size=1, max_size=8
    )
)
def test_means_of_means(values):
    """Beside loops; what does not apply to a concept has no part in it."""
    found = [
        {"alter": {"x": Score((math.nan if v is None else v,), ("p",), "image")}} for _, v in values
    ]
    classes = [str(c) for c, _ in values]
    score = means(found, classes)["alter"].get("x")
    there = [(c, v) for c, v in values if v is not None]
    if not there:
        assert score is None
        return
    single = len(set(classes)) in (1, len(classes))
    by_class: dict[object, list[float]] = {}
    for i, (c, v) in enumerate(there):
        by_class.setdefault(i if single else c, []).append(v)
    each = [sum(vs) / len(vs) for vs in by_class.values()]
    assert score.mean == pytest.approx(sum(each) / len(each), abs=1e-12)
    assert (score.n, score.unit) == (len(each), "concept" if single else "class")


def test_every_image_has_its_row(joint_record):
    scored = pd.read_parquet(joint_record.path / "evaluate" / "images.parquet")
    made = read_table(joint_record.path / "generate")
    keys = ["concept", "kind", "index", "seed", "prompt"]
    pd.testing.assert_frame_equal(scored[keys], made[keys])
    for (name, kind), rows in scored.groupby(["concept", "kind"]):
        score = metrics(joint_record)["concepts"][name][kind]["image_similarity"]
        assert score["mean"] == pytest.approx(rows["image_similarity"].mean())


# What is shown


def test_tables_show_means_and_each_concept(study, joint_record, joint):
    frame = table(*study)
    assert frame["run"].tolist() == ["base", "lora", "real"]
    assert set(frame["concept"]) == {joint.name}
    found = metrics(joint_record)
    assert frame["image_similarity_alter"][1] == found["alter"]["image_similarity"]["mean"]
    each = pd.read_csv(study[1] / "several" / "concepts.csv")
    assert each["run"].tolist() == [run for run in frame["run"] for _ in NAMES]
    assert each["concept"].tolist() == NAMES * 3
    assert each["class"].tolist() == ["my dog", "Old Ink", "ika", "ika"] * 3
    assert each["category"].fillna("").tolist() == ["", "style", "", ""] * 3
    for adapter, rows in each.groupby("adapter"):
        by_class = rows.groupby("class")["image_similarity_train"].mean()
        mean = frame.set_index("adapter").loc[adapter, "image_similarity_train"]
        assert by_class.mean() == pytest.approx(mean, rel=1e-9)


def test_the_page_says_over_what_its_errors_are(study, joint_record):
    assert over(joint_record) == "means over 4 concepts; ± over 3 classes"
    html = page.write(*study, table(*study), []).read_text()
    assert over(joint_record) in html
    prompts = ("sks dog, outside", "sks dog", "veli style")
    assert all(f"<span>{prompt}</span>" in html for prompt in prompts)  # of different concepts


def test_a_dry_run_says_how_many_images_are_drawn(study):
    (planned,) = plan(study[0])
    assert (planned.concepts, planned.drawn) == (4, 45)
    said = "\n".join(estimates(study[0], [planned], {}))
    assert "45 images" in said
    assert "4 concepts x 4 types x 3 - 3 (a style is not drawn in styles) = 45, 1 run" in said


def test_a_dry_run_finds_a_concept_without_words(study, tmp_path, joint):
    shutil.copytree(joint, tmp_path / "in")
    (tmp_path / "in" / "2_my dog" / "0.txt").write_text("something else")
    run = replace(study[0].runs[0], data=Data(folder=str(tmp_path / "in")))
    with pytest.raises(UserError, match=r"words that stand for 'my dog'.*run 'lora'"):
        plan(replace(study[0], runs=(run,)))
