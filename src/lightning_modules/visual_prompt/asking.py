"""What the two command lines that ask about marked pictures share: options, marks, tables, JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from safelight.errors import SafelightError
from safelight.lightning_modules.visual_prompt.picture_marks import BIAS, LEARNED, MARKERS, AttentionBias, Mark, learned
from safelight.lightning_modules.visual_prompt.scoring import Outcome
from safelight.quiet import quiet
from safelight.reporting.files import write_text

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Those of both."""
    parser.add_argument("--model", default="zoo:tiny_clip", help="CLIP or SigLIP: zoo:tiny_clip, a folder or a hub id")
    parser.add_argument("--prompt", type=Path, help="run or export folder of a trained prompt")
    parser.add_argument("--scale", type=float, help="factor on the prompt's size")
    parser.add_argument("--bias-strength", type=float, default=4.0, help="of attention steered from inside, nats")
    parser.add_argument("--limit", type=int, help="so many pictures or objects, evenly spaced")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--json", type=Path, help="file for the results")


def chosen_marks(given: argparse.Namespace) -> dict[str, Mark]:
    """Marks by hand, attention from inside, and the trained prompt if one is given."""
    marks: dict[str, Mark] = {**MARKERS, BIAS: AttentionBias(given.bias_strength)}
    return marks if given.prompt is None else marks | {LEARNED: learned(given.prompt, given.scale)}


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """At most ``limit`` of them, evenly spaced: files are sorted by what they show.

    Raises:
        SafelightError: the limit is none.
    """
    if limit is None or limit >= len(items):
        return list(items)
    if limit < 1:
        raise SafelightError(f"limit={limit}: give 1 or more")
    return [items[place * len(items) // limit] for place in range(limit)]


def filled(template: str, name: str, value: str) -> str:
    """A text made of a template.

    Raises:
        SafelightError: it has not one place for the value.
    """
    if template.count(f"{{{name}}}") != 1:
        raise SafelightError(f"template={template!r}: write {{{name}}} once, where it goes")
    return template.replace(f"{{{name}}}", value)


def reporting(result: Outcome, first: Outcome) -> dict[str, Any]:
    """Figures of a result, and how far it is above ``first``."""
    gain = result.gain(first)
    return {
        "accuracy": result.accuracy, "interval": list(result.interval()),
        "gain_over_none": gain[0], "gain_interval": list(gain[1:]),
    }  # fmt: skip


def table(fixed: Mapping[str, float], found: Mapping[str, Outcome]) -> str:
    """Accuracies with their intervals, and gains over ``none``; ``fixed`` are figures that need no model."""
    width = max(map(len, [*fixed, *found]))
    lines = [f"{'mark':{width}}  right     95 %               over none"]
    lines += [f"{name:{width}}  {100 * value:5.1f} %" for name, value in fixed.items()]
    for name, result in found.items():
        (low, high), (gain, least, most) = result.interval(), result.gain(found["none"])
        above = "" if name == "none" else f"{100 * gain:+5.1f} ({100 * least:+.1f} to {100 * most:+.1f})"
        line = f"{name:{width}}  {100 * result.accuracy:5.1f} %  {f'{100 * low:.1f} to {100 * high:.1f} %':17}  {above}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def finish(given: argparse.Namespace, report: Callable[[argparse.Namespace], dict[str, Any]]) -> int:
    """Run a report, write its figures; the exit status."""
    try:
        with quiet():
            figures = report(given)
        if given.json is not None:
            try:
                write_text(given.json, json.dumps(figures, indent=1) + "\n")
            except OSError as error:
                raise SafelightError(f"--json: {given.json} cannot be written ({error})") from error
            print(f"written to {given.json}")
    except SafelightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
