"""Checkpoints that a crash, a kill or a full disk cannot spoil, and that contain no code."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint

from safelight import __version__
from safelight.errors import SafelightError


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint that holds tensors and plain values only.

    Args:
        path: the file.
        map_location: as in ``torch.load``.

    Raises:
        SafelightError: the file is missing, damaged, or would run code when loaded. The message names the file.
    """
    file = Path(path)
    if not file.is_file():
        raise SafelightError(f"there is no checkpoint {str(file)!r}")
    if not zipfile.is_zipfile(file):
        raise SafelightError(
            f"{str(file)!r} is not a checkpoint: it is damaged, cut short, or a bare pickle, which could run code when "
            "loaded and is refused"
        )
    try:
        content = torch.load(file, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        raise SafelightError(
            f"{str(file)!r} holds pickled Python objects, which could run code when loaded; it is refused. Only "
            "checkpoints of tensors and plain values are read"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError, OSError, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SafelightError(f"{str(file)!r} is damaged and cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise SafelightError(f"{str(file)!r} holds a {type(content).__name__}, not a checkpoint")
    return content


def write_atomically(content: bytes | memoryview, path: Path) -> None:
    """Replace a file as a whole: readers see the old one or the new one, never half of one.

    Written aside in the same folder, forced to the disk, then renamed; the folder is forced to the disk too, or the
    rename itself could be lost with the power.

    Raises:
        SafelightError: the disk is full or not writable; an earlier file at ``path`` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name: what a kill leaves behind is overwritten by the next write instead of piling up.
    aside = path.with_name(f".{path.name}.part")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        kept = f"; the previous {path.name} is intact" if path.is_file() else ""
        raise SafelightError(
            f"cannot write {str(path)!r} ({len(content) / 2**20:.1f} MB): {error.strerror or error}{kept}. "
            "Free some space, then go on with resume=auto"
        ) from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint reader and writer, writing atomically and loading without running code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint through ``write_atomically``."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(buffer.getbuffer(), Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint through ``read_checkpoint``; ``weights_only=False`` is not honoured."""
        return read_checkpoint(path, map_location)


class Checkpoints(Checkpoint):
    """Keeps ``last.ckpt``, and ``best.ckpt`` by a monitored metric.

    Args:
        folder: where the files go; the run's ``checkpoints`` folder on the command line.
        every_n_train_steps: optimiser steps between two writes of ``last.ckpt``; it is also written at the end.
        monitor: logged metric that picks ``best.ckpt`` at each validation. None takes the module's ``monitor``
            attribute; without either, the caller may link ``best.ckpt`` to ``last.ckpt`` after training.
        mode: whether a smaller or a larger value is better; None takes the module's ``monitor_mode``.
    """

    def __init__(
        self,
        folder: str | Path = "checkpoints",
        *,
        every_n_train_steps: Annotated[int, Ge(1)] = 100,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.every_n_train_steps = every_n_train_steps
        self.monitor = monitor
        self.mode = mode
        self.best_value: float | None = None
        self._saved_step = -1

    @property
    def last_path(self) -> Path:
        """File that a resumed run starts from."""
        return self.folder / "last.ckpt"

    @property
    def best_path(self) -> Path:
        """File with the best monitored value."""
        return self.folder / "best.ckpt"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take monitor and mode from the module, and agree on rank 0's folder."""
        self.monitor = self.monitor or getattr(pl_module, "monitor", None)
        self.mode = self.mode or getattr(pl_module, "monitor_mode", "min")
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def save_last(self, trainer: Trainer) -> None:
        """Write ``last.ckpt`` now; called on all ranks."""
        if getattr(trainer, "fast_dev_run", False):
            return
        trainer.save_checkpoint(self.last_path)
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` when its time has come; never between two halves of an accumulated step."""
        step = trainer.global_step
        if step != self._saved_step and step and step % self.every_n_train_steps == 0 and stepped(trainer):
            self.save_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``best.ckpt`` if the monitored metric has improved."""
        if (
            trainer.sanity_checking
            or getattr(trainer, "fast_dev_run", False)
            or self.monitor is None
            or trainer.state.fn != "fit"
        ):
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise SafelightError(
                f"best.ckpt is chosen by {self.monitor!r}, but only {known} was logged; "
                "set callbacks.checkpoints.monitor"
            )
        # Each rank has the value of its own samples unless it was logged with sync_dist=True. All must agree whether to
        # write: that is a collective operation, in which those that write would wait for the others for ever.
        number = float(trainer.strategy.reduce(value.detach().clone().to(pl_module.device), reduce_op="mean"))
        worst = math.inf if self.mode == "min" else -math.inf
        best = worst if self.best_value is None else self.best_value
        if number < best if self.mode == "min" else number > best:
            self.best_value = number
            trainer.save_checkpoint(self.best_path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state."""
        if trainer.global_step != self._saved_step:
            self.save_last(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The value ``best.ckpt`` has to be beaten by."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue to compare with the best value so far."""
        self.best_value = state_dict["best_value"]


def stepped(trainer: Trainer) -> bool:
    """Whether the batch that just ended completed an optimiser step, so that nothing is half accumulated."""
    return not trainer.fit_loop._should_accumulate()


class StoreConfig(Callback):
    """Puts the run's configuration into every checkpoint, so that a checkpoint alone can be evaluated or resumed.

    Args:
        config: resolved plain values.
        template: the same before interpolation.
    """

    def __init__(self, config: Mapping[str, Any], template: Mapping[str, Any]) -> None:
        super().__init__()
        self.config, self.template = dict(config), dict(template)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the ``safelight`` entry."""
        checkpoint["safelight"] = {
            "config": self.config,
            "template": self.template,
            "version": __version__,
            "world_size": trainer.world_size,
        }
