"""Pictures and histograms in TensorBoard."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from safelight.errors import SafelightError


@contextmanager
def untouched(module: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; random states and training flags as before outside.

    Drawing a picture in the middle of training must not change the numbers of the run.
    """
    flags = [(part, part.training) for part in module.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            module.eval()
            yield
    finally:
        for part, training in flags:
            part.training = training
        random.setstate(python)
        np.random.set_state(numpy)


class TensorBoardMedia(Callback):
    """Asks the module for pictures every so many steps and adds histograms of its trainable parameters.

    A module takes part by having ``log_media(writer, step)``, where ``writer`` is TensorBoard's ``SummaryWriter``. It
    is called in eval mode, without gradients and with the random state put back afterwards, on the first rank only, so
    it must not call collectives; where weights are sharded it is called on all ranks, because all are needed to use
    them, and only the first one's ``writer`` writes. Without a TensorBoard logger nothing happens.

    Args:
        every_n_steps: Optimisation steps between two calls; the start and the end of training are always shown.
        histograms: Whether to add the histograms.

    Raises:
        SafelightError: If ``every_n_steps`` < 1.
    """

    def __init__(self, every_n_steps: int = 100, histograms: bool = True) -> None:
        if every_n_steps < 1:
            raise SafelightError(f"TensorBoardMedia: every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.histograms = histograms
        self._shown = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows how it begins."""
        self._shown = -1
        self._show(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Shows every so many steps."""
        if trainer.global_step % self.every_n_steps == 0:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows how it ends."""
        self._show(trainer, pl_module)

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        # Under gradient accumulation several batches end at the same step.
        if step == self._shown or not (trainer.is_global_zero or _is_sharded(pl_module)):
            return
        self._shown = step
        log_media = getattr(pl_module, "log_media", None)
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                continue
            if callable(log_media):
                with untouched(pl_module):
                    log_media(logger.experiment, step)
            if self.histograms:
                self._add_histograms(logger, pl_module, step)

    def _add_histograms(self, logger: TensorBoardLogger, pl_module: LightningModule, step: int) -> None:
        for name, parameter in pl_module.named_parameters():
            if not parameter.requires_grad:
                continue
            values = parameter.detach()
            values = values.full_tensor() if hasattr(values, "full_tensor") else values
            # TensorBoard refuses non-finite values; stopping the run for them is another callback's task.
            if values.numel() and bool(values.isfinite().all()):
                logger.experiment.add_histogram(f"parameters/{name}", values.float().cpu(), step)


def _is_sharded(module: torch.nn.Module) -> bool:
    return any(hasattr(parameter, "full_tensor") for parameter in module.parameters())
