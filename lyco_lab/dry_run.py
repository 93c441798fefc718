"""What a study will do, worked out before it does it: layers, parameters, epochs.

    samples per epoch = images * repeats        epochs = steps * batch size / samples per epoch

The networks are built from their configuration alone, without weights, so this takes seconds; and
every run is checked, so that a mistake in the last one is not found after the others have trained.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lyco_lab import gamma
from lyco_lab.adapters.mount import survey
from lyco_lab.config import Run, Study
from lyco_lab.config.groups import check
from lyco_lab.data.stage import Seen, look, place
from lyco_lab.diffusion import targets
from lyco_lab.diffusion.model import objective, sound
from lyco_lab.diffusion.skeleton import parts, skeleton
from lyco_lab.errors import UserError
from lyco_lab.generate import ask
from lyco_lab.miniature import placed
from lyco_lab.miniature.concepts import concept
from lyco_lab.record import STAGES, Record
from lyco_lab.states import failure
from lyco_lab.train import plugs, suits


@dataclass(frozen=True)
class Plan:
    """One run's."""

    run: Run
    layers: dict[str, int]  # part of the model -> how many of its layers are adapted
    narrowed: int  # of the layers, how many are too narrow for the adapter's rank and get less
    params: int  # trained, over all parts
    images: int  # 0: they are not here, nor is the next known
    samples_per_epoch: int
    concepts: int  # of which images are drawn
    drawn: int  # images, of the run; as many again of the base model, for all runs that ask alike
    report: tuple[str, ...] = ()  # lines on a user's images

    @property
    def epochs(self) -> float:
        return self.run.train.steps * self.run.train.samples_per_step / self.samples_per_epoch

    def stages_done(self, root: Path) -> list[str]:
        """Of this run's stages, those that a rerun will skip, and one that failed.

        Creates nothing.
        """
        record = Record(root / self.run.folder_name)
        failed = failure(record)
        done = [stage for stage in STAGES if record.done(stage)]
        return [*done, *([f"{failed.stage} failed"] if failed else [])]


def plan(study: Study, models: Collection[str] = (), images: Collection[str] = ()) -> list[Plan]:
    """A plan for every run; a `UserError` names the run that cannot work.

    `models`, `images`: paths of models of which there are shapes alone, and of pictures that are
    not here (lyco_lab/lacking.py); nothing else is asked of them.
    """
    plans = []
    for run in study.runs:
        try:
            plans.append(_plan(run, models, images))
        except UserError as error:
            raise UserError(f"{error} (run {run.name!r})") from error
    return plans


def _plan(run: Run, models: Collection[str], absent: Collection[str]) -> Plan:
    if run.model.path not in models:
        sound(placed(run.model))
    unknown = run.data.concept is None and str(place(run)) in absent
    seen = look(run) if run.data.concept is None and not unknown else None
    images, samples, concepts, drawn = (0, 0, 0, 0) if unknown else _count(run, seen)
    check(run.train.groups, [(layer.name, f) for layer in gamma.layers(run) for f in layer.factors])
    plugs(run)
    suits(run.train, objective(placed(run.model)))
    counts, narrowed, adapter = {}, 0, run.adapter_value()
    for part in parts(placed(run.model), run.model.text_encoder):
        network = skeleton(placed(run.model), part)
        chosen = targets.chosen(network, part, run.model, adapter)
        counts[part] = survey(
            network, adapter, chosen.names, options=run.options, overrides=chosen.overrides
        )
        narrowed += len(chosen.narrowed)
    return Plan(
        run=run,
        layers={part: len(layers) for part, layers in counts.items()},
        narrowed=narrowed,
        params=sum(sum(layers.values()) for layers in counts.values()),
        images=images,
        samples_per_epoch=samples,
        concepts=concepts,
        drawn=drawn,
        report=() if seen is None else seen.report,
    )


def _count(run: Run, seen: Seen | None) -> tuple[int, int, int, int]:
    """Images, samples per epoch, concepts that are drawn, and how many images of them."""
    data = run.data
    if seen is not None:
        asked = ask(run, seen.concepts)
        return *seen[:2], len({prompt.concept for prompt in asked}), len(asked)
    subject = concept(str(data.concept))
    images = min(subject.images, data.limit or subject.images)
    return images, images * (data.repeats or subject.repeats), 1, len(ask(run, ()))
