"""Files of other programs: what each tensor means, and that one bad layer stops no other.

That files which LyCORIS wrote give its outputs, tests/oracles/ checks; here they are written by
hand, and the update is spelled out from its definition.
"""

import copy

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lyco_lab.adapters.dora import DoRA
from lyco_lab.adapters.glora import GLoRA
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.norm import Norm
from lyco_lab.adapters.oft import OFT
from lyco_lab.errors import UserError
from lyco_lab.formats import foreign, kohya

ONE = "lora_unet_one."


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def applied(tmp_path, model, tensors, part="unet", **how):
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    mounted, report = foreign.apply(path, {part: model}, **how)
    assert {line.key for line in report} == tensors.keys()
    return mounted[part], {line.key: line for line in report}


def one(layer: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"one": layer})


def lora(rank: int, P: int = 12, Q: int = 8) -> dict[str, Tensor]:
    return {"lora_up.weight": random(P, rank), "lora_down.weight": random(rank, Q)}


def keyed(tensors: dict[str, Tensor], layer: str = ONE) -> dict[str, Tensor]:
    return {layer + suffix: tensor for suffix, tensor in tensors.items()}


def test_every_layer_has_its_own_rank_and_alpha(tmp_path):
    model = nn.ModuleDict({name: nn.Linear(8, 12) for name in ("a", "b", "c", "d")})
    sizes = {"a": (2, 3.0), "b": (4, 0.5), "c": (2, None), "d": (2, 3.0)}
    tensors = {}
    for name, (rank, alpha) in sizes.items():
        tensors |= keyed(lora(rank), f"lora_unet_{name}.")
        if alpha is not None:
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    mounted, report = applied(tmp_path, model, tensors)
    assert all(line.used for line in report.values())
    for name, (rank, alpha) in sizes.items():
        gamma = 1.0 if alpha is None else alpha / rank
        assert mounted.adapter_of(name) == LoRA(rank, gamma * rank)
        up, down = lora(rank).values()
        torch.testing.assert_close(mounted.delta(name), gamma * up @ down)


def test_one_bad_layer_stops_no_other(tmp_path):
    model = nn.ModuleDict({"one": nn.Linear(8, 12), "two": nn.Linear(8, 12)})
    tensors = {
        **keyed(lora(2)),
        ONE + "alpha": torch.tensor(2.0),
        ONE + "mystery": torch.ones(3),
        **keyed(lora(2), "lora_unet_gone."),
        "lora_unet_two.lora_up.weight": random(12, 2),
        "lora_te_text_model_one.lora_up.weight": random(12, 2),
        "first_stage.encoder": torch.ones(1),
    }
    mounted, report = applied(tmp_path, model, tensors, partial=True)
    assert list(mounted.layers) == ["one"]
    assert {key for key, line in report.items() if line.used} == {
        ONE + "alpha",
        *keyed(lora(2)),
    }
    notes = {key: line.note for key, line in report.items()}
    assert "LoRA(rank=2" in notes[ONE + "lora_up.weight"]
    assert "no meaning beside" in notes[ONE + "mystery"]
    assert "no layer 'gone' (did you mean 'one'?)" in notes["lora_unet_gone.lora_up.weight"]
    assert "lacks 'lora_down.weight'" in notes["lora_unet_two.lora_up.weight"]
    assert "no text_encoder was given" in notes["lora_te_text_model_one.lora_up.weight"]
    assert "begin with one of lora_unet_" in notes["first_stage.encoder"]


MALFORMED = {
    "too many rows": {"lora_up.weight": random(13, 2), "lora_down.weight": random(2, 8)},
    "ranks that differ": {"lora_up.weight": random(12, 3), "lora_down.weight": random(2, 8)},
    "blocks of nothing": {"lokr_w1": random(5, 2), "lokr_w2": random(2, 4)},
    "blocks that do not multiply": {
        "lokr_w1": random(2, 2),
        "lokr_w2_a": random(6, 2),
        "lokr_w2_b": random(3, 4),
    },
    "a core without taps": {**lora(2), "lora_mid.weight": random(2, 2)},
    "no axes": {"lora_up.weight": torch.tensor(1.0), "lora_down.weight": torch.tensor(1.0)},
    "an alpha of zero": {**lora(2), "alpha": torch.tensor(0.0)},
    "an alpha that overflowed": {**lora(2), "alpha": torch.tensor(1e10).half()},
    "an alpha for each rank": {**lora(2), "alpha": torch.ones(2)},
    "magnitudes of another layer": {**lora(2), "dora_scale": random(1, 9)},
    "an offset of another bias": {**lora(2), "diff_b": random(13)},
    "a rotation of other outputs": {"oft_blocks": random(3, 5, 5)},
    "a rotation of too few axes": {"oft_blocks": random(12, 12)},
    "T-LoRA without its start": {
        "q_layer.weight": random(2, 8),
        "p_layer.weight": random(12, 2),
        "lambda_layer": random(1, 2),
    },
    "a norm": {"w_norm": random(12)},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_file_of_which_nothing_can_be_used_changes_nothing(name, tmp_path):
    model = one(nn.Linear(8, 12))
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(keyed(MALFORMED[name]), path)
    with pytest.raises(ValueError, match=r"none of its \d keys can be used: lora_unet_one"):
        foreign.apply(path, {"unet": model})
    assert type(model["one"]) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "prefix", ["lora_te_text_model_", "lora_te_", "lora_te1_text_model_", "lora_te1_"]
)
def test_text_encoders_are_spelled_in_several_ways(prefix, wrapped, tmp_path):
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"fc1": nn.Linear(8, 12)})})
    if wrapped:
        model = nn.ModuleDict({"text_model": model})
    tensors = keyed(lora(2), f"{prefix}encoder_fc1.")
    mounted, _ = applied(tmp_path, model, tensors, "text_encoder")
    assert list(mounted.layers) == ["text_model.encoder.fc1" if wrapped else "encoder.fc1"]


