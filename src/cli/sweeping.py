"""``-m``: one run per combination of values, each in its own process and folder."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

from safelight.cli import composing, folders
from safelight.cli.ledger import Ledger, State, same_plan
from safelight.cli.places import why_unwritable
from safelight.cli.problems import ConfigError, Problem, did_you_mean
from safelight.cli.validation import validate
from safelight.errors import SafelightError

_OWN: Final = ("sweep", "sweep_dir", "resume")
_STOPS: Final = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Sweep:
    """What a sweeper works on.

    Attributes:
        overrides: what all runs share and what is varied, without the sweep's own keys.
        jobs: the command line of each run; a search adds to it as it goes.
        ledger: in the sweep's folder.
        stopped_by: number of the signal that asked for the end, or None.
    """

    overrides: list[str]
    jobs: list[list[str]]
    ledger: Ledger
    stopped_by: int | None = field(default=None)


class Sweeper(ABC):
    """A way to make the runs of a sweep; ``sweep=<name>`` picks one, ``configs/sweep/`` lists them.

    Args:
        retry: make failed runs again, from their last checkpoint; unfinished ones always go on.
    """

    searches: ClassVar[bool] = False

    def __init__(self, *, retry: bool = False) -> None:
        self.retry = retry

    def plan(self, overrides: Sequence[str]) -> list[list[str]]:
        """The jobs that are known from the start."""
        return expand(overrides)

    @abstractmethod
    def run(self, sweep: Sweep) -> None:
        """Make what is due and note it in the ledger."""


class LocalSweep(Sweeper):
    """One run after the other on this machine.

    Args:
        retry: make failed runs again, from their last checkpoint; unfinished ones always go on.
    """

    def run(self, sweep: Sweep) -> None:
        """Skip what is done, stop when asked to."""
        for number, job in enumerate(sweep.jobs):
            if sweep.stopped_by is None and sweep.ledger.is_due(number, self.retry):
                run_job(sweep, number, job)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """All combinations of the values in ``seed=1,2,3``, ``seed=range(1,5)`` or ``method=glob(*)``.

    Raises:
        ConfigError: an override cannot be read, or there is nothing that it could mean.
    """
    from hydra.core.override_parser.types import Glob, IntervalSweep
    from hydra.errors import HydraException

    choices: list[list[str]] = []
    problems: list[Problem] = []
    for typed in overrides:
        override = parse_one(typed)
        key, value = override.get_key_element(), override.value()
        if not override.is_sweep_override():
            choices.append([typed])
        elif isinstance(value, Glob):
            names, problem = _globbed(typed, override.key_or_group, value, overrides)
            problems += [problem] if problem else []
            choices.append([f"{key}={name}" for name in names])
        elif isinstance(value, IntervalSweep):
            text = "an interval is for a search: add sweep=optuna, or give values: key=1,2,3 or key=range(1,4)"
            problems.append(Problem(typed, text, typed=typed))
        else:
            try:
                values = list(override.sweep_string_iterator())
            except HydraException as error:
                raise ConfigError([Problem(typed, "cannot be read as key=value,value,…", typed=typed)]) from error
            if not values:
                text = "stands for no value at all, so there is nothing to run"
                problems.append(Problem(typed, text, typed=typed))
            choices.append([f"{key}={value}" for value in values])
    if problems:
        raise ConfigError(problems)
    return [list(combination) for combination in itertools.product(*choices)]


def parse_one(typed: str) -> Any:
    """Hydra's reading of one override.

    Raises:
        ConfigError: it cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_overrides([typed])[0]
    except HydraException as error:
        raise ConfigError([Problem(typed, "cannot be read as key=value,value,…", typed=typed)]) from error


def _globbed(typed: str, group: str, pattern: Any, overrides: Sequence[str]) -> tuple[list[str], Problem | None]:
    """Options of a group that match a pattern, those of plug-ins included."""
    try:
        available = composing.options(group, composing.searchpath(overrides))
    except SafelightError as error:
        return [], Problem("hydra.searchpath", str(error))
    if not available:
        return [], Problem(typed, f"glob() chooses among the options of a group, and {group!r} is none", typed=typed)
    names: list[str] = pattern.filter(available)
    if not names:
        hint, _ = did_you_mean(str(pattern.include), available)
        return [], Problem(typed, f"matches no {group}, so it stands for no value; {hint}", typed=typed)
    return names, None


