"""Ctrl-C and SIGTERM outside of training: stop at once, but through the same door as during training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """A stop was asked for where there is no step to finish.

    Attributes:
        signal_number: what arrived.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


@contextmanager
def stop_through_exceptions() -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into ``Stopped`` for the time of a run.

    By default SIGTERM would end the process without a word, and Lightning turns Ctrl-C into exit code 1. Training takes
    the signals over and gives them back here when it is done. Does nothing outside of the main thread, where Python
    delivers no signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
