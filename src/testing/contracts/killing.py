"""Killed and resumed: a run that dies at any moment becomes, bit for bit, the run that nobody interrupted."""

from __future__ import annotations

import atexit
import json
import random
import shutil
import signal
import tempfile
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from safelight.callbacks.checkpointing import read_checkpoint
from safelight.cli.signatures import signature_of
from safelight.testing import commands, signals
from safelight.testing.contracts.instance import Instance
from safelight.testing.states import gap

EPOCH = 5
"""Optimiser steps of an epoch, or fewer where the data set is that small."""
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "random_states", "global_step", "epoch")
"""Parts of a checkpoint that must be the same."""


class Kill(NamedTuple):
    """Where a run dies, and how it loads its data."""

    place: Literal["step", "write"]
    step: int
    num_workers: int = 0

    def __str__(self) -> str:
        return f"{self.place}-{self.step}-{self.num_workers}_workers"


def _drawn(count: int, steps: int, seed: int) -> list[Kill]:
    """Different kills at random moments of a run; a third of them half-way through a checkpoint."""
    source = random.Random(seed)
    kills = [Kill("write", step) for step in source.sample(range(1, steps + 1), count // 3)]
    kills += [Kill("step", step) for step in source.sample(range(steps), count - len(kills))]
    return [kill._replace(num_workers=2 * (i % 2)) for i, kill in enumerate(kills)]


MID_EPOCH = Kill("step", EPOCH + 2)
RANDOM = _drawn(20, 4 * EPOCH, seed=0)
RANDOM_ON_TWO_RANKS = _drawn(3, 2 * EPOCH, seed=1)


@dataclass(frozen=True)
class Whole:
    """A run that nobody interrupted.

    Attributes:
        words: its command line, without the run folder.
        folder: its run folder.
    """

    words: tuple[str, ...]
    folder: Path

    @cached_property
    def end(self) -> dict[str, Any]:
        """What the last checkpoint says."""
        return _end(self.folder)

    @cached_property
    def curve(self) -> dict[tuple[int, str], float]:
        """What was logged in training."""
        return _curve(self.folder)


class Killing(Instance):
    """Tests that kill the real command line with SIGKILL and resume it with ``resume=auto``."""

    def words(self, steps: int, ranks: int) -> tuple[str, ...]:
        """The command line that is killed: short epochs, validation in between, a checkpoint after every step."""
        trainer = "cpu" if ranks == 1 else "ddp_cpu"
        small = [f"data.batch_size={self.batch_size}"] if self._data_takes("batch_size") else []
        return (
            *self.overrides(), f"method={self.method}", *small, f"trainer={trainer}", f"trainer.max_steps={steps}",
            f"trainer.limit_train_batches={EPOCH}", "trainer.limit_val_batches=1", "trainer.log_every_n_steps=1",
            "callbacks.checkpoints.every_n_train_steps=1", signals.CALLBACK, "test=false", "export=false",
            "report=false", "logger=none",
        )  # fmt: skip

    def test_killed_and_resumed(self, tmp_path: Path) -> None:
        """One kill in the middle of an epoch: weights, optimiser and loss curve end as without it."""
        self.kill_and_resume(MID_EPOCH, 2 * EPOCH, tmp_path)

    @pytest.mark.slow
    @pytest.mark.parametrize("kill", RANDOM, ids=str)
    def test_killed_anywhere(self, kill: Kill, tmp_path: Path) -> None:
        """In any step, at the ends of epochs, half-way through a checkpoint, with and without loader workers."""
        self.kill_and_resume(kill, 4 * EPOCH, tmp_path)

    @pytest.mark.slow
    @pytest.mark.ddp
    @pytest.mark.parametrize("kill", RANDOM_ON_TWO_RANKS, ids=str)
    def test_killed_on_two_ranks(self, kill: Kill, tmp_path: Path) -> None:
        """The same for two processes that die together."""
        self.kill_and_resume(kill, 2 * EPOCH, tmp_path, ranks=2)

    def kill_and_resume(self, kill: Kill, steps: int, folder: Path, ranks: int = 1) -> None:
        """Kill a run, resume it, and compare it with the run that nobody interrupted, which is made once.

        Args:
            kill: where it dies.
            steps: optimiser steps of the run.
            folder: an empty one.
            ranks: processes.
        """
        whole = _uninterrupted(type(self), steps, ranks)  # type: ignore[arg-type]  # mypy: classes are not Hashable
        workers = [f"data.num_workers={kill.num_workers}"] if self._data_takes("num_workers") else []
        words = (*whole.words, *workers, "run_dir=run", "resume=auto")
        order = signals.when(kill.step, signal.SIGKILL, kill.place)
        killed = commands.train(folder, *words, ranks=ranks, **order)
        assert killed.returncode == -signal.SIGKILL, f"it was to be killed:\n{killed.stdout}\n{killed.stderr}"
        survived = kill.step - (kill.place == "write")
        last = folder / "run" / "checkpoints" / "last.ckpt"
        if survived:
            assert read_checkpoint(last)["global_step"] == survived
        else:
            assert not last.exists()
        done = commands.train(folder, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert (f"at step {survived}" if survived else "starting a new one") in done.stdout
        size, place = gap(_end(folder / "run"), whole.end)
        assert size == 0.0, f"killed at {kill} and resumed, the run ends {size:.3g} away from the whole one at {place}"
        assert _curve(folder / "run") == whole.curve

    def _data_takes(self, name: str) -> bool:
        """Whether the data module has a setting of that name."""
        block = self.config.get("data")
        return name in signature_of(block["_target_"]).parameters if block else False


@cache
def _uninterrupted(kind: type[Killing], steps: int, ranks: int) -> Whole:
    """One run for all the kills that are compared with it."""
    words = kind().words(steps, ranks)
    top = Path(tempfile.mkdtemp(prefix="uninterrupted_"))
    atexit.register(shutil.rmtree, top, ignore_errors=True)
    folder = top / "here"
    folder.mkdir()
    done = commands.train(folder, *words, "run_dir=run", ranks=ranks)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    whole = Whole(words, folder / "run")
    assert whole.end["global_step"] == steps
    logged = {step for step, _ in whole.curve}
    assert logged == set(range(steps)), f"training logged something at the steps {sorted(logged)} of {steps}"
    return whole


def _end(run: Path) -> dict[str, Any]:
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    return {key: content[key] for key in COMPARED}


def _curve(run: Path) -> dict[tuple[int, str], float]:
    """Logged values by step and name; a value that was logged twice is an error."""
    curve: dict[tuple[int, str], float] = {}
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if name.startswith("train/"):
                assert (entry["step"], name) not in curve, f"{name} of step {entry['step']} was logged twice"
                curve[entry["step"], name] = value
    return curve
