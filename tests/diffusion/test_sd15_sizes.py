"""The paper's table of file sizes, as a test of which layers of Stable Diffusion 1.5 are adapted.

Everything expected is written here from the architecture and from the adapters' definitions: the
shapes of all layers, what an adapter has for a weight of P outputs and Q inputs (times taps),

    LoRA  R (P + Q)     LoHa  2 R (P + Q)     LoKr  U S + (P / U) (Q / S)     native  P Q

with U and S the largest divisors of P and Q that exceed neither the factor nor the square root,
and the paper's printed sizes, which are those of `ls -h`: mebibytes, rounded up.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import lyco_lab.diffusion
from lyco_lab.adapters.adapted_layer import shape_of
from lyco_lab.adapters.base import Adapter
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import survey
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.norm import Norm
from lyco_lab.config import Model
from lyco_lab.diffusion.targets import Chosen, chosen, match
from lyco_lab.formats import kohya

CONFIGS = Path(lyco_lab.diffusion.__file__).parent / "configs" / "sd15"
MIB = 2**20

# Channels of the UNet's transformer blocks: two of each on the way down, three on the way up.
TRANSFORMERS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
# Channels into and out of its residual blocks: on the way up the skip's are added to the input.
RESNETS = [
    *[(320, 320)] * 2, (320, 640), (640, 640), (640, 1280), *[(1280, 1280)] * 3,
    *[(1280, 1280)] * 2,
    *[(2560, 1280)] * 5, (1920, 1280), (1920, 640), (1280, 640), (960, 640), (960, 320),
    *[(640, 320)] * 2,
]  # fmt: skip
RESIZERS = [320, 640, 1280] + [1280, 1280, 640]  # down, up
TIME, TEXT, LATENT, CLIP_LAYERS = 1280, 768, 4, 12

Shape = tuple[int, ...]


def unet(preset: str) -> list[Shape]:
    """The shapes of the weights that are adapted."""
    shapes: list[Shape] = []
    for C in TRANSFORMERS:
        shapes += [(C, C)] * 6 + [(C, TEXT)] * 2  # q, k, v, out twice; k and v of the text
        if preset != "attn-only":
            shapes += [(8 * C, C), (C, 4 * C)]  # the feed-forward, gated
            shapes += [(C, C, 1, 1)] * 2  # proj_in, proj_out
    if preset == "full":
        shapes += [(320, LATENT, 3, 3), (LATENT, 320, 3, 3), (TIME, 320), (TIME, TIME)]
        for i, o in RESNETS:
            shapes += [(o, i, 3, 3), (o, o, 3, 3), (o, TIME)]
            shapes += [(o, i, 1, 1)] if i != o else []
        shapes += [(C, C, 3, 3) for C in RESIZERS]
    return shapes


def text_encoder(preset: str) -> list[Shape]:
    shapes: list[Shape] = [(TEXT, TEXT)] * 4 * CLIP_LAYERS
    if preset != "attn-only":
        shapes += [(4 * TEXT, TEXT), (TEXT, 4 * TEXT)] * CLIP_LAYERS
    return shapes


# A scale and an offset per channel of the norms in blocks: two in a residual block, of what goes in
# and of what comes out, and four in a transformer. In no block are the one at the UNet's end, the
# two in each of CLIP's layers and the one at its end.
NORMS = 2 * (sum(i + o for i, o in RESNETS) + 4 * sum(TRANSFORMERS))
OUTSIDE = 2 * (320 + (2 * CLIP_LAYERS + 1) * TEXT)


def block(size: int, factor: int) -> int:
    return max(d for d in range(1, factor + 1) if size % d == 0 and d * d <= size)


def params(adapter, shape: Shape) -> int:
    """The definitions."""
    P, Q = shape[0], math.prod(shape[1:])
    if isinstance(adapter, LoKr):
        U, S = block(P, adapter.factor), block(shape[1], adapter.factor)
        return U * S + (P // U) * (Q // S)
    if isinstance(adapter, Native):
        return P * Q
    return {LoRA: 1, LoHa: 2}[type(adapter)] * adapter.rank * (P + Q)


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    """Shapes without numbers, of the configurations that single files are read with."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    config = json.loads((CONFIGS / "text_encoder" / "config.json").read_text())
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(
                UNet2DConditionModel.load_config(CONFIGS / "unet")
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config)),
        }


