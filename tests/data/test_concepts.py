"""Which concepts a folder holds, by its folders, lists and captions, and what each is called."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from lyco_lab.config import Data
from lyco_lab.data import class_folders, own
from lyco_lab.data.memo import Memo
from tests.data import pictures

WORDS = st.text("abcdefgh", min_size=1, max_size=5)


def write(root, *captions, **lists):
    """Images with captions; `lists` makes them lines of a manifest with these texts instead."""
    for i, caption in enumerate(captions):
        pictures.image(root / f"{i}.png", 8, 8, caption=None if lists else caption)
    if lists:
        lines = [
            {"file": f"{i}.png", "caption": caption, **lists} for i, caption in enumerate(captions)
        ]
        (root / "manifest.jsonl").write_text("\n".join(map(json.dumps, lines)))


def found(root=None, **data):
    where = {"folder": str(root), "upscale": True} if root is not None else {}
    index, _ = own.index_of(Data(**where, **data), 1, 64, Memo())
    return own.Items(index, "all").concepts


def named(root=None, **data):
    return {each.name: each.descriptor for each in found(root, **data)}


def test_each_folder_is_a_concept_with_the_words_its_captions_begin_with(tmp_path):
    write(tmp_path / "3_my dog", "sks dog, outside", "sks dog, inside")
    write(tmp_path / "cat", "zwx cat, asleep")
    dog, cat = sorted(found(tmp_path), key=lambda each: -len(each.name))
    assert (dog.name, dog.trigger, dog.class_word) == ("my dog", "sks", "dog")
    assert (cat.name, cat.class_name, cat.descriptor) == ("cat", "cat", "zwx cat")
    assert sorted(dog.captions) == ["sks dog, inside", "sks dog, outside"]


def test_one_name_in_all_captions_is_one_concept(tmp_path):
    for folder in ("indoor", "outdoor", "5_more"):
        write(tmp_path / folder, "sks dog, 1", "sks dog, 2")
    (one,) = found(tmp_path)
    assert (one.name, one.descriptor, len(one.rows)) == ("all", "sks dog", 6)


def test_two_folders_of_one_name_are_one_concept_beside_others(tmp_path):
    write(tmp_path / "dog1", "sks dog, 1")
    write(tmp_path / "dog2", "sks dog, 2", "sks dog, 3")
    write(tmp_path / "pig", "abc pig, 1")
    assert named(tmp_path) == {"dog1": "sks dog", "pig": "abc pig"}
    assert [len(each.rows) for each in found(tmp_path)] == [3, 1]


def test_sub_classes_are_told_apart_by_their_tag(tmp_path):
    ika = tmp_path / "star wars" / "2_ika"
    write(ika / "default", "ika girl, apron, smile", "ika girl, apron")
    write(ika / "casual", "ika girl, casual dress, smile", "ika girl, casual dress, rain")
    write(ika / "others", "ika girl, rain", "ika girl, swimsuit")
    write(tmp_path / "5_pig", "abc pig, mud", "abc pig, mud")
    assert named(tmp_path) == {
        "pig": "abc pig",
        "star wars/ika/casual": "ika girl, casual dress",
        "star wars/ika/default": "ika girl, apron",
        "star wars/ika/others": "ika girl",
    }
    assert {each.class_name for each in found(tmp_path)} == {"star wars/ika", "pig"}


def test_a_list_s_words_come_first(tmp_path):
    write(tmp_path / "a", "photo of a", concept="ann", trigger="sks", class_word="toy, pink robe")
    write(tmp_path / "b", "zwx cat, b", category="plushie")
    write(tmp_path / "c", "qqq c, small", "qqq c, small", concept="cc", subclass="small")
    write(tmp_path / "d", "qqq c, big", "qqq c, big", concept="cc", subclass="big")
    assert named(tmp_path) == {
        "ann": "sks toy, pink robe",
        "b": "zwx cat",
        "cc/small": "qqq c, small",
        "cc/big": "qqq c, big",
    }
    assert [each.category for each in found(tmp_path)] == ["", "plushie", "", ""]


def test_folders_that_nothing_names_are_no_concepts(tmp_path):
    for folder in ("001", "002"):
        write(tmp_path / folder, "a photo of a house, grey", "a tree, green")
    (one,) = found(tmp_path)
    assert one.descriptor == "" and len(one.rows) == 4
    write(tmp_path / "003", "sks dog, 1", "sks dog, 2")
    assert named(tmp_path) == {"001": "", "002": "", "003": "sks dog"}


def test_a_trigger_for_all_is_one_concept(tmp_path):
    write(tmp_path / "a", "a dog, 1")
    write(tmp_path / "b", "a cat, 1")
    assert named(tmp_path, trigger="zwx") == {"all": "zwx"}


SUBSET = """[[datasets.subsets]]
image_dir = "{}"
num_repeats = {}
caption_extension = ".txt"
class_tokens = "{}"
"""


def test_the_subsets_of_a_toml_are_concepts(tmp_path):
    write(tmp_path / "x" / "img", "sks dog, 1", "sks dog, 2")
    write(tmp_path / "y" / "img", "a pig in mud", "a pig asleep")
    write(tmp_path / "9_more", "sks dog, 3")
    (tmp_path / "data.toml").write_text("[[datasets]]\nresolution = 64\n" + "".join([
        SUBSET.format(tmp_path / "x" / "img", 1, ""),
        SUBSET.format(tmp_path / "y" / "img", 1, "abc pig"),
        SUBSET.format(tmp_path / "9_more", 3, ""),
    ]))  # fmt: skip
    words = named(toml=str(tmp_path / "data.toml"))
    assert words == {f"{tmp_path}/x/img": "sks dog", f"{tmp_path}/y/img": "abc pig"}


@settings(max_examples=25, deadline=None)
@given(
    groups=st.dictionaries(
        st.tuples(WORDS, WORDS), st.tuples(WORDS, st.lists(WORDS, min_size=1, max_size=3)),
        min_size=2, max_size=4,
    )
)  # fmt: skip
def test_each_alone_is_what_it_is_among_others(tmp_path_factory, groups):
    root = tmp_path_factory.mktemp("in")
    for i, ((trigger, word), (folder, tags)) in enumerate(groups.items()):
        write(root / f"{i + 1}_{folder}{i}", *(f"{trigger} {word}, {tag}" for tag in tags))
    joint = found(root)
    assert sorted(row for each in joint for row in each.rows) == list(range(len(joint_rows(root))))
    assert len(joint) == len(groups)
    for each, folder in zip(joint, sorted(root.iterdir()), strict=True):
        (alone,) = found(folder)
        assert alone.captions == each.captions
        assert (alone.trigger, alone.class_word) == (each.trigger, each.class_word)
        assert alone.descriptor == each.descriptor


def joint_rows(root):
    return list(root.rglob("*.png"))


@given(parts=st.lists(st.tuples(st.booleans(), WORDS), min_size=1, max_size=4))
def test_a_class_ends_with_the_first_number(parts):
    path = "/".join(f"{'7_' * has}{name}" for has, name in parts)
    above, leaf = class_folders.place(path)
    names = [name for _, name in parts]
    first = next((i for i, (has, _) in enumerate(parts) if has), 0)
    assert above.split("/") == names[: first + 1]
    assert list(filter(None, leaf.split("/"))) == names[first + 1 :]


def test_an_image_s_words_are_its_concept_s(tmp_path):
    write(tmp_path / "a", "sks dog, 1", "sks dog, 2")
    write(tmp_path / "b", "zwx cat, 1")
    write(tmp_path / "c", "c", trigger="qqq", class_word="pig")
    index, _ = own.index_of(Data(folder=str(tmp_path), upscale=True), 1, 64, Memo())
    items = own.Items(index, "all")
    words = [(item.trigger, item.class_word) for item in items]
    assert words == [("sks", "dog")] * 2 + [("zwx", "cat"), ("qqq", "pig")]
    assert (items[-1].trigger, items[-2].trigger) == ("qqq", "zwx")


def test_prior_images_are_no_concept(tmp_path):
    write(tmp_path / "in" / "a", "sks dog, 1")
    write(tmp_path / "in" / "b", "abc pig, 1")
    write(tmp_path / "prior" / "c", "dog")
    assert set(named(tmp_path / "in", prior=str(tmp_path / "prior"))) == {"a", "b"}


def test_images_beside_folders_are_a_concept_of_the_folder_s_name(tmp_path):
    write(tmp_path, "sks dog, 1", "sks dog, 2")
    write(tmp_path / "a", "abc pig, 1", "abc pig, 2")
    assert named(tmp_path)["all"] == "sks dog"
