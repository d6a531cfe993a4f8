"""A callback through which a run sends itself a signal, so that a test can stop or kill it at an exact place."""

from __future__ import annotations

import os
import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

VARIABLE = "SAFELIGHT_SEND_SIGNAL"
"""Environment variable that :class:`SendSignal` reads."""

CALLBACK = f"+callbacks.send_signal._target_={__name__}.SendSignal"
"""Word of a command line that adds :class:`SendSignal` to a run of any method."""


def when(step: int, number: int = signal.SIGKILL, place: str = "step") -> dict[str, str]:
    """The environment variable that makes :class:`SendSignal` act.

    Args:
        step: optimiser steps done.
        number: the signal.
        place: ``step``, between the gradients of the next step and its update, or ``write``, when the checkpoint of
            that step is half on the disk.
    """
    return {VARIABLE: f"{place}:{step}:{int(number)}"}


class SendSignal(Callback):
    """Sends its own process the signal that the environment asks for, at the place it asks for; else does nothing.

    The order comes through the environment, not through arguments: those are stored in the checkpoint, and a resumed
    run would be killed by them again.
    """

    def __init__(self) -> None:
        self.place, step, number = os.environ.get(VARIABLE, "nowhere:0:0").split(":")
        self.step, self.number = int(step), int(number)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """All ranks have the gradients; none has used them."""
        if self.place == "step" and trainer.global_step == self.step:
            self._send()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Only the rank that writes."""
        if self.place == "write" and trainer.global_step == self.step and trainer.is_global_zero:
            # The next file that is forced to the disk is the checkpoint.
            setattr(os, "fsync", self._cut_and_send)  # noqa: B010  # for a type checker functions are constants

    def _cut_and_send(self, descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        self._send()

    def _send(self) -> None:
        os.kill(os.getpid(), self.number)
