"""The runner of command lines that tests kill."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.testing import commands

TOY = ("hydra.searchpath=[pkg://toy_plugin.configs]", "method=toy", "trainer=cpu", "logger=none", "test=false")


def test_a_run_that_hangs_is_no_run_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.setattr(commands, "TIMEOUT", 3)
    with pytest.raises(TimeoutError, match="did not end within 3 s"):
        commands.train(here, *TOY, "trainer.max_steps=1000000")
