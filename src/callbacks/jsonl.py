"""``metrics.jsonl``: every logged value as one line of JSON, to read with grep, pandas or a test."""

from __future__ import annotations

import json
import math
import os
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, TextIO

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

FILE_NAME = "metrics.jsonl"


class MetricsJsonl(Logger):
    """Appends one JSON object per logging call: ``step``, ``epoch``, ``seconds`` since the start, then the metrics.

    NaN and infinity are not JSON and become null. A line is written whole and flushed at once; what a kill leaves of a
    last line is cut off when the file is opened again.

    Args:
        folder: Where ``metrics.jsonl`` lies.
        name: Another file name.
    """

    def __init__(self, folder: str | Path, name: str = FILE_NAME) -> None:
        super().__init__()
        self.path = Path(folder) / name
        self._file: TextIO | None = None
        self._started = time.monotonic()

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name

    @property
    def version(self) -> str:
        """Empty: there is one file per run folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of the file, so that Lightning's default checkpoints go beside it."""
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> TextIO:
        """The open file; on other ranks an object that swallows everything."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_off_half_line()
            self._file = self.path.open("a", encoding="utf-8")
        return self._file

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends one line."""
        values = {name: _plain(value) for name, value in metrics.items()}
        epoch = values.pop("epoch", None)
        line: dict[str, Any] = {"step": step, "epoch": None if epoch is None else int(epoch)}
        line["seconds"] = round(time.monotonic() - self._started, 3)
        self.experiment.write(json.dumps(line | values, allow_nan=False) + "\n")
        self.experiment.flush()

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder keeps the whole configuration in ``config.yaml``."""

    @rank_zero_only
    def drop_from(self, step: int) -> int:
        """Removes the lines of ``step`` and later, which a resumed run is about to write again.

        Returns:
            How many lines were removed.
        """
        if not self.path.is_file():
            return 0
        self._close()
        self._cut_off_half_line()
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        entries = [json.loads(line) for line in lines]
        kept = [line for line, entry in zip(lines, entries, strict=True) if _is_before(entry, step)]
        # The clock of the run goes on where the kept part of it stopped.
        seconds = [entry["seconds"] for entry in entries if _is_before(entry, step)]
        self._started = time.monotonic() - max(seconds, default=0.0)
        if len(kept) < len(lines):
            aside = self.path.with_name(f".{self.path.name}.part")
            aside.write_text("".join(kept), encoding="utf-8")
            aside.replace(self.path)
        return len(lines) - len(kept)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Brings the file to the disk and closes it; a later call opens it again."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def _cut_off_half_line(self) -> None:
        if not self.path.is_file():
            return
        content = self.path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(self.path, content.rfind(b"\n") + 1)

    def __getstate__(self) -> dict[str, Any]:
        # Spawned processes get a logger without the open file.
        return self.__dict__ | {"_file": None}


def _is_before(entry: dict[str, Any], step: int) -> bool:
    return entry["step"] is None or entry["step"] < step


def _plain(value: Any) -> float | int | None:
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else None


class TrimMetrics(Callback):
    """When a run resumes at some step, removes what ``metrics.jsonl`` already holds of that step and later."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trims every :class:`MetricsJsonl` of the trainer, if training does not start from nothing."""
        if trainer.global_step == 0:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsJsonl):
                logger.drop_from(trainer.global_step)
