"""Images that are held out are never trained on, and looking at them disturbs nothing."""

import csv
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lyco_lab.config import Train
from lyco_lab.data.batches import Order
from lyco_lab.diffusion.objective import Epsilon, Flow
from lyco_lab.errors import UserError
from lyco_lab.train import train
from lyco_lab.train.divergence import Diverged, Divergence
from lyco_lab.train.journal import Journal
from lyco_lab.train.module import Training
from lyco_lab.train.validation import Validation, split
from tests.train.test_stage import factors, rows


@st.composite
def orders(draw):
    count = draw(st.integers(2, 30))
    numbers = st.integers(1, 3)
    return Order(
        draw(st.lists(numbers, min_size=count, max_size=count)),
        draw(st.integers(1, 4)),
        draw(st.integers(0, 5)),
        buckets=draw(st.lists(numbers, min_size=count, max_size=count)),
    )


@given(orders(), st.floats(0.01, 0.99))
def test_what_is_held_out_is_never_shown_and_the_rest_as_often_as_before(order, share):
    most = len(order.repeats) - len(set(order.buckets))
    if most == 0:
        with pytest.raises(UserError, match="no image can be held out"):
            split(order, share)
        return
    left, held = split(order, share)
    assert len(held) == min(most, max(1, round(share * len(order.repeats))))
    expected = [0 if i in held else repeats for i, repeats in enumerate(order.repeats)]
    assert list(left.repeats) == expected
    assert left.samples_per_epoch == sum(expected)
    seen = {int(i) for step in range(2 * sum(expected)) for i in left.indices(step)}
    assert seen == set(range(len(expected))) - set(held)


@given(orders(), st.floats(0.1, 0.9), st.integers(0, 9), st.integers(1, 5))
def test_what_is_held_out_depends_on_the_images_alone(order, share, seed, batch_size):
    other = Order(order.repeats, batch_size, seed, 0, 2, buckets=order.buckets)
    try:
        held = split(order, share)[1]
    except UserError:
        return
    assert split(other, share)[1] == held


def test_prior_images_stay():
    prior = [True] * 5 + [False] * 5
    _, held = split(Order([1] * 10, 1, 0, prior=prior), 0.99)
    assert len(held) == 4 and min(held) >= 5


class Module:
    def __init__(self, settings, objective):
        self.settings, self.diffusion = settings, self
        self.objective = objective


