"""Every test runs without network and on one thread per process."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported by any test module.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ[_name] = _value

pytest.register_assert_rewrite("safelight.testing.contracts", "safelight.testing.sharding")

TESTS = Path(__file__).parent
PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
sys.path.insert(0, str(TESTS))

_ORIGINAL = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}


class NetworkBlockedError(AssertionError):
    """A test tried to reach another machine."""


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):
        return True  # A path: a Unix socket.
    host = str(address[0])
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", socket.gethostname())


def _guarded(name: str) -> Callable[..., Any]:
    def call(self: socket.socket, *arguments: Any) -> Any:
        # The address comes last, also in sendto(data, flags, address).
        if not _is_local(arguments[-1]):
            raise NetworkBlockedError(f"a test tried to reach {arguments[-1]!r}; tests run without network")
        return _ORIGINAL[name](self, *arguments)

    return call


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Connections leave this machine only by failing the test; loopback and Unix sockets stay (DDP needs them).

    Put in place before every test and its fixtures: plug-ins such as pytest-socket take it away after each.
    """
    for name in _ORIGINAL:
        setattr(socket.socket, name, _guarded(name))


@pytest.fixture
def clean_run_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run folders announced by an earlier test must not leak into the next."""
    monkeypatch.setenv("SAFELIGHT_RUN_DIR", "")
    for name in ("SAFELIGHT_RUN_DIR", "LOCAL_RANK", "RANK", "SLURM_PROCID", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)


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
    """Runs a command line that must be refused, and checks the manners that all refusals share.

    By default one of ``train.py``, with the toy plug-in at hand; ``main`` takes another program. Returns the message.
    """

    def run(*arguments: str, words: tuple[str, ...] = (), main: Callable[[list[str]], int] | None = None) -> str:
        # Not before the environment above is set; and app is all that a refused command line may need.
        from safelight.cli import app

        before = tree(here)
        status = main(list(arguments)) if main else app.train_main([PLUGIN, *arguments])
        captured = capsys.readouterr()
        message = captured.err
        assert status == 2
        # What only shows when the pieces are built comes after the one line that says where they are put.
        assert re.fullmatch(r"(run folder: .*\n)?", captured.out)
        assert "Traceback" not in message
        assert 1 <= len(message.splitlines()) <= 15, message
        assert "\x1b" not in message
        for word in words:
            assert word in message, message
        assert tree(here) == before
        return message

    return run
