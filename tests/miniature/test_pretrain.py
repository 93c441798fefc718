"""The recipe from beginning to end, a minute's worth of it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lyco_lab.errors import UserError
from lyco_lab.miniature import judges
from lyco_lab.miniature.pretrain import pretrain


def test_a_folder_with_a_model_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="already holds a model"):
        pretrain(tmp_path, quick=True)


@pytest.mark.slow
def test_quick_pretraining_goes_on_after_a_kill_and_makes_a_model_that_loads(tmp_path):
    out = tmp_path / "mini"
    command = [sys.executable, "-m", "lyco_lab", "pretrain", str(out), "--quick"]
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while not (tmp_path / "mini-work" / "autoencoder.ckpt").exists():
        assert first.poll() is None
        time.sleep(0.1)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "| **mean** |" in again.stdout
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert pipe.unet.dtype == torch.float32
    judges.load(out)
    found = json.loads((out / "quality.json").read_text())
    assert set(found["accuracy"]) == {"real", "reconstructed", "generated"}
    assert not list(out.parent.glob("*.part"))
