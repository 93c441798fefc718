"""The theorem on gamma holds, bit for bit, of adapters that other libraries train.

    gamma = alpha / rank, a power of two, from A        trains the same losses and factors as
    gamma = 1, from s A with s**degree = gamma          with every setting moved by s

The modules are those of LyCORIS and PEFT, on every linear layer and convolution of a small UNet of
diffusers; nothing of ours has a part in computing it. The degree of a layer is the number of its
factors: each of these adapters is a single product. Their gammas are read off the modules, since
LyCORIS' LoKr ignores alpha, and has gamma 1, where neither block is factored; PEFT's does not.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from lycoris.logging import logger
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from lyco_lab.optimizers import OPTIMIZERS
from lyco_lab.optimizers.base import Group, Optimizer

logger.setLevel("ERROR")

STEPS = 12

Adapted = dict[str, tuple[float, dict[str, nn.Parameter]]]  # layer -> its gamma and its factors
Put = Callable[[nn.Module, float], Adapted]  # an adapter on every layer, with this alpha / rank


def names_of(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def lycoris(cls: type, rank: int = 2, **settings: object) -> Put:
    def put(model: nn.Module, gamma: float) -> Adapted:
        adapted = {}
        for name in names_of(model):
            layer = model.get_submodule(name)
            module = cls(name, layer, 1.0, lora_dim=rank, alpha=rank * gamma, **settings)
            module.apply_to()
            adapted[name] = (module.scale, dict(module.named_parameters()))
        return adapted

    return put


def with_peft(config: Callable[..., peft.PeftConfig], alpha: str, **settings: object) -> Put:
    def put(model: nn.Module, gamma: float) -> Adapted:
        names = names_of(model)
        given = config(r=2, target_modules=names, **{alpha: 2 * gamma}, **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(given, model)
        adapted = {}
        for name in names:
            layer = model.get_submodule(name)
            factors = {k: p for k, p in layer.named_parameters() if not k.startswith("base_layer")}
            adapted[name] = (layer.scaling["default"], factors)
        return adapted

    return put


# peer -> how it is put on, and the degrees that its layers have
PEERS: Mapping[str, tuple[Put, set[int]]] = {
    "lycoris locon": (lycoris(LoConModule), {2}),
    "lycoris locon tucker": (lycoris(LoConModule, use_tucker=True), {2, 3}),
    "lycoris loha": (lycoris(LohaModule), {4}),
    "lycoris loha tucker": (lycoris(LohaModule, use_tucker=True), {4, 6}),
    "lycoris lokr full": (lycoris(LokrModule, factor=4, full_matrix=True), {2}),
    "lycoris lokr": (lycoris(LokrModule, factor=2), {2, 3}),
    "lycoris lokr tucker": (lycoris(LokrModule, factor=2, use_tucker=True), {2, 3, 4}),
    "lycoris lokr both": (lycoris(LokrModule, rank=1, factor=4, decompose_both=True), {3, 4}),
    "peft lora": (with_peft(peft.LoraConfig, "lora_alpha"), {2}),
    "peft loha": (with_peft(peft.LoHaConfig, "alpha"), {4}),
    "peft lokr": (with_peft(peft.LoKrConfig, "alpha", decompose_factor=2), {2, 3}),
}
RULES: Mapping[str, tuple[Optimizer, float]] = {  # and the learning rate at gamma = 1
    "adamw": (OPTIMIZERS["adamw"](eps=1e-6, weight_decay=0.1), 0.01),
    "sgd": (OPTIMIZERS["sgd"](momentum=0.9, weight_decay=0.01), 0.5),
}


@pytest.fixture(scope="module")
def unet():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=4,
            norm_num_groups=4,
        )


@dataclass(frozen=True)
class Case:
    unet: nn.Module
    put: Put
    optimizer: str
    precision: str

    def train(self, gamma: float, scales: Mapping[str, float]) -> tuple[Tensor, Adapted]:
        """Losses and factors; each layer's start and settings as at gamma = 1, divided by its s."""
        model = copy.deepcopy(self.unet).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            adapted = self.put(model, gamma)
            x, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
            context = torch.randn(2, 5, 16)
        rule, lr = RULES[self.optimizer]
        groups = []
        for name, (_, factors) in adapted.items():
            by = 1 / scales[name]
            with torch.no_grad():
                for factor in factors.values():
                    factor *= by
            moved = lr * by ** rule.powers["lr"]
            groups.append(Group(name, list(factors.values()), moved, rule.scaled(by)))
        running = rule.build(groups)
        losses = []
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
                noise = model(x, torch.tensor([3, 700]), context).sample
            loss = (noise.float() - target).square().mean()
            running.zero_grad()
            loss.backward()
            running.step()
            losses.append(loss.detach())
        return torch.stack(losses), adapted


def degrees_of(adapted: Adapted) -> dict[str, int]:
    return {name: len(factors) for name, (_, factors) in adapted.items()}


def root(gamma: float, degree: int) -> float:
    """s with s**degree = gamma, both powers of two."""
    exponent, rest = divmod(math.frexp(gamma)[1] - 1, degree)
    assert rest == 0 and 2.0 ** (exponent * degree) == gamma
    return 2.0**exponent


every_optimizer = pytest.mark.parametrize("optimizer", RULES)
every_precision = pytest.mark.parametrize("precision", ["float32", "bfloat16"])


@pytest.mark.slow
@every_precision
@every_optimizer
@pytest.mark.parametrize("peer", PEERS)
def test_gamma_is_a_scale_of_the_factors(peer, optimizer, precision, unet):
    put, expected = PEERS[peer]
    case = Case(unet, put, optimizer, precision)
    gamma = 2.0 ** -math.lcm(*expected)  # so that s is a power of two at every degree
    start = put(copy.deepcopy(unet), gamma)
    degrees = degrees_of(start)
    assert set(degrees.values()) == expected
    scales = {name: root(own, degrees[name]) for name, (own, _) in start.items()}
    losses, with_gamma = case.train(gamma, scales)
    twin_losses, without = case.train(1.0, dict.fromkeys(scales, 1.0))
    assert all(own == 1.0 for own, _ in without.values())
    assert losses[-1] < 0.998 * losses[0]
    assert torch.equal(losses, twin_losses)
    for layer, s in scales.items():
        for name, factor in with_gamma[layer][1].items():
            assert torch.equal(without[layer][1][name], s * factor), (layer, name)


@pytest.mark.slow
@every_optimizer
@pytest.mark.parametrize("peer", ["lycoris lokr", "peft lokr"])
@pytest.mark.parametrize("degree", [2, 3])
def test_one_scale_for_layers_of_two_degrees_is_another_run(degree, peer, optimizer, unet):
    case = Case(unet, PEERS[peer][0], optimizer, "float32")
    start = case.put(copy.deepcopy(unet), 1 / 64)
    scales = dict.fromkeys(start, root(1 / 64, degree))
    losses, _ = case.train(1 / 64, scales)
    twin_losses, _ = case.train(1.0, dict.fromkeys(scales, 1.0))
    assert losses[0] == twin_losses[0]  # both start at the frozen model
    assert not torch.allclose(losses, twin_losses, rtol=1e-2)
