"""The sections of a run. A `Run` that exists is valid: every check is made when it is built.

The names here are the keys of a study's YAML; experiments/base.yaml explains each. A setting that
would be accepted and do nothing is refused.
"""

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

from lyco_lab import adapters, optimizers, record, settings
from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.norm import Norm
from lyco_lab.adapters.options import Options
from lyco_lab.config.asked import Asked
from lyco_lab.config.checks import at_least, choose, need
from lyco_lab.config.data import Data
from lyco_lab.config.training import Embedding, Train, Trainer
from lyco_lab.errors import UserError, nearest
from lyco_lab.optimizers.base import Optimizer
from lyco_lab.settings import PATH, SEED, Within

LONGEST_NAME = 128  # characters of a run, a study and a project; what W&B takes
EMBEDDED = "miniature"
PRECISIONS = ("fp32", "bf16")
LAYER_PRESETS = ("attn-only", "attn-mlp", "full")
WEIGHTS = ("ema", "non-ema")
PREDICTIONS = ("epsilon", "v_prediction")
PROMPT_TYPES = ("train", "trigger", "alter", "style")
TRIGGER_RULES = ("drop", "keep", "class")
WANDB_MODES = ("offline", "online", "disabled")
DEFAULT_ADAPTER = {"kind": "lora"}
DEFAULT_OPTIMIZER = {"kind": "adamw"}


@dataclass(frozen=True, kw_only=True)
class Model:
    path: Annotated[str, PATH] = EMBEDDED
    family: str | None = None
    weights: str | None = None
    prediction: str | None = None
    zero_terminal_snr: bool = False
    tokenizer: Annotated[str | None, PATH] = None
    clip_skip: Annotated[int, Within(1, 100)] = 1
    max_token_length: Annotated[int | None, Within(1, 7500)] = None
    preset: str = "attn-mlp"
    train_norm: bool = False
    text_encoder: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        needed = "'miniature', a diffusers folder, a .safetensors or .ckpt file, or owner/name"
        need(bool(self.path), "model.path", self.path, needed)
        for key, choices in (("weights", WEIGHTS), ("prediction", PREDICTIONS)):
            if getattr(self, key) is not None:
                choose(f"model.{key}", getattr(self, key), choices)
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise UserError(
                "model.zero_terminal_snr is true, but model.prediction is 'epsilon': where there "
                "is noise alone, to predict it says nothing of the image; needs v_prediction"
            )
        need(self.tokenizer != "", "model.tokenizer", self.tokenizer, "null or a folder")
        at_least("model.clip_skip", self.clip_skip, 1)
        if self.max_token_length is not None:
            at_least("model.max_token_length", self.max_token_length, 1)
        choose("model.preset", self.preset, LAYER_PRESETS)
        choose("model.precision", self.precision, PRECISIONS)

    @property
    def embedded(self) -> bool:
        """Whether it is the model that comes with the library."""
        return self.path == EMBEDDED


@dataclass(frozen=True, kw_only=True)
class Generate:
    types: tuple[str, ...] = PROMPT_TYPES
    images_per_type: Annotated[int, Within(1, 10**4)] = 8
    concepts: tuple[Asked, ...] = ()
    steps: Annotated[int, Within(1, 1000)] = 25
    guidance: Annotated[float, Within(1, 1000)] = 5.0
    batch_size: Annotated[int, Within(1, 4096)] = 16
    seed: Annotated[int, SEED] = 1000

    def __post_init__(self) -> None:
        for kind in self.types:
            choose("generate.types", kind, PROMPT_TYPES)
        distinct = len(set(self.types)) == len(self.types)
        need(bool(self.types) and distinct, "generate.types", self.types, "distinct prompt types")
        for key in ("images_per_type", "steps", "batch_size"):
            at_least(f"generate.{key}", getattr(self, key), 1)
        at_least("generate.guidance", self.guidance, 1)
        at_least("generate.seed", self.seed, 0)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    trigger_in_text: str = "drop"

    def __post_init__(self) -> None:
        choose("evaluate.trigger_in_text", self.trigger_in_text, TRIGGER_RULES)


