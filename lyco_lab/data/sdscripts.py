"""A dataset in the TOML of sd-scripts -> sources.

    [general]                       for all
    [[datasets]]                    a resolution and its buckets
    [[datasets.subsets]]            a folder of images

A key may stand on any level it applies to, and the innermost counts. Nothing is ignored: a key that
cannot be carried over is listed with its value, unless that value asks for nothing, and a key that
sd-scripts does not know either is an error.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lyco_lab.data.buckets import Sizing
from lyco_lab.data.captions import Captions
from lyco_lab.data.sources import Source
from lyco_lab.errors import UserError, nearest
from lyco_lab.readers import read_text
from lyco_lab.settings import Within, check_text

# Their defaults; the type of each is that of its value.
DATASET: dict[str, Any] = {
    "resolution": 512,
    "batch_size": 1,
    "enable_bucket": False,
    "min_bucket_reso": 256,
    "max_bucket_reso": 1024,
    "bucket_reso_steps": 64,
    "bucket_no_upscale": False,
}
SUBSET: dict[str, Any] = {
    "image_dir": "",
    "num_repeats": 1,
    "caption_extension": ".caption",
    "class_tokens": "",
    "is_reg": False,
    "shuffle_caption": False,
    "keep_tokens": 0,
    "caption_separator": ",",
    "caption_tag_dropout_rate": 0.0,
    "caption_dropout_rate": 0.0,
    "caption_prefix": "",
    "caption_suffix": "",
    "flip_aug": False,
    "alpha_mask": False,
}
# Known to sd-scripts and not to us, with the values that ask for nothing.
INERT: dict[str, tuple[Any, ...]] = {
    "cache_info": (False, True),  # of speed, not of the result
    "caption_dropout_every_n_epochs": (0,),
    "color_aug": (False,),
    "conditioning_data_dir": ("",),
    "custom_attributes": ({},),
    "enable_wildcard": (False,),
    "face_crop_aug_range": (),
    "keep_tokens_separator": ("",),
    "metadata_file": (),
    "network_multiplier": (1.0,),
    "random_crop": (False,),
    "resize_interpolation": (),
    "secondary_separator": ("",),
    "skip_image_resolution": (),
    "token_warmup_min": (1,),
    "token_warmup_step": (0,),
    "validation_seed": (),
    "validation_split": (0.0,),
    "caption_tag_dropout_targets": (),
    "bucket_no_upscale_round": (False,),
}
TOML_BYTES = 2**20
# The largest number of a key; of the others MOST_ELSE.
MOST = {"num_repeats": 10**4, "batch_size": 2**16, "keep_tokens": 10**4}
MOST_ELSE = 16384
MOST_PIXELS = Within(1, 16384)
INNERMOST = ("image_dir", "class_tokens", "is_reg")  # mean something in a subset only
LEVELS = ("general", "datasets")


@dataclass(frozen=True)
class Toml:
    """What a file says. `dropped`: keys that are not carried over, as 'where: key = value'."""

    sources: tuple[Source, ...]
    batch_size: int | None  # None: the file says nothing of it
    dropped: tuple[str, ...]


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds; a byte-order mark, as editors on Windows write, is no part of it."""
    text = read_text(path, TOML_BYTES)
    try:
        return tomllib.loads(text.replace("\r\n", "\n"))
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        raise UserError(f"{path} is not valid TOML: {error}") from error


def read(path: Path) -> Toml:
    """The sources of a dataset in TOML. Folders in it are relative to where the command is run."""
    content = read_toml(path)
    for key in content:
        if key not in LEVELS:
            raise UserError(f"{path}: unknown key {key!r}{nearest(key, LEVELS)}")
    general = _table(path, "[general]", content.get("general", {}))
    datasets = content.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise UserError(f"{path} has no [[datasets]]: there is nothing to train on")
    dropped: dict[str, None] = {}
    sources: list[Source] = []
    batches: set[int | None] = set()
    _check(path, "[general]", general, dropped, outer=True)
    for number, found in enumerate(datasets, 1):
        where = f"[[datasets]] {number}"
        dataset = dict(_table(path, where, found))
        subsets = dataset.pop("subsets", None)
        if not isinstance(subsets, list) or not subsets:
            raise UserError(f"{path}, {where}: has no [[datasets.subsets]] with an image_dir")
        _check(path, where, dataset, dropped, outer=True)
        outer = general | dataset
        batches.add(outer.get("batch_size"))
        sizing = _sizing(path, where, outer)
        for inner_number, inner in enumerate(subsets, 1):
            inner_where = f"{where}, subset {inner_number}"
            subset = _table(path, inner_where, inner)
            _check(path, inner_where, subset, dropped)
            sources.append(_source(path, inner_where, outer | subset, sizing, dropped))
    if len(batches) > 1:
        raise UserError(
            f"{path}: its datasets have batch sizes {sorted(b or 1 for b in batches)}, needs one "
            "for all"
        )
    return Toml(tuple(sources), batches.pop(), tuple(dropped))


