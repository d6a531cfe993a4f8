from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from safelight.callbacks import DataWait, ProgressLine, RichProgress, make_progress
from safelight.callbacks.progress import StepRate, format_metrics, format_seconds
from safelight.errors import SafelightError

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/keep", torch.tensor(0.8123), prog_bar=True)
        self.log("train/hidden", loss)
        return loss

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        time.sleep(0.02)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def fit(callback: Any, steps: int, folder: Path, data: Any = None, **settings: Any) -> Trainer:
    trainer = Trainer(
        max_steps=steps, callbacks=[callback], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_model_summary=False, default_root_dir=folder, **settings,
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(torch.ones(64, 2) if data is None else data, batch_size=2))
    return trainer


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


def test_prints_every_n_steps_the_first_and_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(ProgressLine(every_n_steps=4, every_seconds=None), 10, tmp_path)
    printed = lines(capsys.readouterr().out)
    assert [line.split()[1] for line in printed] == ["1/10", "4/10", "8/10", "10/10"]
    pattern = (
        r"step 4/10  eta 0:0\d  loss [\d.]+(e-\d+)?  keep 0\.812  [\d.e+]+ (steps/s|s/step)  waiting for data \d+ %"
    )
    assert re.fullmatch(pattern, printed[1])
    assert "eta 0:00" in printed[-1]
    assert "hidden" not in printed[1]


def test_gradient_accumulation_counts_optimisation_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(ProgressLine(every_n_steps=1, every_seconds=None), 3, tmp_path, accumulate_grad_batches=4)
    assert [line.split()[1] for line in lines(capsys.readouterr().out)] == ["1/3", "2/3", "3/3"]


def test_by_time_alone_a_fast_run_prints_first_and_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(ProgressLine(every_seconds=60), 20, tmp_path)
    assert [line.split()[1] for line in lines(capsys.readouterr().out)] == ["1/20", "20/20"]


def test_prints_nothing_when_lightning_disables_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class OtherRank(ProgressLine):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            super().setup(trainer, pl_module, stage)
            self.disable()

    fit(OtherRank(every_n_steps=1), 3, tmp_path)
    assert lines(capsys.readouterr().out) == []


def test_testing_reports_how_far_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Trainer(
        callbacks=[ProgressLine(every_seconds=0.05)], logger=False, accelerator="cpu", default_root_dir=tmp_path
    )
    trainer.test(Line(), DataLoader(torch.ones(20, 2)), verbose=False)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test ")]
    assert printed
    assert re.fullmatch(r"test \d+/20  eta 0:0\d", printed[0])


def test_data_wait_is_the_share_of_a_slow_loader(tmp_path: Path) -> None:
    class Slow(Dataset[Tensor]):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> Tensor:
            time.sleep(0.02)
            return torch.ones(2)

    shares = []
    for data in (Slow(), torch.ones(24, 2)):
        wait = DataWait()
        # max_steps end the run while two batches are left, so nothing but training is measured.
        trainer = fit(wait, 10, tmp_path, data=data)
        shares.append(wait.share)
        assert trainer.global_step == 10
    assert shares[0] > 0.6
    assert shares[1] < shares[0]


def test_two_measures_share_one_timer(tmp_path: Path) -> None:
    first, second = DataWait(), DataWait()
    trainer = Trainer(
        max_steps=4, callbacks=[first, second], logger=False, enable_checkpointing=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Line(), DataLoader(torch.ones(16, 2), batch_size=2))
    assert first._timer is second._timer
    assert first._timer is not None
    assert 0 < first._timer.seconds < 5


def test_watching_does_not_change_the_run(tmp_path: Path) -> None:
    weights = []
    for callback in (ProgressLine(every_n_steps=1), ProgressLine(every_seconds=60), DataWait()):
        torch.manual_seed(0)
        trainer = fit(callback, 5, tmp_path)
        weights.append(trainer.lightning_module.layer.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_rate_forgives_one_slow_step_but_not_slow_work() -> None:
    rate = StepRate(window=10)
    assert rate.seconds is None
    for seconds in (100.0, 1.0, 1.0, 1.0):
        rate.add(seconds)
    assert rate.seconds == pytest.approx((3 + 1 + 1 + 1) / 4)
    for _ in range(5):
        rate.add(1.0)
        rate.add(2.0)
    # With accumulation every second step takes longer, and that is counted in full.
    assert rate.seconds == pytest.approx(1.5)


def test_formats() -> None:
    assert [format_seconds(s) for s in (0, 11.2, 61, 3723, 97_441)] == ["0:00", "0:12", "1:01", "1:02:03", "1 d 03:04"]
    metrics = {"train/loss": torch.tensor(0.031249), "v_num": 3, "lr": 1e-5, "n": 12345.0, "bad": float("nan")}
    assert format_metrics(metrics) == ["loss 0.0312", "lr 1e-05", "n 12345", "bad nan"]


def test_choice_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(make_progress(), RichProgress)
    assert isinstance(make_progress("plain"), ProgressLine)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_progress(every_n_steps=7), ProgressLine)
    with pytest.raises(SafelightError, match="kind='fancy'"):
        make_progress("fancy")  # type: ignore[arg-type]
    with pytest.raises(SafelightError, match="both None"):
        ProgressLine(None, None)
    with pytest.raises(SafelightError, match="every_n_steps must be above 0, got 0"):
        ProgressLine(0)


def test_rich_bar_runs_and_shows_the_wait(tmp_path: Path) -> None:
    bar = RichProgress()
    trainer = fit(bar, 3, tmp_path)
    metrics = bar.get_metrics(trainer, trainer.lightning_module)
    assert re.fullmatch(r"\d+ %", str(metrics["waiting for data"]))
    assert "v_num" not in metrics
