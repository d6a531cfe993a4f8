"""Runs that are killed, stopped, piped into a file or meet a NaN: nothing is lost, and the next command is printed."""

from __future__ import annotations

import json
import random
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch

from processes import train as run
from safelight.callbacks.checkpointing import read_checkpoint

PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
QUICK = ("test=false", "export=false", "report=false", "logger=none")
TOY = (PLUGIN, "method=toy", "trainer=cpu", "trainer.max_steps=24", "callbacks.checkpoints.every_n_train_steps=1")


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(run_folder / "checkpoints" / "last.ckpt")["state_dict"])


def difference(a: Path, b: Path) -> float:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def loss_curve(run_folder: Path) -> list[tuple[int, float]]:
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    return [(line["step"], line["train/loss"]) for line in logged if "train/loss" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody interrupts, with dropout, noise on the inputs and validation in between."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder, *TOY, *QUICK, "trainer.log_every_n_steps=1", "run_dir=run")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return folder / "run"


def kill_and_resume(folder: Path, whole: Path, step: int) -> None:
    """SIGKILL inside a step; the same line with ``resume=auto`` ends where the whole run ended, bit for bit."""
    words = (*TOY, *QUICK, "trainer.log_every_n_steps=1", f"run_dir=killed{step}", "resume=auto")
    killed = run(folder, *words, TOY_SIGNAL=f"{step}:{signal.SIGKILL.value}")
    assert killed.returncode == -signal.SIGKILL
    assert read_checkpoint(folder / f"killed{step}" / "checkpoints" / "last.ckpt")["global_step"] == step
    done = run(folder, *words)
    assert done.returncode == 0, done.stderr
    assert f"at step {step}" in done.stdout
    assert difference(folder / f"killed{step}", whole) == 0.0
    assert loss_curve(folder / f"killed{step}") == loss_curve(whole)


@pytest.mark.parametrize("step", [5, 17])  # at the boundary of an epoch and in the middle of one
def test_killed_and_resumed_bit_for_bit(tmp_path: Path, whole: Path, step: int) -> None:
    kill_and_resume(tmp_path, whole, step)


@pytest.mark.slow
@pytest.mark.parametrize("step", sorted(random.Random(0).sample(range(1, 24), 20)))
def test_killed_at_any_step_and_resumed_bit_for_bit(tmp_path: Path, whole: Path, step: int) -> None:
    kill_and_resume(tmp_path, whole, step)


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, whole: Path) -> None:
    """One run that dies five times at seeded steps and still becomes the run it would have been."""
    words = (*TOY, *QUICK, "trainer.log_every_n_steps=1", "run_dir=run", "resume=auto")
    for step in sorted(random.Random(1).sample(range(1, 24), 5)):
        assert run(tmp_path, *words, TOY_SIGNAL=f"{step}:{signal.SIGKILL.value}").returncode == -signal.SIGKILL
    assert run(tmp_path, *words).returncode == 0
    assert difference(tmp_path / "run", whole) == 0.0
    assert loss_curve(tmp_path / "run") == loss_curve(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_training_saves_and_the_printed_line_goes_on(tmp_path: Path, whole: Path, number: int) -> None:
    words = (*TOY, *QUICK, "callbacks.checkpoints.every_n_train_steps=100", "run_dir=here")
    stopped = run(tmp_path, *words, TOY_SIGNAL=f"7:{int(number)}")
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
