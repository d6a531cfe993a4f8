"""Checkpoints survive full disks and kills, and never run code."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from safelight.callbacks.checkpointing import AtomicCheckpointIO, read_checkpoint
from safelight.callbacks.resume import random_state, set_random_state
from safelight.errors import SafelightError


class Malicious:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def test_round_trip_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.arange(3), "b": [1, "x", None]}, path)
    content = AtomicCheckpointIO().load_checkpoint(path)
    assert content["a"].tolist() == [0, 1, 2]
    assert content["b"] == [1, "x", None]
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(SafelightError, match=r"cannot write .*last.ckpt.*previous last.ckpt is intact"):
            io.save_checkpoint({"step": 2, "big": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert read_checkpoint(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_kill_during_the_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"step": 1}, path)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom safelight.callbacks import checkpointing\n"
        "def stall(handle):\n    print('writing', flush=True)\n    time.sleep(60)\n"
        "checkpointing.os.fsync = stall\n"
        "checkpointing.write_atomically(b'half', Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.kill()
    process.wait()
    assert read_checkpoint(path)["step"] == 1
    AtomicCheckpointIO().save_checkpoint({"step": 2}, path)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert read_checkpoint(path)["step"] == 2


def test_code_in_a_checkpoint_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    for name, zipped in (("new.ckpt", True), ("old.ckpt", False)):
        path = tmp_path / name
        torch.save({"x": Malicious(target)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(SafelightError, match=rf"{name}.*(could run code).*refused"):
            AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not target.exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"x": torch.zeros(5000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SafelightError, match=r"last.ckpt' is not a checkpoint: it is damaged"):
        read_checkpoint(path)
    middle = bytearray(whole)
    middle[40:400] = b"\0" * 360
    path.write_bytes(bytes(middle))
    with pytest.raises(SafelightError, match=r"last.ckpt"):
        read_checkpoint(path)
    with pytest.raises(SafelightError, match="there is no checkpoint"):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_random_state_survives_a_checkpoint(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    draw()
    AtomicCheckpointIO().save_checkpoint({"state": random_state()}, tmp_path / "s.ckpt")
    expected = draw()
    assert draw() != expected
    set_random_state(read_checkpoint(tmp_path / "s.ckpt")["state"])
    assert draw() == expected