def asked(model, part: str, preset: str, adapter, *, train_norm: bool) -> Chosen:
    return chosen(model, part, Model(preset=preset, train_norm=train_norm), adapter)


def surveyed(models, preset: str, adapter, *, train_norm: bool = False) -> list[tuple[str, int]]:
    """What the library says it would train: layers by their names in a file, and parameters."""
    found = []
    for part, model in models.items():
        run = asked(model, part, preset, adapter, train_norm=train_norm)
        counts = survey(model, adapter, run.names, overrides=run.overrides)
        found += [(kohya.file_layer(part, name), count) for name, count in counts.items()]
    return found


def test_the_models_have_the_sizes_of_stable_diffusion(models):
    counts = {part: sum(p.numel() for p in model.parameters()) for part, model in models.items()}
    assert counts == {"unet": 859_520_964, "text_encoder": 123_060_480}


@pytest.mark.parametrize(
    ("preset", "layers"), [("attn-only", 128 + 48), ("attn-mlp", 192 + 72), ("full", 282 + 72)]
)
def test_the_presets_are_these_layers(models, preset, layers):
    expected = {"unet": unet(preset), "text_encoder": text_encoder(preset)}
    for part, model in models.items():
        names = match(model, preset, part)
        shapes = [tuple(shape_of(model.get_submodule(name))) for name in names]
        assert sorted(shapes) == sorted(expected[part])
    assert sum(map(len, expected.values())) == layers


def label(value) -> str:
    """A test's name without the defaults of an adapter."""
    size = {LoRA: "rank", LoHa: "rank", LoKr: "factor"}.get(type(value))
    kind = type(value).__name__ if isinstance(value, Adapter) else str(value)
    return kind if size is None else f"{kind}{getattr(value, size)}"


# Preset, adapter, parameters, mebibytes in half precision.
TABLE = [
    ("attn-only", LoRA(rank=8), 2_184_192, 4.17),
    ("attn-only", LoHa(rank=4), 2_184_192, 4.17),
    ("attn-only", LoKr(factor=8), 1_914_752, 3.65),
    ("attn-only", Native(), 121_823_232, 232.4),
    ("attn-mlp", LoRA(rank=8), 4_718_592, 9.00),
    ("attn-mlp", LoRA(rank=32), 18_874_368, 36.0),
    ("attn-mlp", LoHa(rank=4), 4_718_592, 9.00),
    ("attn-mlp", LoHa(rank=16), 18_874_368, 36.0),
    ("attn-mlp", LoKr(factor=4), 21_998_720, 42.0),
    ("attn-mlp", LoKr(factor=8), 5_515_520, 10.5),
    ("attn-mlp", LoKr(factor=12), 3_257_856, 6.2),
    ("attn-mlp", Native(), 351_911_936, 671),
]


@pytest.mark.parametrize(("preset", "adapter", "total", "mebibytes"), TABLE, ids=label)
def test_every_parameter_is_accounted_for(models, preset, adapter, total, mebibytes):
    expected = [params(adapter, shape) for shape in unet(preset) + text_encoder(preset)]
    counts = [count for _, count in surveyed(models, preset, adapter)]
    assert sorted(counts) == sorted(expected)
    assert sum(counts) == total
    assert 2 * total / MIB == pytest.approx(mebibytes, rel=0.01)


