"""``summary.json``: the numbers of one run, in one schema for every method."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from safelight.errors import SafelightError
from safelight.reporting.files import write_text

FILE_NAME = "summary.json"
_FLAT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]*")


@dataclass
class Summary:
    """The content of ``summary.json``.

    Attributes:
        method: Name of the method, as in ``method=``.
        backbone: Name of the backbone, or None for methods without one.
        data: Name of the data set.
        seed: The seed of the run.
        wall_seconds: Wall time of the whole run in seconds.
        metrics: Flat name -> finite number; the same names in training, evaluation, report and README.
        controls: Control (``random``, ``magnitude``, ...) -> its metrics, under the same names.
        paper: Name -> ``{"value": number, "source": "table or section"}`` as published.
        artefact: Where the exported artefact lies, or None if nothing was exported.
        eval_command: The command line that repeats the numbers.
        versions: Package -> version.
    """

    method: str
    backbone: str | None
    data: str | None
    seed: int
    wall_seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    controls: dict[str, dict[str, float]] = field(default_factory=dict)
    paper: dict[str, dict[str, Any]] = field(default_factory=dict)
    artefact: str | None = None
    eval_command: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def split_logged(
    logged: Mapping[str, Any], prefix: str = "test/"
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Sorts logged values into metrics and controls.

    ``test/<name>`` is a metric, ``test/<control>/<name>`` belongs to a control; everything else is left out.

    Args:
        logged: For example ``trainer.callback_metrics``; numbers or tensors of one element.
        prefix: The stage, with its slash.

    Returns:
        ``(metrics, controls)`` of plain floats.

    Raises:
        SafelightError: If a name has more than two levels below the prefix.
    """
    metrics: dict[str, float] = {}
    controls: dict[str, dict[str, float]] = {}
    for key, value in logged.items():
        if not key.startswith(prefix):
            continue
        parts = key.removeprefix(prefix).split("/")
        if len(parts) == 1:
            metrics[parts[0]] = float(value)
        elif len(parts) == 2:
            controls.setdefault(parts[0], {})[parts[1]] = float(value)
        else:
            raise SafelightError(
                f"metric {key!r} is nested too deeply: log it as '{prefix}<name>' or '{prefix}<control>/<name>'"
            )
    return metrics, controls


def write_summary(folder: str | Path, summary: Summary | Mapping[str, Any]) -> Path:
    """Checks a summary and writes it as ``folder/summary.json``, whole or not at all.

    Args:
        folder: The run folder, or a path that ends in ``.json``.
        summary: The summary or a mapping with the same keys.

    Raises:
        SafelightError: Names every key that is missing, unknown, not flat, not a number or not finite.
    """
    target = Path(folder)
    if target.suffix != ".json":
        target = target / FILE_NAME
    content = _checked(asdict(summary) if isinstance(summary, Summary) else dict(summary), where=str(target))
    return write_text(target, json.dumps(asdict(content), indent=2, allow_nan=False) + "\n")


def read_summary(path: str | Path) -> Summary:
    """Reads ``summary.json`` (a file, or the folder it lies in) and checks it.

    Raises:
        SafelightError: If there is none, or it does not keep the schema.
    """
    source = Path(path)
    if source.is_dir():
        source = source / FILE_NAME
    if not source.is_file():
        raise SafelightError(f"no {FILE_NAME} at {source}: the run has not finished, or the folder is another one")
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise SafelightError(f"{source} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise SafelightError(f"{source} should hold one JSON object, found {type(content).__name__}")
    return _checked(content, where=str(source))


def _checked(content: dict[str, Any], where: str) -> Summary:
    problems: list[str] = []
    known = {f.name for f in fields(Summary)}
    problems += [f"{name}: missing" for name in sorted(known - content.keys())]
    problems += [f"{name}: unknown key" for name in sorted(content.keys() - known)]
    if problems:
        raise SafelightError(f"{where}: " + "; ".join(problems))

    clean = dict(content)
    for name, kinds in {
        "method": (str,),
        "backbone": (str, type(None)),
        "data": (str, type(None)),
        "artefact": (str, type(None)),
        "eval_command": (str,),
        "seed": (int,),
    }.items():
        if not isinstance(content[name], kinds) or isinstance(content[name], bool):
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            problems.append(f"{name}: should be {wanted}, found {content[name]!r}")
    clean["wall_seconds"] = _number("wall_seconds", content["wall_seconds"], problems)
    clean["metrics"] = _numbers("metrics", content["metrics"], problems)
    clean["controls"] = {
        control: _numbers(f"controls.{control}", values, problems)
        for control, values in _mapping("controls", content["controls"], problems).items()
    }
    clean["paper"] = {
        name: _published(f"paper.{name}", entry, problems)
        for name, entry in _mapping("paper", content["paper"], problems).items()
    }
    versions = _mapping("versions", content["versions"], problems)
    problems += [
        f"versions.{name}: should be str, found {value!r}"
        for name, value in versions.items()
        if not isinstance(value, str)
    ]
    if problems:
        raise SafelightError(f"{where}: " + "; ".join(problems))
    return Summary(**clean)


def _mapping(key: str, value: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        problems.append(f"{key}: should be a mapping, found {value!r}")
        return {}
    for name in value:
        if not isinstance(name, str) or not _FLAT_NAME.fullmatch(name):
            problems.append(f"{key}: name {name!r} is not flat (letters, digits, '_', '.', '@', '+', '-')")
    return dict(value)


def _numbers(key: str, value: Any, problems: list[str]) -> dict[str, float]:
    return {name: _number(f"{key}.{name}", number, problems) for name, number in _mapping(key, value, problems).items()}


def _number(key: str, value: Any, problems: list[str]) -> float:
    # Tensors and numpy scalars of one element are welcome, truth values and words are not.
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        number = value if isinstance(value, (int, float)) else float(value)
    except (TypeError, ValueError, RuntimeError):
        problems.append(f"{key}: should be a number, found {value!r}")
        return math.nan
    if not math.isfinite(number):
        problems.append(f"{key}: {number} is not finite")
    return number


def _published(key: str, entry: Any, problems: list[str]) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or set(entry) != {"value", "source"}:
        problems.append(f'{key}: should be {{"value": number, "source": text}}, found {entry!r}')
        return {}
    if not isinstance(entry["source"], str) or not entry["source"].strip():
        problems.append(f"{key}.source: should name the table or section, found {entry['source']!r}")
    return {"value": _number(f"{key}.value", entry["value"], problems), "source": entry["source"]}
