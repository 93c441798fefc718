"""What lycoris-lora 4.1 gets wrong, on record, beside the definition that ours satisfies.

Each test asserts the wrong figure: when it fails, LyCORIS has mended it and the case belongs among
those of `test_lycoris.py`. The numbers L1, L2, ... are those of the list these were found by.
"""

import copy

import pytest
import safetensors.torch
import torch
from lycoris.functional import lokr
from lycoris.modules import get_module, make_module
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from lycoris.modules.tlora import TLoraModule
from torch import Tensor, nn
from torch.nn import functional as F

from lyco_lab.adapters.glora import GLoRA
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import Mounted, attach
from lyco_lab.adapters.norm import Norm
from lyco_lab.adapters.options import Options
from lyco_lab.formats import foreign
from tests.oracles.layers import INPUTS, LAYERS, relative
from tests.oracles.test_lycoris import BOUND, change, generic, random_module, tensors_of

LORA = {"lora_dim": 2, "alpha": 3.0}  # gamma is 1.5


def both(kind: str, cls: type, tmp_path, **settings) -> tuple[nn.Module, nn.Module, Mounted]:
    """LyCORIS' module on a layer, and a copy of the layer with ours, which has read its file."""
    return both_on(LAYERS[kind](), cls, tmp_path, **settings)


def both_on(layer: nn.Module, cls: type, tmp_path, **settings):
    module = random_module(cls, copy.deepcopy(layer), **settings)
    safetensors.torch.save_file(tensors_of(module), tmp_path / "a.safetensors")
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    mounted, _ = foreign.apply(tmp_path / "a.safetensors", {"unet": model})
    return module, model["layer"], mounted["unet"]


def loaded(tensors: dict[str, Tensor], layer: nn.Module) -> nn.Module:
    """What LyCORIS makes of a file."""
    cls, parameters = get_module(tensors, "lora_unet_layer")
    return make_module(cls, parameters, "lora_unet_layer", layer).eval()


@pytest.mark.parametrize(
    ("cls", "settings"), [(LohaModule, LORA), (LokrModule, {"lora_dim": 1, "alpha": 1.5})]
)
@torch.no_grad()
def test_l1_gamma_twice_in_what_is_merged(cls, settings, tmp_path):
    module, _, mounted = both("linear", cls, tmp_path, **settings)
    delta, _ = module.get_diff_weight()
    torch.testing.assert_close(delta, 1.5 * mounted.delta("layer"))


@torch.no_grad()
def test_l2_the_scalar_is_left_out_of_what_is_merged(tmp_path):
    module, _, mounted = both(
        "linear", LohaModule, tmp_path, lora_dim=2, alpha=2.0, use_scalar=True
    )
    delta, _ = module.get_diff_weight()
    torch.testing.assert_close(module.scalar * delta, mounted.delta("layer"))
    assert abs(module.scalar - 1) > 0.1


