"""Adapter files after an accident: each loads what was written, or is refused in one line.

Files are damaged as disks, downloads and editors do it: flipped and lost bytes, headers with other
names, types, shapes and sizes, numbers that are not finite, lost and doubled layers, metadata of
other types. A file of ours has a digest, so whatever loads holds what was written. Of another
program's file nobody can say what was written: it loads something finite, or is refused.
"""

import json
import random
import resource
import struct
import time

import pytest
import safetensors.torch
import torch
from torch import nn

from lyco_lab.adapters.dora import DoRA
from lyco_lab.adapters.glora import GLoRA
from lyco_lab.adapters.ia3 import IA3
from lyco_lab.adapters.loha import LoHa
from lyco_lab.adapters.lokr import LoKr
from lyco_lab.adapters.lora import LoRA
from lyco_lab.adapters.mount import attach
from lyco_lab.adapters.native import Native
from lyco_lab.adapters.oft import OFT
from lyco_lab.adapters.options import Options, Override
from lyco_lab.adapters.tlora import TLoRA
from lyco_lab.errors import UserError
from lyco_lab.formats import embedding, foreign, kohya

MOST_BYTES, MOST_S = 400e6, 20.0  # above the imports, for all files together; for each

ADAPTERS = [
    LoRA(rank=2, alpha=1.5),
    LoRA(rank=2, tucker=True),
    LoHa(rank=2),
    LoKr(rank=2, factor=2),
    DoRA(of=LoRA(rank=2)),
    OFT(4),
    GLoRA(rank=2),
    IA3(on_input=True),
    Native(bias=True),
    TLoRA(rank=2),
]
JUNK = ["x", None, -1, 0, 1e400, 10**400, 2**40, [], {}, [1], {"a": 1}, True, 0.5, "nan", "e" * 999]
DTYPES = ["F8_E4M3", "F8_E5M2", "I64", "BOOL", "F16", "BF16", "F64", "I8", "C64", "F4", "X"]


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3), "fc": nn.Linear(8, 12), "b": nn.Linear(8, 8)})


def written(tmp_path, adapter, *, ours: bool) -> bytes:
    """A file of two layers, one of which has another adapter, on two parts of a model."""
    several = {part: model() for part in ("unet", "text_encoder")}
    options = Options(dropout=0.1) if isinstance(adapter, LoRA) else Options()
    other = {"fc": Override(adapter=LoRA(rank=1))}
    parts = {
        part: attach(net, adapter, ["conv", "fc"], seed=1, options=options, overrides=other)
        for part, net in several.items()
    }
    for mounted in parts.values():
        for number, factor in enumerate(mounted.parameters()):
            nn.init.normal_(factor, generator=torch.Generator().manual_seed(number))
    path = tmp_path / "whole.safetensors"
    kohya.save(path, parts, {})
    if not ours:
        safetensors.torch.save_file(safetensors.torch.load_file(path), path)
    data = path.read_bytes()
    path.unlink()
    return data


def taken_apart(data: bytes) -> tuple[dict, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def put_together(header: dict, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def flipped(rng, data):
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def flipped_in_header(rng, data):
    (length,) = struct.unpack("<Q", data[:8])
    at = rng.randrange(8 + length)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def cut(rng, data):
    return data[: rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1])]


def longer(rng, data):
    return data + rng.randbytes(rng.choice([1, 8, 4096]))


def huge(rng, data):
    """Sizes that are not there, and would not fit into memory."""
    header, payload = taken_apart(data)
    if rng.random() < 0.3:
        return struct.pack("<Q", rng.choice([2**63, 2**62, 2**40, 10**9, 10**8])) + data[8:]
    entry = header[tensor_key(rng, header)]
    entry["shape"] = [rng.choice([2**62, 2**40, 2**31, 10**6]) for _ in range(rng.randrange(1, 5))]
    if rng.random() < 0.5:
        entry["data_offsets"][1] = entry["data_offsets"][0] + 2**40
    return put_together(header, payload)


def tensor_key(rng, header):
    return rng.choice([key for key in sorted(header) if key != "__metadata__"])


def other_dtype(rng, data):
    header, payload = taken_apart(data)
    header[tensor_key(rng, header)]["dtype"] = rng.choice(DTYPES)
    return put_together(header, payload)


def other_shape(rng, data):
    header, payload = taken_apart(data)
    entry = header[tensor_key(rng, header)]
    if entry["shape"]:
        rng.shuffle(entry["shape"])
        entry["shape"] = rng.choice([entry["shape"], entry["shape"][:-1], [*entry["shape"], 1], []])
    return put_together(header, payload)


