"""The run folder: what a run writes, where, and which earlier run can be continued."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import yaml

from safelight.errors import SafelightError

# Everything a run may leave in its folder, and nothing else.
CONTENTS: Final = (
    "config.yaml",
    "command.txt",
    "versions.json",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "export",
    "report",
    "summary.json",
)
_OF_CALLBACKS: Final = ("activations", "sae_probe", "sae_probe.json")
"""What a run writes beside it with ``callbacks=activation_cache`` and ``callbacks=sae_probe``."""
_WRITTEN_FIRST: Final = ("config.yaml", "command.txt", "versions.json")
_FOLDER_VARIABLE: Final = "SAFELIGHT_RUN_DIR"
_RANK_VARIABLES: Final = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
_PACKAGES: Final = ("torch", "lightning", "diffusers", "transformers", "peft", "torchmetrics", "numpy", "hydra-core")


def process_rank() -> int:
    """Rank of this process before any process group exists, from what launchers put into the environment."""
    for variable in _RANK_VARIABLES:
        if os.environ.get(variable, "").isdigit():
            return int(os.environ[variable])
    return 0


def is_used(folder: Path) -> bool:
    """Whether a path holds anything worth keeping; what a run writes before it starts is not."""
    if not folder.is_dir():
        return folder.exists()
    return any(entry.name not in _WRITTEN_FIRST for entry in folder.iterdir())


def is_finished(folder: Path) -> bool:
    """Whether a run went through to its summary."""
    return (folder / "summary.json").is_file()


def make_run_folder(config: Mapping[str, Any]) -> Path:
    """Create the folder of a new run and tell child processes about it.

    Processes of a higher rank get rank 0's folder and create nothing.

    Args:
        config: a resolved configuration with ``run_dir``, ``runs_dir``, ``overwrite``, ``name`` and ``choices``.

    Raises:
        SafelightError: ``run_dir`` holds an earlier run and ``overwrite`` is off.
    """
    inherited = os.environ.get(_FOLDER_VARIABLE)
    if process_rank() > 0:
        # Under torchrun there is nothing to inherit; the strategy broadcasts rank 0's checkpoint folder later.
        return Path(inherited or config.get("run_dir") or config["runs_dir"])
    try:
        if config.get("run_dir"):
            folder = Path(config["run_dir"]).expanduser()
            if is_used(folder) and not config.get("overwrite"):
                raise SafelightError(
                    f"run_dir {str(folder)!r} holds an earlier run; use resume=auto, another folder or overwrite=true"
                )
            clear(folder)
            folder.mkdir(parents=True, exist_ok=True)
        else:
            parent = Path(config["runs_dir"]).expanduser() / str(config["choices"]["method"])
            folder = new_folder(parent, run_name(config))
    except OSError as error:
        raise SafelightError(f"cannot make a run folder at {error.filename!r}: {error.strerror}") from error
    return adopt(folder)


def discard_unstarted(folder: Path, runs_dir: Path) -> bool:
    """Delete the folder of a run that ended before its first step: no checkpoint, no line of metrics.

    Args:
        folder: the run folder.
        runs_dir: folders above ``folder`` are deleted too when they are empty, up to and including this one.

    Returns:
        Whether it was deleted; False when there is something to keep.
    """
    metrics = folder / "metrics.jsonl"
    if (metrics.is_file() and metrics.stat().st_size) or any((folder / "checkpoints").glob("*.ckpt")):
        return False
    clear(folder)
    remove_empty(folder, runs_dir)
    return True


def remove_empty(folder: Path, top: Path) -> None:
    """Delete a folder and those above it up to ``top``, as far as they are empty."""
    for empty in (folder, *(part for part in folder.parents if part.is_relative_to(top))):
        try:
            empty.rmdir()
        except OSError:  # something else is in there
            return


def adopt(folder: Path) -> Path:
    """Use an existing folder and tell child processes about it."""
    if process_rank() == 0:
        os.environ[_FOLDER_VARIABLE] = str(folder.absolute())
    return folder


def run_name(config: Mapping[str, Any]) -> str:
    """The last part of a run folder's name."""
    choices = config.get("choices", {})
    name = config.get("name") or choices.get("backbone") or choices.get("data") or "run"
    return re.sub(r"[^\w.+-]+", "-", Path(str(name)).name)


def new_folder(parent: Path, name: str) -> Path:
    """Create ``<parent>/<time>-<name>``, with a number behind it where that exists already."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        folder = parent / (f"{stamp}-{name}" if attempt == 1 else f"{stamp}-{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise SafelightError(f"cannot make a new run folder in {parent}")


def clear(folder: Path) -> None:
    """Delete what an earlier run left, and nothing that a run does not write."""
    for name in (*CONTENTS, *_OF_CALLBACKS):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_start(folder: Path, config: Mapping[str, Any], command: str) -> None:
    """Write ``config.yaml``, ``command.txt`` and ``versions.json``; a resumed run adds its command to the list."""
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    with (folder / "command.txt").open("a", encoding="utf-8") as file:
        file.write(command + "\n")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of what produced a run: packages, Python, platform, and the commit when run from a checkout."""
    from safelight import __version__

    found = {"safelight": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = _commit(Path(__file__).resolve().parents[1])
    return found | ({"commit": commit} if commit else {})


def _commit(folder: Path) -> str | None:
    git = shutil.which("git")
    if git is None or not (folder.parent / ".git").exists():
        return None
    answer = subprocess.run([git, "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None
