"""optimizer_type, learning_rate, lr_scheduler, noise_offset, … -> optimizer and train."""

import ast
import math
from typing import Any

from lyco_lab.errors import UserError, nearest
from lyco_lab.import_config.keys import Keys

# Their optimizer, in lower case -> our kind and the defaults that their package has for it.
ADAM: dict[str, Any] = {"betas": [0.9, 0.999], "eps": 1e-8}
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("adamw", {**ADAM, "weight_decay": 0.01}),
    "adamw8bit": ("adamw8bit", {**ADAM, "weight_decay": 0.01}),
    "adam": ("adam", {**ADAM, "weight_decay": 0.0}),
    "lion": ("lion", {"betas": [0.9, 0.99], "weight_decay": 0.0}),
    "prodigy": (
        "prodigy",
        {**ADAM, "weight_decay": 0.0, "use_bias_correction": False, "safeguard_warmup": False},
    ),
    "sgdnesterov": ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.0}),
    "adamwschedulefree": ("schedulefree", {**ADAM, "weight_decay": 0.0}),
}
FIELDS = {
    "betas", "eps", "weight_decay", "amsgrad", "beta3", "use_bias_correction", "safeguard_warmup",
    "d0", "d_coef", "growth_rate", "momentum", "dampening", "nesterov", "r", "weight_lr_power",
}  # fmt: skip
WITH_AMSGRAD = ("adamw", "adam")
SCHEDULES = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear",
    "cosine": "cosine", "cosine_with_restarts": "cosine_restarts", "polynomial": "polynomial",
}  # fmt: skip
POLYNOMIAL_END = 1e-7  # the rate that theirs falls to
LOSSES = {"l2": "mse", "huber": "huber", "smooth_l1": "smooth_l1"}


def optimizer(keys: Keys) -> None:
    name = keys.text("optimizer_type") or ""
    for key, meant in (("use_8bit_adam", "AdamW8bit"), ("use_lion_optimizer", "Lion")):
        if keys.flag(key):
            if name:
                raise UserError(f"{keys.path}: {key} is given as well as optimizer_type: keep one")
            name = meant
    found = OPTIMIZERS.get(name.rsplit(".", 1)[-1].lower() or "adamw")
    if found is None:
        raise UserError(
            f"{keys.path}: optimizer_type is {name!r}, which has no like here; needs one of "
            f"{', '.join(OPTIMIZERS)}{nearest(name, OPTIMIZERS)}. Change it there, or in the study "
            "afterwards"
        )
    kind, values = found[0], dict(found[1])
    given = {}
    for key, text in keys.pairs("optimizer_args").items():
        known = [field for field in FIELDS if field in values or field not in ADAM]
        if key not in FIELDS or (key == "amsgrad" and kind not in WITH_AMSGRAD):
            asks = {"decouple": "True", "amsgrad": "False"}
            if asks.get(key) == text:
                keys.needless(f"optimizer_args {key}", "so it is here")
            else:
                keys.leave(f"optimizer_args {key}={text}", f"{kind} has none{nearest(key, known)}")
            continue
        given[key] = _literal(keys, key, text)
    keys.set("optimizer.kind", kind, "optimizer_type")
    for key, value in (values | given).items():
        theirs = f"optimizer_args {key}" if key in given else f"optimizer_type {name or 'AdamW'}"
        keys.settings[f"optimizer.{key}"] = (
            value,
            theirs if key in given else f"default of {name or 'AdamW'}",
        )


