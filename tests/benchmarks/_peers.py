"""Who is measured: every adapter of lyco_lab, and those of lycoris-lora and peft.

A contestant is called who/adapter or who/adapter/mode. All are put on every Linear and Conv2d of
a model but those called conv_in and conv_out, by the functions that each library tells its users
to call; rank 8, LoKr's factor 8, blocks of 16 for the rotations. The layers stay in the places
they had, so the model is called in the same way whoever is on it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import peft
from lycoris import LycorisNetwork
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lyco_lab.adapters import ADAPTERS, build
from lyco_lab.adapters.mount import Mounted, attach

RANK, FACTOR, BLOCK = 8, 8, 16
LEFT_OUT = ("conv_in", "conv_out")

# What each is called in a study. An adapter that is not here is measured with its defaults.
OURS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": RANK, "alpha": RANK},
    "loha": {"kind": "loha", "rank": RANK, "alpha": RANK},
    "loha4": {"kind": "loha", "rank": 4, "alpha": 4},
    "lokr": {"kind": "lokr", "rank": RANK, "alpha": RANK, "factor": FACTOR},
    "lokr-full": {"kind": "lokr", "factor": FACTOR, "full_matrix": True},
    "dora": {"kind": "dora", "of": {"kind": "lora", "rank": RANK, "alpha": RANK}},
    "oft": {"kind": "oft", "block_size": BLOCK},
    "boft": {"kind": "boft", "block_size": BLOCK},
    "ia3": {"kind": "ia3"},
    "glora": {"kind": "glora", "rank": RANK, "alpha": RANK},
    "dylora": {"kind": "dylora", "rank": RANK, "alpha": RANK},
    "tlora": {"kind": "tlora", "rank": RANK, "alpha": RANK},
}

# algorithm: arguments of LycorisNetwork, which all have in both of its modes but those in REBUILT.
LYCORIS: dict[str, dict[str, Any]] = {
    "lora": {"network_module": "locon"},
    "dora": {"network_module": "locon", "weight_decompose": True},
    "loha": {"network_module": "loha"},
    "loha4": {"network_module": "loha", "dim": 4},
    "lokr": {"network_module": "lokr", "factor": FACTOR},
    "lokr-full": {"network_module": "lokr", "factor": FACTOR, "full_matrix": True},
    "oft": {"network_module": "diag-oft", "dim": BLOCK},
    "boft": {"network_module": "boft", "dim": BLOCK},
    "ia3": {"network_module": "ia3"},
    "glora": {"network_module": "glora"},
    "native": {"network_module": "full"},
}
REBUILT = {"dora", "native"}  # bypass mode silently trains a plain LoRA for "dora"

PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": RANK, "lora_alpha": RANK}),
    "dora": ("LoraConfig", {"r": RANK, "lora_alpha": RANK, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": RANK, "alpha": RANK}),
    "loha4": ("LoHaConfig", {"r": 4, "alpha": 4}),
    "lokr": ("LoKrConfig", {"r": RANK, "alpha": RANK, "decompose_factor": FACTOR}),
    "lokr-full": ("LoKrConfig", {"r": 10000, "alpha": 10000, "decompose_factor": FACTOR}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": BLOCK, "use_cayley_neumann": False}),
    "boft": ("BOFTConfig", {"boft_block_size": BLOCK, "boft_n_butterfly_factor": 2}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "glora": ("GloraConfig", {"r": RANK, "config_A_B": "lora", "config_C": "none",
                              "config_D_E": "none"}),
}  # fmt: skip


@dataclass(frozen=True)
class Contestant:
    """One adapter on a model."""

    parameters: list[nn.Parameter]  # those that train
    tensors: list[Tensor]  # all that it owns
    merge: Callable[[], object]
    restore: Callable[[], object]  # the model as it was; not after a merge
    ours: Mounted | None = None


Attach = Callable[[nn.Module], Contestant]


def in_words(name: str) -> str:
    """lycoris/lora/bypass -> lora lycoris bypass."""
    who, algorithm, *mode = name.split("/")
    return " ".join([algorithm, who, *mode])


def targets(model: nn.Module) -> list[str]:
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and name not in LEFT_OUT
    ]


def contestants() -> dict[str, Attach]:
    """who/adapter[/mode] -> how to put it on a model."""
    found: dict[str, Attach] = {f"ours/{name}": ours(section) for name, section in sections()}
    for name, settings in LYCORIS.items():
        found[f"lycoris/{name}/rebuild"] = of_lycoris(bypass_mode=False, **settings)
        if name not in REBUILT:
            found[f"lycoris/{name}/bypass"] = of_lycoris(bypass_mode=True, **settings)
    for name, (config, settings) in PEFT.items():
        found[f"peft/{name}"] = of_peft(config, **settings)
    return found


def sections() -> Iterator[tuple[str, dict[str, Any]]]:
    yield from OURS.items()
    measured = {section["kind"] for section in OURS.values()}
    for kind, cls in ADAPTERS.items():
        if kind not in measured and cls.takes == "matrix":
            yield kind, {"kind": kind}


def ours(section: dict[str, Any], *, keep_base: bool = True) -> Attach:
    def put(model: nn.Module) -> Contestant:
        mounted = attach(model, build(section), targets(model), seed=0)
        return Contestant(
            parameters=mounted.parameters(),
            tensors=list(mounted.named_factors().values()),
            merge=lambda: mounted.merge(keep_base=keep_base),
            restore=mounted.detach,
            ours=mounted,
        )

    return put


def of_lycoris(dim: int = RANK, **settings: Any) -> Attach:
    def put(model: nn.Module) -> Contestant:
        kinds = {"target_module": ["Linear", "Conv2d"], "target_name": [], "exclude_name": LEFT_OUT}
        LycorisNetwork.apply_preset(kinds)
        network = LycorisNetwork(model, 1.0, dim, dim, dim, dim, **settings)
        network.apply_to()
        # `full` takes the layer's weight out of the layer.
        taken = [getattr(module, "org_weight", None) for module in network.modules()]
        return Contestant(
            parameters=[p for p in network.parameters() if p.requires_grad],
            tensors=[
                *network.parameters(),
                *network.buffers(),
                *(tensor for tensor in taken if isinstance(tensor, Tensor)),
            ],
            merge=lambda: network.merge_to(1.0),
            restore=network.restore,
        )

    return put


def of_peft(config: str, **settings: Any) -> Attach:
    def put(model: nn.Module) -> Contestant:
        chosen = getattr(peft, config)(target_modules=targets(model), **settings)
        tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[chosen.peft_type](model, chosen, "default")

        def merge() -> None:
            for layer in list(tuner.modules()):
                if isinstance(layer, BaseTunerLayer):
                    layer.merge()

        return Contestant(
            parameters=[p for p in model.parameters() if p.requires_grad],
            tensors=[*model.parameters(), *model.buffers()],
            merge=merge,
            restore=tuner.unload,
        )

    return put
