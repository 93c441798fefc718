"""One damaged file of a finished study: `check` names it, `report` never lies, `run` mends it.

Every kind of file meets every action before one is met twice.
"""

import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from lyco_lab.record import digest
from tests.trials import child, study
from tests.trials.child import Ending
from tests.trials.table import OK, Kind, Row

ACTIONS = ("flip", "cut", "empty", "delete")
# Written anew by each command, whatever is in them, or read by people alone.
UNCOUNTED = re.compile(r"\.lock$|/report\.html$|/results\.csv$|/shared\.txt$")


@dataclass(frozen=True)
class Damage:
    file: str  # relative to where the runs lie
    action: str
    place: float  # share of the file's length
    bit: int
    links: tuple[str, ...]  # all names of the file

    def strike(self, root: Path) -> None:
        """Do it, in place, as a broken disk does: a hard link shares it."""
        path = root / self.file
        content = bytearray(path.read_bytes())
        at = int(self.place * len(content))
        if self.action == "delete":
            path.unlink()
        elif self.action == "empty":
            path.write_bytes(b"")
        elif self.action == "cut":
            path.write_bytes(content[:at])
        else:
            content[at] ^= 1 << self.bit
            path.write_bytes(content)


def draw(root: Path, seed: int, number: int) -> Damage:
    """The damage of this number to a study in `root`."""
    kinds = files(root)
    pairs = [(k, a) for k in kinds for a in ACTIONS if a == "delete" or not k.endswith(".lock")]
    random.Random(f"{seed}/damages").shuffle(pairs)
    rng = random.Random(f"{seed}/damages/{number}")
    kind, action = pairs[number % len(pairs)]
    file = rng.choice(kinds[kind])
    return Damage(file, action, rng.random(), rng.randrange(8), links(root, file))


def links(root: Path, file: str) -> tuple[str, ...]:
    """All names below `root` of the file that has this one."""
    found = (path for path in root.rglob(Path(file).name) if path.samefile(root / file))
    return tuple(sorted(str(path.relative_to(root)) for path in found))


def files(root: Path) -> dict[str, list[str]]:
    """All files of a study by their kind, which is their path without names and numbers."""
    found: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            file = str(path.relative_to(root))
            found.setdefault(kind_of(file), []).append(file)
    return dict(sorted(found.items()))


def kind_of(file: str) -> str:
    kind = re.sub(r"^base/[^/]+", "base/*", file)
    kind = re.sub(r"^[^/]+-[0-9a-f]{8}/", "RUN/", kind)
    kind = re.sub(r"[0-9a-f]{32}|\d{4,}", "*", kind)
    return re.sub(r"/(alter|trigger)/", "/KIND/", kind)


def trial(work: Path, seed: int, number: int) -> Row:
    made = study.finished(work, "whole", study.WHOLE)
    child.warm(made.study)
    damage = draw(made.root, seed, number)
    sound = _sound(made)
    endings: list[Ending] = []
    verdict, detail = OK, ""
    for said, why, ending in _observed(work / f"damage-{number}", made, damage, sound):
        endings.append(ending)
        if said != OK:
            verdict, detail = said, why
            break
    return Row(
        "damages",
        number,
        damage.file,
        f"{damage.action} at {damage.place:.3f}"
        if damage.action in ("flip", "cut")
        else damage.action,
        verdict,
        endings[-1].code,
        sum(ending.seconds for ending in endings),
        max(ending.peak_mb for ending in endings),
        detail,
    )


@dataclass(frozen=True)
class Sound:
    """What an undamaged study has."""

    tables: dict[str, str]
    results: dict[str, str]
    page: str


@cache
def _sound(made: study.Finished) -> Sound:
    return Sound(study.tables(made.root), study.results(made.root), page_of(made.root, made.name))


def page_of(root: Path, name: str) -> str:
    path = root / name / "report.html"
    return path.read_text(errors="replace") if path.is_file() else ""


