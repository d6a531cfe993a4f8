"""Runs of several processes end together: no process is left behind, and one message says how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from safelight.errors import SafelightError

# What gloo and nccl say when the process at the other end is gone.
_GONE = ("onnection closed by peer", "onnection reset by peer", "remote process exit")
_LOOK_EVERY = 0.5
_GRACE = 5.0


class PeerLostError(SafelightError):
    """Another process of the run is gone, so that this one cannot go on."""


def watch_parent() -> None:
    """End this process soon after the one that launched it, whatever happened to that.

    A thread that looks at the parent's number rather than ``prctl(PR_SET_PDEATHSIG)``: it works on every system, does
    not depend on which thread of the parent started us, and also while the main thread waits in a collective operation
    for the process that is gone. Does nothing in a process that no launcher has started.
    """
    if "LOCAL_RANK" not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_EVERY)
        # Not an exception: the main thread may be where it can receive none.
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def let_the_first_speak() -> None:
    """Wait a moment: a mistake that all processes meet is told by the first one, whose end ends this process too."""
    time.sleep(_GRACE)


@contextmanager
def together(say_lost: Callable[[PeerLostError], None]) -> Iterator[None]:
    """Watch the processes that Lightning starts inside the block, and say which one was lost.

    Lightning's own watch kills the main process without a word when another one dies.

    Args:
        say_lost: prints the message where the main thread cannot, because it waits for the lost process.

    Raises:
        PeerLostError: in place of the error that a collective operation with a lost process ends in.
    """
    launchers: Any = import_module("lightning.pytorch.strategies.launchers.subprocess_script")
    started: list[subprocess.Popen[bytes]] = []
    told = threading.Event()

    def watch() -> None:
        while not any(child.poll() for child in started):
            if all(child.poll() == 0 for child in started):
                return
            time.sleep(_LOOK_EVERY)
        # With gloo the main thread meets an error at once and ends the run itself; with nccl it may wait for ever.
        if told.wait(2 * _GRACE):
            return
        say_lost(PeerLostError(_story(started)))
        for child in started:
            child.kill()
        os._exit(1)

    def launched(children: list[subprocess.Popen[bytes]]) -> None:
        started.extend(children)
        threading.Thread(target=watch, name="child-watch", daemon=True).start()

    theirs = launchers._launch_process_observer
    launchers._launch_process_observer = launched
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error) for text in _GONE):
            raise
        raise PeerLostError(_story(started)) from error
    finally:
        told.set()
        launchers._launch_process_observer = theirs


def _story(children: Sequence[subprocess.Popen[bytes]]) -> str:
    """Which child ended, and how; it may need a moment to do so."""
    deadline = time.monotonic() + _GRACE
    while children and not any(child.poll() for child in children) and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY / 5)
    for rank, child in enumerate(children, 1):
        code = child.poll()
        if code and code < 0:
            name = signal.Signals(-code).name
            memory = "; the system does that when memory runs out" if name == "SIGKILL" else ""
            return f"process {rank} of the run was killed by {name}{memory}"
        if code:
            return f"process {rank} of the run ended with exit code {code}; what it printed stands above"
    return "another process of the run is gone; what it printed stands above"
