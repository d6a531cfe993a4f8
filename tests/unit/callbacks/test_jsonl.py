from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from safelight.callbacks import MetricsJsonl, TrimMetrics

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def read(logger: MetricsJsonl) -> list[dict[str, Any]]:
    return [json.loads(line) for line in logger.path.read_text().splitlines()]


def test_one_line_per_call_with_step_epoch_and_seconds(tmp_path: Path) -> None:
    logger = MetricsJsonl(tmp_path)
    logger.log_metrics({"train/loss": 0.5, "epoch": 2}, step=7)
    logger.log_metrics({"val/loss": torch.tensor(0.25)}, step=8)
    logger.finalize("success")
    first, second = read(logger)
    assert list(first) == ["step", "epoch", "seconds", "train/loss"]
    assert (first["step"], first["epoch"], first["train/loss"]) == (7, 2, 0.5)
    assert (second["step"], second["epoch"], second["val/loss"]) == (8, None, 0.25)
    assert 0 <= first["seconds"] <= second["seconds"] < 10


def test_non_finite_values_become_null_so_that_every_line_is_json(tmp_path: Path) -> None:
    logger = MetricsJsonl(tmp_path)
    logger.log_metrics({"a": float("nan"), "b": float("inf"), "c": 1.0}, step=0)
    assert "NaN" not in logger.path.read_text()
    assert read(logger)[0]["a"] is None
    assert read(logger)[0]["b"] is None


def test_appends_after_reopening_and_cuts_off_half_a_line(tmp_path: Path) -> None:
    logger = MetricsJsonl(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    logger.finalize("success")
    with logger.path.open("a") as file:
        file.write('{"step": 1, "a')
    again = MetricsJsonl(tmp_path)
    again.log_metrics({"a": 2.0}, step=1)
    assert [entry["a"] for entry in read(again)] == [1.0, 2.0]


def test_drop_from_removes_the_step_and_later_and_keeps_the_clock(tmp_path: Path) -> None:
    logger = MetricsJsonl(tmp_path)
    logger._started -= 100
    for step in range(6):
        logger.log_metrics({"a": float(step)}, step=step)
    fresh = MetricsJsonl(tmp_path)
    assert fresh.drop_from(4) == 2
    fresh.log_metrics({"a": 40.0}, step=4)
    assert [entry["a"] for entry in read(fresh)] == [0, 1, 2, 3, 40]
    assert read(fresh)[-1]["seconds"] >= 100
    assert MetricsJsonl(tmp_path / "empty").drop_from(3) == 0


def test_survives_pickling_while_open(tmp_path: Path) -> None:
    logger = MetricsJsonl(tmp_path)
    logger.log_metrics({"a": 1.0}, step=0)
    copy = pickle.loads(pickle.dumps(logger))
    copy.log_metrics({"a": 2.0}, step=1)
    assert [entry["a"] for entry in read(copy)] == [1.0, 2.0]


class Walk(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05)


def fit(folder: Path, steps: int, ckpt_path: Path | None = None) -> MetricsJsonl:
    torch.manual_seed(0)
    logger = MetricsJsonl(folder)
    data = DataLoader(torch.arange(16.0).reshape(8, 2) / 16, batch_size=1)
    trainer = Trainer(
        max_steps=steps, logger=logger, log_every_n_steps=1, val_check_interval=4, num_sanity_val_steps=0,
        callbacks=[TrimMetrics(), ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)],
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Walk(), data, data, ckpt_path=ckpt_path)
    return logger


def test_a_resumed_run_leaves_the_same_lines_as_one_that_never_stopped(tmp_path: Path) -> None:
    whole = read(fit(tmp_path / "whole", 12))
    fit(tmp_path / "torn", 10)
    torn = read(fit(tmp_path / "torn", 12, ckpt_path=tmp_path / "torn" / "step=8.ckpt"))
    assert len(whole) == 12 + 3
    for line in [*whole, *torn]:
        line.pop("seconds")
    assert [line["step"] for line in torn] == [line["step"] for line in whole]
    for ours, theirs in zip(torn, whole, strict=True):
        assert ours == pytest.approx(theirs)