def _observed(
    folder: Path, made: study.Finished, damage: Damage, sound: Sound
) -> Iterator[tuple[str, str, Ending]]:
    """Verdict, reason and ending of each command that is tried on a copy with this damage."""
    arguments = (str(made.study), "--out", str(folder))
    shutil.rmtree(folder, ignore_errors=True)
    try:
        study.copy(made.root, folder)
        damage.strike(folder)
        if can_check():
            ending = child.lyco("check", "--out", str(folder))
            yield *_of_check(ending, damage, counts=counts(damage, made.root, folder)), ending
        ending = child.lyco("report", *arguments)
        yield *_of_report(ending, damage, folder, made.name, sound), ending

        shutil.rmtree(folder)
        study.copy(made.root, folder)
        damage.strike(folder)
        run = ("run", *arguments, "--workers", "1")
        ending = child.lyco(*run)
        yield *_of_run(ending, folder, sound, last=False), ending
        if ending.code:
            ending = child.lyco(*run)
            yield *_of_run(ending, folder, sound, last=True), ending
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def can_check() -> bool:
    from lyco_lab.cli import app

    names = {c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands}
    return "check" in names


def counts(damage: Damage, sound: Path, root: Path) -> bool:
    """Whether a result depends on the file, so that `check` has to list it.

    Caches may be deleted, a study whose last mark is deleted is one that is not finished, and of a
    configuration names do not count.
    """
    if UNCOUNTED.search(damage.file):
        return False
    if damage.action == "delete" and re.search("^cache/|/done/evaluate.json$", damage.file):
        return False
    if not damage.file.endswith("config.yaml") or not (root / damage.file).is_file():
        return True
    try:
        mine, theirs = (yaml.safe_load((at / damage.file).read_bytes()) for at in (root, sound))
        return digest(mine) != digest(theirs)
    except (yaml.YAMLError, AttributeError, TypeError, ValueError):
        return True


def _of_check(ending: Ending, damage: Damage, *, counts: bool) -> tuple[str, str]:
    if ending.fault:
        return f"check: {ending.fault}", ending.last_words
    if ending.code not in (0, 1, 2):
        return "check: exit code", ending.last_words
    if counts and (ending.code == 0 or not _names(ending.out + ending.err, damage)):
        return "check: unnamed", ending.last_words
    return OK, ""


def _of_report(
    ending: Ending, damage: Damage, root: Path, name: str, sound: Sound
) -> tuple[str, str]:
    if ending.fault:
        return f"report: {ending.fault}", ending.last_words
    if ending.code:
        if not ending.one_line:
            return "report: not one line", ending.last_words
        if not _names(ending.err, damage):
            return "report: unnamed", ending.last_words
        return OK, ""
    page = page_of(root, name)
    said = _names(page + ending.out + ending.err, damage)
    if other := study.differing(study.tables(root), sound.tables):
        # What is left of the tables when a run is left out has to be what it was.
        if not said or not study.within(study.tables(root), sound.tables):
            return "report: silent", f"differs: {' '.join(other)}"
    elif page != sound.page and not said:
        return "report: silent", "the page differs and says nothing of it"
    return OK, ""


def _of_run(ending: Ending, root: Path, sound: Sound, *, last: bool) -> tuple[str, str]:
    which = "second run" if last else "run"
    if ending.fault:
        return f"{which}: {ending.fault}", ending.last_words
    if ending.code == 0:
        other = study.differing(study.results(root), sound.results)
        return (f"{which}: silent", f"differs: {' '.join(other)}") if other else (OK, "")
    if last:
        return "unmended", ending.last_words
    if not ending.one_line:
        return f"{which}: not one line", ending.last_words
    return OK, ""


def _names(text: str, damage: Damage) -> bool:
    """Whether a text names the file and the folder that it is in, however its lines are broken.

    Runs that share a result share its files, so folder and name may be those of another link.
    """
    plain = re.sub(r"\s+", "", text)
    for name in damage.links:
        folder, _, file = name.partition("/")
        if folder in plain and (file in plain or Path(file).name in plain):
            return True
    return damage.action == "delete" and _says_undone(plain, damage.file)


def _says_undone(plain: str, file: str) -> bool:
    """Whether a text without blanks says that the stage of a lost mark is not done."""
    folder, _, mark = file.rpartition("/done/")
    name = Path(folder).name
    said = name in plain or name.rpartition("-")[0] in plain
    return bool(mark) and said and bool(re.search("notdone|notevaluated", plain))


KIND = Kind("damages", 300, trial)