@pytest.mark.parametrize(
    ("adapter", "total"),
    [
        (LoRA(rank=8), 9_792_832),
        (LoHa(rank=4), 9_792_832),
        (LoKr(factor=8), 14_773_824),
        (Native(), 944_011_776),
    ],
    ids=label,
)
def test_full_and_norms(models, adapter, total):
    """As the paper has it but for `conv_out`, whose 4 outputs allow a rank of 4 and no more."""
    expected = sum(params(adapter, shape) for shape in unet("full") + text_encoder("full"))
    assert expected == total
    if adapter == LoRA(rank=8):
        expected -= params(LoRA(rank=4), (LATENT, 320, 3, 3))  # half of what rank 8 would have
    without = sum(count for _, count in surveyed(models, "full", adapter))
    together = sum(count for _, count in surveyed(models, "full", adapter, train_norm=True))
    assert without == expected
    assert together - without == NORMS == 199_680


def test_every_norm_is_in_a_block_or_not(models):
    kinds = (nn.GroupNorm, nn.LayerNorm)
    every = [m for model in models.values() for m in model.modules() if isinstance(m, kinds)]
    assert sum(p.numel() for norm in every for p in norm.parameters()) == NORMS + OUTSIDE


# The paper's table 5, as printed.
PRINTED = [
    ("attn-only", LoRA(rank=8), "4.4M"),
    ("attn-only", LoHa(rank=4), "4.4M"),
    ("attn-only", LoKr(factor=8), "3.8M"),
    ("attn-only", Native(), "233M"),
    ("attn-mlp", LoRA(rank=8), "9.2M"),
    ("attn-mlp", LoRA(rank=32), "37M"),
    ("attn-mlp", LoHa(rank=16), "37M"),
    ("attn-mlp", LoKr(factor=4), "43M"),
    ("attn-mlp", LoKr(factor=8), "11M"),
    ("attn-mlp", LoKr(factor=12), "6.4M"),
    ("attn-mlp", Native(), "672M"),
    ("full", LoRA(rank=8), "20M"),
    ("full", LoHa(rank=4), "20M"),
    ("full", LoKr(factor=8), "29M"),
    ("full", Native(), "1.8G"),
]


def listed(size: float) -> str:
    """A size in bytes as `ls -h` prints it: rounded up, to a decimal below 10."""
    unit, number = ("M", size / MIB) if size < 1024 * MIB else ("G", size / MIB / 1024)
    digits = 10 if number < 10 else 1
    return f"{math.ceil(number * digits) / digits:.{digits // 10}f}{unit}"


def test_a_listing():
    sizes = {4.31: "4.4M", 9.0: "9.0M", 9.91: "10.0M", 10.2: "11M", 1023: "1023M", 1801: "1.8G"}
    assert {size: listed(size * MIB) for size in sizes} == sizes


def file_size(models, preset: str, adapter) -> int:
    """Bytes of a file in half precision without metadata: the numbers, and what names them."""
    header, data = {}, 0
    for part, model in models.items():
        run = asked(model, part, preset, adapter, train_norm=preset == "full")
        for name in run.names:
            value = Norm() if name in run.norms else adapter
            tensors = kohya.layout(value, model.get_submodule(name))
            if not isinstance(value, Native | Norm):
                tensors = {**tensors, "alpha": ()}
            for suffix, shape in tensors.items():
                size = 2 * math.prod(shape)
                header[f"{kohya.file_layer(part, name)}.{suffix}"] = {
                    "dtype": "F16",
                    "shape": list(shape),
                    "data_offsets": [data, data + size],
                }
                data += size
    return 8 + len(json.dumps(header, separators=(",", ":"))) + data


def test_the_files_are_as_large_as_the_papers(models):
    """The paper does not tell how much metadata its files have; one amount fits all 15 of them."""
    sizes = [(file_size(models, *row), printed) for *row, printed in PRINTED]
    fitting_kib = [
        kib
        for kib in range(200)
        if all(listed(size + 1024 * kib) == printed for size, printed in sizes)
    ]
    assert fitting_kib, [(size / MIB, printed) for size, printed in sizes]
