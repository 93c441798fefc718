"""Cases are worked on by several processes, the model and the images loaded once in each.

Cases with the same R are one job, in which R trains once.
"""

import io
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lyco_lab import progress
from lyco_lab.data.folder import Dataset
from lyco_lab.data.stage import dataset, prepare
from lyco_lab.errors import Interrupted, UserError
from lyco_lab.record import Record
from lyco_lab.train.stage import DTYPES
from lyco_lab.verify import cause, power
from lyco_lab.verify.case import Case
from lyco_lab.verify.table import Row
from lyco_lab.verify.trace import Bench, Trace, follow
from lyco_lab.verify.verdict import NONE, SHADOWS, UNTOLD, Verdict, compare
from lyco_lab.workers import Failed, Say, Work, carry_out, cores

Job = Sequence[tuple[int, Case]]  # with their places among all


def suggested_workers(cases: Sequence[Case]) -> int:
    """A process per core for the embedded model, if there is work for them."""
    if not _embedded(cases) or torch.cuda.is_available():
        return 1
    return max(1, min(cores(), len(jobs(cases)) // 2))


def _embedded(cases: Sequence[Case]) -> bool:
    return all(case.base.model.embedded for case in cases)


def verify(cases: Sequence[Case], workers: int | None = None) -> Iterator[tuple[int, Row]]:
    """A row for each case with its place, as they are done. Writes nothing that stays."""
    workers = workers or suggested_workers(cases)
    # Sums are split among threads: with one, results do not depend on the machine's cores.
    threads = 1 if _embedded(cases) else max(1, cores() // workers)
    with tempfile.TemporaryDirectory(prefix="lyco-lab-verify-") as folder:
        record = Record.open(Path(folder), cases[0].base)
        with redirect_stdout(io.StringIO()):  # what is said of images is no result
            prepare(cases[0].base, record)
        images = dataset(cases[0].base, record)
        if workers > 1:
            yield from _side_by_side(jobs(cases), images, workers, threads)
        else:
            with _alone(threads):
                bench = Bench(images)
                for job in jobs(cases):
                    yield from work(job, bench)


def jobs(cases: Sequence[Case]) -> list[Job]:
    """Cases that share R together; the longest first, as far as one can tell."""
    by_base: dict[str, list[tuple[int, Case]]] = {}
    for place, case in enumerate(cases):
        by_base.setdefault(case.base.hash, []).append((place, case))
    return list(by_base.values())


@contextmanager
def _alone(threads: int) -> Iterator[None]:
    """In this process, which is left as it was; without a bar for every training."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, before))
    progress.send_to(lambda news: None)
    try:
        yield
    finally:
        progress.send_to(None)
        torch.set_num_threads(before)


def _side_by_side(
    jobs: list[Job], images: Dataset, workers: int, threads: int
) -> Iterator[tuple[int, Row]]:
    count = min(workers, len(jobs))
    try:
        for end in carry_out(count, threads, partial(_setup, images), jobs):
            if isinstance(end, Failed) and end.trace and not end.mistake:
                raise RuntimeError(f"{end.reason}, in a worker:\n{end.trace}")
            if isinstance(end, Failed):
                raise UserError(f"cases could not be finished: {end.reason}")
            yield from end.result
    except Interrupted as error:
        raise Interrupted("nothing of a verification is kept", error.number) from None


def _setup(images: Dataset, say: Say) -> Work:
    bench = Bench(images)
    progress.send_to(lambda news: None)
    return lambda job: list(work(job, bench))


def work(job: Job, bench: Bench) -> Iterator[tuple[int, Row]]:
    """Train R, and then each A."""
    base: Trace | None = None
    shadows: dict[float, list[Trace]] = {}
    for place, case in job:
        began_s = time.monotonic()
        verdict, found = Verdict(NONE, case.base.train.steps, 0, 0.0, 0.0, None), ""
        try:
            if base is None:
                base = follow(case.base, bench)
            if base.stopped:
                raise UserError(f"gamma = 1: {base.stopped}")
            other = follow(case.other, bench, strength=case.strength)
            verdict = compare(base, other)
            known: list[Trace] = []
            for unit, count in itertools.product(units(case), range(1, SHADOWS + 1)):
                known = shadows.setdefault(unit, [])
                if len(known) < count:
                    known.append(follow(case.base, bench, unit=unit, number=count))
                verdict = compare(base, other, known)
                if verdict.equal:
                    break
            if case.claim and not verdict.equal:
                found = cause.search(case, base, bench, verdict)
            elif case.claim and not case.keep:
                found = power.unseen(case, base, bench, known)
            if verdict.equal and (found or case.predicted):
                verdict = replace(verdict, word=UNTOLD)
        except UserError as error:
            found = str(error)
        yield place, Row.of(case, verdict, found, time.monotonic() - began_s)


def units(case: Case) -> list[float]:
    """The units of the roundings that may explain a difference, the finest first.

    None where nothing is rounded differently. Neighbours among the coarsest numbers of a step are
    so far apart; in some optimizers these are coarser than the model's, for some of the factors.
    """
    if case.in_bits:
        return []
    rounded = DTYPES[case.base.model.precision]
    coarse = [torch.bfloat16] if case.base.optimizer_value().coarse else []
    return sorted({torch.finfo(dtype).eps for dtype in (rounded, *coarse)})
