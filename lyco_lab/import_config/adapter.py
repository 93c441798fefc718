"""network_module, network_dim, network_args, … -> the adapter, its options, and its layers."""

import math
import re
from typing import Any

from lyco_lab.errors import UserError, nearest
from lyco_lab.import_config.keys import MOST, Keys

# Their name of an algorithm -> our kind.
ALGOS = {
    "lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "ia3": "ia3",
    "dylora": "dylora", "glora": "glora", "full": "native", "native": "native",
    "diag-oft": "oft", "diagoft": "oft", "oft": "oft", "boft": "boft", "tlora": "tlora",
}  # fmt: skip
MODULES = {"networks.lora": "lora", "networks.dylora": "dylora", "lycoris.kohya": ""}
RANKED = {"lora", "loha", "lokr", "dylora", "glora", "tlora"}
ROTATIONS = {"oft", "boft"}
# Their preset -> ours, and whether text encoders are in it.
PRESETS = {
    "attn-only": ("attn-only", True), "attn-mlp": ("attn-mlp", True), "full": ("full", True),
    "unet-transformer-only": ("attn-mlp", False),
}  # fmt: skip
TRUE = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
MOST_SQUARE = 10_000  # as a factor, as large as this: the most nearly square split
LEAST_ROOT = 17  # of SD's layers, the narrowest has 320 channels
BLOCKS = re.compile(r"(down|mid|up|block|conv_block)_.*|train_t5xxl")
Arguments = dict[str, str]


def adapter(keys: Keys) -> None:
    """Set adapter, options and model.preset."""
    module = keys.text("network_module")
    if module is None:
        raise UserError(f"{keys.path} names no network_module: it trains no adapter")
    if module not in MODULES:
        raise UserError(
            f"{keys.path}: network_module is {module!r}, needs one of {', '.join(MODULES)}"
            f"{nearest(module, MODULES)}"
        )
    arguments = keys.pairs("network_args")
    kind = MODULES[module] or _algo(keys, arguments)
    keys.set("adapter.kind", kind, "network_args algo" if not MODULES[module] else "network_module")
    _size(keys, kind, arguments)
    _shape(keys, kind, arguments)
    _preset(keys, module, kind, arguments)
    _dropouts(keys, arguments)
    _decomposed(keys, kind, arguments)
    _ratio(keys, kind, arguments)
    for name, value in arguments.items():
        _rest(keys, name, value)


def _algo(keys: Keys, arguments: Arguments) -> str:
    algo = arguments.pop("algo", "lora").lower()
    if algo not in ALGOS:
        raise UserError(
            f"{keys.path}: network_args has algo={algo}, needs one of {', '.join(ALGOS)}"
            f"{nearest(algo, ALGOS)}"
        )
    return ALGOS[algo]


def _number(keys: Keys, arguments: Arguments, name: str) -> float | None:
    text = arguments.pop(name, None)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.inf
    if abs(number) < MOST:
        return number
    raise UserError(f"{keys.path}: network_args has {name}={text}, needs a number")


def _flag(keys: Keys, arguments: Arguments, *names: str) -> bool:
    found = False
    for name in names:
        text = arguments.pop(name, "false")
        if text.lower() not in TRUE:
            raise UserError(f"{keys.path}: network_args has {name}={text}, needs True or False")
        found = found or TRUE[text.lower()]
    return found


