"""Runs that an earlier version finished, whose marks list no digests of outputs.

    lyco-lab check --adopt      notes their outputs as they are now

What was damaged before that cannot be told any more, so nothing is adopted unasked. Scores are not
adopted: the next run computes them again, which takes seconds.
"""

from collections.abc import Iterator
from pathlib import Path

from lyco_lab.errors import UserError
from lyco_lab.files import locked
from lyco_lab.generate import STAGE as GENERATE
from lyco_lab.generate import TABLE, read_table, stage_of
from lyco_lab.integrity import BASE, is_of_an_earlier_version, records
from lyco_lab.readers import read_json
from lyco_lab.record import Record


def adopt(root: Path, names: list[str]) -> Iterator[str]:
    """Note what is there, in runs of these names or in all; a line for each stage."""
    for path in sorted((root / BASE).glob("*/")):
        with locked(path):
            yield from _adopt_shared(Record(path))
    for record in records(root, names):
        with locked(record.path):
            for stage in record.marked():
                if is_of_an_earlier_version(record.mark_file(stage)):
                    yield _adopt_stage(record, stage)


def _adopt_shared(base: Record) -> Iterator[str]:
    if base.marked() or not (base.path / TABLE).is_file():
        return
    images = [Path(name) for name in read_table(base.path)["file"]]
    if gone := [image for image in images if not image.is_file()]:
        raise UserError(f"{gone[0]} is missing: delete {base.path}, and run the study again")
    base.finish(GENERATE, outputs=[*images, base.path / TABLE])
    yield f"{base.path}: the stage {GENERATE} is adopted"


def _adopt_stage(record: Record, stage: str) -> str:
    facts = read_json(record.mark_file(stage))
    if "references" in facts:  # the evaluation, which notes more today
        record.undo(stage)
        return f"{record.path}: the stage {stage} is carried out again by the next run"
    shared = Record(record.path.parent / BASE / str(facts.get("base")))
    record.finish(stage, beside=[stage_of(shared)] if "base" in facts else [], **facts)
    return f"{record.path}: the stage {stage} is adopted"