def sweep(overrides: Sequence[str], program: str) -> int:
    """Make every run of a sweep and print one table.

    Runs lie in ``<sweep_dir>/<number>``; ``ledger.jsonl`` remembers how each ended and ``summary.csv`` holds the table.
    The same command with the same ``sweep_dir`` (or with ``resume=auto``: the newest sweep of the same runs)
    makes only what is missing.

    Args:
        overrides: the command line without ``-m``.
        program: how it was started, for the messages.

    Returns:
        0 if all runs went through, 128 + signal number when stopped, else 1.
    """
    from safelight.cli.building import build

    if folders.process_rank() > 0 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SafelightError("-m starts the processes of each run itself: call it without torchrun or srun")
    own = [word for word in overrides if _key(word).partition(".")[0] in _OWN]
    shared = [word for word in overrides if word not in own]
    block = _own_settings(own, shared)
    sweeper = build("sweep", block, Sweeper)
    assert isinstance(sweeper, Sweeper)
    jobs = sweeper.plan(shared)
    _check_all(jobs)
    plan = {"jobs": jobs, "search": shared if sweeper.searches else None}
    folder = _folder(own, shared, plan)
    state = Sweep(shared, jobs, Ledger(folder))
    with state.ledger.locked():
        state.jobs = _agree(folder, plan)["jobs"]
        print(f"sweep: {len(state.jobs) or 'searching'}{' runs' if state.jobs else ''} in {folder}", flush=True)
        before = {number: signal.signal(number, lambda got, _: setattr(state, "stopped_by", got)) for number in _STOPS}
        try:
            sweeper.run(state)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return _conclude(state, sweeper, [*program.split(), "-m", *shared, *(w for w in own if _key(w) == "sweep")])


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def _own_settings(own: Sequence[str], shared: Sequence[str]) -> dict[str, Any]:
    """The checked ``sweep`` block."""
    problems = [
        Problem(word, "each run has a folder of its own; sweep_dir=<folder> names the one around them", typed=word)
        for word in shared
        if _key(word) == "run_dir"
    ]
    for word in own:
        if _key(word) == "resume" and word.partition("=")[2] != "auto":
            problems.append(Problem(word, "a sweep goes on with resume=auto or sweep_dir=<folder>", typed=word))
    words = [word for word in own if _key(word).partition(".")[0] == "sweep"]
    if not any(_key(word) == "sweep" for word in words):
        words = ["sweep=local", *words]
    composed = composing.compose_all([*(w for w in shared if w.startswith("hydra.searchpath=")), *words])
    problems += composed.problems
    found = [problem for problem in validate(composed.config) if problem.where.startswith("sweep.")]
    problems += composing.explain(composed, found)
    if problems:
        raise ConfigError(problems)
    block = composed.config["sweep"]
    assert isinstance(block, dict)
    return block


def _check_all(jobs: Sequence[Sequence[str]]) -> None:
    problems = [problem for job in jobs for problem in job_problems(job)]
    if problems:
        raise ConfigError(list({(p.where, p.text): p for p in problems}.values()))


def job_problems(job: Sequence[str]) -> list[Problem]:
    """Everything wrong with the command line of one run."""
    return composing.all_problems(composing.compose_all(job))


def _folder(own: Sequence[str], shared: Sequence[str], plan: dict[str, Any]) -> Path:
    named = [word.partition("=")[2] for word in own if _key(word) == "sweep_dir"]
    if named:
        folder = Path(named[-1]).expanduser()
        _refuse_unwritable(folder if named[-1] else None, f"sweep_dir={named[-1]}")
        # Looked at before anything is written, and again once nobody else can write.
        _refuse_another(folder, _read_plan(folder), plan)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    runs = [word.partition("=")[2] for word in shared if _key(word) == "runs_dir"]
    parent = Path(runs[-1] if runs else "runs").expanduser() / "sweep"
    if "resume=auto" in own:
        for folder in sorted(parent.iterdir(), reverse=True) if parent.is_dir() else ():
            try:
                known = _read_plan(folder)
            except SafelightError as error:
                print(f"resume=auto: passed over {folder}: {error}", flush=True)
                continue
            if known and same_plan(known, plan):
                return folder
        print(f"resume=auto: no sweep of these runs in {parent}; starting a new one", flush=True)
    _refuse_unwritable(parent)
    return folders.new_folder(parent, "sweep")


