"""Callbacks and loggers that watch any run; they know no method and change no number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.lazy import lazy_exports

if TYPE_CHECKING:
    from safelight.callbacks.activation_cache import ActivationCache as ActivationCache
    from safelight.callbacks.jsonl import MetricsJsonl as MetricsJsonl
    from safelight.callbacks.jsonl import TrimMetrics as TrimMetrics
    from safelight.callbacks.media import TensorBoardMedia as TensorBoardMedia
    from safelight.callbacks.nonfinite import NonFiniteError as NonFiniteError
    from safelight.callbacks.nonfinite import StopOnNonFinite as StopOnNonFinite
    from safelight.callbacks.progress import ProgressLine as ProgressLine
    from safelight.callbacks.progress import RichProgress as RichProgress
    from safelight.callbacks.progress import make_progress as make_progress
    from safelight.callbacks.sae_probe import SAEProbe as SAEProbe
    from safelight.callbacks.summary import RunSummary as RunSummary
    from safelight.callbacks.waiting import DataWait as DataWait

_HOME = {
    "ActivationCache": "activation_cache",
    "DataWait": "waiting",
    "MetricsJsonl": "jsonl",
    "NonFiniteError": "nonfinite",
    "ProgressLine": "progress",
    "RichProgress": "progress",
    "RunSummary": "summary",
    "SAEProbe": "sae_probe",
    "StopOnNonFinite": "nonfinite",
    "TensorBoardMedia": "media",
    "TrimMetrics": "jsonl",
    "make_progress": "progress",
}
__all__ = sorted(_HOME)
__getattr__, __dir__ = lazy_exports(__name__, _HOME)
