"""How long training waits for its data."""

from __future__ import annotations

import time
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, LightningModule, Trainer

_FETCH = "train_dataloader_next"


class FetchTimer:
    """Sums the seconds between asking the training loader for a batch and having it.

    Lightning tells its profiler when it fetches, and only there is a fetch told apart from checkpointing, validation
    and other callbacks. The timer listens in on that profiler, whichever it is, and leaves it working as before.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._asked: float | None = None

    @classmethod
    def of(cls, trainer: Trainer) -> FetchTimer:
        """The one timer of this trainer; it starts to listen at the first call."""
        profiler = trainer.profiler  # type: ignore[attr-defined]
        timer = _TIMERS.get(profiler)
        if timer is None:
            timer = _TIMERS[profiler] = cls()
            timer._listen(profiler)
        return timer

    def _listen(self, profiler: Any) -> None:
        start, stop = profiler.start, profiler.stop

        def heard_start(action_name: str) -> None:
            start(action_name)
            if action_name.endswith(_FETCH):
                self._asked = time.perf_counter()

        def heard_stop(action_name: str) -> None:
            if action_name.endswith(_FETCH) and self._asked is not None:
                self.seconds += time.perf_counter() - self._asked
                self._asked = None
            stop(action_name)

        profiler.start, profiler.stop = heard_start, heard_stop


_TIMERS: WeakKeyDictionary[Any, FetchTimer] = WeakKeyDictionary()


class DataWait(Callback):
    """Measures the share of the training time that was spent waiting for data.

    Attributes:
        share: Between 0 and 1, since the start of ``fit``; validation counts as training time.
    """

    def __init__(self) -> None:
        self._timer: FetchTimer | None = None
        self._since = 0.0
        self._before = 0.0

    @property
    def share(self) -> float:
        """Seconds waited / seconds passed since training started; 0 before."""
        passed = time.perf_counter() - self._since
        if self._timer is None or passed <= 0:
            return 0.0
        return min((self._timer.seconds - self._before) / passed, 1.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to measure."""
        self._timer = FetchTimer.of(trainer)
        self._before = self._timer.seconds
        self._since = time.perf_counter()
