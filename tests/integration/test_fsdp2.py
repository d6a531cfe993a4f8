"""``trainer=fsdp2_cpu`` as it is typed: training, test, export and report, and ``eval.py`` on the checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safelight.callbacks.checkpointing import read_checkpoint
from safelight.cli.folders import CONTENTS
from safelight.lightning_modules import TextToImage
from safelight.testing.pipelines import pipeline_folder

REPOSITORY = Path(__file__).parents[2]


def run(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "SAFELIGHT_RUN_DIR"}
    command = [sys.executable, str(REPOSITORY / script), *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.ddp
def test_a_whole_run_with_sharded_weights(tmp_path: Path) -> None:
    small = ("data.image_size=16", "data.test_size=4", "data.batch_size=2", "trainer.max_steps=4", "run_dir=run")
    backbone = pipeline_folder("flux")
    done = run(tmp_path, "train.py", "method=text_to_image", f"backbone={backbone}", "trainer=fsdp2_cpu", *small)
    assert "view tensor" not in done.stderr
    folder = tmp_path / "run"
    assert {entry.name for entry in folder.iterdir()} == set(CONTENTS)
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]

    # One file of ordinary tensors, that one process opens.
    checkpoint = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 4
    assert checkpoint["safelight"]["world_size"] == 2
    module = TextToImage.load_from_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=True)
    start = TextToImage(backbone=str(backbone)).state_dict()
    for key, value in module.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][key])
    key = "trained.denoiser.single_transformer_blocks.0.proj_mlp.weight"
    assert not torch.equal(checkpoint["state_dict"][key], start[key])

    # The averaged weights, whole, in 16 bits.
    exported = load_file(folder / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, checkpoint["state_dict"][f"ema.denoiser.{name}"].half())
    assert "Trained for 4 steps" in (folder / "export" / "README.md").read_text()

    evaluated = run(tmp_path, "eval.py", "ckpt_path=run/checkpoints/best.ckpt", "eval_dir=numbers")
    before, after = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "numbers"))
    assert after["metrics"] == before["metrics"]
    assert "numbers equal the training run's" in evaluated.stdout
