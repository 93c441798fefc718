"""A large folder of images: to index it, to come back to it, and to read its latents.

python tests/benchmarks/data.py [--images 100000]

Each question is asked in a process of its own, of which the peak memory is told, with one thread.
Images are of a few dozen kinds, and each has a caption of its own. They are asked of many images of
64 x 64 pixels, where what each image costs shows, and of fewer of 512 x 512, where the bytes do.
"""

import argparse
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOALS = {"index": 60.0, "memory": 500.0, "rate": 200.0, "first": 5.0}
ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
SHAPES = [(w, h) for w in (7, 8, 10, 12, 16) for h in (7, 8, 9, 12)]


def write(folder: Path, images: int, side: int) -> None:
    """JPEG and PNG files in folders of a thousand."""
    from PIL import Image

    kinds = []
    for i, shape in enumerate(SHAPES):
        size = (shape[0] * side // 8, shape[1] * side // 8)
        for form, suffix in (("JPEG", "jpg"), ("PNG", "png")):
            buffer = io.BytesIO()
            Image.new("RGB", size, (i, 2 * i, 3 * i)).save(buffer, form)
            kinds.append((suffix, buffer.getvalue()))
    rng = random.Random(0)
    for i in range(images):
        if i % 1000 == 0:
            inner = folder / f"{i // 1000:04d}"
            inner.mkdir(parents=True)
        suffix, data = rng.choice(kinds)
        (inner / f"{i:06d}.{suffix}").write_bytes(data)
        (inner / f"{i:06d}.txt").write_text(f"sks dog, number {i}, in a park, on a lawn, sunny")


def rss() -> float:
    """The peak so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def index(root: Path) -> dict:
    from lyco_lab.data.index import build
    from lyco_lab.data.memo import Memo
    from lyco_lab.data.sources import Source

    began = time.perf_counter()
    memo = Memo(root / "files.arrow")
    found = build([Source(root / "in")], memo)
    seconds = time.perf_counter() - began
    return {"images": len(found), "s": seconds, "files read": memo.read, "MB": rss()}


def side(root: Path) -> int:
    return int(root.name.split("-")[-2])


def samples(root: Path):
    from lyco_lab.config import Data
    from lyco_lab.data import own
    from lyco_lab.data.memo import Memo

    buckets = tuple(n * side(root) // 512 for n in (320, 960, 64))
    data = Data(folder=str(root / "in"), resolution=side(root), buckets=buckets, upscale=True)
    return own.samples_of(data, 4, side(root), Memo(root / "files.arrow"))


def checked(root: Path) -> dict:
    """Every image decoded once: what the first stage of the first run does."""
    began = time.perf_counter()
    found = samples(root)
    return {"images": len(found), "s": time.perf_counter() - began, "MB": rss()}


class Model:
    """As much of a diffusion model as the cache asks: latents and texts of the right shapes."""

    def __init__(self, width: int) -> None:
        import torch
        from diffusers import AutoencoderKL
        from transformers import CLIPTextConfig, CLIPTextModel

        class Tokenizer:
            model_max_length, pad_token_id = 77, 0

            def get_vocab(self) -> dict:
                return {"a": 0}

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            four = {"down_block_types": ("DownEncoderBlock2D",) * 4,
                    "up_block_types": ("UpDecoderBlock2D",) * 4}  # fmt: skip
            self.vae = AutoencoderKL(
                block_out_channels=(8, 8, 8, 8), norm_num_groups=8, sample_size=512, **four
            )
            text = CLIPTextModel(CLIPTextConfig(hidden_size=64, num_hidden_layers=1))
        self.parts = {"unet": None, "text_encoder": text}
        self.tokenizers = {"ids": Tokenizer()}
        self.chunks = 1
        self.rng = torch.Generator().manual_seed(0)
        self.width = width

    def encode_images(self, images, batch_size=16):
        import torch

        from lyco_lab.diffusion.base import Latents

        count, height, width, _ = images.shape
        mean = torch.randn(count, 4, height // 8, width // 8, generator=self.rng)
        return Latents(mean, mean.abs())

    def encode_text(self, texts):
        import torch

        return {"hidden": torch.randn(len(texts), 77, self.width, generator=self.rng)}

    def too_long(self, text: str) -> bool:
        return False


def stored(root: Path, model: Model):
    from lyco_lab.data.own import dataset_of
    from lyco_lab.data.stored import Stored

    found = samples(root)
    found.index.digest(found.digests)  # as a run does, to see that nothing changed
    dataset_of(found, root, root / "cache")
    return Stored(found, model, root / "cache", text_states=True, cached=True).build()


def model(root: Path) -> Model:
    """Text states in proportion to the latents: those of 100,000 captions are 24 GB."""
    import lyco_lab.data.stage  # noqa: F401  # as it is imported where a model is loaded

    return Model(768 * side(root) ** 2 // 512**2)


def encode(root: Path) -> dict:
    """The cache written: decoding, cutting and disk, without the time of a VAE."""
    made, before = model(root), rss()
    began = time.perf_counter()
    found = stored(root, made)
    seconds = time.perf_counter() - began
    size = sum(f.stat().st_size for f in (root / "cache").rglob("*.safetensors")) / 2**30
    return {"samples": len(found.samples), "s": seconds, "GiB": size, "MB": rss() - before}


def read(root: Path, batches: int = 500) -> dict:
    """From where the model is in memory to the first batch, and on."""
    import torch

    from lyco_lab.data.batches import draw

    torch.set_num_threads(1)
    made, before = model(root), rss()
    began = time.perf_counter()
    found = stored(root, made)
    order = found.order(4, 0)

    def batch(step: int) -> None:
        draw(found, order, step, timesteps=1000, caption_dropout=0.05)

    batch(0)
    first = time.perf_counter() - began
    began, cpu = time.perf_counter(), time.process_time()
    for step in range(1, batches + 1):
        batch(step)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "s to the first batch": first,
        "samples/s": 4 * batches / seconds,
        "of a core": cpu / seconds,
        "MB more than the model's": rss() - before,
    }


ASKED = {"index": index, "again": index, "checked": checked, "encode": encode, "read": read}


def ask(what: str, root: Path) -> dict:
    command = [sys.executable, __file__, "--ask", what, "--root", str(root)]
    done = subprocess.run(command, env=os.environ | ENV, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100_000, help="of 64 x 64 pixels")
    parser.add_argument("--large", type=int, default=4_000, help="images of 512 x 512")
    parser.add_argument("--ask")
    parser.add_argument("--root", type=Path)
    given = parser.parse_args()
    if given.ask:
        print(json.dumps(ASKED[given.ask](given.root)))
        return
    for images, pixels in ((given.images, 64), (given.large, 512)):
        root = Path(tempfile.mkdtemp(prefix=f"lyco-lab-data-{pixels}-"))
        try:
            began = time.perf_counter()
            write(root / "in", images, pixels)
            seconds = time.perf_counter() - began
            print(f"{images} images of {pixels} x {pixels}, written in {seconds:.0f} s")
            time.sleep(3)  # until they count as settled
            for what in ASKED:
                found = ask(what, root)
                told = ", ".join(
                    f"{value:.4g} {name}" if isinstance(value, float) else f"{value} {name}"
                    for name, value in found.items()
                )
                print(f"  {what}: {told}{judged(what, found)}")
        finally:
            shutil.rmtree(root)


def judged(what: str, found: dict) -> str:
    """Which goals are missed."""
    missed = []
    if what in ("index", "again"):
        missed += [f"goal: {GOALS['index']:g} s"] * (found["s"] > GOALS["index"])
        missed += [f"goal: {GOALS['memory']:g} MB"] * (found["MB"] > GOALS["memory"])
    if what == "read":
        missed += [f"goal: {GOALS['first']:g} s"] * (found["s to the first batch"] > GOALS["first"])
        missed += [f"goal: {GOALS['rate']:g} samples/s"] * (found["samples/s"] < GOALS["rate"])
    return f"  ✗ {', '.join(missed)}" if missed else ""


if __name__ == "__main__":
    main()
