"""Which concepts a folder holds, and the words that stand for each.

A folder is one concept where all its captions begin alike, "[trigger] class, …". Else it holds one
for each of

    metadata     concept, and its subclass
    a folder     REPEATS_CLASS, or CLASS; what lies in folders below it are its sub-classes
    a subset     of a TOML dataset

Two of them that begin alike are one, as nothing tells their prompts apart; but sub-classes of a
class stay apart, and are told apart by the next tag, where all captions of each have the same:
"[trigger] class, sub-class, …". Folders that nothing names, neither captions nor their own numbers,
are no concepts: whoever keeps a million images in a hundred folders has not taught a hundred
concepts.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from lyco_lab.data.class_folders import NUMBERED, unnumbered
from lyco_lab.data.index import Index


@dataclass(frozen=True)
class Concept:
    """Some of a dataset's images, and what to call it that they show."""

    name: str  # CLASS or CLASS/SUBCLASS
    class_name: str  # what its sub-classes have in common
    rows: tuple[int, ...]  # of the dataset's images
    captions: tuple[str, ...] = field(repr=False)
    trigger: str = ""
    class_word: str = ""
    subclass_word: str = ""
    category: str = ""

    @property
    def descriptor(self) -> str:
        """What stands for it in a prompt; "" where nothing does."""
        words = " ".join(word for word in (self.trigger, self.class_word) if word)
        return ", ".join(part for part in (words, self.subclass_word) if part and words)


def find(
    index: Index, rows: Sequence[int], captions: Sequence[str], title: str
) -> tuple[Concept, ...]:
    """The concepts of an index, whose images that count are `rows`; `title` is the dataset's."""
    columns = {name: index.texts[name].to_pylist() for name in _COLUMNS}
    sources = sorted({int(index.source_N[row]) for row in rows})
    titles = (
        _titles(index, sources) if len(sources) > 1 else dict.fromkeys(sources, unnumbered(title))
    )
    groups: dict[str, list[int]] = {}
    classes: dict[str, str] = {}
    named = len(sources) > 1
    for i, row in enumerate(rows):
        above = columns["class"][row] or titles[int(index.source_N[row])]
        name = "/".join(filter(None, (above, columns["leaf"][row])))
        groups.setdefault(name, []).append(i)
        classes.setdefault(name, above)
        folder = PurePosixPath(columns["file"][row]).parent
        listed = columns["concept"][row] != unnumbered(folder.name)
        named = named or listed or any(map(NUMBERED.fullmatch, folder.parts))

    def concept(name: str, class_name: str, of: Iterable[int]) -> Concept:
        places = tuple(of)
        said = tuple(captions[i] for i in places)
        texts = {
            key: _common(columns[key][rows[i]] for i in places)
            for key in ("trigger", "class_word", "category")
        }
        if not any(columns["trigger"][rows[i]] for i in places):
            found = [index.sources[index.source_N[rows[i]]] for i in places]
            begins = _begins(said, _common(source.captions.trigger for source in found))
            tokens = _common(source.class_tokens for source in found).partition(" ")[::2]
            words = begins if any(begins) else tokens
            if any(words):
                texts |= dict(zip(("trigger", "class_word"), words, strict=True))
        return Concept(name, class_name, places, said, **texts)

    whole = concept(unnumbered(title), unnumbered(title), range(len(rows)))
    no_list = not any(columns["trigger"][row] for row in rows)
    if len(groups) == 1 or whole.trigger or (no_list and whole.class_word):
        return (whole,)
    found = [concept(name, classes[name], of) for name, of in groups.items()]
    if not named and not any(each.descriptor for each in found):
        return (whole,)
    leaves = Counter(classes.values())
    joined: dict[tuple[str, bool], list[Concept]] = {}
    for each in found:
        alone = leaves[each.class_name] == 1
        by_words = alone and bool(each.descriptor)
        key = (each.descriptor if by_words else each.name, by_words)
        joined.setdefault(key, []).append(each if alone else _told_apart(each))
    return tuple(
        concept(members[0].name, members[0].class_name, sorted(i for m in members for i in m.rows))
        if len(members) > 1
        else members[0]
        for members in joined.values()
    )


_COLUMNS = ("file", "class", "leaf", "concept", "trigger", "class_word", "category")


def _begins(captions: Sequence[str], trigger: str) -> tuple[str, str]:
    """Trigger and class word: what was asked for, else how all captions begin."""
    heads = {caption.split(",")[0].strip() for caption in captions}
    if trigger:
        words = {head.removeprefix(trigger).strip() for head in heads}
        return trigger, words.pop() if len(words) == 1 else ""
    if len(heads) != 1:
        return "", ""
    trigger, _, class_word = heads.pop().partition(" ")
    return trigger, class_word


def _told_apart(concept: Concept) -> Concept:
    """With the tag behind its descriptor, where all captions have the same."""
    head = concept.descriptor
    rest = [caption.removeprefix(head) for caption in concept.captions]
    following = _common(text.lstrip(" ,").split(",")[0].strip() for text in rest)
    whole = head and all(c.startswith(head) and r.startswith((",", " ,"))
                         for c, r in zip(concept.captions, rest, strict=True))  # fmt: skip
    return replace(concept, subclass_word=following) if whole else concept


def _common(values: Iterable[str]) -> str:
    """What all of them are; "" where they differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else ""


def _titles(index: Index, sources: Sequence[int]) -> dict[int, str]:
    """A name for each source: its folder's, or the whole path where several folders share it."""
    folders = {number: index.sources[number].folder for number in sources}
    short = {number: unnumbered(folder.resolve().name) for number, folder in folders.items()}
    shared = {
        name
        for name in short.values()
        if len({folders[n].resolve() for n in sources if short[n] == name}) > 1
    }
    return {n: str(folders[n]) if short[n] in shared else short[n] for n in sources}
