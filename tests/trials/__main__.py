"""Hostile trials: what goes wrong around a study must not make its numbers wrong.

    python -m tests.trials                              all kinds, into tests/trials/results/
    python -m tests.trials damages --number 17          one case again
    python -m tests.trials damages studies --count 20   the first few of each

    damages         a file of a finished study is damaged
    interruptions   a running study is killed, ended or interrupted
    studies         study.yaml is mutated, and read by `run --dry-run`
    commands        likewise the command line
    adapters        an adapter file is mutated and loaded
    failures        runs of a study fail, or their process is killed

Exits 1 if a verdict is not "ok". Cases are drawn from --seed and their number alone.
"""

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from tests.trials import adapters, commands, damages, failures, interruptions, studies
from tests.trials.table import OK, Kind, Row, Table, library, printable

KINDS: dict[str, Kind] = {
    module.KIND.name: module.KIND
    for module in (damages, interruptions, studies, commands, adapters, failures)
}
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    asked = _asked()
    with tempfile.TemporaryDirectory(prefix="trials-") as temporary:
        work = (asked.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        wrong = [_try(KINDS[name], work, asked) for name in asked.kinds or KINDS]
    return int(any(wrong))


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.trials",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="all if none is given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="only so many of each kind")
    parser.add_argument("--number", type=int, help="only this case; prints its row, writes nothing")
    parser.add_argument("--work", type=Path, help="folder that keeps the finished studies")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    parser.add_argument("--resume", action="store_true", help="skip what the tables have")
    asked = parser.parse_args()
    for name in asked.kinds:
        if name not in KINDS:
            parser.error(f"unknown kind {name!r}: {', '.join(KINDS)}")
    return asked


def _try(kind: Kind, work: Path, asked: argparse.Namespace) -> int:
    """The trials of one kind; returns how many of them are not ok."""
    tree = library()
    began_s = time.monotonic()
    if asked.number is not None:
        rows = [_row(kind, work, asked.seed, asked.number, tree)]
        print(rows[0])
    else:
        table = Table(asked.results / f"{kind.name}.csv", asked.seed, tree)
        known = table.known() if asked.resume else {}
        numbers = range(kind.count if asked.count is None else min(asked.count, kind.count))
        table.begin(known)
        for number in numbers:
            if number not in known:
                table.add(known.setdefault(number, _row(kind, work, asked.seed, number, tree)))
        table.sort()
        rows = [known[number] for number in numbers]
    counted = Counter(row.verdict for row in rows)
    found = ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common())
    print(f"{kind.name}: {len(rows)} trials in {time.monotonic() - began_s:.0f} s: {found}")
    return len(rows) - counted[OK]


def _row(kind: Kind, work: Path, seed: int, number: int, tree: str) -> Row:
    row = kind.trial(work, seed, number)
    row = replace(
        row,
        target=printable(row.target),
        action=printable(row.action),
        detail=printable(row.detail, 400),
        seconds=round(row.seconds, 2),
        peak_mb=round(row.peak_mb),
        seed=seed,
        library=tree,
    )
    if row.verdict != OK:
        print(f"{kind.name} {number}: {row.verdict}: {row.target}: {row.action}: {row.detail}")
    return row


if __name__ == "__main__":
    raise SystemExit(main())