def renamed(rng, data):
    header, payload = taken_apart(data)
    key = tensor_key(rng, header)
    others = ["lora_unet_b", "lora_te1_fc", "lora_unet_fc", "oft_unet_conv", "x", ""]
    suffixes = [*{k.partition(".")[2] for k in header}, "mystery", "oft_diag", "dora_scale", ""]
    layer, _, suffix = key.partition(".")
    layer, suffix = rng.choice([(rng.choice(others), suffix), (layer, rng.choice(suffixes))])
    header[f"{layer}.{suffix}"] = header.pop(key)
    return put_together(header, payload)


def swapped(rng, data):
    header, payload = taken_apart(data)
    one, two = tensor_key(rng, header), tensor_key(rng, header)
    header[one], header[two] = header[two], header[one]
    return put_together(header, payload)


def rewritten(rng, data, change):
    """With a change of the tensors themselves, and a header that says so."""
    header, _ = taken_apart(data)
    tensors = safetensors.torch.load(data)
    change(tensors)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    return safetensors.torch.save(tensors, header.get("__metadata__"))


def not_finite(rng, data):
    def change(tensors):
        numbers = sorted(key for key in tensors if tensors[key].is_floating_point())
        tensor = tensors[rng.choice(numbers)].view(-1)
        tensor[rng.randrange(len(tensor))] = rng.choice([torch.nan, torch.inf, -torch.inf])

    return rewritten(rng, data, change)


def lost(rng, data):
    def change(tensors):
        key = rng.choice(sorted(tensors))
        layer = key.partition(".")[0]
        for gone in [k for k in tensors if k == key or rng.random() < 0.3 and k.startswith(layer)]:
            del tensors[gone]

    return rewritten(rng, data, change)


def doubled(rng, data):
    def change(tensors):
        layer = rng.choice(sorted(tensors)).partition(".")[0]
        other = rng.choice(["lora_unet_b", "lora_te1_fc", "lora_te_fc", "lycoris_fc", "lora_unet_"])
        for key in [k for k in tensors if k.startswith(layer)]:
            tensors[key.replace(layer, other)] = tensors[key].clone()

    return rewritten(rng, data, change)


def long_and_thin(rng, data):
    """Factors whose product would not fit into memory, from a file of a megabyte or two."""

    def change(tensors):
        for key in tensors:
            if tensors[key].dim() > 1:
                side = rng.choice([10**5, 2])
                tensors[key] = torch.ones(side, 1) if rng.random() < 0.5 else torch.ones(1, side)

    return rewritten(rng, data, change)


def other_metadata(rng, data):
    """A value of another type somewhere in the JSON, or text that is no JSON."""
    header, payload = taken_apart(data)
    metadata = header.setdefault("__metadata__", {"format": "pt"})
    key = rng.choice([kohya.OURS, kohya.LAYERS, kohya.OPTIONS])
    spoil(rng, metadata, key)
    if rng.random() < 0.5:
        metadata.pop(kohya.DIGEST, None)  # so that what the values mean is looked at
    return put_together(header, payload)


def spoil(rng, metadata, key):
    text = metadata.get(key, "{}")
    if rng.random() < 0.3:
        metadata[key] = rng.choice(["", "{", text[:-1], "[" * 99999, "null", "\x00", text + text])
        return
    found = json.loads(text)
    place, keys = found, []
    while isinstance(place, dict | list) and place and (not keys or rng.random() < 0.8):
        keys.append(rng.choice(sorted(place)) if isinstance(place, dict) else 0)
        place = place[keys[-1]]
    inner = found
    for step in keys[:-1]:
        inner = inner[step]
    if not keys:
        found = rng.choice(JUNK)
    elif isinstance(inner, dict) and rng.random() < 0.3:
        inner[rng.choice(["rnak", "kind", "of", "rank", ""])] = rng.choice(JUNK)
    else:
        inner[keys[-1]] = rng.choice(JUNK)
    metadata[key] = json.dumps(found)


WAYS = [
    flipped, flipped_in_header, cut, longer, huge, other_dtype, other_shape, renamed, swapped,
    not_finite, lost, doubled, long_and_thin, other_metadata, other_metadata,
]  # fmt: skip


def content(parts):
    return {
        part: (
            {name: (mounted.adapter_of(name), mounted.options_of(name)) for name in mounted.layers},
            mounted.state_dict(),
        )
        for part, mounted in parts.items()
    }


