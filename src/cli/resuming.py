"""Find the run to continue, and decide which configuration applies to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safelight.cli.folders import is_finished
from safelight.errors import SafelightError

# Blocks in which the command line wins when a run is continued: they say how long, where and with what eyes a run goes
# on, not what it is.
_MAY_CHANGE: Final = ("trainer", "callbacks", "logger")
# Keys that are about this call, not about the run.
_OF_THIS_CALL: Final = ("resume", "run_dir", "runs_dir", "overwrite", "full_error", "test", "export", "report", "name")


@dataclass(frozen=True)
class Resumable:
    """A checkpoint to continue from.

    Attributes:
        folder: the run folder.
        checkpoint: the file.
        step: optimiser steps done.
        config: the run's resolved configuration.
        template: the same before interpolation.
    """

    folder: Path
    checkpoint: Path
    step: int
    config: dict[str, Any]
    template: dict[str, Any]


def find_resumable(config: Mapping[str, Any]) -> Resumable | None:
    """What ``resume=`` points at: None means there is nothing to continue and a new run starts.

    Args:
        config: a resolved configuration; reads ``resume``, ``run_dir``, ``runs_dir`` and ``choices.method``.

    Raises:
        SafelightError: an explicit ``resume=<path>`` holds no readable checkpoint.
    """
    wish = str(config["resume"])
    if wish != "auto":
        return _from_path(Path(wish).expanduser())
    if config.get("run_dir"):
        return _newest([Path(config["run_dir"]).expanduser()])
    runs = Path(config["runs_dir"]).expanduser() / str(config["choices"]["method"])
    folders = [entry for entry in sorted(runs.iterdir()) if entry.is_dir()] if runs.is_dir() else []
    return _newest([folder for folder in folders if not is_finished(folder)])


def _newest(folders: Sequence[Path]) -> Resumable | None:
    """The candidate with the most optimiser steps; of equals the one in the later folder."""
    found: Resumable | None = None
    for folder in folders:
        for name in ("last.ckpt", "best.ckpt"):
            file = folder / "checkpoints" / name
            if not file.is_file():
                continue
            try:
                candidate = _open(file)
            except SafelightError as error:
                print(f"resume: skipped {file}: {error}")
                continue
            if found is None or candidate.step >= found.step:
                found = candidate
            break
    return found


def _from_path(path: Path) -> Resumable:
    if path.is_dir():
        found = _newest([path])
        if found is None:
            raise SafelightError(f"resume: {str(path)!r} holds no checkpoint that can be read")
        return found
    return _open(path)


def _open(file: Path) -> Resumable:
    from safelight.callbacks.checkpointing import read_checkpoint

    content = read_checkpoint(file)
    stored = content.get("safelight")
    whole = "loops" in content and "global_step" in content
    if not isinstance(stored, dict) or not all(isinstance(stored.get(k), dict) for k in ("config", "template")):
        whole, stored = False, {}
    if not whole:
        raise SafelightError(f"{str(file)!r} was not written by a Safelight training run")
    step = int(content["global_step"])
    return Resumable(file.parent.parent, file, step, stored["config"], stored["template"])


def merge(
    found: Resumable, config: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """The configuration a continued run uses: the checkpoint's, except for how it is run.

    Args:
        found: the run to continue.
        config: what the command line composed to.
        overrides: what was typed.

    Returns:
        The configuration, its template, and one sentence for each difference the user should know.

    Raises:
        SafelightError: ``method=`` was typed and the checkpoint is of another one.
    """
    _same_method(found, config, overrides)
    result, template = _copy(found.config), _copy(found.template)
    notes = []
    for typed in overrides:
        key = typed.lstrip("+~").partition("=")[0].partition("@")[0]
        group = key.partition(".")[0]
        if group in _MAY_CHANGE and config.get(group) is not None:
            path = key.split(".")
            before, now = _get(result, path), _get(config, path)
            if before != now:
                _set(result, path, now)
                _set(template, path, now)
                notes += _changes(key, before, now)
    ours = {k: v for k, v in _flat(config).items() if not k.startswith(tuple(f"{g}." for g in _MAY_CHANGE))}
    theirs = _flat(found.config)
    for key in sorted(ours.keys() & theirs.keys()):
        if key.partition(".")[0] not in _OF_THIS_CALL and ours[key] != theirs[key]:
            notes.append(f"{key}: {_show(theirs[key])} from the checkpoint wins over {_show(ours[key])}")
    for key in _OF_THIS_CALL:
        if key in config:
            result[key] = template[key] = config[key]
    return result, template, notes


def _same_method(found: Resumable, config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    theirs, ours = (each.get("choices", {}).get("method") for each in (found.config, config))
    if theirs != ours and any(word.startswith("method=") for word in overrides):
        raise SafelightError(
            f"resume: {str(found.checkpoint)!r} is a checkpoint of {theirs}, not of {ours}; "
            f"use method={theirs}, or another resume="
        )


def _changes(key: str, before: Any, now: Any) -> list[str]:
    """One sentence per leaf that the command line changes."""
    old, new = (_flat({key: value}) for value in (before, now))
    return [
        f"{leaf}: {_show(new.get(leaf))} from the command line (the checkpoint has {_show(old.get(leaf))})"
        for leaf in sorted(old.keys() | new.keys())
        if old.get(leaf) != new.get(leaf)
    ]


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return [_copy(inner) for inner in value] if isinstance(value, list) else value


def _get(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    node: Any = config
    for part in path:
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _set(config: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        config = config.setdefault(part, {})
    config[path[-1]] = value


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _show(value: Any) -> str:
    text = "{…}" if isinstance(value, dict) else str(value)
    return text if len(text) < 60 else text[:59] + "…"
