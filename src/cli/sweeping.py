"""``-m``: one run per combination of values, each in its own process and folder."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from safelight.cli import composing
from safelight.cli.ending import as_table
from safelight.cli.places import why_unwritable
from safelight.cli.problems import ConfigError, Problem
from safelight.cli.validation import validate
from safelight.errors import SafelightError

_OWN_KEY = "sweep_dir"


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """All combinations of the values in overrides such as ``seed=1,2,3`` or ``method=glob(*)``.

    Raises:
        ConfigError: an override cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    choices: list[list[str]] = []
    for typed in overrides:
        try:
            (override,) = parser.parse_overrides([typed])
            if not override.is_sweep_override():
                choices.append([typed])
                continue
            key, pattern = override.get_key_element(), override.value()
            if isinstance(pattern, Glob):
                values = [str(name) for name in pattern.filter(composing.options(override.key_or_group))]
            else:
                values = [str(value) for value in override.sweep_string_iterator()]
        except HydraException as error:
            raise ConfigError([Problem(typed, "cannot be read as key=value,value,…", typed=typed)]) from error
        if not values:
            raise ConfigError([Problem(typed, "stands for no value at all, so there is nothing to run", typed=typed)])
        choices.append([f"{key}={value}" for value in values])
    return [list(combination) for combination in itertools.product(*choices)]


def sweep(overrides: Sequence[str], program: str) -> int:
    """Run every combination, one after the other.

    Each run gets ``<sweep_dir>/<number>`` and ``resume=auto``, so the same command with the same ``sweep_dir`` skips
    what is finished and goes on with what is not. ``ledger.jsonl`` has a line per run.

    Args:
        overrides: the command line without ``-m``.
        program: how it was started, for the messages.

    Returns:
        0 if all runs went through, else 1.
    """
    own = [word for word in overrides if word.startswith(f"{_OWN_KEY}=")]
    jobs = expand([word for word in overrides if word not in own])
    problems = [problem for job in jobs for problem in _problems(job)]
    if problems:
        raise ConfigError(list({(p.where, p.text): p for p in problems}.values()))
    folder = _sweep_folder(own)
    plan = folder / "jobs.json"
    if plan.is_file() and _read_plan(plan) != jobs:
        raise SafelightError(f"{_OWN_KEY} {str(folder)!r} belongs to another sweep; give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_text(json.dumps(jobs, indent=1), encoding="utf-8")
    print(f"sweep: {len(jobs)} runs in {folder}", flush=True)
    codes = [_run(job, folder / f"{number:03d}", folder / "ledger.jsonl") for number, job in enumerate(jobs)]
    print(f"\n{_table(jobs, folder)}")
    if any(codes):
        print(f"\n{sum(map(bool, codes))} of {len(jobs)} runs failed; the same with {_OWN_KEY}={folder} goes on")
    return int(any(codes))


def _sweep_folder(own: Sequence[str]) -> Path:
    """Where the runs go: ``sweep_dir=``, or a new folder under ``runs/sweep``."""
    name = own[-1].partition("=")[2] if own else f"runs/sweep/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    wrong = why_unwritable(Path(name).expanduser()) if name else "must name a folder"
    if wrong:
        raise ConfigError([Problem(_OWN_KEY, wrong, typed=own[-1] if own else None)])
    return Path(name).expanduser()


def _read_plan(plan: Path) -> Any:
    try:
        return json.loads(plan.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SafelightError(f"{plan} is damaged ({error}); give another {_OWN_KEY}") from error


def _problems(job: Sequence[str]) -> list[Problem]:
    composed = composing.compose_all(job)
    return composed.problems + composing.explain(composed, validate(composed.config) if composed.config else [])


def _run(job: Sequence[str], run_dir: Path, ledger: Path) -> int:
    script = Path(sys.argv[0])
    start = [str(script)] if script.name == "train.py" and script.is_file() else ["-m", "safelight.cli", "train"]
    command = [sys.executable, *start, *job, f"run_dir={run_dir}", "resume=auto"]
    print(f"\n── {run_dir.name}: {' '.join(job)}", flush=True)
    environment = {name: value for name, value in os.environ.items() if name != "SAFELIGHT_RUN_DIR"}
    code = subprocess.run(command, env=environment, check=False).returncode
    with ledger.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"run": run_dir.name, "overrides": list(job), "exit_code": code}) + "\n")
    return code


def _table(jobs: Sequence[Sequence[str]], folder: Path) -> str:
    """One row per run: what differed, and the metrics."""
    from safelight.reporting import read_summary

    rows = []
    for number, job in enumerate(jobs):
        constant = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
        run = folder / f"{number:03d}"
        metrics = read_summary(run).metrics if (run / "summary.json").is_file() else {}
        rows.append({"run": run.name, "settings": " ".join(w for w in job if w not in constant), **metrics})
    return as_table(rows)
