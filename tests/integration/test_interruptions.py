"""Runs that are stopped, killed again and again, piped into a file or meet a NaN: nothing is lost.

That a run which is killed once goes on bit for bit is part of every method's contract.
"""

from __future__ import annotations

import random
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch

from safelight.callbacks.checkpointing import read_checkpoint
from safelight.testing import signals
from safelight.testing.commands import train as run

PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
QUICK = ("test=false", "export=false", "report=false", "logger=none")
TOY = (PLUGIN, "method=toy", "trainer=cpu", "trainer.max_steps=24", "callbacks.checkpoints.every_n_train_steps=1")


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(run_folder / "checkpoints" / "last.ckpt")["state_dict"])


def difference(a: Path, b: Path) -> float:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts, with dropout, noise on the inputs and validation in between."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, *TOY, *QUICK, "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder / "run"


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, whole: Path) -> None:
    """One run that dies five times at seeded steps and still becomes the run it would have been."""
    words = (*TOY, *QUICK, "run_dir=run", "resume=auto")
    for step in sorted(random.Random(1).sample(range(1, 24), 5)):
        assert run(tmp_path, *words, **signals.when(step)).returncode == -signal.SIGKILL
    assert run(tmp_path, *words).returncode == 0
    assert difference(tmp_path / "run", whole) == 0.0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_training_saves_and_the_printed_line_goes_on(tmp_path: Path, whole: Path, number: int) -> None:
    words = (*TOY, *QUICK, "callbacks.checkpoints.every_n_train_steps=100", "run_dir=here")
    stopped = run(tmp_path, *words, **signals.when(7, number))
    assert stopped.returncode == 128 + number
    assert "Traceback" not in stopped.stderr
    assert "stopped at step 8; saved here/checkpoints/last.ckpt" in stopped.stderr
    line = shlex.split(stopped.stderr.splitlines()[-1])
    assert line[:2] == ["python", "train.py"]
    done = run(tmp_path, *line[2:])
    assert done.returncode == 0, done.stderr
    assert "at step 8" in done.stdout
    assert difference(tmp_path / "here", whole) == 0.0


@pytest.mark.parametrize(
    ("stage", "number"),
    [
        (stage, number)
        for stage in ("setup", "validation", "test", "export")
        for number in (signal.SIGINT, signal.SIGTERM)
    ],
)
def test_stopped_outside_of_training(tmp_path: Path, stage: str, number: int) -> None:
    words = (PLUGIN, "method=toy", "trainer=cpu", "trainer.max_steps=6", "callbacks.checkpoints.every_n_train_steps=2")
    stopped = run(tmp_path, *words, "run_dir=here", TOY_STAGE=f"{stage}:{int(number)}")
    assert stopped.returncode == 128 + number, stopped.stderr
    assert "Traceback" not in stopped.stderr
    here = tmp_path / "here"
    assert not (here / "export").exists()
    assert not (here / "summary.json").exists()
    if stage == "setup":
        assert "stopped before the first checkpoint" in stopped.stderr
        assert list(tmp_path.iterdir()) == []
        return
    assert "here/checkpoints/last.ckpt holds the last saved step" in stopped.stderr
    done = run(tmp_path, *shlex.split(stopped.stderr.splitlines()[-1])[2:])
    assert done.returncode == 0, done.stderr
    assert (here / "export" / "plane.json").is_file()
    assert (here / "summary.json").is_file()
    assert not (here / "export" / "half.json").exists()


def test_a_nan_stops_the_run_at_once_by_step_and_name(tmp_path: Path) -> None:
    done = run(tmp_path, *TOY, "run_dir=here", TOY_NAN="4")
    assert done.returncode == 2
    assert "training stopped at step 5: the loss is not finite" in done.stderr
    assert "train/loss" in done.stderr
    assert len(done.stderr.splitlines()) <= 15
    assert "Traceback" not in done.stderr
    left = {entry.name for entry in (tmp_path / "here").iterdir()}
    assert "checkpoints" in left  # step 4, whose weights are good
    assert not left & {"export", "report", "summary.json"}
    state = read_checkpoint(tmp_path / "here" / "checkpoints" / "last.ckpt")
    assert state["global_step"] == 4
    assert all(bool(value.isfinite().all()) for value in state["state_dict"].values())


def test_output_in_a_file_is_plain_and_short(tmp_path: Path) -> None:
    done = run(tmp_path, PLUGIN, "method=toy", "trainer=cpu", "trainer.max_steps=400")
    assert done.returncode == 0, done.stderr
    for text in (done.stdout, done.stderr):
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)  # no escape codes, no carriage returns
        assert len(text.splitlines()) <= 200
    assert re.search(r"^step 400/400 .* loss \d.* steps/s ", done.stdout, re.MULTILINE)
