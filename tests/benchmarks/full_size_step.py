"""What one training step of a full-size Stable Diffusion 1.5 takes: resident memory and seconds.

python tests/benchmarks/full_size_step.py [--only REGEX] [--side 512] [--threads N] [--quick]

The UNet, the text encoder and the VAE have their full sizes and random weights, and are made in
memory from their configuration. LoKr (factor 8, full blocks) is put on the layers of attn-mlp of
the UNet and of the text encoder, and `Training` makes a step of AdamW on one picture of
side x side under Lightning's Trainer: with the UNet's gradient checkpointing and without, the
frozen weights in float32 and in bfloat16. Each has a process of its own, with glibc's own settings
and at most 16 GiB of data, beyond which it fails. The resident peaks are those of the whole
process, while it made the model, while the VAE read the picture, and in the step.

Checkpointing computes again what it did not keep. That changes no bit, or the last line says so.
"""

import argparse
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _unet
import numpy as np
import torch
from _measure import answer, give_back, isolated, limit_memory, machine

from lyco_lab.workers import cores

LIMIT_GB = 16
MINUTES = 30  # for one of them
CASES = {
    f"{precision}, {'checkpoints' if checkpointing else 'all kept'}": (precision, checkpointing)
    for precision in ("fp32", "bf16")
    for checkpointing in (False, True)
}


def model(precision: torch.dtype, *, small: bool) -> Any:
    """A `Diffusion` as `load` would give it, without a folder."""
    from diffusers import AutoencoderKL
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextConfig, CLIPTextModel

    from lyco_lab.diffusion.families.sd1 import SD1
    from lyco_lab.diffusion.objective import of_scheduler

    schedule = config("scheduler", "scheduler_config.json")
    text, images = config("text_encoder"), config("vae")
    if small:
        text["num_hidden_layers"], images["block_out_channels"] = 1, [32] * 4
    unet = _unet.make(small=small).to(precision)
    unet.set_attn_processor(AttnProcessor())  # as `load` does on a processor without a GPU
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder = CLIPTextModel(CLIPTextConfig(**text))
        vae = AutoencoderKL.from_config(images)
    text_encoder.to(precision)
    for module in (unet, text_encoder, vae):
        module.requires_grad_(False).eval()
    return SD1(
        vae=vae,
        schedule=schedule,
        objective=of_scheduler(schedule, None, "this script"),
        dtype=precision,
        tokenizer=None,  # the caption is given as token numbers
        text_encoder=text_encoder,
        unet=unet,
    )


def config(part: str, file: str = "config.json") -> dict[str, Any]:
    import lyco_lab.diffusion

    folder = Path(str(lyco_lab.diffusion.__file__)).parent / "configs" / "sd15"
    return dict(json.loads((folder / part / file).read_text()))


def batch(diffusion: Any, side: int) -> Any:
    """The first step's: one picture, and a caption of 77 tokens."""
    from lyco_lab.data.batches import Batch
    from lyco_lab.diffusion.model import Sizes

    picture = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    rng = torch.Generator().manual_seed(2)
    latents = diffusion.encode_images(picture).sample(rng)
    return Batch(
        step=0,
        indices_B=torch.tensor([0]),
        latents_BCHW=latents,
        noise_BCHW=torch.randn(latents.shape, generator=rng),
        timesteps_B=torch.tensor([500]),
        sizes=Sizes.whole(side, side),
        text={"ids": torch.randint(49408, (1, 77), generator=rng)},
    )


def training(diffusion: Any, precision: str) -> Any:
    """The library's, as a run with these settings begins it."""
    from lyco_lab.config import Data, Model, Run, Train
    from lyco_lab.train.module import Training
    from lyco_lab.train.stage import mount

    run = Run(
        name="lokr",
        study="benchmarks",
        model=Model(preset="attn-mlp", text_encoder=True, precision=precision),
        data=Data(folder="none"),
        adapter={"kind": "lokr", "factor": 8, "full_matrix": True},
        train=Train(steps=1, batch_size=1, warmup_steps=0),
    )
    return Training(diffusion, mount(run, diffusion), run.train, run.optimizer_value())


def measure(task: dict[str, Any]) -> dict[str, Any]:
    import lightning.pytorch as lightning

    from lyco_lab.train.stage import DTYPES, exact

    logging.disable(logging.CRITICAL)
    limit_memory(LIMIT_GB)
    torch.set_num_threads(task["threads"])
    precision, checkpointing = CASES[task["case"]]
    peaks = Peaks()
    diffusion = peaks.of("make", lambda: model(DTYPES[precision], small=task["quick"]))
    given = peaks.of("read", lambda: batch(diffusion, task["side"]))
    module = training(diffusion, precision)
    if checkpointing:
        diffusion.unet.enable_gradient_checkpointing()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    wall, cpu = time.perf_counter(), time.process_time()
    with exact(None):
        peaks.of("step", lambda: trainer.fit(module, train_dataloaders=Once(given)))
    assert trainer.global_step == 1 and module.delta_norm() > 0
    return {
        "layers": {part: len(m.layers) for part, m in module.mounted.items()},
        "params": sum(m.num_params for m in module.mounted.values()),
        "peaks_gb": peaks.found,
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "loss": module.row["loss"],
        "result": digest(module.factors()),
    }


class Once:
    """An epoch of one batch."""

    def __init__(self, only: Any) -> None:
        self.only = only

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        yield self.only


class Peaks:
    """The most GB that were resident in the process, by what it did."""

    def __init__(self) -> None:
        self.found: dict[str, float] = {}

    def of(self, name: str, call: Callable[[], Any]) -> Any:
        give_back()
        Path("/proc/self/clear_refs").write_text("5")
        result = call()
        most = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert most is not None
        self.found[name] = int(most[1]) * 1024 / 1e9
        return result


def digest(factors: dict[str, torch.nn.Parameter]) -> str:
    found = hashlib.blake2b(digest_size=8)
    for name, factor in factors.items():
        found.update(name.encode() + factor.detach().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--only", default="", help="which to measure: a regular expression")
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help="a small model, a picture of 64 x 64")
    given = parser.parse_args()
    print(machine().replace("One thread", f"{given.threads} threads"))
    rows = {}
    for case in CASES:
        if not re.search(given.only, case):
            continue
        side = 64 if given.quick else given.side
        task = {"case": case, "side": side, "threads": given.threads, "quick": given.quick}
        row = isolated(__file__, task, minutes=MINUTES)
        if "error" in row:
            print(f"  {case:17} {row['error']}", flush=True)
            continue
        rows[case] = row
        peaks = ", ".join(f"{what} {most:.2f}" for what, most in row["peaks_gb"].items())
        print(
            f"  {case:17} peak {max(row['peaks_gb'].values()):5.2f} GB ({peaks})"
            f"   step {row['wall_s']:6.1f} s, of the processor {row['cpu_s']:6.1f} s"
            f"   loss {row['loss']:.6f}   factors {row['result']}"
            f"   {row['params']:,} in {sum(row['layers'].values())} layers",
            flush=True,
        )
    for precision in ("fp32", "bf16"):
        results = {row["result"] for case, row in rows.items() if case.startswith(precision)}
        if sum(case.startswith(precision) for case in rows) == 2:
            equal = "the same bits" if len(results) == 1 else "DIFFERENT bits"
            print(f"  {precision}: {equal} with checkpoints and without")


if __name__ == "__main__" and not answer(measure):
    main()