@given(st.integers(1, 40), st.booleans())
def test_each_stratum_of_the_timesteps_has_one_image_and_each_image_one_of_each_part(n, flow):
    settings = Train(timestep_sampling="logit_normal") if flow else Train(max_timestep=700)
    objective = Flow.shifted(10_000, 3.0) if flow else Epsilon(torch.linspace(0.9, 0.1, 1000))
    validation = Validation(None, None, list(range(n)), 4)
    found, draws = validation.timesteps(Module(settings, objective)), validation.draws
    assert draws >= 4 and n * draws >= 32
    if flow:  # the share of all that is drawn below a timestep
        share = torch.special.ndtr(torch.logit((torch.arange(10_000) + 0.5) / 10_000)).tolist()
        strata = {pair: int(share[t] * n * draws) for pair, t in found.items()}
    else:
        strata = {pair: t * n * draws // 700 for pair, t in found.items()}
    assert sorted(strata.values()) == list(range(n * draws))
    for (_, draw), stratum in strata.items():
        assert stratum // n == draw


def columns(record, *left_out):
    return [{k: v for k, v in row.items() if k not in left_out} for row in rows(record)]


def test_looking_disturbs_nothing(trained, tiny_concept):
    settings = {"steps": 6, "ema_decay": 0.7, "text_encoder": True, "lr": 1e-2}
    _, plain = trained("plain", **settings)
    folder = {"validation_folder": str(tiny_concept)}
    _, often = trained("often", validate_every=2, **folder, **settings)
    assert columns(often, "validation_loss") == columns(plain, "validation_loss")
    assert [bool(row["validation_loss"]) for row in rows(often)] == [False, True] * 3
    assert not any(row["validation_loss"] for row in rows(plain))
    for name, factor in factors(plain).items():
        assert torch.equal(factors(often)[name], factor), name


@pytest.mark.slow
def test_how_often_held_out_images_are_looked_at_changes_no_bit(trained, results):
    settings = {"steps": 6, "validation_share": 0.3, "optimizer": {"kind": "schedulefree"}}
    one = trained("one", validate_every=1, **settings)[1]
    two = trained("two", validate_every=3, **settings)[1]
    assert columns(one, "validation_loss") == columns(two, "validation_loss")
    assert [row["validation_loss"] for row in rows(one)][2::3] == [
        row["validation_loss"] for row in rows(two)
    ][2::3]
    for name, factor in factors(one).items():
        assert torch.equal(factors(two)[name], factor), name


def test_the_loss_is_of_the_held_out_images_with_fixed_noise(begin, monkeypatch):
    """Against the definition, one image at a time; the batch size decides nothing."""
    run, record = begin(validate_every=4, validation_share=0.3, steps=4, ema_decay=0.5)
    trained_on, looked_at = set(), []
    loss = Training.loss

    def watched(self, batch):
        if torch.is_grad_enabled():
            trained_on.update(batch.indices_B.tolist())
        else:
            looked_at.append(batch)
        return loss(self, batch)

    monkeypatch.setattr(Training, "loss", watched)
    kept = []
    made = Training.__init__
    monkeypatch.setattr(
        Training, "__init__", lambda self, *a: (made(self, *a), kept.append(self))[0]
    )
    train(run, record)
    images = {i for batch in looked_at for i in batch.indices_B.tolist()}
    assert len(images) == 2 and not images & trained_on
    assert len(trained_on) == 4
    (module,) = kept
    losses = []
    with module.exported(), torch.no_grad():
        for batch in looked_at:
            for b in range(len(batch.indices_B)):
                one = {k: v[b : b + 1] for k, v in batch.text.items()}
                z, e, t = (
                    x[b : b + 1] for x in (batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B)
                )
                noisy = module.diffusion.objective.noisy(z, e, t)
                predicted = module.diffusion.predict(noisy, t, one)
                losses.append(float(((predicted - e) ** 2).mean()))
    assert len(losses) == 32
    assert float(rows(record)[-1]["validation_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_run_that_was_stopped_sees_the_same(begin, trained, results, interrupted):
    settings = {"validate_every": 2, "validation_share": 0.3, "stop_on_divergence": 5.0, "steps": 8}
    _, straight = trained("straight", **settings)
    run, record = begin("stopped", **settings)
    interrupted(run, record, after=5)
    train(run, record)
    assert results(record) == results(straight)


def test_the_file_says_what_was_trained_on_and_not_where_it_was_tested(
    trained, tiny_concept, tmp_path
):
    from lyco_lab.formats import kohya

    folder = shutil.copytree(tiny_concept, tmp_path / "secret" / "others")
    run, record = trained(steps=4, validate_every=4, validation_folder=str(folder))
    _, metadata = kohya.load(record.path / "adapter.safetensors")
    assert '"validation_folder": "others"' in metadata["lyco_lab.run"]
    assert "secret" not in str(metadata)
    assert metadata["ss_num_train_images"] == "12"
    _, record = trained(steps=4, validate_every=4, validation_share=0.3)
    _, metadata = kohya.load(record.path / "adapter.safetensors")
    assert metadata["ss_num_train_images"] == "8"


# Divergence


def stops_naive(losses, factor, checks):
    """The first check at which it is over, by the definition."""
    for end in range(len(losses)):
        bad = [losses[i] > factor * min(losses[:i], default=np.inf) for i in range(end + 1)]
        if end + 1 >= checks and all(bad[end + 1 - checks :]):
            return end
    return None


@given(
    st.lists(st.integers(1, 80).map(lambda n: n / 8), min_size=1, max_size=30),
    st.floats(1.01, 3),
    st.integers(1, 4),
    st.booleans(),
)
def test_it_stops_after_so_many_bad_checks_in_a_row(losses, factor, checks, validated):
    every = 2
    settings = Train(
        steps=10_000,
        stop_on_divergence=factor,
        divergence_checks=checks,
        **({"validate_every": every, "validation_share": 0.5} if validated else {}),
    )
    every = settings.check_every
    assert every == (2 if validated else 50)
    divergence, stopped = Divergence(settings), None
    for check, loss in enumerate(losses):
        for step in range(check * every + 1, (check + 1) * every + 1):
            # Where there is a validation, training losses mean nothing.
            seen = 1000.0 * step if validated else loss
            at_check = loss if validated and step % every == 0 else None
            try:
                divergence.see(step, seen, at_check)
            except Diverged:
                stopped = check
                break
        if stopped is not None:
            break
    assert stopped == stops_naive(losses, factor, checks)


def test_what_was_seen_is_read_from_the_rows(tmp_path):
    settings = Train(steps=400, stop_on_divergence=2.0, divergence_checks=2)
    fresh = Divergence(settings)
    with Journal(tmp_path / "metrics.csv", 0) as journal:
        for step in range(1, 171):
            loss = 0.1 + 0.01 * (step % 7) + (step > 100)
            journal.write({"step": step, "loss": loss, "lr": 1.0, "grad_norm": 1.0})
            if step <= 160:
                fresh.see(step, loss, None)
    assert Divergence.of(settings, tmp_path / "metrics.csv", 160) == fresh
    assert fresh.bad == 1 and len(fresh.losses) == 10


def test_a_run_that_diverges_ends_and_its_checkpoints_are_from_before(begin, monkeypatch):
    settings = {"validate_every": 1, "validation_share": 0.3, "checkpoint_every": 2}
    run, record = begin(stop_on_divergence=2.0, divergence_checks=2, lr=1e-9, **settings)
    loss = Training.loss
    monkeypatch.setattr(
        Training,
        "loss",
        lambda self, batch: loss(self, batch) * (100 if self.row.get("step", 0) > 6 else 1),
    )
    with pytest.raises(UserError, match=r"the validation loss is .* at step 8, and was more than 2 "
                       r"times its best, .* at 2 checks in a row"):  # fmt: skip
        train(run, record)
    assert not record.done("train")
    names = sorted(file.name for file in (record.path / "train" / "checkpoints").iterdir())
    assert names == ["step00000004.ckpt", "step00000006.ckpt"]
    with (record.path / "train" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
