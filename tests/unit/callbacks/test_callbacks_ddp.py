"""Under DDP one rank writes, and all ranks stop together."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from safelight.callbacks import MetricsJsonl, NonFiniteError, ProgressLine, RunSummary, StopOnNonFinite
from safelight.callbacks.checkpointing import Checkpoints, read_checkpoint
from safelight.testing.running import on_two_ranks, quiet_trainer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Broken(LightningModule):
    """The *logged* value of rank 1 is untouched, its loss is NaN at step 4."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.log("train/loss", 1.0)
        loss = self.layer(batch).square().mean()
        return loss * float("nan") if batch_idx == 3 and self.global_rank == 1 else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def _worker(rank: int, folder: str, port: int) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    logger = MetricsJsonl(folder)
    trainer = Trainer(
        max_steps=8, accelerator="cpu", devices=2, strategy="ddp", logger=logger, log_every_n_steps=1,
        callbacks=[ProgressLine(every_n_steps=1), StopOnNonFinite(), RunSummary()],
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    try:
        trainer.fit(Broken(), DataLoader(torch.ones(32, 2), batch_size=2))
    except NonFiniteError as error:
        Path(folder, f"rank{rank}.txt").write_text(f"{error.step} {trainer.global_step}")
    torch.distributed.destroy_process_group()


@pytest.mark.ddp
def test_one_rank_writes_and_all_ranks_stop_at_the_same_step(tmp_path: Path) -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(str(tmp_path), port), nprocs=2)
    # Gradients are averaged, so both ranks see the damage, and both before the update that would spread it.
    assert [(tmp_path / f"rank{rank}.txt").read_text() for rank in (0, 1)] == ["4 3", "4 3"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]


class Disagreeing(LightningModule):
    """Rank 0's value falls from epoch to epoch, rank 1's rises, and their mean falls twice, then rises."""

    values = ((9.0, 5.0, 3.0, 1.0), (1.0, 2.0, 3.0, 9.0))

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/mse", self.values[self.global_rank][self.current_epoch])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def _keep_best(folder: Path) -> float | None:
    checkpoints = Checkpoints(folder, monitor="val/mse")
    trainer = quiet_trainer(
        max_epochs=4,
        max_steps=-1,
        devices=2,
        strategy="ddp",
        callbacks=[checkpoints],
        enable_checkpointing=True,
        limit_val_batches=1,
    )
    loader = DataLoader(torch.ones(4, 2), batch_size=2)
    trainer.fit(Disagreeing(), loader, loader)
    return checkpoints.best_value


@pytest.mark.ddp
def test_ranks_that_see_other_values_agree_on_the_best(tmp_path: Path) -> None:
    """Writing is a collective operation: if each went by its own value, one would wait for the other for ever."""
    assert on_two_ranks(_keep_best, tmp_path) == [3.0, 3.0]
    assert read_checkpoint(tmp_path / "best.ckpt")["epoch"] == 2
