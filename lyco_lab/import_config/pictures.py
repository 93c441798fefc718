"""train_data_dir, resolution, caption_extension, … -> model and data."""

from pathlib import Path
from typing import Any

from lyco_lab.errors import UserError
from lyco_lab.import_config.keys import Keys

BUCKETS = ("min_bucket_reso", "max_bucket_reso", "bucket_reso_steps", "bucket_no_upscale")
# What a dataset's own TOML says of each subset; in the main file they are its defaults.
OF_DATASETS = (
    "caption_extension", "resolution", "enable_bucket", *BUCKETS, "shuffle_caption", "keep_tokens",
    "caption_separator", "caption_tag_dropout_rate", "caption_prefix", "caption_suffix", "flip_aug",
    "alpha_mask", "masked_loss", "random_crop", "dataset_repeats",
)  # fmt: skip
TOKENS = (75, 150, 225)  # one, two or three of CLIP's windows
PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "bf16"}


def model(keys: Keys) -> None:
    path = keys.text("pretrained_model_name_or_path")
    if path is None:
        raise UserError(f"{keys.path} names no pretrained_model_name_or_path")
    keys.set("model.path", path, "pretrained_model_name_or_path")
    if keys.flag("v2"):
        keys.set("model.family", "sd2", "v2")
    if "v_parameterization" in keys.values:
        predicted = "v_prediction" if keys.flag("v_parameterization") else "epsilon"
        keys.set("model.prediction", predicted, "v_parameterization")
    if keys.flag("zero_terminal_snr"):
        keys.set("model.zero_terminal_snr", True, "zero_terminal_snr")
    skip = keys.whole("clip_skip")
    if skip and skip > 1:
        keys.set("model.clip_skip", skip, "clip_skip")
    precision = keys.text("mixed_precision", "no") or "no"
    if precision not in PRECISIONS:
        raise UserError(f"{keys.path}: mixed_precision is {precision!r}, needs no, fp16 or bf16")
    keys.set("model.precision", PRECISIONS[precision], "mixed_precision")
    if precision == "fp16":
        keys.leave("mixed_precision", "fp16 overflows where bf16 does not: bf16 was taken")
    tokens = keys.whole("max_token_length")
    if tokens is not None:
        if tokens not in TOKENS:
            raise UserError(f"{keys.path}: max_token_length is {tokens}, needs 75, 150 or 225")
        keys.set("model.max_token_length", tokens, "max_token_length")


def data(keys: Keys) -> None:
    described = keys.text("dataset_config")
    if described is not None:
        keys.set("data.toml", described, "dataset_config")
        for key in ("train_data_dir", "reg_data_dir", "in_json"):
            if keys.has(key):
                keys.needless(key, "dataset_config is given, and holds")
        for key in OF_DATASETS:
            if keys.has(key):
                keys.leave(key, f"say it in [general] of {described}, where it is not said yet")
    else:
        _folder(keys)
    weight = keys.number("prior_loss_weight", 1.0)
    if keys.has("reg_data_dir") and described is None:
        keys.set("data.prior", keys.text("reg_data_dir"), "reg_data_dir")
        if weight != 1:
            keys.set("data.prior_weight", weight, "prior_loss_weight")
    elif keys.has("prior_loss_weight") and described is None:
        keys.needless("prior_loss_weight", "there are no reg images")
    elif keys.has("prior_loss_weight") and weight != 1:
        keys.set("data.prior_weight", weight, "prior_loss_weight")
    seed = keys.whole("seed")
    if seed is None:
        keys.needless("seed", "not given: another one each time there, 0 here")
    else:
        keys.set("seed", seed, "seed")


def _folder(keys: Keys) -> None:
    folder = keys.text("train_data_dir")
    if folder is None:
        raise UserError(f"{keys.path} names neither a train_data_dir nor a dataset_config")
    keys.set("data.folder", folder, "train_data_dir")
    if keys.has("in_json"):
        keys.leave("in_json", "captions are read from text files, metadata.jsonl or manifest.jsonl")
    repeats = keys.whole("dataset_repeats", 1)
    if repeats != 1:
        keys.set("data.repeats", repeats, "dataset_repeats")
    extension = keys.text("caption_extension", ".caption") or ".caption"
    dotted = extension if extension.startswith(".") else f".{extension}"
    keys.set("data.caption_extension", dotted, "caption_extension")
    keys.set("data.caption_lines", "first", "caption_extension")  # there it is the only one read
    _sizes(keys)
    _tags(keys)
    if keys.flag("flip_aug"):
        keys.set("data.flip", True, "flip_aug")
    for key in ("alpha_mask", "masked_loss"):
        if keys.flag(key):
            keys.set("data.masks", "alpha", key)
    if keys.flag("random_crop"):
        keys.set("data.crop", "random", "random_crop")
        keys.set("data.latents", "live", "random_crop")


