"""What readers of data files share: rows that cannot be used, and on which side of a split a row stands."""

from __future__ import annotations

import hashlib
import warnings
from typing import Literal

from safelight.errors import SafelightError

OnError = Literal["raise", "skip"]


class Faults:
    """Counts what is wrong with rows, and ends the run at the first or says at the end how many were left out.

    Args:
        on_error: ``raise`` or ``skip``.
    """

    def __init__(self, on_error: OnError) -> None:
        self.on_error = on_error
        self.count, self.first = 0, ""

    def add(self, message: str) -> None:
        """Note a fault.

        Raises:
            SafelightError: faults are fatal.
        """
        if self.on_error == "raise":
            raise SafelightError(f"{message}; data.on_error=skip leaves such rows out")
        self.count, self.first = self.count + 1, self.first or message

    def report(self) -> None:
        """Warn about what was left out since the last time."""
        if self.count:
            warnings.warn(f"{self.count} row(s) left out, the first: {self.first}", stacklevel=3)
        self.count, self.first = 0, ""


def drawn(text: str) -> float:
    """A number in [0, 1) that belongs to a text: where it goes depends on nothing else."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48
