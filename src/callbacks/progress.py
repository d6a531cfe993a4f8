"""Progress that suits where it is read: Rich on a terminal, plain lines in a log file."""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from safelight.callbacks.waiting import DataWait
from safelight.errors import SafelightError


class StepRate:
    """Seconds per step from the latest steps, not thrown off by a slow one.

    Compilation in the first step, a checkpoint or a hiccup would spoil a plain mean for long; a median would ignore
    that, with gradient accumulation, some steps are truly longer. So it is the mean of the latest steps, each cut at
    three times their median.
    """

    def __init__(self, window: int = 50) -> None:
        self._durations: deque[float] = deque(maxlen=window)

    def add(self, seconds: float) -> None:
        """Tells how long one step took."""
        self._durations.append(seconds)

    @property
    def seconds(self) -> float | None:
        """Expected seconds of a step; None before the first."""
        if not self._durations:
            return None
        ceiling = 3 * statistics.median(self._durations)
        return statistics.fmean(min(duration, ceiling) for duration in self._durations)


def format_seconds(seconds: float) -> str:
    """``0:12``, ``1:02:03`` or ``2 d 03:04``."""
    whole = math.ceil(seconds - 1e-9)
    days, rest = divmod(max(whole, 0), 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, left = divmod(rest, 60)
    if days:
        return f"{days} d {hours:02d}:{minutes:02d}"
    return f"{hours}:{minutes:02d}:{left:02d}" if hours else f"{minutes}:{left:02d}"


def format_metrics(metrics: Mapping[str, Any]) -> list[str]:
    """``loss 0.0312``: three significant digits, without the ``train/`` in front."""
    parts = []
    for name, value in metrics.items():
        if name == "v_num":
            continue
        number = float(value)
        text = f"{number:.3g}" if not math.isfinite(number) or abs(number) < 1000 else f"{number:.0f}"
        parts.append(f"{name.removeprefix('train/')} {text}")
    return parts


class ProgressLine(ProgressBar):
    """Prints one plain line now and then: step, time left, logged values, throughput, share of time waiting for data.

    Values are those logged with ``prog_bar=True``; they are read from the device only when a line is due.

    Args:
        every_n_steps: Print when the step is a multiple of this; None goes by time alone.
        every_seconds: Print when so many seconds passed since the last line; None goes by steps alone. The pause
            grows to a hundredth of the time since the start, so that a week's log stays short.

    Raises:
        SafelightError: If both are None or one is not above zero.
    """

    def __init__(self, every_n_steps: int | None = None, every_seconds: float | None = 5.0) -> None:
        super().__init__()
        if every_n_steps is None and every_seconds is None:
            raise SafelightError("ProgressLine: every_n_steps and every_seconds are both None: give one")
        for name, value in (("every_n_steps", every_n_steps), ("every_seconds", every_seconds)):
            if value is not None and value <= 0:
                raise SafelightError(f"ProgressLine: {name} must be above 0, got {value}")
        self.every_n_steps = every_n_steps
        self.every_seconds = every_seconds
        self._enabled = True
        self._waiting = DataWait()
        self._rate = StepRate()
        self._total: int | None = None
        self._started = self._printed_at = self._step_at = time.monotonic()
        self._paused_at = 0.0
        self._step = self._printed_step = 0
        self._printed_any = False

    def disable(self) -> None:
        """Prints nothing from now on (Lightning calls it on every rank but the first)."""
        self._enabled = False

    def enable(self) -> None:
        """Prints again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints between the lines."""
        if self._enabled:
            print(*args, **{"flush": True, **kwargs})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clocks."""
        self._waiting.on_train_start(trainer, pl_module)
        self._rate = StepRate()
        total = trainer.estimated_stepping_batches
        self._total = int(total) if 0 < total < math.inf else None
        self._step = self._printed_step = trainer.global_step
        self._printed_any = False
        self._started = self._printed_at = self._step_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the step and prints when a line is due."""
        if trainer.global_step == self._step:
            return
        now = time.monotonic()
        done = trainer.global_step - self._step
        self._rate.add((now - self._step_at) / done)
        self._step, self._step_at = trainer.global_step, now
        by_steps = self.every_n_steps is not None and self._step % self.every_n_steps == 0
        # The first line comes at once: a reader wants to know that it runs.
        if by_steps or self._is_due(now) or self._step == self._total or not self._printed_any:
            self._print_step(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the last step if no line showed it."""
        if self._printed_step != self._step:
            self._print_step(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock of the steps."""
        self._paused_at = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the clock of the steps go on."""
        self._step_at += time.monotonic() - self._paused_at

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints how far validation got when it takes long."""
        self.has_dataloader_changed(dataloader_idx)
        self._print_evaluation("validation", batch_idx, self.total_val_batches_current_dataloader)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clocks of the test."""
        self._paused_at = self._started = self._printed_at = time.monotonic()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Prints how far the test got when it takes long."""
        self.has_dataloader_changed(dataloader_idx)
        self._print_evaluation("test", batch_idx, self.total_test_batches_current_dataloader)

    def line(self, trainer: Trainer, pl_module: LightningModule) -> str:
        """The line for the current step."""
        head = f"step {self._step}" + (f"/{self._total}" if self._total else "")
        parts = [head]
        pace = self._rate.seconds
        if pace is not None and self._total:
            parts.append(f"eta {format_seconds(pace * (self._total - self._step))}")
        parts += format_metrics(self.get_metrics(trainer, pl_module))
        if pace:
            parts.append(f"{1 / pace:.3g} steps/s" if pace <= 1 else f"{pace:.3g} s/step")
        parts.append(f"waiting for data {100 * self._waiting.share:.0f} %")
        return "  ".join(parts)

    def _is_due(self, now: float) -> bool:
        if self.every_seconds is None:
            return False
        return now - self._printed_at >= max(self.every_seconds, (now - self._started) / 100)

    def _print_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled:
            print(self.line(trainer, pl_module), flush=True)
        self._printed_at, self._printed_step, self._printed_any = time.monotonic(), self._step, True

    def _print_evaluation(self, stage: str, batch_idx: int, total: float) -> None:
        now = time.monotonic()
        if not self._enabled or self.trainer.sanity_checking or not self._is_due(now):
            return
        done, head = batch_idx + 1, f"{stage} {batch_idx + 1}"
        if 0 < total < math.inf:
            head += f"/{int(total)}  eta {format_seconds((now - self._paused_at) / done * (total - done))}"
        print(head, flush=True)
        self._printed_at = now


class RichProgress(RichProgressBar):
    """Lightning's Rich bar with the share of time waiting for data, and without the version number."""

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self._waiting = DataWait()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the bar and the clock."""
        self._waiting.on_train_start(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """The logged values and the data-wait share."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        metrics["waiting for data"] = f"{100 * self._waiting.share:.0f} %"
        return metrics


def make_progress(
    kind: Literal["auto", "rich", "plain"] = "auto",
    every_n_steps: int | None = None,
    every_seconds: float | None = 5.0,
) -> ProgressBar:
    """Picks the progress display.

    Args:
        kind: ``auto`` takes Rich when standard output is a terminal that can move its cursor, else plain lines.
        every_n_steps: See :class:`ProgressLine`.
        every_seconds: See :class:`ProgressLine`.

    Raises:
        SafelightError: If ``kind`` is another word.
    """
    if kind not in ("auto", "rich", "plain"):
        raise SafelightError(f"make_progress: kind={kind!r}, choose one of auto, rich, plain")
    if kind == "auto":
        terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
        kind = "rich" if terminal else "plain"
    return RichProgress() if kind == "rich" else ProgressLine(every_n_steps, every_seconds)