@pytest.mark.parametrize("cls", [LoConModule, LohaModule, LokrModule])
@torch.no_grad()
def test_l3_half_precision_rounds_the_change_away(cls, tmp_path):
    """It is taken as (W + delta) - W in bfloat16, whose steps are as large as such a delta."""
    torch_layer = LAYERS["linear"]()
    frozen = copy.deepcopy(torch_layer).bfloat16()
    x = INPUTS["linear"].bfloat16()
    module = random_module(cls, copy.deepcopy(torch_layer), lora_dim=1, alpha=1.0)
    scaled = {"lora_up.weight", "hada_w1_a", "lokr_w1"}
    tensors = {
        key: 2e-3 * tensor if key.removeprefix("lora_unet_layer.") in scaled else tensor
        for key, tensor in tensors_of(module).items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    theirs = copy.deepcopy(frozen)
    module = loaded(tensors, theirs).bfloat16()
    module.apply_to()
    model = nn.ModuleDict({"layer": copy.deepcopy(frozen)})
    mounted, _ = foreign.apply(tmp_path / "a.safetensors", {"unet": model})
    expected = F.linear(x.double(), mounted["unet"].delta("layer").double())
    weight = module.get_merged_weight()[0] - frozen.weight
    assert relative(F.linear(x.double(), weight.double()), expected) > 0.1
    exact = F.linear(x.double(), frozen.weight.double(), frozen.bias.double()) + expected
    # A rounding of the sum is all that ours may lose: half a step of bfloat16.
    assert (model["layer"](x).double() - exact).abs().max() < 2**-8 * exact.abs().max()


def test_l4_rank_stabilised_full_lokr_reloads_at_another_scale(tmp_path):
    kind = "linear"
    settings = {"lora_dim": 16, "alpha": 16.0, "rs_lora": True}
    module, ours, _ = both(kind, LokrModule, tmp_path, **settings)
    frozen, again = LAYERS[kind](), LAYERS[kind]()
    reloaded = loaded(tensors_of(module), again)
    module.apply_to(), reloaded.apply_to()
    trained = change(module.org_module[0], frozen, INPUTS[kind])
    torch.testing.assert_close(trained, 4 * change(again, frozen, INPUTS[kind]))
    # The file does not say so, and of full blocks it is defined that alpha has no meaning.
    torch.testing.assert_close(4 * change(ours, frozen, INPUTS[kind]), trained)


def test_l5_rank_stabilised_glora_reloads_at_another_scale(tmp_path):
    """gamma is 2 = 4 / sqrt(4), of which the file says nothing; ours stores it as an alpha of 8."""
    settings = {"lora_dim": 4, "alpha": 4.0, "rs_lora": True}
    module = random_module(GLoRAModule, LAYERS["linear"](), **settings)
    reloaded = loaded(tensors_of(module), LAYERS["linear"]())
    torch.testing.assert_close(module.get_diff_weight()[0], 2 * reloaded.get_diff_weight()[0])
    assert GLoRA(4, 4.0, rank_stabilised=True).file_alpha((12, 8)) == 8.0


@pytest.mark.parametrize(
    ("cls", "settings", "error"),
    [
        pytest.param(
            LoConModule,
            {**LORA, "weight_decompose": True, "wd_on_out": False},
            RuntimeError,
            id="L6 magnitudes by inputs",
        ),
        pytest.param(IA3Module, {}, TypeError, id="L11 ia3"),
        pytest.param(
            LokrModule,
            {"lora_dim": 1, "factor": 2, "use_tucker": True},
            AttributeError,
            id="L12 lokr with a core",
        ),
        pytest.param(
            LokrModule,
            {"lora_dim": 1, "factor": 2, "unbalanced_factorization": True},
            RuntimeError,
            id="L13 unbalanced lokr",
        ),
    ],
)
def test_files_that_it_writes_and_cannot_read(cls, settings, error, tmp_path):
    layer = LAYERS["conv"]()
    module = random_module(cls, copy.deepcopy(layer), **settings)
    tensors = tensors_of(module)
    with pytest.raises(error):
        loaded(tensors, copy.deepcopy(layer))
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    foreign.apply(tmp_path / "a.safetensors", {"unet": model})
    module.apply_to()
    expected = change(module.org_module[0], layer, INPUTS["conv"])
    assert relative(change(model["layer"], layer, INPUTS["conv"]), expected) < BOUND


@torch.no_grad()
def test_l8_dora_at_strength_0_is_not_the_frozen_weight(tmp_path):
    module, ours, mounted = both("linear", LoConModule, tmp_path, **LORA, weight_decompose=True)
    weight = LAYERS["linear"]().weight
    moved = 1.5 * module.lora_up.weight @ module.lora_down.weight
    torch.testing.assert_close(module.get_merged_weight(0)[0], weight + moved)
    mounted.strength = 0.0
    assert torch.equal(ours(INPUTS["linear"]), LAYERS["linear"]()(INPUTS["linear"]))
    half = mounted.delta("layer")
    mounted.strength = 1.0
    assert not half.any() and mounted.delta("layer").any()


@torch.no_grad()
def test_l9_merging_precisely_drops_the_magnitudes(tmp_path):
    module, ours, mounted = both("linear", LoConModule, tmp_path, **LORA, weight_decompose=True)
    weight = LAYERS["linear"]().weight
    expected = mounted.delta("layer")
    module.merge_to(1.0, precise=True)
    moved = 1.5 * module.lora_up.weight @ module.lora_down.weight
    torch.testing.assert_close(module.org_module[0].weight, weight + moved)
    mounted.merge()
    torch.testing.assert_close(ours.weight, weight + expected)
    assert relative(moved, expected) > 0.2


@pytest.mark.parametrize("mode", ["circular", "reflect"])
def test_l15_padding_mode(mode, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = nn.Conv2d(8, 12, 3, padding=1, padding_mode=mode)
    x = INPUTS["conv"]
    module, ours, mounted = both_on(layer, LoConModule, tmp_path, **LORA)
    module.apply_to()
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode=mode), mounted.delta("layer"))
    assert relative(change(ours, layer, x), expected) < BOUND
    assert relative(change(module.org_module[0], layer, x), expected) > 0.2


