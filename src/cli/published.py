"""Figures that a configuration quotes from a paper: ``paper: {<metric>: {value: 27.4, source: table 1}}``.

They end in ``summary.json`` and in the report beside what was measured, in place of the method's own
``paper_numbers``. A name that the method never measures must say so with ``measured: false``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from safelight.cli.crosschecks import TARGET
from safelight.cli.problems import Problem, did_you_mean
from safelight.cli.signatures import class_attribute

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_ENTRY: Final = ("value", "source", "measured")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]*")


def problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the quoted figures of a resolved configuration."""
    quoted = config.get("paper")
    if quoted is None:
        return
    if not isinstance(quoted, Mapping):
        yield Problem("paper", f"is {quoted!r}; must map names of metrics to {{value: <number>, source: <table>}}")
        return
    method = config.get("method")
    target = method.get(TARGET) if isinstance(method, Mapping) else None
    declared = class_attribute(target, "metric_names") if isinstance(target, str) else None
    for name, entry in quoted.items():
        wrong = _shape_problem(f"paper.{name}", name, entry)
        if wrong is not None:
            yield wrong
        elif declared is not None:
            yield from _name_problems(name, entry.get("measured", True), declared, str(target).rpartition(".")[2])


def _shape_problem(where: str, name: Any, entry: Any) -> Problem | None:
    """The first thing wrong with one figure by itself."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return Problem(where, "is no name of a metric: letters, digits, '_', '.', '@', '+' and '-'")
    if not isinstance(entry, Mapping) or not {"value", "source"} <= set(entry):
        return Problem(where, f"is {entry!r}; must be {{value: <number>, source: <table or section>}}")
    unknown = [key for key in entry if key not in _ENTRY]
    if unknown:
        hint, _ = did_you_mean(str(unknown[0]), _ENTRY)
        return Problem(f"{where}.{unknown[0]}", f"is no part of a figure; {hint}")
    value, source = entry["value"], entry["source"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return Problem(f"{where}.value", f"is {value!r}; must be a number that is finite")
    if not isinstance(source, str) or not source.strip():
        return Problem(f"{where}.source", f"is {source!r}; must say where the figure stands: a table or section")
    if not isinstance(entry.get("measured", True), bool):
        return Problem(f"{where}.measured", f"is {entry['measured']!r}; must be true or false")
    return None


def _name_problems(name: str, measured: bool, declared: Any, method: str) -> Iterator[Problem]:
    if measured and name not in declared:
        hint, _ = did_you_mean(name, declared)
        yield Problem(f"paper.{name}", f"{method} never measures it; add measured: false, or {hint}")
    elif not measured and name in declared:
        yield Problem(f"paper.{name}.measured", f"is false, but {method} measures {name}; leave it out")


def figures(config: Mapping[str, Any], module: LightningModule) -> dict[str, dict[str, Any]]:
    """The figures to put beside those of a run: the configuration's, or else the method's own ``paper_numbers``.

    Returns:
        Metric to ``{"value": ..., "source": ...}``; the source says so where the method does not measure it.
    """
    quoted = config.get("paper") or getattr(module, "paper_numbers", {})
    return {
        name: {
            "value": entry["value"],
            "source": entry["source"] + ("" if entry.get("measured", True) else " (not measured here)"),
        }
        for name, entry in quoted.items()
    }
