"""``train.py method=ecodiff`` on ``tiny_flux``: run folder, summary, artefact, evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight import zoo
from safelight.callbacks.checkpointing import read_checkpoint

REPOSITORY = Path(__file__).parents[2]
SMALL = (
    "method=ecodiff", "trainer=cpu", "trainer.max_steps=6", "trainer.log_every_n_steps=1",
    "data.size=16", "data.test_size=8", "data.batch_size=4", "method.seed=7",  # other than the data's
    "method.correction_samples=8", "method.random_masks=1", "callbacks.checkpoints.every_n_train_steps=2",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not {"tiny_flux", "tiny_clip"} <= set(zoo.names()), reason="tiny_flux or tiny_clip is not built in this checkout"
)


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / script), *arguments]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "SAFELIGHT_RUN_DIR"}
    return kept | {"OMP_NUM_THREADS": "1"}


def run(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(script, *arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )


def run_folder_of(folder: Path) -> Path:
    (found,) = (folder / "runs" / "ecodiff").iterdir()
    return found


def logits(run_folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(run_folder / "checkpoints" / "last.ckpt")["state_dict"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One whole small run, and what it printed."""
    folder = tmp_path_factory.mktemp("ecodiff")
    done = run(folder, "train.py", *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_folder_of(folder), done.stdout


def test_run_folder_and_summary(finished: tuple[Path, str]) -> None:
    from safelight.lightning_modules import EcoDiff

    folder, output = finished
    assert {entry.name for entry in folder.iterdir()} == {
        "config.yaml", "command.txt", "versions.json", "metrics.jsonl", "tensorboard", "checkpoints", "export",
        "report", "summary.json",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["metrics"]) == set(EcoDiff.metric_names)
    assert set(summary["controls"]) == set(EcoDiff.control_names)
    for values in summary["controls"].values():
        assert set(values) == set(EcoDiff.metric_names)
    for values in (summary["metrics"], *summary["controls"].values()):
        assert values["keep_params"] == pytest.approx(0.8, abs=0.005)
        assert 0 < values["flops_ratio"] < 1
        assert values["latent_mse_median"] > 0
        assert 0 <= values["clip_accuracy"] <= 1
        assert values["ssim"] <= 1
    for label in ("dense", "pruned (ours)", "random mask"):
        assert label in output
    assert "python eval.py ckpt_path=" in output
    page = (folder / "report" / "index.html").read_text()
    assert "The same noise through every model" in page
    size = (folder / "checkpoints" / "last.ckpt").stat().st_size
    assert size < 400_000  # logits and Adam's moments, no frozen weights
    keys = logits(folder)
    assert keys
    assert all(key.startswith(("bank.logits.", "target.")) for key in keys)


OPEN = """
import json, sys
from importlib import abc

class Refuse(abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("safelight", "lightning", "hydra"):
            raise ImportError(name + " is not to be used here")

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, "transformer")
import torch
from load import load_pipeline

pipeline = load_pipeline(".")
given = torch.load(sys.argv[1], weights_only=True)
options = json.load(open("safelight.json"))
picture = pipeline(
    prompt=given["prompts"], latents=given["noise"], height=options["height"], width=options["width"],
    num_inference_steps=options["num_inference_steps"], guidance_scale=options["guidance_scale"],
    max_sequence_length=options["max_sequence_length"], output_type="latent",
).images
count = sum(p.numel() for p in pipeline.transformer.parameters())
torch.save({"latents": picture, "parameters": count}, sys.argv[1])
"""


def test_artefact_opens_without_safelight(finished: tuple[Path, str], tmp_path: Path) -> None:
    from safelight.lightning_modules import EcoDiff

    folder, _ = finished
    checkpoint = folder / "checkpoints" / "best.ckpt"
    module = EcoDiff.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    smaller = module.pruned()
    prompts, seeds = ["a small octopus on a yellow background in noto style", "an apple"], [11, 12]
    noise = module.generator.noise(seeds)
    wanted = smaller.rollout(noise, module.generator.encode(prompts))
    exchange = tmp_path / "exchange.pt"
    torch.save({"prompts": prompts, "noise": noise}, exchange)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(exchange)], cwd=folder / "export", env=environment(), capture_output=True,
        text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(exchange, weights_only=True)
    assert torch.allclose(found["latents"], wanted, atol=1e-4 * wanted.abs().max().item())
    dense = module.generator.rollout(noise, module.generator.encode(prompts))
    assert (wanted - dense).abs().max() > 1e-2
    whole = sum(p.numel() for p in module.denoiser.parameters())
    from safelight.masking import prunable_params

    share = 1 - (whole - found["parameters"]) / prunable_params(module.specs)
    assert share == pytest.approx(0.8, abs=0.005)


def test_evaluation_repeats_the_numbers(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    done = run(tmp_path, "eval.py", f"ckpt_path={folder / 'checkpoints' / 'best.ckpt'}", "eval_dir=results")
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (json.loads((p / "summary.json").read_text()) for p in (folder, tmp_path / "results"))

    def flat(summary: dict[str, Any]) -> dict[str, float]:
        parts = {"": summary["metrics"], **summary["controls"]}
        return {
            f"{part}/{name}": value
            for part, values in parts.items()
            for name, value in values.items()
            if name != "latency_ratio"  # a clock's
        }

    assert flat(after) == pytest.approx(flat(before), abs=1e-6)