def of_two_parts(unet_layer: str) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    models = {"unet": one(nn.Linear(8, 12)), "text_encoder": one(nn.Linear(8, 12))}
    tensors = keyed(lora(2), "lora_te1_one.")
    for number in range(40):
        tensors |= keyed(lora(2), f"{unet_layer}_{number}.")
    return models, tensors


@pytest.mark.parametrize("prefix", ["lora_unet_input_blocks", "lora_unet2_one"])
def test_a_part_of_which_no_key_fits_is_an_error_unless_asked_for(prefix, tmp_path, monkeypatch):
    """As with the names that SDXL's own code gives the layers of its UNet."""
    looked_up = []
    monkeypatch.setattr(foreign, "nearest", lambda word, known: looked_up.append(word) or "")
    models, tensors = of_two_parts(prefix)
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path)
    words = r"none of its 80 (unet keys|keys of no known part) can be used, of 82 in all: .*partial"
    with pytest.raises(UserError, match=words):
        foreign.apply(path, models)
    assert all(type(model["one"]) is nn.Linear for model in models.values())
    looked_up.clear()
    mounted, report = foreign.apply(path, models, partial=True)
    assert list(mounted) == ["text_encoder"] and sum(line.used for line in report) == 2
    assert len(looked_up) <= foreign.HINTS  # it takes long, and 80 say no more than 3


def test_a_part_without_a_model_is_an_error_unless_asked_for(tmp_path):
    models, tensors = of_two_parts("lora_unet_one")
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({**tensors, **keyed(lora(2))}, path)
    with pytest.raises(UserError, match="none of its 2 text_encoder keys .*no text_encoder was"):
        foreign.apply(path, {"unet": models["unet"]})
    mounted, _ = foreign.apply(path, {"unet": models["unet"]}, partial=True)
    assert list(mounted) == ["unet"]


def test_names_that_may_mean_two_layers(tmp_path):
    model = nn.ModuleDict(
        {
            "a_b": nn.Linear(8, 12),
            "a": nn.ModuleDict({"b": nn.Linear(8, 12)}),
            "one": nn.Linear(8, 12),
        }
    )
    tensors = {**keyed(lora(2), "lora_unet_a_b."), **keyed(lora(2))}
    mounted, report = applied(tmp_path, model, tensors, partial=True)
    assert list(mounted.layers) == ["one"]
    assert "may be any of a_b, a.b" in report["lora_unet_a_b.lora_up.weight"].note


def test_a_layer_that_is_named_twice(tmp_path):
    model = one(nn.Linear(8, 12))
    tensors = {**keyed(lora(2), "lora_te_one."), **keyed(lora(3), "lora_te1_one.")}
    mounted, report = applied(tmp_path, model, tensors, "text_encoder")
    used = [key for key, line in report.items() if line.used]
    assert len(used) == 2
    assert len({key.split(".")[0] for key in used}) == 1


def naive_kron(left: Tensor, right: Tensor) -> Tensor:
    if right.dim() == 2:
        return torch.kron(left, right)
    taps = right.flatten(2)
    product = torch.stack([torch.kron(left, taps[..., k]) for k in range(taps.shape[-1])], -1)
    return product.unflatten(-1, right.shape[2:])