def test_l16_dilated_convolution_beside_the_layer(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layer = nn.Conv2d(8, 12, 3, padding=2, dilation=2)
    x = INPUTS["conv"]
    module, ours, mounted = both_on(layer, LoConModule, tmp_path, **LORA, bypass_mode=True)
    module.apply_to()
    with pytest.raises(RuntimeError):
        module.org_module[0](x)
    expected = F.conv2d(x, mounted.delta("layer"), padding=2, dilation=2)
    assert relative(change(ours, layer, x), expected) < BOUND


def test_l17_rank_dropout_divides_by_the_mean_of_nothing():
    """With all rows dropped, LyCORIS' rescaling gives NaN; ours divides by a probability."""
    layer = nn.Linear(8, 8)
    settings = {"rank_dropout": 0.9, "rank_dropout_scale": True}
    module = random_module(LoConModule, layer, **LORA, **settings).train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        broken = sum(bool(module.make_weight().isnan().any()) for _ in range(200))
    assert 50 < broken < 140  # of 200, (9/10)**8 of them
    model = nn.ModuleDict({"layer": nn.Linear(8, 8)}).train()
    options = Options(rank_dropout=0.9)
    mounted = attach(model, LoRA(2), ["layer"], seed=0, options=options)
    with torch.no_grad():
        for factor in mounted.parameters():
            factor += 0.1
    for step in range(200):
        mounted.step = step
        assert model["layer"](INPUTS["linear"]).isfinite().all()


def test_l20_loading_keeps_the_scale_of_the_settings(tmp_path):
    module, _, mounted = both("linear", LoConModule, tmp_path, lora_dim=2, alpha=8.0)
    other = LoConModule("lora_unet_layer", LAYERS["linear"](), 1.0, lora_dim=2, alpha=2.0)
    other.load_state_dict(module.state_dict())
    delta, _ = other.get_diff_weight()
    torch.testing.assert_close(4 * delta, mounted.delta("layer"))


def test_l21_a_file_without_alpha(tmp_path):
    """LyCORIS stops at it; by the other readers of the layout gamma is 1."""
    module = random_module(LoConModule, LAYERS["linear"](), lora_dim=2, alpha=2.0)
    tensors = tensors_of(module)
    del tensors["lora_unet_layer.alpha"]
    with pytest.raises(TypeError):
        loaded(tensors, LAYERS["linear"]())
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    model = nn.ModuleDict({"layer": LAYERS["linear"]()})
    mounted, _ = foreign.apply(tmp_path / "a.safetensors", {"unet": model})
    torch.testing.assert_close(mounted["unet"].delta("layer"), module.get_diff_weight()[0])


@torch.no_grad()
def test_l22_a_strength_between_0_and_1_is_no_rotation(tmp_path):
    """LyCORIS mixes the rotation with the identity, which shrinks; ours turns by a part of it."""
    module, _, mounted = both("linear", DiagOFTModule, tmp_path, lora_dim=4)
    weight = LAYERS["linear"]().weight
    values = torch.linalg.svdvals(weight)
    theirs = torch.linalg.svdvals(weight + module.get_diff_weight(0.5)[0])
    assert relative(theirs, values) > 0.02
    mounted.strength = 0.5
    ours = torch.linalg.svdvals(weight + mounted.delta("layer"))
    torch.testing.assert_close(ours, values)


def test_l23_tlora_on_a_kernel_of_several_taps():
    layer = LAYERS["conv"]()
    module = random_module(TLoraModule, layer, lora_dim=2)
    module.apply_to()
    with pytest.raises(RuntimeError):
        layer(INPUTS["conv"])


def test_l24_dylora_scales_by_blocks_and_not_by_ranks(tmp_path):
    """Four ranks in one block: alpha / 1 where the paper has alpha / 4."""
    module, _, mounted = both("linear", DyLoraModule, tmp_path, lora_dim=4, block_size=4, alpha=3.0)
    delta, _ = module.get_diff_weight()
    torch.testing.assert_close(delta, 4 * mounted.delta("layer"), rtol=1e-5, atol=1e-5)


def test_l25_a_norm_layer_without_an_offset():
    with pytest.raises(AttributeError):
        module = NormModule("lora_unet_layer", nn.LayerNorm(8, bias=False), 1.0)
        module.make_weight()
    model = nn.ModuleDict({"layer": nn.LayerNorm(8, bias=False)})
    attach(model, Norm(), ["layer"], seed=0)
    model["layer"](INPUTS["linear"])


@pytest.mark.parametrize("kind", ["conv", "conv1d", "conv3d"])
def test_the_rank_of_a_lokr_core_is_read_from_the_wrong_axis(kind):
    """`functional.lokr` takes the 6 rows of the right block for the rank, which is 1."""
    weight, tensors, delta = generic(LoKr(1, 3.0, factor=2, tucker=True), kind)
    keys = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    theirs = lokr.diff_weight(*(tensors.get(f"lokr_{key}") for key in keys), gamma=3.0)
    torch.testing.assert_close(6 * theirs.view(weight.shape), delta)
