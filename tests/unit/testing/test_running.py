"""Tasks in two other processes: a process that a signal ends is replaced once, and only once."""

from __future__ import annotations

import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from safelight.testing.running import on_two_ranks


def _end_below(limit: int, folder: Path) -> int:
    """Rank 1 ends itself until ``limit`` processes have done so."""
    before = len(list(folder.iterdir()))
    if os.environ["RANK"] == "1" and before < limit:
        (folder / str(before)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return int(os.environ["RANK"])


@pytest.mark.ddp
def test_a_task_whose_process_is_ended_by_a_signal_runs_once_more(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="_end_below.* ended a process"):
        assert on_two_ranks(_end_below, 1, tmp_path) == [0, 1]


@pytest.mark.ddp
def test_a_second_end_is_an_error(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="runs once more"), pytest.raises(BrokenProcessPool):
        on_two_ranks(_end_below, 2, tmp_path)
    assert on_two_ranks(_end_below, 0, tmp_path) == [0, 1], "the pool is usable afterwards"