def _table(path: Path, where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path}: {where} is {value!r}, needs keys and values")
    return value


def _check(
    path: Path, where: str, table: Mapping[str, Any], dropped: dict[str, None], outer: bool = False
) -> None:
    known = {**DATASET, **SUBSET}
    for key, value in table.items():
        if key in DATASET and not outer:
            raise UserError(f"{path}, {where}: {key} belongs one level up, in [[datasets]]")
        if key in INNERMOST and outer:
            raise UserError(f"{path}, {where}: {key} belongs in a [[datasets.subsets]]")
        if key in INERT:
            if not any(value == inert and type(value) is not bool or value is inert
                       for inert in INERT[key]):  # fmt: skip
                dropped[f"{where}: {key} = {value!r}"] = None
            continue
        if key not in known:
            raise UserError(f"{path}, {where}: unknown key {key!r}{nearest(key, [*known, *INERT])}")
        if key == "resolution":
            continue  # one number or two
        default = known[key]
        right = isinstance(value, type(default)) and (
            isinstance(default, bool) or not isinstance(value, bool)
        )
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            right = True
        if not right:
            raise UserError(f"{path}, {where}: {key} is {value!r}, needs a value like {default!r}")
        least = 1 if key in ("batch_size", "bucket_reso_steps") else 0
        if isinstance(value, int | float) and not isinstance(value, bool):
            Within(least, MOST.get(key, MOST_ELSE)).check(f"{path}, {where}: {key}", value)
        if isinstance(value, str):
            check_text(f"{path}, {where}: {key}", value)
        if key.endswith("_rate") and value > 1:
            raise UserError(f"{path}, {where}: {key} is {value!r}, needs a number in [0, 1]")


def _sizing(path: Path, where: str, table: Mapping[str, Any]) -> Sizing:
    values = DATASET | {key: value for key, value in table.items() if key in DATASET}
    size = values["resolution"]
    pair = [size, size] if isinstance(size, int) else size
    if (
        not isinstance(pair, list)
        or len(pair) not in (1, 2)
        or not all(isinstance(side, int) and not isinstance(side, bool) for side in pair)
    ):
        raise UserError(
            f"{path}, {where}: resolution is {size!r}, needs a number of pixels or [width, height]"
        )
    bucket_keys = [key for key in table if key.endswith("bucket_reso") or key.startswith("bucket_")]
    if not values["enable_bucket"] and bucket_keys:
        raise UserError(
            f"{path}, {where}: {bucket_keys[0]} is given, but enable_bucket is false: there are no "
            "buckets"
        )
    for side in pair:
        MOST_PIXELS.check(f"{path}, {where}: resolution", side)
    buckets = (values["min_bucket_reso"], values["max_bucket_reso"], values["bucket_reso_steps"])
    try:
        return Sizing(
            width=pair[0],
            height=pair[-1],
            buckets=buckets if values["enable_bucket"] else None,
            # Without buckets sd-scripts resizes whatever it is given.
            upscale=not values["bucket_no_upscale"],
        )
    except UserError as error:
        raise UserError(f"{path}, {where}: {error}") from error


def _source(
    path: Path, where: str, table: Mapping[str, Any], sizing: Sizing, dropped: dict[str, None]
) -> Source:
    values = SUBSET | {key: value for key, value in table.items() if key in SUBSET}
    if not values["image_dir"]:
        raise UserError(f"{path}, {where}: needs an image_dir")
    drawn = values["shuffle_caption"] or values["caption_tag_dropout_rate"]
    if values["keep_tokens"] and not drawn:
        raise UserError(
            f"{path}, {where}: keep_tokens is {values['keep_tokens']}, but tags are neither "
            "shuffled nor dropped: it does nothing"
        )
    extension = values["caption_extension"]
    prefix, suffix = values["caption_prefix"], values["caption_suffix"]
    for key in ("caption_prefix", "caption_suffix"):
        if values[key] and drawn:  # there its tags are shuffled and dropped with the others
            dropped[f"{where}: {key} = {values[key]!r} with tags that are drawn"] = None
    return Source(
        folder=Path(values["image_dir"]),
        repeats=values["num_repeats"],
        prior=values["is_reg"],
        recursive=False,
        numbered=False,
        extensions=(extension if extension.startswith(".") else f".{extension}",),
        class_tokens=values["class_tokens"],
        captions=Captions(
            shuffle=values["shuffle_caption"],
            keep_tags=values["keep_tokens"],
            separator=values["caption_separator"],
            tag_dropout=float(values["caption_tag_dropout_rate"]),
            prefix=f"{prefix} " if prefix else "",
            suffix=f" {suffix}" if suffix else "",
            dropout=float(table["caption_dropout_rate"])
            if "caption_dropout_rate" in table
            else None,
        ),
        sizing=sizing,
        flip=values["flip_aug"],
        masks="alpha" if values["alpha_mask"] else None,
        lines="first",  # as sd-scripts reads its caption files, unless enable_wildcard is set
    )