def _sizes(keys: Keys) -> None:
    found = keys.any("resolution")
    sides = _sides(found)
    if sides is None:
        raise UserError(f'{keys.path}: resolution is {found!r}, needs 512 or "512,512"')
    width, height = sides
    side = round((width * height) ** 0.5)
    keys.set("data.resolution", side, "resolution")
    if not keys.flag("enable_bucket"):
        for key in BUCKETS:
            if keys.has(key):
                keys.needless(key, "enable_bucket is false")
        keys.set("data.upscale", True, "enable_bucket (small images are enlarged)")
        if width != height:
            keys.leave("resolution", f"{width} x {height} is no square: {side} was taken")
        return
    if side * side != width * height:
        keys.leave(
            "resolution", f"{width} x {height} pixels: the area of {side} x {side} was taken"
        )
    least, most = keys.whole("min_bucket_reso", 256) or 256, keys.whole("max_bucket_reso", 1024)
    step = keys.whole("bucket_reso_steps", 64) or 64
    fitting = [least // step * step or step, (most or 1024) // step * step, step]
    keys.set("data.buckets", fitting, "enable_bucket min_bucket_reso max_bucket_reso")
    if fitting[:2] != [least, most]:
        keys.leave(
            "min_bucket_reso, max_bucket_reso", f"set, as multiples of {step} that they need"
        )
    keys.set("data.upscale", not keys.flag("bucket_no_upscale"), "bucket_no_upscale")


def _sides(value: Any) -> tuple[int, int] | None:
    """512, "512", "512,768" and [512, 768]."""
    listed = value if isinstance(value, list) else str(value).split(",")
    try:
        numbers = [int(str(side).strip()) for side in listed]
    except ValueError:
        return None
    right = len(numbers) in (1, 2) and min(numbers) > 0
    return (numbers[0], numbers[-1]) if right else None


def _tags(keys: Keys) -> None:
    shuffle, dropout = keys.flag("shuffle_caption"), keys.number("caption_tag_dropout_rate", 0.0)
    if shuffle:
        keys.set("data.shuffle_tags", True, "shuffle_caption")
    if dropout:
        keys.set("data.tag_dropout", dropout, "caption_tag_dropout_rate")
    for theirs, ours, value, inert in (
        ("keep_tokens", "keep_tags", keys.whole("keep_tokens", 0), 0),
        ("caption_separator", "tag_separator", keys.text("caption_separator", ","), ","),
    ):
        if value == inert:
            continue
        if shuffle or dropout:
            keys.set(f"data.{ours}", value, theirs)
        else:
            keys.needless(theirs, "tags are neither shuffled nor dropped")
    for theirs, ours in (("caption_prefix", "prefix"), ("caption_suffix", "suffix")):
        text = keys.text(theirs)
        if text:
            joined = f"{text} " if ours == "prefix" else f" {text}"
            keys.set(f"data.{ours}", joined, theirs)


def steps_per_epoch(keys: Keys) -> float | None:
    """By what the images' headers say; None where the images are not here."""
    values = {name.removeprefix("data."): value for name, (value, _) in keys.settings.items()
              if name.startswith("data.")}  # fmt: skip
    place = Path(str(values.get("folder") or values.get("toml")))
    if not place.exists():
        return None
    from lyco_lab.config import Data
    from lyco_lab.data import own
    from lyco_lab.data.memo import Memo

    if "buckets" in values:
        values["buckets"] = tuple(values["buckets"])
    batch = keys.whole("train_batch_size", 1) or 1
    together = batch * (keys.whole("gradient_accumulation_steps", 1) or 1)
    described = Data(**values, bad_files="drop")
    index, _ = own.index_of(described, batch, int(values.get("resolution") or 512), Memo())
    samples = int(index.repeats_N[~index.prior_N].sum())
    share = 2 if index.prior_N.any() else 1  # half of a batch are prior images, there as here
    return share * samples / together if samples else None
