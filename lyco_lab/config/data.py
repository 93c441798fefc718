"""The section `data` of a run: which images it trains on, and what is done to them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lyco_lab.config.checks import at_least, choose, need, positive
from lyco_lab.errors import UserError
from lyco_lab.settings import PATH, SHARE, Within

SIDE = Within(64, 16384)  # pixels
PLACES = ("concept", "folder", "toml")
CHOICES = {
    "balance": ("repeats", "classes"),
    "bad_files": ("error", "drop"),
    "crop": ("center", "random"),
    "caption_lines": ("all", "first"),
    "masks": ("alpha", "files"),
    "trigger_rule": ("add", "keep"),
    "latents": ("fp32", "fp16", "live"),
}
# Settings that a TOML file makes itself, and those that the embedded world has no use for.
TOML_SETTINGS = (
    "repeats", "resolution", "buckets", "upscale", "flip", "masks", "caption_extension",
    "caption_lines", "trigger", "trigger_rule", "prefix", "suffix", "shuffle_tags", "keep_tags",
    "tag_dropout", "tag_separator", "prior",
)  # fmt: skip
OWN_SETTINGS = (
    *TOML_SETTINGS[1:], "balance", "bad_files", "crop", "prior_share", "prior_weight", "latents",
)  # fmt: skip
# How an image and its caption are seen, wherever they come from.
SEEN = (
    "bad_files", "resolution", "buckets", "upscale", "masks", "caption_extension", "caption_lines",
    "trigger", "trigger_rule", "prefix", "suffix", "latents",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Data:
    concept: str | None = None
    folder: Annotated[str | None, PATH] = None
    toml: Annotated[str | None, PATH] = None
    repeats: Annotated[int | None, Within(1, 10**4)] = None
    limit: Annotated[int | None, Within(1, 10**9)] = None
    balance: str = "repeats"
    bad_files: str = "error"
    resolution: Annotated[int | None, SIDE] = None
    buckets: Annotated[tuple[int, int, int] | None, Within(8, 16384)] = None
    upscale: bool = False
    crop: str = "center"
    flip: bool = False
    masks: str | None = None
    caption_extension: str | None = None
    caption_lines: str = "all"
    trigger: str | None = None
    trigger_rule: str = "add"
    prefix: str = ""
    suffix: str = ""
    shuffle_tags: bool = False
    keep_tags: Annotated[int, Within(0, 10**4)] = 0
    tag_dropout: Annotated[float, SHARE] = 0.0
    tag_separator: str = ","
    prior: Annotated[str | None, PATH] = None
    prior_share: Annotated[float | None, SHARE] = None
    prior_weight: Annotated[float | None, Within(1e-12, 1e12)] = None
    latents: str = "fp32"

    def __post_init__(self) -> None:
        given = [key for key in PLACES if getattr(self, key)]
        if len(given) != 1:
            values = " and ".join(f"{key} {getattr(self, key)!r}" for key in PLACES)
            raise UserError(
                f"exactly one of data.concept, data.folder and data.toml must be given, not "
                f"{values}"
            )
        self._check_owner(given[0])
        for key, least in (("repeats", 1), ("limit", 1), ("keep_tags", 0), ("resolution", 64)):
            at_least(f"data.{key}", getattr(self, key), least)
        for key, choices in CHOICES.items():
            if getattr(self, key) is not None:
                choose(f"data.{key}", getattr(self, key), choices)
        for key in ("tag_dropout", "prior_share"):
            value = getattr(self, key)
            whole = value is None or (0 < value < 1 if key == "prior_share" else 0 <= value <= 1)
            needed = "between 0 and 1" if key == "prior_share" else "a number in [0, 1]"
            need(whole, f"data.{key}", value, needed)
        positive("data.prior_weight", self.prior_weight)
        if self.buckets is not None:
            least, most, step = self.buckets
            right = step >= 8 and step % 8 == 0 and 0 < least <= most
            right = right and least % step == 0 and most % step == 0
            needed = "[smallest, largest, step]: sides that are multiples of a step, itself of 8"
            need(right, "data.buckets", list(self.buckets), needed)
        for key in ("trigger", "caption_extension", "prior"):
            need(getattr(self, key) != "", f"data.{key}", "", "null or text")
        extension = self.caption_extension
        if extension is not None:
            need(extension.startswith("."), "data.caption_extension", extension, "a leading '.'")
        need(bool(self.tag_separator.strip()), "data.tag_separator", self.tag_separator, "a mark")
        self._check_idle()

    @property
    def title(self) -> str:
        """What the images are called: the concept, or the name of their folder or TOML file."""
        return self.concept or Path(self.folder or str(self.toml)).name

    def elsewhere(self, folder: str) -> "Data":
        """Images of another folder, seen as these are: nothing is drawn, and each counts once."""
        return Data(folder=folder, **{key: getattr(self, key) for key in SEEN})

    def _check_owner(self, place: str) -> None:
        """Settings that the images' place decides itself."""
        taken = {"folder": (), "concept": OWN_SETTINGS, "toml": TOML_SETTINGS}[place]
        defaults = {spec.name: spec.default for spec in dataclasses.fields(self)}
        for key in taken:
            if getattr(self, key) != defaults[key]:
                why = (
                    "is for pictures of your own"
                    if place == "concept"
                    else f"is to be said in {self.toml}"
                )
                raise UserError(
                    f"data.{key} is {getattr(self, key)!r}, but data.{place} is given: {key} {why}"
                )

    def _check_idle(self) -> None:
        """Settings that would do nothing beside the others."""
        drawn = self.shuffle_tags or self.tag_dropout > 0
        idle = {
            "trigger_rule": self.trigger_rule != "add" and self.trigger is None,
            "keep_tags": self.keep_tags > 0 and not drawn,
            "tag_separator": self.tag_separator != "," and not drawn,
            "repeats": self.repeats is not None and self.balance == "classes",
        }
        wanted = {
            "trigger_rule": "data.trigger is null",
            "keep_tags": "tags are neither shuffled nor dropped",
            "tag_separator": "tags are neither shuffled nor dropped",
            "repeats": "data.balance is 'classes', which sets them",
        }
        for key, is_idle in idle.items():
            if is_idle:
                raise UserError(f"data.{key} is {getattr(self, key)!r}, but {wanted[key]}")
        if self.toml is None and self.prior is None:
            for key in ("prior_share", "prior_weight"):
                need(getattr(self, key) is None, f"data.{key}", getattr(self, key), "a data.prior")
        if self.crop == "random" and self.latents != "live":
            raise UserError(
                "data.crop is 'random', which cuts an image elsewhere each time, but latents are "
                f"kept in {self.latents}: needs data.latents=live"
            )
