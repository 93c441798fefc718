"""Generation on a tiny genuine model: what it draws, with which seeds, and what a rerun repeats."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import lyco_lab.generate as generate_module
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.config import Data, Generate, Model, Run, Wandb
from lyco_lab.data.folder import read
from lyco_lab.data.stage import dataset, prepare
from lyco_lab.diffusion import targets
from lyco_lab.diffusion.base import NoPicture
from lyco_lab.diffusion.model import load
from lyco_lab.errors import UserError
from lyco_lab.formats import kohya
from lyco_lab.generate import (
    ALTER,
    PIECES,
    STYLE,
    ask,
    base_folder,
    folder_prompts,
    generate,
    read_table,
    repeated,
    scored,
    tiled,
)
from lyco_lab.record import Record
from lyco_lab.seeds import generator
from tests.short_of_memory import limited
from tests.strategies import seeds

STEPS, GUIDANCE, FIRST_SEED = 3, 3.0, 40


def run_on(tiny_sd, tiny_concept, seed: int = 0) -> Run:
    return Run(
        name=f"lora-{seed}",
        study="test",
        seed=seed,
        model=Model(path=str(tiny_sd)),
        data=Data(folder=str(tiny_concept)),
        adapter={"kind": "lora", "rank": 2, "alpha": 2.0},
        generate=Generate(
            types=("trigger", "alter"),
            images_per_type=2,
            steps=STEPS,
            guidance=GUIDANCE,
            batch_size=3,
            seed=FIRST_SEED,
        ),
        wandb=Wandb(mode="disabled"),
    )


def mounted_on(diffusion, seed: int = 0):
    """An adapter far enough from its start that it shows in every image."""
    names = targets.match(diffusion.unet, "attn-mlp", "unet")
    mounted = attach(diffusion.unet, LoRA(rank=2, alpha=2.0), names, seed=seed)
    rng = generator(seed, "move")
    for factor in mounted.parameters():
        factor.data += 0.3 * torch.randn(factor.shape, generator=rng)
    return mounted


def trained(run: Run, root, seed: int = 0) -> Record:
    """A run whose data and train stages are done."""
    record = Record.open(root, run)
    prepare(run, record)
    diffusion = load(run.model.path)
    kohya.save(record.path / "adapter.safetensors", {"unet": mounted_on(diffusion, seed)}, {})
    record.finish("train", trainable_params=1, train_seconds=0.0)
    return record


@pytest.fixture(scope="module")
def generated(tiny_sd, tiny_concept, tmp_path_factory):
    """(run, record) of a run that has generated; read only."""
    run = run_on(tiny_sd, tiny_concept)
    record = trained(run, tmp_path_factory.mktemp("runs"))
    generate(run, record)
    return run, record


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def pictures(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}


def pipeline_image(pipeline, prompt: str, seed: int) -> np.ndarray:
    image = pipeline(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
    ).images[0]
    return np.asarray(image).astype(int)


def test_base_images_are_those_of_the_diffusers_pipeline_with_the_same_noise(generated):
    """One by one, from the folder itself: neither batch nor loader changes a picture."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    run, record = generated
    pipeline = StableDiffusionPipeline.from_pretrained(run.model.path, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for row in read_table(base_folder(run, record)).itertuples():
        expected = pipeline_image(pipeline, row.prompt, row.seed)
        assert abs(pixels(row.file) - expected).max() <= 1


def test_merged_images_are_those_of_the_mounted_adapter(generated):
    run, record = generated
    diffusion = load(run.model.path)
    mounted_on(diffusion)
    for row in read_table(record.path / "generate").itertuples():
        expected = diffusion.sample([row.prompt], [row.seed], STEPS, GUIDANCE)[0].astype(int)
        assert abs(pixels(row.file) - expected).max() <= 2


def test_the_adapter_shows_and_the_seeds_are_those_of_the_base(generated):
    run, record = generated
    ours, base = read_table(record.path / "generate"), read_table(base_folder(run, record))
    assert ours["seed"].tolist() == [FIRST_SEED, FIRST_SEED + 1] * 2
    columns = ["kind", "index", "prompt", "seed"]
    pd.testing.assert_frame_equal(ours[columns], base[columns])
    for mine, theirs in zip(ours["file"], base["file"], strict=True):
        assert abs(pixels(mine) - pixels(theirs)).max() > 5


def test_the_table_carries_all_that_later_stages_read(generated):
    _, record = generated
    table = pd.read_parquet(record.path / "generate" / "images.parquet")
    row = table.iloc[0]
    assert (row["kind"], row["prompt"], row["seed"]) == ("trigger", "sks circle", FIRST_SEED)
    assert row["file"] == "trigger/0000.png"
    assert json.loads(row["attributes"]) == {}
    assert {"scored_drop", "scored_keep", "scored_class", "concept"} <= set(table.columns)


def test_an_interrupted_stage_ends_with_the_images_it_would_have_made(
    generated, tmp_path, monkeypatch
):
    """Killed in the second batch: the first is kept, the second made again as a whole."""
    run, whole = generated
    record = trained(run, tmp_path)
    sample, calls = generate_module.Diffusion.sample, []

    def failing(self, *args, **kwargs):
        calls.append(args)
        if len(calls) == 4:  # two batches of the base model, then the run's first and second
            raise KeyboardInterrupt
        return sample(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(generate_module.Diffusion, "sample", failing)
        generate(run, record)
    assert not record.done("generate")
    kept = sorted((record.path / "generate").rglob("*.png"))
    assert len(kept) == 3
    kept[1].unlink()
    generate(run, record)
    assert pictures(record.path / "generate") == pictures(whole.path / "generate")
    assert record.facts("generate")["images"] == 4


@pytest.mark.parametrize("interrupted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_batches_that_do_not_fit_are_drawn_in_pieces_also_after_an_interruption(
    generated, tmp_path, monkeypatch, interrupted
):
    """Batches of 3 and 1, of which 2 fit: the same as with pieces of 2 from the beginning."""
    run, whole = generated
    record, expected = trained(run, tmp_path / "a"), trained(run, tmp_path / "b")
    for folder in (expected.path / "generate", base_folder(run, expected)):
        folder.mkdir(parents=True)
        (folder / PIECES).write_text('{"drawn": 2, "decoded": null}')
    generate(run, expected)

    opened = generate_module.load

    def small(model):
        diffusion = opened(model)
        limited(monkeypatch, diffusion.unet, "forward", 4)  # two for each image
        return diffusion

    monkeypatch.setattr(generate_module, "load", small)
    if interrupted:
        write, written = generate_module.write_image, []

        def failing(path, image):
            written.append(path)
            if len(written) == 6:  # the second of the run's own
                raise KeyboardInterrupt
            write(path, image)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(generate_module, "write_image", failing)
            generate(run, record)
    generate(run, record)
    assert pictures(record.path / "generate") == pictures(expected.path / "generate")
    assert pictures(base_folder(run, record)) == pictures(base_folder(run, expected))
    pieces = {"drawn": 2, "decoded": None}
    facts = record.facts("generate")
    assert facts["at_once"] == facts["base_at_once"] == pieces
    assert whole.facts("generate")["at_once"] == {"drawn": None, "decoded": None}


def test_where_not_even_one_fits_the_error_says_what_helps(generated, tmp_path, monkeypatch):
    run, _ = generated
    record, opened = trained(run, tmp_path), generate_module.load

    def small(model):
        diffusion = opened(model)
        limited(monkeypatch, diffusion.vae, "decode", 0)
        return diffusion

    monkeypatch.setattr(generate_module, "load", small)
    needed = r"single image of 64 x 64 pixels, so no generate.batch_size .* \(it is 3\).*--workers"
    with pytest.raises(UserError, match=needed):
        generate(run, record)
    assert not record.done("generate") and not pictures(tmp_path)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_an_image_that_is_not_finite_is_an_error_and_no_black_image(
    generated, tmp_path, monkeypatch, part
):
    """Of the base model's two batches the second: what the first has drawn stays."""
    run, _ = generated
    record, opened = trained(run, tmp_path), generate_module.load

    def poisoned(model):
        diffusion = opened(model)
        module, name = {"unet": (diffusion.unet, "forward"), "vae": (diffusion.vae, "decode")}[part]
        computed, calls = getattr(module, name), []

        def bad(x, *args, **kwargs):
            found = computed(x, *args, **kwargs)
            calls.append(x)
            first = found[0] if isinstance(found, tuple) else found.sample
            if len(calls) == {"unet": STEPS + 1, "vae": 2}[part]:
                first[0] = float("nan")
            return found

        monkeypatch.setattr(module, name, bad)
        return diffusion

    monkeypatch.setattr(generate_module, "load", poisoned)
    what = {"unet": "latent", "vae": "image"}[part]
    said = rf"lora-0: base model: the {what} of the prompt '.*' with seed 41 is not .*guidance"
    with pytest.raises(NoPicture, match=said):
        generate(run, record)
    drawn = pictures(base_folder(run, record))
    assert len(drawn) == 3 and not record.done("generate")


def test_an_adapter_that_gives_no_picture_is_named_with_its_run(generated, tmp_path):
    """One factor is out of range; the base model draws all the same."""
    run, _ = generated
    record = trained(run, tmp_path)
    diffusion = load(run.model.path)
    mounted = mounted_on(diffusion)
    next(iter(mounted.parameters())).data.fill_(3e38)
    kohya.save(record.path / "adapter.safetensors", {"unet": mounted}, {})
    record.finish("train", trainable_params=1, train_seconds=0.0)
    said = r"lora-0: generate: the latent of the prompt 'sks circle' with seed 40 .* train.lr"
    with pytest.raises(NoPicture, match=said):
        generate(run, record)
    assert len(pictures(base_folder(run, record))) == 4
    assert not pictures(record.path / "generate") and not record.done("generate")


def test_another_run_finds_the_base_models_images_made(generated, tiny_sd, tiny_concept):
    first, whole = generated
    other = run_on(tiny_sd, tiny_concept, seed=1)
    record = trained(other, whole.path.parent, seed=1)
    assert base_folder(other, record) == base_folder(first, whole)
    before = pictures(base_folder(first, whole))
    left = base_folder(first, whole) / ".part-killed"  # while an image was written
    left.mkdir()
    (left / "x.png").write_bytes(b"half")
    generate(other, record)
    assert pictures(base_folder(other, record)) == before and not left.exists()
    assert pictures(record.path / "generate") != pictures(whole.path / "generate")


def test_a_done_stage_is_not_done_again(generated, monkeypatch):
    monkeypatch.setattr(generate_module, "load", lambda *_: pytest.fail("loaded a model"))
    generate(*generated)


@given(count=st.integers(1, 60), n=st.integers(1, 12))
def test_prompts_are_repeated_evenly_and_the_first_ones_once_more(count, n):
    texts = [f"prompt {i}" for i in range(n)]
    found = repeated(texts, count)
    often = [found.count(text) for text in texts]
    assert len(found) == count
    assert often == [count // n + (i < count % n) for i in range(n)]
    assert list(dict.fromkeys(found)) == texts[: min(n, count)]


def test_a_users_folder_is_asked_for_in_all_four_ways(tiny_concept):
    images = read(tiny_concept)
    (concept,) = images.concepts

    def texts(kind):
        return [prompt.text for prompt in folder_prompts(concept, kind, 10)]

    assert texts("train")[:2] == [images.captions[0]] * 2
    assert set(texts("trigger")) == {"sks circle"}
    assert texts("alter") == [t.format("sks circle") for t in ALTER[""]]
    assert texts("style")[::2] == [t.format("sks circle") for t in STYLE]
    assert [p.index for p in folder_prompts(concept, "alter", 10)] == list(range(10))


def test_a_folder_without_a_common_word_can_only_be_asked_its_captions(tmp_path):
    for name in ("cat", "dog"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name}, grey")
    (concept,) = read(tmp_path).concepts
    assert tuple(p.text for p in folder_prompts(concept, "train", 2)) == concept.captions
    with pytest.raises(UserError, match="trigger class"):
        folder_prompts(concept, "alter", 2)


def test_a_style_is_not_asked_for_in_another_style(tmp_path):
    run = Run(
        name="x", study="test", data=Data(concept="neon"), generate=Generate(types=("style",))
    )
    record = Record.open(tmp_path, run)
    prepare(run, record)
    with pytest.raises(UserError, match="gives no prompt"):
        ask(run, dataset(run, record).concepts)
    with pytest.raises(UserError, match="gives no prompt"):
        generate(run, record)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("sks dog, at the beach", ("sks", "dog"), ("dog, at the beach", "at the beach")),
        ("sks dog at night", ("sks", "dog"), ("dog at night", "at night")),
        ("sks dog", ("sks", "dog"), ("dog", "dog")),
        ("sks", ("sks", ""), ("sks", "sks")),
        ("a dog", ("", ""), ("a dog", "a dog")),
    ],
)
def test_the_scored_text_follows_the_rule_for_the_trigger(text, words, expected):
    without_trigger, without_both = expected
    assert scored(text, *words) == {"keep": text, "class": without_trigger, "drop": without_both}


@given(n=st.integers(1, 10), seed=seeds)
def test_a_tiling_holds_every_image_once(n, seed, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    rng = np.random.default_rng(seed)
    images = rng.integers(1, 256, (n, 2, 2, 3), dtype=np.uint8)
    files = [str(folder / f"tile{i}.png") for i in range(n)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    grid = tiled(files)
    side = grid.shape[1] // 2
    cells = grid.reshape(-1, 2, side, 2, 3).swapaxes(1, 2).reshape(-1, 2, 2, 3)
    np.testing.assert_array_equal(cells[:n], images)
    assert not cells[n:].any()
    assert len(cells) - n < side
