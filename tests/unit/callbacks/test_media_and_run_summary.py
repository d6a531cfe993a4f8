from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from safelight.callbacks import RunSummary, TensorBoardMedia
from safelight.callbacks.media import untouched
from safelight.callbacks.summary import RunStats
from safelight.errors import SafelightError

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Painter(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.frozen = nn.Dropout(0.5).eval()
        self.calls: list[int] = []
        self.scores = iter([0.5, 0.2, 0.4])

    def log_media(self, writer: Any, step: int) -> None:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append(step)
        writer.add_image("noise", torch.rand(3, 4, 4), step)
        random.random()
        np.random.rand()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        assert self.training
        return (self.layer(batch) * torch.rand(1)).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            self.log("val/score", next(self.scores))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def fit(module: LightningModule, callbacks: list[Any], folder: Path, steps: int = 6, **settings: Any) -> Trainer:
    data = DataLoader(torch.ones(8, 2), batch_size=1)
    settings.setdefault("logger", TensorBoardLogger(folder, name="", version=""))
    trainer = Trainer(
        max_steps=steps, callbacks=callbacks, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, **settings,
    )  # fmt: skip
    trainer.fit(module, data, data if "val_check_interval" in settings else None)
    return trainer


def test_pictures_every_n_steps_at_the_start_and_at_the_end(tmp_path: Path) -> None:
    module = Painter()
    fit(module, [TensorBoardMedia(every_n_steps=4)], tmp_path)
    assert module.calls == [0, 4, 6]
    assert any(tmp_path.glob("events.*"))


def test_pictures_do_not_change_the_run(tmp_path: Path) -> None:
    weights = []
    for name, callbacks in (("with", [TensorBoardMedia(every_n_steps=1)]), ("without", [])):
        torch.manual_seed(0)
        module = Painter()
        fit(module, callbacks, tmp_path / name)
        weights.append(module.layer.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])


def test_without_tensorboard_or_log_media_nothing_happens(tmp_path: Path) -> None:
    module = Painter()
    fit(module, [TensorBoardMedia(1)], tmp_path, logger=False)
    assert module.calls == []
    with pytest.raises(SafelightError, match="at least 1, got 0"):
        TensorBoardMedia(0)


def test_untouched_restores_flags_and_every_random_stream_even_after_an_error() -> None:
    module = Painter()
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())

    def draw_and_fail() -> None:
        torch.rand(1), random.random(), np.random.rand()
        raise RuntimeError

    with pytest.raises(RuntimeError), untouched(module):
        draw_and_fail()
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert states[2] == np.random.get_state()[1].tolist()
    assert module.training
    assert not module.frozen.training


def test_run_summary_finds_the_best_value_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = RunSummary(monitor="val/score", mode="min")
    fit(Painter(), [summary], tmp_path, val_check_interval=2)
    stats = summary.stats
    assert (stats.steps, stats.best, stats.best_step) == (6, pytest.approx(0.2), 4)
    assert stats.steps_per_second == pytest.approx(6 / stats.wall_seconds)
    assert stats.peak_memory_bytes is None or stats.peak_memory_bytes > 10_000_000
    assert "6 steps in 0:0" in capsys.readouterr().out


def test_run_summary_asks_the_module_what_to_watch(tmp_path: Path) -> None:
    module = Painter()
    module.monitor, module.monitor_mode = "val/score", "max"  # type: ignore[assignment]
    summary = RunSummary(announce=False)
    fit(module, [summary], tmp_path, val_check_interval=2)
    assert (summary.stats.monitor, summary.stats.best, summary.stats.best_step) == ("val/score", 0.5, 2)


def test_run_summary_remembers_the_best_across_a_resume() -> None:
    first, second = RunSummary(), RunSummary()
    first.stats = RunStats(monitor="m", best=0.1, best_step=3)
    second.load_state_dict(first.state_dict())
    assert (second.stats.best, second.stats.best_step) == (0.1, 3)
    line = str(RunStats(60, 52.0, 1.154, 0.031, 1_200_000_000, "val/x", 0.029, 40))
    assert line == (
        "60 steps in 0:52, 1.15 steps/s, 3 % waiting for data, peak memory 1.20 GB, best val/x 0.029 at step 40"
    )
    with pytest.raises(SafelightError, match="mode='low'"):
        RunSummary(mode="low")  # type: ignore[arg-type]
