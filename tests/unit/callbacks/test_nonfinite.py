from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from safelight.callbacks import NonFiniteError, StopOnNonFinite
from safelight.errors import SafelightError

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


class Fragile(LightningModule):
    """Two layers; at batch ``at`` the named thing breaks."""

    def __init__(self, breaks: str | None, at: int = 4, manual: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)
        self.breaks, self.at = breaks, at
        self.automatic_optimization = not manual

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        now = batch_idx == self.at
        weight = _BadGradient.apply(self.second.weight) if now and self.breaks == "gradient" else self.second.weight
        loss = nn.functional.linear(torch.tanh(self.first(batch)), weight).square().mean()
        clean = loss
        if now and self.breaks == "loss":
            loss = loss * float("nan")
        self.log("train/loss", loss.detach().nan_to_num())
        self.log("train/rate", float("inf") if now and self.breaks == "metric" else 1.0)
        self.log("train/psnr", float("inf"))
        if not self.automatic_optimization:
            optimiser = self.optimizers()
            optimiser.zero_grad()
            clean.backward()
            optimiser.step()
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/score", float("nan") if self.breaks == "validation" else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def run(module: LightningModule, folder: Path, every: int | None = None, data: Tensor | None = None) -> Trainer:
    trainer = Trainer(
        max_steps=12, callbacks=[StopOnNonFinite(every)], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, val_check_interval=6,
    )  # fmt: skip
    loader = DataLoader(torch.ones(24, 2) if data is None else data, batch_size=2)
    trainer.fit(module, loader, loader if module.breaks == "validation" else None)
    return trainer


def test_a_sound_run_goes_to_its_end(tmp_path: Path) -> None:
    assert run(Fragile(None), tmp_path).global_step == 12


def test_stops_at_the_step_of_a_bad_loss_before_the_weights_are_lost(tmp_path: Path) -> None:
    module = Fragile("loss")
    with pytest.raises(NonFiniteError, match=r"stopped at step 5: the loss is not finite") as caught:
        run(module, tmp_path)
    assert caught.value.step == 5
    assert module.trainer.global_step == 4
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_names_the_parameter_whose_gradient_broke(tmp_path: Path) -> None:
    module = Fragile("gradient")
    with pytest.raises(NonFiniteError, match=r"step 5: the gradient of 'second\.weight' is not finite"):
        run(module, tmp_path)
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_names_the_metric(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 5: metric 'train/rate' is inf"):
        run(Fragile("metric"), tmp_path)


def test_names_a_validation_metric_but_lets_the_sanity_check_pass(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"step 6: metric 'val/score' is nan"):
        run(Fragile("validation"), tmp_path)


@pytest.mark.parametrize("breaks", ["loss", "gradient"])
def test_rare_checks_still_name_the_first_step(tmp_path: Path, breaks: str) -> None:
    module = Fragile(breaks, at=2)
    with pytest.raises(NonFiniteError) as caught:
        run(module, tmp_path, every=5)
    assert caught.value.step == 3
    # The answer was read before the fifth update.
    assert module.trainer.global_step == 4


def test_what_happens_after_the_last_check_is_found_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 12"):
        run(Fragile("loss", at=11), tmp_path, every=100)


def test_manual_optimisation_is_watched_through_the_returned_loss(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="step 5: the loss is not finite"):
        run(Fragile("loss", manual=True), tmp_path)


def test_bad_data_is_named_as_the_cause(tmp_path: Path) -> None:
    data = torch.ones(24, 2)
    data[7, 1] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is not finite; .*the data is not finite at batch\."):
        run(Fragile(None), tmp_path, data=data)


def test_the_error_is_one_the_user_can_mend() -> None:
    assert issubclass(NonFiniteError, SafelightError)
    with pytest.raises(SafelightError, match="at least 1, got 0"):
        StopOnNonFinite(0)


def test_reads_the_device_only_when_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    check = StopOnNonFinite._check
    monkeypatch.setattr(StopOnNonFinite, "_check", lambda self, *a: (reads.append(1), check(self, *a))[1])
    run(Fragile(None), tmp_path, every=6)
    # Steps 6 and 12, and once at the end.
    assert len(reads) == 3
