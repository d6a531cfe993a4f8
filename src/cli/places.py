"""Files and folders that a configuration names: whether they are there, and whether a run may write to them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from safelight.cli.folders import is_used, process_rank
from safelight.cli.problems import Problem, nearest
from safelight.errors import SafelightError

_PATH_NAMES: Final = ("path", "folder", "dir", "root", "file")
# Folders that are made when they are not there.
_WRITTEN: Final = ("targets_folder",)
_FILE_ENDINGS: Final = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".zip", ".safetensors", ".ckpt", ".npz", ".parquet")
_ZOO: Final = "zoo:"
_HUB: Final = "hf:"


def check(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Everything that is wrong with the places named in a resolved configuration."""
    for group in ("backbone", "data", "method"):
        block = config.get(group)
        for name, value in block.items() if isinstance(block, dict) else ():
            if isinstance(value, str) and value and "cache" not in name:
                yield from _check_named(f"{group}.{name}", name, value)
    yield from _run_folder_problems(config)


def _check_named(where: str, name: str, value: str) -> Iterator[Problem]:
    path = Path(value).expanduser()
    if name in _WRITTEN:
        wrong = why_unwritable(path)
        if wrong:
            yield Problem(where, wrong)
    elif value.startswith(_ZOO):
        from safelight import zoo

        try:
            zoo.path(value.removeprefix(_ZOO))
        except SafelightError as error:
            yield Problem(where, str(error))
    elif value.startswith(_HUB):
        return  # a data set of the hub is asked for when the data are set up
    elif name == "pretrained":
        yield from _pretrained_problems(where, value)
    elif (_names_a_path(name) or value.lower().endswith(_FILE_ENDINGS)) and not _exists(path):
        yield Problem(where, f"there is no {value!r} here{nearest_sibling(value)}")


def _names_a_path(name: str) -> bool:
    return name in _PATH_NAMES or name.endswith(tuple(f"_{word}" for word in _PATH_NAMES))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name longer than the file system takes, or with a zero byte in it
        return False


def _pretrained_problems(where: str, value: str) -> Iterator[Problem]:
    """A ``pretrained`` that can only be a local folder and is none."""
    # A hub id is `name` or `owner/name`; anything else with a slash, a dot or a tilde in front is a folder.
    path = Path(value).expanduser()
    local = value.startswith(("/", "./", "../", "~")) or value.count("/") > 1
    if local and not _exists(path):
        text = f"there is no folder {value!r}; give a diffusers folder or a hub id{nearest_sibling(value)}"
        yield Problem(where, text)
    elif _exists(path) and not path.is_dir():
        yield Problem(where, f"{value!r} is a file; give the folder of a pipeline")


def _run_folder_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A run folder that is in use or cannot be made, and a run to resume that is not there."""
    resume, run_dir, runs_dir = config.get("resume"), config.get("run_dir"), config.get("runs_dir")
    if isinstance(resume, str) and resume and resume != "auto":
        wrong = _why_not_resumable(resume)
        if wrong:
            yield Problem("resume", wrong)
    if process_rank() > 0:
        return
    if isinstance(run_dir, str) and run_dir:
        folder = Path(run_dir).expanduser()
        wrong = why_unwritable(folder)
        if wrong:
            yield Problem("run_dir", wrong)
        elif not resume and not config.get("overwrite") and is_used(folder):
            text = f"{run_dir!r} holds an earlier run; add resume=auto to go on with it or overwrite=true to replace it"
            yield Problem("run_dir", text)
    elif isinstance(runs_dir, str) and runs_dir:
        wrong = why_unwritable(Path(runs_dir).expanduser())
        if wrong:
            yield Problem("runs_dir", wrong)


def _why_not_resumable(value: str) -> str | None:
    path = Path(value).expanduser()
    if not _exists(path):
        text = f"there is no run folder or checkpoint {value!r}; resume=auto finds the newest unfinished run"
        return text + nearest_sibling(value)
    if path.is_dir():
        inside = [path / "checkpoints" / name for name in ("last.ckpt", "best.ckpt")]
        return None if any(file.is_file() for file in inside) else f"{value!r} holds no checkpoints/last.ckpt"
    return None if zipfile.is_zipfile(path) else f"{value!r} is not a checkpoint, or it is cut short"


def why_unwritable(folder: Path) -> str | None:
    """Why a run cannot make or fill a folder, in words; None when it can."""
    try:
        above = next((part for part in (folder, *folder.parents) if part.exists()), Path())
    except (OSError, ValueError) as error:
        return f"{str(folder)[:60]!r} cannot be a folder: {getattr(error, 'strerror', None) or error}"
    if not above.is_dir():
        return f"{str(above)!r} is a file; give a folder"
    return None if os.access(above, os.W_OK | os.X_OK) else f"{str(above)!r} is not writable"


def nearest_sibling(value: str) -> str:
    """Half a sentence with the entry beside a missing path that was probably meant, or nothing."""
    path = Path(value).expanduser()
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return ""
    guess = nearest(path.name, names)
    return f"; did you mean {str(Path(value).parent / guess)!r}?" if guess else ""