def _literal(keys: Keys, key: str, text: str) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UserError(
            f"{keys.path}: optimizer_args has {key}={text}, which is no value"
        ) from None
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, float) and math.isinf(value):
        return None
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def rates(keys: Keys) -> None:
    """Learning rates, and whether the text encoder trains."""
    usual = keys.number("learning_rate", 2e-6)
    unet, text = keys.number("unet_lr"), _one_of(keys, "text_encoder_lr")
    if keys.flag("network_train_text_encoder_only") or unet == 0:
        raise UserError(f"{keys.path} trains the text encoder alone, which a study cannot ask for")
    theirs = "learning_rate" if unet is None else "unet_lr"
    lr = usual if unet is None else unet
    keys.set("train.lr", lr, theirs)
    if keys.flag("network_train_unet_only") or text == 0:
        keys.set("model.text_encoder", False, "network_train_unet_only")
        if text:
            keys.needless("text_encoder_lr", "the text encoder is not trained")
    elif keys.settings.get("model.text_encoder", (True, ""))[0]:
        keys.set("model.text_encoder", True, "network_train_unet_only")
        own = usual if text is None else text
        if own != lr:
            keys.set(
                "train.text_encoder_lr", own, "learning_rate" if text is None else "text_encoder_lr"
            )
    if keys.has("learning_rate") and unet is not None and text is not None:
        keys.needless("learning_rate", "unet_lr and text_encoder_lr are given")
    norm = keys.number("max_grad_norm", 1.0)
    keys.set("train.grad_clip", float(norm) if norm else None, "max_grad_norm")


def _one_of(keys: Keys, key: str) -> float | None:
    """A rate, or the first of a list of equal ones."""
    value = keys.values.get(key)
    if not isinstance(value, list):
        return keys.number(key)
    keys.used.add(key)
    if len(set(map(float, value))) > 1:
        keys.leave(
            key, "one rate for all text encoders: the first was taken; others: write train.groups"
        )
    return float(value[0]) if value else None


def length(keys: Keys, epoch_steps: float | None) -> None:
    """Steps, and what is counted in epochs, which has `epoch_steps` steps where that is known."""
    batch, times = keys.whole("train_batch_size", 1), keys.whole("gradient_accumulation_steps", 1)
    keys.set("train.batch_size", batch, "train_batch_size")
    if times != 1:
        keys.set("train.accumulate", times, "gradient_accumulation_steps")
    steps, epochs = keys.whole("max_train_steps", 1600), keys.whole("max_train_epochs")
    if epochs is not None and epoch_steps is not None:
        steps = round(epochs * epoch_steps)
        keys.set("train.steps", steps, f"max_train_epochs ({epochs} x {epoch_steps:g} steps)")
        if keys.has("max_train_steps"):
            keys.needless("max_train_steps", "max_train_epochs is given, and holds")
    else:
        keys.set("train.steps", steps, "max_train_steps")
        if epochs is not None:
            keys.leave(
                "max_train_epochs",
                f"holds there, and not max_train_steps; but the images are not here to count the "
                f"steps of an epoch: give --epoch-steps, or set train.steps to {epochs} times that",
            )
    _checkpoints(keys, epoch_steps)
    _schedule(keys, int(steps or 0))


def _checkpoints(keys: Keys, epoch_steps: float | None) -> None:
    every, epochs = keys.whole("save_every_n_steps"), keys.whole("save_every_n_epochs")
    if epochs and epoch_steps:
        every = max(1, round(epochs * epoch_steps))
    if every:
        theirs = "save_every_n_epochs" if epochs and epoch_steps else "save_every_n_steps"
        keys.set("train.checkpoint_every", every, theirs)
    for key in ("save_every_n_steps", "save_every_n_epochs"):
        if keys.has(key):
            keys.leave(
                key,
                ("set, but " if every else "")
                + "the last two checkpoints are kept, to go on from; for a file of each ask for "
                "grid: {train.steps: [...]}, which at a constant rate is one training",
            )
    share, often = keys.number("validation_split"), keys.whole("validate_every_n_steps")
    if share and often:
        keys.set("train.validation_share", share, "validation_split")
        keys.set("train.validate_every", often, "validate_every_n_steps")
    elif share:
        keys.leave("validation_split", "give train.validation_share and train.validate_every")
    elif often:
        keys.needless("validate_every_n_steps", "does nothing without validation_split")
    sample = keys.whole("sample_every_n_steps")
    if sample:
        keys.set("train.sample_every", sample, "sample_every_n_steps")


