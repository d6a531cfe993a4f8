"""Command lines that must be refused, and the manners that all refusals share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from safelight.cli import app

PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a user, who keeps one file in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    monkeypatch.chdir(folder)
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused, and checks the manners that all refusals share."""

    def run(*arguments: str, words: tuple[str, ...] = (), main: Callable[..., int] = app.train_main) -> str:
        before = tree(here)
        assert main([PLUGIN, *arguments] if main is app.train_main else list(arguments)) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert 1 <= len(message.splitlines()) <= 15, message
        assert "\x1b" not in message
        for word in words:
            assert word in message, message
        assert tree(here) == before
        return message

    return run