@dataclass(frozen=True, kw_only=True)
class Wandb:
    mode: str = "offline"
    project: str | None = None  # None: the study's name

    def __post_init__(self) -> None:
        choose("wandb.mode", self.mode, WANDB_MODES)
        name = self.project
        right = name is None or (0 < len(name) <= LONGEST_NAME and not set(name) & set("/\\#?%:"))
        needed = f"null or a name of at most {LONGEST_NAME} characters, none of them / \\ # ? % :"
        slash = "; a team is named by the variable WANDB_ENTITY" if name and "/" in name else ""
        need(right, "wandb.project", name, needed + slash)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One configuration, trained once: everything its stages may ask."""

    name: str
    study: str
    seed: Annotated[int, SEED] = 0
    model: Model = Model()
    data: Data
    adapter: dict[str, Any] = field(default_factory=DEFAULT_ADAPTER.copy)
    options: Options = Options()
    optimizer: dict[str, Any] = field(default_factory=DEFAULT_OPTIMIZER.copy)
    train: Train = Train()
    embedding: Embedding = Embedding()
    trainer: Trainer = Trainer()
    generate: Generate = Generate()
    evaluate: Evaluate = Evaluate()
    wandb: Wandb = Wandb()

    def __post_init__(self) -> None:
        settings.check(self)
        for key in ("name", "study"):
            value = getattr(self, key)
            need(len(value) <= LONGEST_NAME, key, value, f"at most {LONGEST_NAME} characters")
            plain = getattr(self, key).replace("-", "").replace("_", "").replace(".", "")
            needed = "letters, digits, '-', '_' and '.', as it names a folder"
            need(plain.isascii() and plain.isalnum(), key, getattr(self, key), needed)
        if self.model.train_norm:
            try:
                self.options.check(Norm(), (1,), "norm layer")
            except UserError as error:
                raise UserError(f"model.train_norm is true, and options.{error}") from None
        if self.generate.concepts and self.data.concept is not None:
            raise UserError(
                f"generate.concepts names {', '.join(self.generate.concepts[0].names)}, but "
                f"data.concept is {self.data.concept!r}: it is for pictures of your own"
            )
        if self.train.text_encoder_lr is not None and not self.model.text_encoder:
            raise UserError(
                f"train.text_encoder_lr is {self.train.text_encoder_lr!r}, but model.text_encoder "
                "is false: the text encoder is not trained"
            )
        if self.train.batch_size % self.trainer.devices:
            raise UserError(
                f"train.batch_size is {self.train.batch_size}, which trainer.devices = "
                f"{self.trainer.devices} cannot share: it counts the samples of all devices "
                "together, needs a multiple"
            )
        if self.trainer.strategy == "fsdp" and self.train.sample_every is not None:
            raise UserError(
                f"train.sample_every is {self.train.sample_every}, but trainer.strategy is 'fsdp': "
                "no process has a whole model to draw with; generate draws after the training"
            )
        if self.train.validation_folder is not None and self.data.toml is not None:
            raise UserError(
                f"train.validation_folder is {self.train.validation_folder!r}, but how images are "
                f"seen is said in {self.data.toml} for those in it only: use "
                "train.validation_share"
            )
        # Spelled out in full, so that leaving a field at its default and giving the default by
        # hand are the same run.
        object.__setattr__(self, "adapter", adapters.describe(self.adapter_value()))
        rule = self.optimizer_value()
        settings.check(self.adapter_value(), "adapter.")
        settings.check(rule, "optimizer.")
        object.__setattr__(self, "optimizer", optimizers.describe(rule))
        self._check_groups(rule)
        if rule.averages and self.train.schedule != "constant":
            raise UserError(
                f"train.schedule is {self.train.schedule!r}, but the optimizer "
                f"{self.optimizer['kind']!r} averages the factors instead of slowing down: use "
                "'constant'"
            )
        if rule.averages and self.train.ema_decay is not None:
            raise UserError(
                f"train.ema_decay is {self.train.ema_decay!r}, but the optimizer "
                f"{self.optimizer['kind']!r} averages the factors itself: use one of them"
            )

    def _check_groups(self, rule: Optimizer) -> None:
        own = {spec.name for spec in dataclasses.fields(rule)}
        known = [key for key in rule.powers if key in own]
        for number, group in enumerate(self.train.groups, start=1):
            for name in group.optimizer:
                if name not in known:
                    hint = ": its lr stands beside `optimizer`, not in it" if name == "lr" else ""
                    raise UserError(
                        f"group {number} of train.groups multiplies optimizer.{name}: for "
                        f"{self.optimizer['kind']!r} that can be {', '.join(known) or 'nothing'}"
                        f"{hint or nearest(name, known)}"
                    )
            settings.check(rule.moved(group.optimizer), f"train.groups[{number}] makes optimizer.")

    @property
    def reads_texts(self) -> bool:
        """Whether text encoders have to read captions in every step, since what they say moves."""
        return self.model.text_encoder or self.embedding.token is not None

    def adapter_value(self) -> Adapter:
        """The adapter this run trains."""
        return adapters.build(self.adapter)

    def optimizer_value(self) -> Optimizer:
        """The optimizer that moves its factors."""
        return optimizers.build(self.optimizer)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as config.yaml holds them."""
        plain = {key: _plain(value) for key, value in dataclasses.asdict(self).items()}
        if not self.generate.concepts:
            del plain["generate"]["concepts"]  # runs from before there were any keep their hash
        if self.data.caption_lines == "all":
            del plain["data"]["caption_lines"]  # likewise
        return plain

    @cached_property
    def hash(self) -> str:
        """Eight hex digits of what decides the result: not names, devices or wandb."""
        return record.digest(self.to_dict())

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.hash}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
