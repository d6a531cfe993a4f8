"""A method with dropout and noise from the global stream: what exact resume has to reproduce."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Gt, Interval
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from safelight.datamodules.loading import ResumableLoader
from safelight.lightning_modules.base import SafelightModule
from safelight.reporting import write_model_card

# "<stage>:<signal>": the process sends itself that signal in `setup`, `validation`, `test` or `export`.
STAGE_VARIABLE = "TOY_STAGE"
# "<step>": the loss of that step is NaN.
NAN_VARIABLE = "TOY_NAN"
# "<step>": that step raises an error.
ERROR_VARIABLE = "TOY_ERROR"
# "<rank>": only that process gets errors.
RANK_VARIABLE = "TOY_RANK"


def _signal_in(stage: str) -> None:
    wanted, _, number = os.environ.get(STAGE_VARIABLE, "").partition(":")
    if wanted == stage:
        os.kill(os.getpid(), signal.Signals(int(number)))


class Toy(SafelightModule):
    """Fits a plane to random points."""

    metric_names = ("mse",)
    control_names = ("zero",)
    monitor = "val/mse"

    def __init__(
        self,
        *,
        lr: Annotated[float, Gt(0)] = 1e-2,
        keep: Annotated[float, Interval(ge=0, le=1)] = 0.8,
        mode: Literal["plain", "noisy"] = "noisy",
        dropout: float = 0.3,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.mode, self.lr = mode, lr
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Linear(8, 1))

    def on_fit_start(self) -> None:
        """Before the first step."""
        _signal_in("setup")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Squared error, with noise on the inputs."""
        mine = os.environ.get(RANK_VARIABLE, str(self.global_rank)) == str(self.global_rank)
        if mine and self.global_step == int(os.environ.get(ERROR_VARIABLE, "-1")):
            raise LookupError("broken on purpose")
        x, y = batch
        if self.mode == "noisy":
            x = x + 0.1 * torch.randn_like(x)
        loss = (self.net(x) - y).square().mean()
        if self.global_step == int(os.environ.get(NAN_VARIABLE, "-1")):
            loss = loss * float("nan")
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Draws from the global stream on purpose: validation must not shift the stream of training."""
        _signal_in("validation")
        torch.rand(3)
        self.log("val/mse", (self.net(batch[0]) - batch[1]).square().mean())

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """The metric, with noise that eval.py must meet again, and the control that predicts zero."""
        _signal_in("test")
        x, y = batch
        self.log("test/mse", (self.net(x) - y).square().mean() + 0.01 * torch.rand(()))
        self.log("test/zero/mse", y.square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.lr)

    def export(self, folder: Path) -> Path:
        """The first layer as JSON, and its card."""
        (folder / "half.json").write_text("{")
        _signal_in("export")
        (folder / "half.json").unlink()
        (folder / "plane.json").write_text(json.dumps(self.net[0].weight.tolist()), encoding="utf-8")
        write_model_card(
            folder,
            title="Plane",
            command="python train.py method=toy",
            data="twenty random points",
            metrics=getattr(self, "run_facts", {}).get("metrics", {}),
            licence="apache-2.0",
        )
        return folder

    def full_size_command(self) -> str:
        """There is no larger toy."""
        return "python train.py method=toy data.batch_size=10"


class PointSet(Dataset[tuple[Tensor, Tensor]]):
    """Twenty fixed random points and their sums."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(20, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.x[index].sum(0, keepdim=True)

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class Points(LightningDataModule):
    """Five batches of four points per epoch by default."""

    def __init__(
        self, *, batch_size: int = 4, seed: int = 0, num_workers: int = 0, data_folder: str | None = None
    ) -> None:
        super().__init__()
        self.batch_size, self.seed, self.num_workers = batch_size, seed, num_workers

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled."""
        return ResumableLoader(
            PointSet(), batch_size=self.batch_size, shuffle=True, seed=self.seed, num_workers=self.num_workers
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """A plain loader."""
        return DataLoader(PointSet(), batch_size=8)

    test_dataloader = val_dataloader
