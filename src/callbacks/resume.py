"""Stop and continue a run without changing it: random states, and signals that ask for a stop."""

from __future__ import annotations

import random
import signal
import threading
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from safelight.callbacks.checkpointing import Checkpoints, stepped


def random_state() -> dict[str, Any]:
    """States of all global random streams, as values that a ``weights_only`` load accepts."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put all global random streams back where ``random_state`` found them."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))


class ExactResume(Callback):
    """Makes a resumed run the run that would have been: training has its own random stream, kept in checkpoints.

    The stream is taken at the end of each batch and put back at the start of the next. So nothing between two batches
    (validation, pictures, writing a checkpoint) can shift it, and a run resumed there goes on with the same draws.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put the stream back."""
        if self._state is not None:
            set_random_state(self._state)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the stream; runs before any callback that writes a checkpoint."""
        self._state = random_state()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the streams of all ranks."""
        states: list[Any] = [self._state]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            states = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(states, self._state)
        checkpoint["random_states"] = states

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find this rank's stream again; with another number of ranks there is none to continue."""
        states = checkpoint.get("random_states", [])
        self._state = states[trainer.global_rank] if len(states) == trainer.world_size else None


class StopRequest(BaseException):
    """A stop that was asked for by Ctrl-C or SIGTERM, after the checkpoint was written where that was possible.

    Attributes:
        signal_number: what arrived.
        saved_step: optimiser step of the ``last.ckpt`` written for it; None when it came outside of training.
    """

    def __init__(self, signal_number: int, saved_step: int | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number
        self.saved_step = saved_step


class StopCleanly(Callback):
    """On Ctrl-C or SIGTERM: finish the step, write ``last.ckpt`` on all ranks, then raise ``StopRequest``.

    A second signal stops at once.

    Args:
        checkpoints: writes the file.
    """

    def __init__(self, checkpoints: Checkpoints | None = None) -> None:
        self.checkpoints = checkpoints
        self._received: int | None = None
        self._waits = False
        self._previous: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        second = self._received is not None
        self._received = number
        if second or not (self._waits or self._always_waits):
            raise StopRequest(number)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals for the time of training; from here on they wait for the end of a step.

        Not earlier: Lightning installs a handler of its own before this hook, which starts a collective operation from
        inside the signal and so can lock up with the gradients' reduction.
        """
        self._received = None
        self._waits = True
        # With several ranks all must stop at the same place, so there a signal waits during validation too.
        self._always_waits = trainer.world_size > 1
        if threading.current_thread() is threading.main_thread():
            # SIGUSR2 is how submitit announces that the time of a SLURM job is up.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
                self._previous[number] = signal.signal(number, self._note)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has nothing to save: a signal stops it at once."""
        self._waits = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to training."""
        self._waits = not trainer.sanity_checking

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here if any rank was asked to and no step is half accumulated."""
        asked = self._received is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if not asked or not stepped(trainer):
            return
        if self.checkpoints is not None:
            self.checkpoints.save_last(trainer)
        raise StopRequest(self._received or signal.SIGTERM, trainer.global_step if self.checkpoints else None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back: what follows has nothing to save."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back when training ends badly."""
        self._give_back()

    def _give_back(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            self._previous = {}