def _refuse_unwritable(folder: Path | None, typed: str | None = None) -> None:
    wrong = why_unwritable(folder) if folder is not None else "must name a folder"
    if wrong:
        raise ConfigError([Problem("sweep_dir", wrong, typed=typed)])


def _read_plan(folder: Path) -> dict[str, Any] | None:
    file = folder / "plan.json"
    if not file.is_file():
        return None
    try:
        plan = json.loads(file.read_text(encoding="utf-8"))
        same_plan(plan, plan)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise SafelightError(f"{file} is damaged ({error}); give another sweep_dir") from error
    return dict(plan)


def _agree(folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The plan that the folder was begun with: the numbers of its runs follow that order."""
    known = _read_plan(folder)
    if known is None:
        (folder / "plan.json").write_text(json.dumps(plan, indent=1), encoding="utf-8")
        return plan
    _refuse_another(folder, known, plan)
    return known


def _refuse_another(folder: Path, known: dict[str, Any] | None, plan: dict[str, Any]) -> None:
    if known is not None and not same_plan(known, plan):
        raise SafelightError(f"sweep_dir {str(folder)!r} belongs to another sweep; give another folder")


def job_command(job: Sequence[str], run_dir: Path) -> list[str]:
    """The command of one run: everything explicit, so that processes it starts itself need not know of a sweep."""
    script = Path(sys.argv[0])
    start = [str(script)] if script.name == "train.py" and script.is_file() else ["-m", "safelight.cli", "train"]
    return [sys.executable, *start, *job, f"run_dir={run_dir}", "resume=auto"]


def run_job(sweep: Sweep, number: int, job: Sequence[str]) -> State:
    """Make one run in a process of its own and note how it ended."""
    ledger = sweep.ledger
    print(f"\n── {number:03d}: {' '.join(job)}", flush=True)
    ledger.record(number, "started", job)
    environment = {name: value for name, value in os.environ.items() if name != "SAFELIGHT_RUN_DIR"}
    process = subprocess.Popen(
        job_command(job, ledger.run_folder(number)),
        env=environment,
        # A group of its own, so that a signal reaches all ranks once, and from here only.
        start_new_session=True,
        preexec_fn=_end_with_parent(),
        # As long as the run lives it holds the lock of the sweep.
        pass_fds=() if ledger.descriptor is None else (ledger.descriptor,),
    )
    forwarded = False
    while True:
        try:
            code = process.wait(0.1)
            break
        except subprocess.TimeoutExpired:
            if sweep.stopped_by is not None and not forwarded:
                os.killpg(process.pid, sweep.stopped_by)
                forwarded = True
    stops = {-number for number in _STOPS} | {128 + number for number in _STOPS}
    state: State = "done" if code == 0 else "stopped" if code in stops else "failed"
    ledger.record(number, state, job, exit_code=code)
    return state


def _end_with_parent() -> Callable[[], None] | None:
    """On Linux a run gets SIGTERM, so saves and stops, when the sweep is killed without a chance to pass it on."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return lambda: library.prctl(1, int(signal.SIGTERM), 0, 0, 0)


def _conclude(sweep: Sweep, sweeper: Sweeper, command: Sequence[str]) -> int:
    """The table, the CSV file, and how to go on."""
    if not sweep.jobs:
        print("sweep: no run was made")
        return 128 + sweep.stopped_by if sweep.stopped_by else 1
    print(f"\n{sweep.ledger.table(sweep.jobs)}\n")
    print(f"table        {sweep.ledger.write_csv(sweep.jobs)}")
    states = [sweep.ledger.state(number) for number in range(len(sweep.jobs))]
    failed = states.count("failed")
    again = [*command, f"sweep_dir={sweep.ledger.folder}"]
    if sweep.stopped_by is not None:
        print(f"stopped; go on with\n  {shlex.join(again)}", flush=True)
        return 128 + sweep.stopped_by
    if failed:
        print(f"{failed} of {len(states)} runs failed; retry with\n  {shlex.join([*again, 'sweep.retry=true'])}")
    if "submitted" in states:
        print(f"{states.count('submitted')} of {len(states)} runs are submitted; see how far they are with")
        print(f"  {shlex.join(again)}")
    print(end="", flush=True)
    return int(bool(failed))
