"""Runs of two processes: torchrun writes what the plain launch writes, and no process outlives its run."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from safelight.callbacks.checkpointing import read_checkpoint

TESTS = Path(__file__).parents[1]
SCRIPT = str(TESTS.parent / "train.py")
MARK = "SAFELIGHT_TEST_MARK"
TOY = (
    "hydra.searchpath=[pkg://toy_plugin.configs]", "method=toy", "trainer=ddp_cpu", "data.batch_size=2",
    "callbacks.checkpoints.every_n_train_steps=2", "trainer.log_every_n_steps=1",
)  # fmt: skip
ENDLESS = ("trainer.max_steps=100000", "trainer.max_epochs=-1", "run_dir=here")

pytestmark = [
    pytest.mark.ddp,
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc"),
]


class Launch:
    """A command whose processes can all be found again, wherever they end up."""

    def __init__(self, folder: Path, *words: str, **variables: str) -> None:
        self.mark = uuid.uuid4().hex
        self.error = folder / "stderr.txt"
        environment = {k: v for k, v in os.environ.items() if k not in ("SAFELIGHT_RUN_DIR", "LOCAL_RANK", "RANK")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), MARK: self.mark} | variables
        with self.error.open("w") as error, (folder / "stdout.txt").open("w") as output:
            self.main = subprocess.Popen(
                [sys.executable, *words], cwd=folder, env=environment, stdout=output, stderr=error
            )

    def alive(self) -> dict[int, str]:
        """Number and command of the processes that carry the mark and are not merely waiting to be collected."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (place / "environ").read_bytes():
                    found[int(place.name)] = (place / "cmdline").read_text().replace("\0", " ")
            except (OSError, UnicodeDecodeError):
                continue  # It has ended in between.
        return found

    def children(self) -> list[int]:
        return [number for number in self.alive() if number != self.main.pid]

    def finish(self, seconds: float = 240) -> str:
        """Wait for the main process; what it and its children wrote to standard error."""
        self.main.wait(seconds)
        return self.error.read_text()

    def nothing_left(self, seconds: float = 15) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == {}

    def clean_up(self) -> None:
        for number in self.alive():
            os.kill(number, signal.SIGKILL)
        self.main.wait()


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    started: list[Launch] = []

    def start(*words: str, **variables: str) -> Launch:
        started.append(Launch(tmp_path, *words, **variables))
        return started[-1]

    yield start
    for one in started:
        one.clean_up()


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"])


def tree(folder: Path) -> set[str]:
    """Relative paths; the names of TensorBoard's files say when and where they were written."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {re.sub(r"events\.out\.tfevents\..*", "events", name) for name in names}


def logged(folder: Path) -> list[dict[str, float]]:
    """All numbers but the time they took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("test/mse" in line for line in lines)
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_torchrun_makes_the_run_of_the_plain_launch(tmp_path: Path, launch: Callable[..., Launch]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = (*TOY, "trainer.max_steps=7")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port)
    first = launch(*torchrun, SCRIPT, *words, "name=torchrun")
    text = first.finish()
    assert first.main.returncode == 0, text
    second = launch(SCRIPT, *words, "name=plain")
    text = second.finish()
    assert second.main.returncode == 0, text
    one, other = sorted((tmp_path / "runs" / "toy").iterdir(), key=lambda folder: folder.name.endswith("plain"))
    assert (one.name[-8:], other.name[-5:]) == ("torchrun", "plain")
    assert {entry.name for entry in tmp_path.iterdir()} == {"runs", "stdout.txt", "stderr.txt"}
    assert tree(one) == tree(other)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert (one / "export" / "plane.json").read_bytes() == (other / "export" / "plane.json").read_bytes()
    assert logged(one) == logged(other)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_of_the_main_process_stops_all(tmp_path: Path, launch: Callable[..., Launch], number: int) -> None:
    run = launch(SCRIPT, *TOY, *ENDLESS)
    until((tmp_path / "here" / "checkpoints" / "last.ckpt").is_file)
    run.main.send_signal(number)
    text = run.finish()
    assert run.main.returncode == 128 + number
    assert "Traceback" not in text
    assert text.count("go on with:") == 1
    assert re.search(r"stopped at step \d+; saved here/checkpoints/last.ckpt", text)
    run.nothing_left()


@pytest.mark.parametrize("when", ["starting", "training"])
def test_a_killed_main_process_takes_the_others_along(tmp_path: Path, launch: Callable[..., Launch], when: str) -> None:
    run = launch(SCRIPT, *TOY, *ENDLESS)
    ready = (tmp_path / "here" / "checkpoints" / "last.ckpt").is_file if when == "training" else run.children
    until(lambda: bool(ready()))
    assert len(run.children()) == 1
    if when == "starting":
        time.sleep(1)  # Its interpreter has started, its libraries have not; it would wait for rank 0 for half an hour.
    run.main.kill()
    run.finish()
    run.nothing_left()


def test_a_killed_rank_ends_the_run_with_a_word(tmp_path: Path, launch: Callable[..., Launch]) -> None:
    run = launch(SCRIPT, *TOY, *ENDLESS)
    until((tmp_path / "here" / "checkpoints" / "last.ckpt").is_file)
    (child,) = run.children()
    os.kill(child, signal.SIGKILL)
    text = run.finish()
    assert run.main.returncode == 1, text
    assert "Traceback" not in text
    assert "process 1 of the run was killed by SIGKILL" in text
    assert "here/checkpoints/last.ckpt holds the last saved step" in text
    run.nothing_left()
    # And the printed line does go on.
    step = read_checkpoint(tmp_path / "here" / "checkpoints" / "last.ckpt")["global_step"]
    line = shlex.split(text.splitlines()[-1])
    assert line[:2] == ["python", "train.py"]
    again = launch(SCRIPT, *line[2:], f"trainer.max_steps={step + 2}")
    text = again.finish()
    assert again.main.returncode == 0, text
    assert read_checkpoint(tmp_path / "here" / "checkpoints" / "last.ckpt")["global_step"] == step + 2


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_ends_the_run(tmp_path: Path, launch: Callable[..., Launch], rank: int) -> None:
    run = launch(SCRIPT, *TOY, *ENDLESS, TOY_ERROR="5", TOY_RANK=str(rank))
    text = run.finish()
    assert run.main.returncode == 1
    assert text.count("LookupError: broken on purpose") == 1
    assert text.count("Traceback") == 1
    if rank == 1:
        assert "process 1 of the run ended with exit code 1" in text
        assert text.count("go on with:") == 1
    assert (tmp_path / "here" / "checkpoints" / "last.ckpt").is_file()
    run.nothing_left()
