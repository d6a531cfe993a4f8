"""What a training run took and what it reached, collected while it runs."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from safelight.callbacks.progress import format_seconds
from safelight.callbacks.waiting import DataWait
from safelight.errors import SafelightError


@dataclass
class RunStats:
    """Numbers of one ``fit``.

    Attributes:
        steps: Optimisation steps done in this process (without those before a resume).
        wall_seconds: From the start to the end of training, validation included.
        steps_per_second: ``steps / wall_seconds``.
        data_wait: Share of the time waiting for data, in [0, 1].
        peak_memory_bytes: CUDA: the allocator's peak of this process. CPU: its largest resident set, or None where
            the system does not tell.
        monitor: The metric that decides what is best, or None.
        best: Its best value so far, or None.
        best_step: The step of that value, or None.
    """

    steps: int = 0
    wall_seconds: float = 0.0
    steps_per_second: float = 0.0
    data_wait: float = 0.0
    peak_memory_bytes: int | None = None
    monitor: str | None = None
    best: float | None = None
    best_step: int | None = None

    def __str__(self) -> str:
        parts = [
            f"{self.steps} steps in {format_seconds(self.wall_seconds)}",
            f"{self.steps_per_second:.3g} steps/s",
            f"{100 * self.data_wait:.0f} % waiting for data",
        ]
        if self.peak_memory_bytes:
            parts.append(f"peak memory {self.peak_memory_bytes / 1e9:.2f} GB")
        if self.best is not None:
            parts.append(f"best {self.monitor} {self.best:.4g} at step {self.best_step}")
        return ", ".join(parts)


class RunSummary(Callback):
    """Collects :class:`RunStats` into ``stats`` and says them in one line when training ends.

    Args:
        monitor: Metric to watch; None takes the module's ``monitor``, else that of a ``ModelCheckpoint``.
        mode: ``min`` or ``max``; None takes the module's ``monitor_mode``, else that of the ``ModelCheckpoint``.
        announce: Whether to print the line.
    """

    def __init__(
        self, monitor: str | None = None, mode: Literal["min", "max"] | None = None, announce: bool = True
    ) -> None:
        if mode not in (None, "min", "max"):
            raise SafelightError(f"RunSummary: mode={mode!r}, choose min or max")
        self.monitor = monitor
        self.mode = mode
        self.announce = announce
        self.stats = RunStats()
        self._waiting = DataWait()
        self._higher = False
        self._first_step = 0
        self._started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock and settles what to watch."""
        monitor, mode = self._watched(trainer, pl_module)
        best, step = (self.stats.best, self.stats.best_step) if self.stats.monitor == monitor else (None, None)
        self.stats = RunStats(monitor=monitor, best=best, best_step=step)
        self._higher = mode == "max"
        self._waiting.on_train_start(trainer, pl_module)
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)
        self._first_step = trainer.global_step
        self._started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks whether the watched metric is the best so far."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for a metric of training."""
        self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Closes the account."""
        self._look(trainer)
        stats = self.stats
        stats.steps = trainer.global_step - self._first_step
        stats.wall_seconds = time.monotonic() - self._started
        stats.steps_per_second = stats.steps / stats.wall_seconds if stats.wall_seconds else 0.0
        stats.data_wait = self._waiting.share
        stats.peak_memory_bytes = _peak_memory(pl_module.device)
        if self.announce:
            rank_zero_only(print)(stats, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, so that a resumed run does not forget it."""
        return {"monitor": self.stats.monitor, "best": self.stats.best, "best_step": self.stats.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what :meth:`state_dict` gave."""
        self.stats = RunStats(**state_dict)

    def _watched(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str | None, str | None]:
        """Name and direction: what the user said, else what the module says, else what a checkpoint goes by."""
        monitor = self.monitor or getattr(pl_module, "monitor", None)
        mode = self.mode or (None if self.monitor else getattr(pl_module, "monitor_mode", None))
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor and monitor in (None, callback.monitor):
                monitor, mode = callback.monitor, mode or callback.mode
        return monitor, mode

    def _look(self, trainer: Trainer) -> None:
        stats = self.stats
        value = trainer.callback_metrics.get(stats.monitor) if stats.monitor else None
        if value is None:
            return
        number = float(value)
        if not math.isfinite(number):
            return
        if stats.best is None or (number > stats.best if self._higher else number < stats.best):
            stats.best, stats.best_step = number, trainer.global_step


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts kilobytes, macOS bytes.
    return peak if sys.platform == "darwin" else peak * 1024
