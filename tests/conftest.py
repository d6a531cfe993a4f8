"""Every test runs without network and on one thread per process."""

from __future__ import annotations

import ipaddress
import os
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