def equal(one, two):
    if {part: said for part, (said, _) in one.items()} != {p: said for p, (said, _) in two.items()}:
        return False
    return all(
        one[part][1].keys() == two[part][1].keys()
        and all(torch.equal(one[part][1][key], two[part][1][key]) for key in one[part][1])
        for part in one
    )


def try_all(tmp_path, count: int) -> dict[str, list[int]]:
    """Way -> how many loaded what was written, and how many were refused."""
    rng, counts = random.Random(0), {}
    files = {}
    for adapter in ADAPTERS:
        for ours in (True, False):
            data = written(tmp_path, adapter, ours=ours)
            path = tmp_path / "whole.safetensors"
            path.write_bytes(data)
            models = {part: model() for part in ("unet", "text_encoder")}
            if ours or not isinstance(adapter, TLoRA):  # whose files say too little for others
                files[str(adapter), ours] = data, content(foreign.apply(path, models)[0])
            path.unlink()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "a.safetensors"
    for number in range(count):
        way = WAYS[number % len(WAYS)]
        name = list(files)[(number + number // len(WAYS)) % len(files)]
        data, whole = files[name]
        spoilt = way(rng, data)
        path.write_bytes(spoilt)
        models = {part: model() for part in ("unet", "text_encoder")}
        seen = counts.setdefault(way.__name__, [0, 0])
        began_s = time.monotonic()
        try:
            parts, _ = foreign.apply(path, models)
        except UserError as error:
            assert "\n" not in str(error) and 10 < len(str(error)) < 1500, (name, error)
            assert str(path) in str(error), (name, error)
            assert all(type(net["conv"]) is nn.Conv2d for net in models.values()), (name, error)
            seen[1] += 1
        else:
            if name[1] and (way is not other_metadata or kohya.DIGEST.encode() in spoilt):
                assert equal(content(parts), whole), (number, way.__name__, name)
            for mounted in parts.values():
                assert all(f.isfinite().all() for f in mounted.state_dict().values()), (number, way)
            seen[0] += 1
        assert time.monotonic() - began_s < MOST_S
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert more < MOST_BYTES
    return counts


def test_damaged_files_load_what_was_written_or_are_refused_in_a_line(tmp_path):
    counts = try_all(tmp_path, 6 * len(WAYS))
    assert sum(refused for _, refused in counts.values()) > 3 * len(WAYS), counts


@pytest.mark.slow
def test_a_thousand_damaged_files(tmp_path):
    try_all(tmp_path, 1080)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_factor_that_is_not_finite_is_refused(value, tmp_path):
    path = tmp_path / "a.safetensors"
    net = model()
    mounted = attach(net, LoRA(rank=2), ["fc"], seed=0)
    with torch.no_grad():
        mounted.factors("fc")["b_PR"][3, 1] = value
    kohya.save(path, {"unet": mounted}, {})
    mounted.detach()
    for loader in (kohya.apply, foreign.apply):
        with pytest.raises(UserError, match="lora_unet_fc.lora_up.weight holds numbers that are"):
            loader(path, {"unet": net})
    embedding.save(path, {"text_encoder": torch.full((1, 4), value)})
    with pytest.raises(UserError, match="emb_params .* finite"):
        embedding.load(path)


def test_a_digest_that_was_removed_on_purpose_is_not_asked_for(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(written(tmp_path, ADAPTERS[0], ours=True))
    models = {part: model() for part in ("unet", "text_encoder")}
    header, payload = taken_apart(path.read_bytes())
    at = header["lora_unet_fc.lora_up.weight"]["data_offsets"][0]
    edited = payload[:at] + bytes(4) + payload[at + 4 :]
    path.write_bytes(put_together(header, edited))
    with pytest.raises(UserError, match="its digest differs.* remove 'lyco_lab.digest'"):
        kohya.apply(path, models)
    del header["__metadata__"][kohya.DIGEST]
    path.write_bytes(put_together(header, edited))
    assert kohya.apply(path, models)["unet"].factors("fc")["b_PR"].flatten()[0] == 0


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_precision_that_no_reader_has_is_not_written(dtype, tmp_path):
    mounted = attach(model(), LoRA(rank=2), ["fc"], seed=0)
    with pytest.raises(UserError, match=f"dtype is {dtype}, needs one of torch.float16"):
        kohya.save(tmp_path / "a.safetensors", {"unet": mounted}, {}, dtype=dtype)
