"""What a run does in its steps, on an accelerator: where tensors are, and when it waits.

Run by test_accelerator.py.
"""

import pytest
import torch

from lyco_lab import adapters, optimizers, waits
from lyco_lab.adapters.mount import survey
from lyco_lab.adapters.options import Options
from lyco_lab.data.batches import Batch
from lyco_lab.errors import UserError
from lyco_lab.train import validation
from lyco_lab.train.callbacks import NORM_EVERY
from lyco_lab.train.module import Training
from tests.accelerator.fake import Apart, Waits
from tests.accelerator.stage import LAYERS, model, run_of, trained

ADAPTERS = [{"kind": kind} for kind in sorted(adapters.ADAPTERS) if kind not in ("dora", "norm")]
ADAPTERS += [{"kind": "dora", "of": {"kind": "lora"}}]
ADAPTERS += [{"kind": kind, "tucker": True} for kind in ("lora", "loha", "lokr")]
FEW = [{"kind": "lora"}, {"kind": "oft"}, {"kind": "tlora", "min_rank": 2}, ADAPTERS[-4]]
OPTIONS = {
    "use_scalar": True,
    "dropout": 0.1,
    "rank_dropout": 0.1,
    "module_dropout": 0.1,
    "max_norm": 1.0,
}
NO_KERNEL = {
    "adamw8bit": "bitsandbytes computes in kernels of its own, for devices that exist",
    "sgd": "torch's fused SGD has no kernel for tensors without numbers",
}
OFTEN = ("adamw", "adafactor", "muon", "prodigy", "schedulefree")
KINDS = [
    kind if kind in OFTEN else pytest.param(kind, marks=pytest.mark.slow)
    for kind in sorted(set(optimizers.OPTIMIZERS) - set(NO_KERNEL))
]
SHORT = (LAYERS[0][:2],)
ONE_STEP = {"step": 1, "norms": 1}  # the norm of the last step


def named(value):
    return "-".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


def test_a_step_waits_once_and_the_rows_are_whole(tiny_sd, tmp_path, monkeypatch):
    """Whatever is asked of it: several batches, clipping, an average, other noise and losses."""
    train = {
        "steps": 2,
        "accumulate": 2,
        "grad_clip": 0.1,  # below the norm, so that gradients are scaled
        "ema_decay": 0.5,
        "noise_offset": 0.1,
        "input_perturbation": 0.1,
        "loss": "huber",
        "min_snr_gamma": 5.0,
        "gradient_checkpointing": True,
        "validate_every": 2,
        "validation_share": 0.25,
    }
    run = run_of(tiny_sd, text_encoder=True, train=train)
    monkeypatch.setattr(validation, "LEAST_LOSSES", 4)
    waited = trained(run, tmp_path, monkeypatch)
    assert waited == {"step": 2, "norms": 2, "validation": 1}  # a norm for each of two parts
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 and rows[1].startswith("1,1.0,") and NORM_EVERY > 2


@pytest.mark.parametrize("adapter", FEW, ids=named)
def test_an_adapter_trains_there(tiny_sd, tmp_path, monkeypatch, adapter):
    run = run_of(tiny_sd, adapter=adapter, train={"steps": 1})
    assert trained(run, tmp_path, monkeypatch) == ONE_STEP


@pytest.mark.parametrize("kind", KINDS)
def test_each_optimizer_waits_if_and_only_if_it_says_so(tiny_sd, tmp_path, monkeypatch, kind):
    """What it keeps between steps is there from the first on."""
    run = run_of(tiny_sd, optimizer={"kind": kind}, train={"steps": 1})
    if run.optimizer_value().waits:
        with pytest.raises(Waits):
            trained(run, tmp_path, monkeypatch, layers=SHORT)
    else:
        assert trained(run, tmp_path, monkeypatch, layers=SHORT) == ONE_STEP


def planted(how):
    """Training.loss with a line that a careless hand might add."""
    loss = Training.loss

    def careless(self, batch: Batch) -> torch.Tensor:
        found = loss(self, batch)
        how(found)
        return found

    return careless


FAULTS = {
    "item": lambda found: found.detach().item(),
    "cpu": lambda found: found.detach().cpu(),
    "float": lambda found: float(found.detach()),
    "if": lambda found: 1 if found.detach() > 0 else 0,
    "tolist": lambda found: found.detach().tolist(),
    "nonzero": lambda found: found.detach()[None].nonzero(),
    "mask": lambda found: found.detach()[None][found.detach()[None] > 0],
    "copy": lambda found: torch.empty(()).copy_(found.detach()),
}


@pytest.mark.parametrize("fault", ["item", "cpu"])
def test_a_wait_that_is_planted_into_the_step_is_seen(tiny_sd, tmp_path, monkeypatch, fault):
    run = run_of(tiny_sd, train={"steps": 1})
    monkeypatch.setattr(Training, "loss", planted(FAULTS[fault]))
    with pytest.raises(Waits):
        trained(run, tmp_path, monkeypatch)


def test_every_kind_of_wait_is_seen(tiny_sd, tmp_path, monkeypatch):
    """All in one step, where each is caught."""
    seen = []

    def each(found):
        for name, fault in FAULTS.items():
            with pytest.raises(Waits):
                fault(found)
            seen.append(name)

    monkeypatch.setattr(Training, "loss", planted(each))
    trained(run_of(tiny_sd, train={"steps": 1}), tmp_path, monkeypatch)
    assert seen == list(FAULTS)


def test_a_wait_in_the_backward_pass_is_seen(tiny_sd, tmp_path, monkeypatch):
    def meddle(module):
        module.trained[0].register_hook(lambda gradient: gradient.sum().item() * gradient)

    with pytest.raises(Waits, match="in the backward pass, aten._local_scalar_dense"):
        trained(run_of(tiny_sd, train={"steps": 1}), tmp_path, monkeypatch, meddle)


def test_a_tensor_that_stayed_behind_is_seen(tiny_sd, tmp_path, monkeypatch):
    """A weight of the processor among the others."""

    def meddle(module):
        layer = module.diffusion.denoiser.conv_in
        stayed = torch.zeros(layer.weight.shape)
        layer._parameters["weight"] = torch.nn.Parameter(stayed, requires_grad=False)

    with pytest.raises(Apart, match=r"convolution.* meets a tensor of \(16, 4, 3, 3\)"):
        trained(run_of(tiny_sd), tmp_path, monkeypatch, meddle)


def test_a_reason_that_is_not_listed_is_none():
    with pytest.raises(ValueError, match="'because' is no reason to wait"):
        waits.host(torch.zeros(()), "because")


def supported(tiny_sd, adapter) -> Options:
    """All options that the adapter has, at once."""
    unet, found = model(run_of(tiny_sd)).denoiser, {}
    for name, value in OPTIONS.items():
        run = run_of(tiny_sd, adapter=adapter)
        try:
            survey(unet, run.adapter_value(), LAYERS[0], options=Options(**{name: value}))
            found[name] = value
        except UserError:
            continue
    return Options(**found)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=named)
def test_each_adapter_with_its_options_in_each_precision(
    tiny_sd, tmp_path, monkeypatch, adapter, precision
):
    options = supported(tiny_sd, adapter)
    assert options != Options()
    for asked in (Options(), options) if precision == "fp32" else (options,):
        run = run_of(tiny_sd, precision, adapter=adapter, options=asked)
        assert trained(run, tmp_path, monkeypatch) == ONE_STEP, asked