def _size(keys: Keys, kind: str, arguments: Arguments) -> None:
    """Ranks and alphas; alpha of 0 means the rank, as theirs does."""
    dim, alpha = keys.whole("network_dim", 4), keys.number("network_alpha", 1.0)
    conv_dim = _number(keys, arguments, "conv_dim")
    conv_alpha = _number(keys, arguments, "conv_alpha")
    if kind in RANKED:
        keys.set("adapter.rank", dim, "network_dim")
        keys.set("adapter.alpha", float(alpha or dim or 0), "network_alpha")
        if conv_dim is not None:
            keys.set("adapter.conv_rank", int(conv_dim), "network_args conv_dim")
            if conv_alpha is not None:
                keys.set(
                    "adapter.conv_alpha", float(conv_alpha or conv_dim), "network_args conv_alpha"
                )
        elif conv_alpha is not None:
            keys.leave("network_args conv_alpha", "does nothing without conv_dim")
        return
    if kind in ROTATIONS:
        keys.set("adapter.block_size", dim, "network_dim")
        if keys.has("network_alpha"):
            keys.needless("network_alpha", "rotations have none")
    else:
        for key in ("network_dim", "network_alpha"):
            if keys.has(key):
                keys.needless(key, f"{kind} has no rank")
    for name, value in (("conv_dim", conv_dim), ("conv_alpha", conv_alpha)):
        if value is not None:
            keys.needless(f"network_args {name}", f"{kind} has one size for all layers")


def _shape(keys: Keys, kind: str, arguments: Arguments) -> None:
    """Fields that some kinds have."""
    if kind == "lokr":
        factor = _number(keys, arguments, "factor")
        given = -1 if factor is None else int(factor)
        keys.set("adapter.factor", MOST_SQUARE if given < 0 else given, "network_args factor")
        if given > LEAST_ROOT:
            keys.leave(
                "network_args factor",
                f"set, but LyCORIS keeps a factor that divides a size even where it exceeds the "
                f"size's root; here the blocks are then as the paper's equation 5 has them, "
                f"so layers of fewer than {given**2} channels may be split otherwise",
            )
    if kind in ROTATIONS:
        constraint = _number(keys, arguments, "constraint")
        if constraint is not None:
            keys.set("adapter.constraint", constraint, "network_args constraint")
    if kind == "dylora":
        block = _number(keys, arguments, "block_size") or _number(keys, arguments, "unit")
        if block is not None:
            keys.set("adapter.block_size", int(block), "network_args block_size")
    for ours, theirs, kinds in (
        ("tucker", ("use_tucker", "use_cp"), {"lora", "loha", "lokr"}),
        ("rank_stabilised", ("rs_lora",), RANKED - {"dylora", "tlora"}),
        ("full_matrix", ("full_matrix",), {"lokr"}),
        ("decompose_both", ("decompose_both",), {"lokr"}),
        ("unbalanced", ("unbalanced_factorization",), {"lokr"}),
        ("rescaled", ("rescaled",), ROTATIONS),
        ("on_input", ("train_on_input",), {"ia3"}),
        ("bias", ("train_bias",), {"native"}),
    ):
        if _flag(keys, arguments, *theirs):
            if kind in kinds:
                keys.set(f"adapter.{ours}", True, f"network_args {theirs[0]}")
            else:
                keys.leave(f"network_args {theirs[0]}", f"{kind} has nothing of the kind")
    if _flag(keys, arguments, "use_scalar"):
        keys.set("options.use_scalar", True, "network_args use_scalar")


def _preset(keys: Keys, module: str, kind: str, arguments: Arguments) -> None:
    """Which layers."""
    named = arguments.pop("preset", None)
    if module == "networks.lora" or module == "networks.dylora":
        convolutions = "adapter.conv_rank" in keys.settings
        keys.set("model.preset", "full" if convolutions else "attn-mlp", "network_module")
        if convolutions:
            keys.leave(
                "network_args conv_dim",
                "set, but preset full adapts conv_in, conv_out and the time embedding as well, "
                "which networks.lora leaves alone",
            )
    else:
        preset, text_encoder = PRESETS.get(named or "full", ("full", True))
        keys.set("model.preset", preset, "network_args preset")
        if named is not None and named not in PRESETS:
            keys.leave(
                f"network_args preset={named}",
                f"there are {', '.join(PRESETS)} only; full was taken{nearest(named, PRESETS)}",
            )
        if not text_encoder:
            keys.set("model.text_encoder", False, "network_args preset")
    if _flag(keys, arguments, "train_norm"):
        if keys.settings["model.preset"][0] == "attn-only":
            keys.needless("network_args train_norm", "attention contains no norm layer")
        else:
            keys.set("model.train_norm", True, "network_args train_norm")
    both = {"adapter.conv_rank", "adapter.conv_alpha"} & keys.settings.keys()
    if both and keys.settings["model.preset"][0] != "full":
        for ours in sorted(both):  # the paper's own files give them with each preset
            _, theirs = keys.settings.pop(ours)
            keys.needless(theirs, "the preset has no kernels larger than one tap")