def _schedule(keys: Keys, steps: int) -> None:
    name = keys.text("lr_scheduler", "constant") or "constant"
    warmup = keys.number("lr_warmup_steps", 0) or 0
    cycles, power = keys.whole("lr_scheduler_num_cycles", 1), keys.number("lr_scheduler_power", 1)
    end = keys.number("lr_scheduler_min_lr_ratio")
    kind = SCHEDULES.get(name)
    if kind is None:
        keys.leave("lr_scheduler", f"{name!r} has no like here{nearest(name, SCHEDULES)}: constant")
        kind = "constant"
    if warmup and name == "constant":
        keys.needless("lr_warmup_steps", "lr_scheduler is 'constant', which has no warm-up there")
        warmup = 0
    count = round(warmup * steps) if 0 < warmup < 1 else int(warmup)
    if count >= steps:
        raise UserError(
            f"{keys.path}: lr_warmup_steps is {warmup:g}, but there are {steps} steps: if "
            "they are counted in epochs, give --epoch-steps"
        )
    keys.set("train.warmup_steps", count, "lr_warmup_steps")
    if kind == "cosine_restarts" and cycles == 1:
        kind = "cosine"
    keys.set("train.schedule", kind, "lr_scheduler")
    if kind == "cosine_restarts":
        keys.set("train.schedule_restarts", (cycles or 1) - 1, "lr_scheduler_num_cycles")
    elif keys.has("lr_scheduler_num_cycles"):
        keys.needless("lr_scheduler_num_cycles", f"of no effect with {name}")
    if kind == "polynomial":
        keys.set("train.schedule_power", float(power or 1), "lr_scheduler_power")
        lr = keys.settings["train.lr"][0]
        if lr > POLYNOMIAL_END:
            keys.set("train.schedule_end", POLYNOMIAL_END / lr, "lr_scheduler (their end)")
    elif keys.has("lr_scheduler_power"):
        keys.needless("lr_scheduler_power", f"of no effect with {name}")
    if end is not None:
        keys.leave("lr_scheduler_min_lr_ratio", f"of no effect with {name} there")


def noise(keys: Keys) -> None:
    """What is drawn, and how errors count."""
    offset, rounds = keys.number("noise_offset"), keys.whole("multires_noise_iterations")
    discount, perturbation = keys.number("multires_noise_discount"), keys.number("ip_noise_gamma")
    if offset:
        keys.set("train.noise_offset", offset, "noise_offset")
    if rounds:
        keys.set("train.multires_noise_iterations", rounds, "multires_noise_iterations")
        if discount is not None:
            keys.set("train.multires_noise_discount", discount, "multires_noise_discount")
        keys.leave(
            "multires_noise_iterations",
            "set, but levels are enlarged and weighed in our own way (lyco_lab/train/noise.py)",
        )
    elif discount is not None:
        keys.needless("multires_noise_discount", "does nothing without multires_noise_iterations")
    if perturbation:
        keys.set("train.input_perturbation", perturbation, "ip_noise_gamma")
    gamma = keys.number("min_snr_gamma")
    if gamma:
        keys.set("train.min_snr_gamma", gamma, "min_snr_gamma")
    if keys.flag("debiased_estimation_loss"):
        keys.set("train.debiased", True, "debiased_estimation_loss")
    low, high = keys.whole("min_timestep"), keys.whole("max_timestep")
    if low:
        keys.set("train.min_timestep", low, "min_timestep")
    if high is not None and high < 1000:
        keys.set("train.max_timestep", high, "max_timestep")
    _loss(keys)
    keys.set(
        "train.caption_dropout", keys.number("caption_dropout_rate", 0.0), "caption_dropout_rate"
    )
    if keys.flag("gradient_checkpointing"):
        keys.set("train.gradient_checkpointing", True, "gradient_checkpointing")


def _loss(keys: Keys) -> None:
    kind, delta = keys.text("loss_type", "l2") or "l2", keys.number("huber_c", 0.1)
    schedule = keys.text("huber_schedule", "snr")
    if kind not in LOSSES:
        keys.leave("loss_type", f"{kind!r} has no like here{nearest(kind, LOSSES)}: mse")
        return
    if kind == "l2":
        for key in ("huber_c", "huber_schedule"):
            if keys.has(key):
                keys.needless(key, "loss_type is l2")
        return
    keys.set("train.loss", LOSSES[kind], "loss_type")
    keys.set("train.huber_delta", delta, "huber_c")
    keys.leave(
        "loss_type",
        "set, but theirs is a smooth function near it (pseudo-Huber), and ours the exact one",
    )
    if schedule != "constant":
        keys.leave("huber_schedule", f"{schedule!r}: here delta is the same for all timesteps")