@pytest.mark.parametrize("kernel", [(), (3, 2)])
@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((3, 2), (4, 4)),  # as LoKr splits
        ((4, 2), (3, 4)),  # unbalanced
        ((2, 4), (6, 2)),
        ((1, 1), (12, 8)),  # no split at all
        ((12, 8), (1, 1)),
        ((6, 1), (2, 8)),
        ((12, 2), (1, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("alpha", [5.0, float("inf"), None])
def test_full_blocks_of_any_split_have_gamma_one(left, right, kernel, alpha, tmp_path):
    layer = nn.Conv2d(8, 12, kernel) if kernel else nn.Linear(8, 12)
    tensors = {"lokr_w1": random(*left), "lokr_w2": random(*right, *kernel)}
    expected = naive_kron(tensors["lokr_w1"], tensors["lokr_w2"])
    if alpha is not None:
        tensors["alpha"] = torch.tensor(alpha)
    mounted, report = applied(tmp_path, one(layer), keyed(tensors))
    assert all(line.used for line in report.values())
    torch.testing.assert_close(mounted.delta("one"), expected)
    ours = (left, right) in [((3, 2), (4, 4)), ((4, 2), (3, 4))]
    assert isinstance(mounted.adapter_of("one"), LoKr if ours else Native)


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("factored_left", [False, True])
@pytest.mark.parametrize(("U", "S"), [(3, 2), (4, 2), (2, 4), (6, 1)])
def test_factored_blocks_have_the_rank_of_their_tensors(U, S, factored_left, core, tmp_path):
    V, T, R = 12 // U, 8 // S, 1
    tensors = {"lokr_w2_b": random(R, T if core else T * 6), "alpha": torch.tensor(3.0)}
    if core:
        tensors |= {"lokr_w2_a": random(R, V), "lokr_t2": random(R, R, 3, 2)}
        operands = tensors["lokr_t2"], tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        right = torch.einsum("rskl,rv,st->vtkl", *operands)
    else:
        tensors |= {"lokr_w2_a": random(V, R)}
        right = (tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]).view(V, T, 3, 2)
    if factored_left:
        tensors |= {"lokr_w1_a": random(U, R), "lokr_w1_b": random(R, S)}
        left = tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    else:
        left = tensors["lokr_w1"] = random(U, S)
    mounted, report = applied(tmp_path, one(nn.Conv2d(8, 12, (3, 2))), keyed(tensors))
    assert all(line.used for line in report.values())
    torch.testing.assert_close(mounted.delta("one"), 3 * naive_kron(left, right))
    # R = 1 < max(U, S) / 2, so that where LoKr has such blocks it factors the left one as well.
    assert isinstance(mounted.adapter_of("one"), LoKr if S == 2 else Native)


def test_a_rank_above_the_sides_of_the_weight(tmp_path):
    """As scripts write for `conv_out`: no LoRA of ours, but the same update."""
    tensors = {**lora(20, 4), "alpha": torch.tensor(10.0)}
    mounted, report = applied(tmp_path, one(nn.Linear(8, 4)), keyed(tensors))
    assert mounted.adapter_of("one") == Native()
    assert "the whole difference" in report[ONE + "lora_up.weight"].note
    expected = 0.5 * tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    torch.testing.assert_close(mounted.delta("one"), expected)


@pytest.mark.parametrize("rank", [2, 20])
@pytest.mark.parametrize("axis", ["out", "in", "flat"])
def test_magnitudes_by_their_shape(axis, rank, tmp_path):
    layer = nn.Linear(8, 12)
    size = {"out": (12, 1), "in": (1, 8), "flat": (12,)}[axis]
    tensors = {**lora(rank), "dora_scale": random(*size).abs()}
    mounted, report = applied(tmp_path, one(copy.deepcopy(layer)), keyed(tensors))
    assert all(line.used for line in report.values())
    adapter = mounted.adapter_of("one")
    assert isinstance(adapter, DoRA)
    assert adapter.axis == ("in" if axis == "in" else "out")
    moved = layer.weight + tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    dim = 0 if axis == "in" else 1
    m = tensors["dora_scale"].view(1, 8) if axis == "in" else tensors["dora_scale"].view(12, 1)
    expected = m * moved / moved.norm(dim=dim, keepdim=True) - layer.weight
    torch.testing.assert_close(mounted.delta("one"), expected)


def test_an_offset_of_the_bias_beside_any_update(tmp_path):
    tensors = {**lora(2), "diff_b": random(12)}
    layer = nn.Linear(8, 12)
    model = one(copy.deepcopy(layer))
    mounted, report = applied(tmp_path, model, keyed(tensors))
    assert all(line.used for line in report.values())
    assert mounted.adapter_of("one") == Native(bias=True)
    weight = layer.weight + tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    x = random(3, 8)
    expected = nn.functional.linear(x, weight, layer.bias + tensors["diff_b"])
    torch.testing.assert_close(model["one"](x), expected)


@pytest.mark.parametrize("with_offset", [False, True])
def test_norm_layers_with_or_without_an_offset(with_offset, tmp_path):
    model = one(nn.LayerNorm(8))
    tensors = {"w_norm": random(8)} | ({"b_norm": random(8, seed=1)} if with_offset else {})
    mounted, _ = applied(tmp_path, model, keyed(tensors))
    assert mounted.adapter_of("one") == Norm()
    x = random(3, 8)
    offset = tensors.get("b_norm", torch.zeros(8))
    expected = nn.functional.layer_norm(x, (8,), 1 + tensors["w_norm"], offset)
    torch.testing.assert_close(model["one"](x), expected)


@pytest.mark.parametrize("partial", [False, True])
def test_finished_rotations_of_older_lycoris_are_refused(partial, tmp_path):
    """The same shapes as `oft_blocks`, but R itself, from which no generator need exist."""
    model = nn.ModuleDict({"one": nn.Linear(8, 12), "two": nn.Linear(8, 12)})
    tensors = {**keyed(lora(2)), "lora_unet_two.oft_diag": torch.eye(3).expand(4, 3, 3)}
    with pytest.raises(UserError, match="holds 'lora_unet_two.oft_diag': .* finished rotation"):
        applied(tmp_path, model, tensors, partial=partial)
    assert type(model["one"]) is nn.Linear
    with pytest.raises(UserError, match="finished rotation"):
        foreign.interpret({"oft_diag": random(4, 3, 3)}, model["one"])


@pytest.mark.parametrize(("count", "size"), [(4, 3), (3, 4), (1, 12)])
def test_rotations_by_blocks_of_any_number(count, size, tmp_path):
    """Also fewer blocks than rows in each, as sd-scripts has them."""
    layer = nn.Linear(8, 12)
    blocks = random(count, size, size)
    tensors = {"oft_blocks": blocks, "alpha": torch.tensor(0.0)}
    model = one(copy.deepcopy(layer))
    mounted, report = applied(tmp_path, model, keyed(tensors, "oft_unet_one."))
    assert all(line.used for line in report.values())
    assert isinstance(mounted.adapter_of("one"), OFT if size <= count else Native)
    eye, rows = torch.eye(size), []
    for block, part in zip(blocks, layer.weight.split(size), strict=True):
        q = block - block.T
        r = (eye + q) @ torch.linalg.inv(eye - q)
        rows.append(r.T @ part)  # rows are rotated by the transpose: sum_n r[n, m] w[n]
    torch.testing.assert_close(
        mounted.delta("one"), torch.cat(rows) - layer.weight, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("old", [False, True])
def test_glora_of_both_orders(old, tmp_path):
    layer = nn.Conv2d(8, 12, 3)
    a1, a2 = random(8, 2, 1, 1), random(2, 8, 1, 1)
    b1, b2 = random(12, 2, 1, 1), random(2, 8, 3, 3)
    names = ("a2", "a1", "b2", "b1") if old else ("a1", "a2", "b1", "b2")
    tensors = {f"{name}.weight": t for name, t in zip(names, (a1, a2, b1, b2), strict=True)}
    tensors["alpha"] = torch.tensor(3.0)
    mounted, _ = applied(tmp_path, one(copy.deepcopy(layer)), keyed(tensors))
    assert mounted.adapter_of("one") == GLoRA(2, 3.0)
    mixed = torch.einsum("pqkl,qr,rs->pskl", layer.weight, a1[..., 0, 0], a2[..., 0, 0])
    added = torch.einsum("pr,rqkl->pqkl", b1[..., 0, 0], b2)
    torch.testing.assert_close(mounted.delta("one"), 1.5 * (mixed + added))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_are_computed_with_in_float32(dtype, tmp_path):
    tensors = {
        suffix: tensor.to(dtype)
        for suffix, tensor in {
            "hada_w1_a": random(12, 2),
            "hada_w1_b": random(2, 8),
            "hada_w2_a": random(12, 2, seed=1),
            "hada_w2_b": random(2, 8, seed=1),
            "alpha": torch.tensor(1.0),
        }.items()
    }
    mounted, _ = applied(tmp_path, one(nn.Linear(8, 12)), keyed(tensors))
    assert mounted.adapter_of("one") == LoHa(2, 1.0)
    w1_a, w1_b, w2_a, w2_b = (tensors[f"hada_{key}"].float() for key in
                              ("w1_a", "w1_b", "w2_a", "w2_b"))  # fmt: skip
    torch.testing.assert_close(mounted.delta("one"), 0.5 * (w1_a @ w1_b) * (w2_a @ w2_b))


def test_our_own_files_are_read_by_their_metadata(tmp_path):
    model = one(nn.Linear(8, 12))
    fresh = copy.deepcopy(model)
    adapter = LoRA(rank=4, alpha=3.0, rank_stabilised=True)
    kohya.save(tmp_path / "a.safetensors", {"unet": attach(model, adapter, ["one"], seed=0)}, {})
    mounted, report = foreign.apply(tmp_path / "a.safetensors", {"unet": fresh})
    assert mounted["unet"].adapter_of("one") == adapter
    assert all(line.used for line in report)