def _dropouts(keys: Keys, arguments: Arguments) -> None:
    dropout, own = keys.number("network_dropout", 0.0), _number(keys, arguments, "dropout")
    chosen = dropout or own
    if chosen:
        theirs = "network_dropout" if dropout else "network_args dropout"
        keys.set("options.dropout", chosen, theirs)
    for name in ("rank_dropout", "module_dropout"):
        share = _number(keys, arguments, name)
        if share:
            keys.set(f"options.{name}", share, f"network_args {name}")
    limit = keys.number("scale_weight_norms", 0.0)
    if limit:
        keys.set("options.max_norm", float(limit), "scale_weight_norms")
    if _flag(keys, arguments, "rank_dropout_scale"):
        keys.needless("network_args rank_dropout_scale", "what is kept is scaled up in any case")


def _decomposed(keys: Keys, kind: str, arguments: Arguments) -> None:
    """DoRA is an adapter that has another within it."""
    per_output = arguments.pop("wd_on_output", "true").lower() not in ("false", "0", "no")
    if not _flag(keys, arguments, "dora_wd", "weight_decompose"):
        return
    if kind not in ("lora", "loha", "lokr"):
        keys.leave("network_args dora_wd", f"{kind} has nothing of the kind")
        return
    within = {name: keys.settings.pop(name) for name in list(keys.settings)
              if name.startswith("adapter.")}  # fmt: skip
    keys.set("adapter.kind", "dora", "network_args dora_wd")
    keys.set("adapter.axis", "out" if per_output else "in", "network_args wd_on_output")
    for name, (value, theirs) in within.items():
        keys.settings[name.replace("adapter.", "adapter.of.")] = (value, theirs)


def _ratio(keys: Keys, kind: str, arguments: Arguments) -> None:
    """LoRA+: B learns faster than A."""
    for name, layers in (
        ("loraplus_lr_ratio", None),
        ("loraplus_unet_lr_ratio", ["unet.*"]),
        ("loraplus_text_encoder_lr_ratio", ["text_encoder*"]),
    ):
        ratio = _number(keys, arguments, name)
        if ratio is None:
            continue
        if kind not in ("lora", "dylora"):
            keys.leave(f"network_args {name}", f"is for LoRA's two factors, {kind} has others")
            continue
        group: dict[str, Any] = {"factors": ["b_*"], "lr": ratio}
        groups = keys.settings.get("train.groups", ([], ""))[0]
        if layers is not None:
            group = {"layers": layers, **group}
        keys.set("train.groups", [*groups, group], f"network_args {name}")


def _rest(keys: Keys, name: str, value: str) -> None:
    if name == "bypass_mode":
        why = "the cheapest way to compute the same is chosen for each layer"
        keys.needless(f"network_args {name}", why)
    elif BLOCKS.fullmatch(name):
        keys.leave(f"network_args {name}", "is for some blocks only: write it as train.groups")
    else:
        known = (
            "algo", "preset", "conv_dim", "conv_alpha", "factor", "dropout", "rank_dropout",
            "module_dropout", "use_tucker", "use_scalar", "rs_lora", "full_matrix", "constraint",
            "decompose_both", "unbalanced_factorization", "rescaled", "train_on_input",
            "train_norm", "train_bias", "dora_wd", "wd_on_output", "block_size", "bypass_mode",
            "rank_dropout_scale", "loraplus_lr_ratio", "loraplus_unet_lr_ratio",
            "loraplus_text_encoder_lr_ratio",
        )  # fmt: skip
        keys.leave(f"network_args {name}={value}", f"not known{nearest(name, known)}")
