"""The programs behind ``train.py``, ``eval.py`` and the ``safelight`` command: arguments in, exit code out."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from safelight.cli.folders import process_rank
from safelight.cli.problems import ConfigError, Problem, did_you_mean, render, visible
from safelight.cli.processes import PeerLostError, let_the_first_speak, together, watch_parent
from safelight.cli.stopping import stop_through_exceptions
from safelight.errors import SafelightError

USER_ERROR = 2
_FLAGS = ("--help", "-h", "--version", "--cfg", "-c", "--multirun", "-m")


def train_main(arguments: Sequence[str] | None = None, program: str = "python train.py") -> int:
    """Run ``train.py``.

    Args:
        arguments: the command line without the program; ``sys.argv`` when None.
        program: how the user started it, for commands to paste.

    Returns:
        The exit code: 0, 1 when another process of the run was lost, 2 for a mistake the user can mend, 128 + signal
        number when stopped.
    """
    typed = list(sys.argv[1:] if arguments is None else arguments)
    watch_parent()
    return _guarded(lambda: _train(typed, program), typed, program)


def eval_main(arguments: Sequence[str] | None = None, program: str = "python eval.py") -> int:
    """Run ``eval.py``; arguments and exit codes as in ``train_main``."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    return _guarded(lambda: _evaluate(typed, program), typed, program)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the ``safelight`` command: ``train``, ``eval`` and the helpers in ``commands``."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    verbs = {"train": train_main, "eval": eval_main}
    if typed and typed[0] in verbs:
        return verbs[typed[0]](typed[1:], f"safelight {typed[0]}")
    from safelight.cli.commands import COMMANDS

    if typed and typed[0] in COMMANDS:
        verb, rest = typed[0], typed[1:]
        if "--help" in rest or "-h" in rest:
            print(f"usage: safelight {COMMANDS[verb][1]}")
            return 0
        return _guarded(lambda: COMMANDS[verb][0](rest), rest, f"safelight {verb}")
    if typed and typed[0] not in _FLAGS:
        hint, guess = did_you_mean(typed[0], [*verbs, *COMMANDS])
        print(render([Problem(typed[0], hint, typed[0], guess or "")], "safelight", typed), file=sys.stderr)
        return USER_ERROR
    if not typed or typed[0] in ("--help", "-h"):
        from safelight.cli.helping import commands_text

        print(commands_text())
        return 0
    return train_main(typed, "safelight train")


def _train(typed: list[str], program: str) -> int:
    flags, overrides, problems = _read_flags(typed)
    from safelight.cli import composing

    if "help" in flags:
        from safelight.cli.helping import help_text

        print(help_text(program, composing.searchpath(overrides)))
        return 0
    if "version" in flags:
        from safelight import __version__

        print(__version__)
        return 0
    if "multirun" in flags:
        from safelight.cli.sweeping import sweep

        return sweep(overrides, program)
    composed = composing.compose_all(overrides)
    problems += composing.all_problems(composed)
    if composed.config.get("sweep"):
        chosen = f"sweep={composed.config['choices']['sweep']}"
        problems.append(Problem("sweep", "is for several runs: add -m in front", typed=chosen, fix=chosen))
    if problems:
        raise ConfigError(problems)
    if "cfg" in flags:
        import yaml

        print(yaml.safe_dump(composed.config, sort_keys=False, allow_unicode=True), end="")
        return 0
    if composed.config["full_error"]:
        os.environ["HYDRA_FULL_ERROR"] = "1"
    from safelight.cli.building import quiet
    from safelight.cli.running import train

    quiet()
    command = shlex.join([*program.split(), *typed])
    with stop_through_exceptions(), together(lambda error: _say_lost(error, typed, program)):
        train(composed.config, template=composed.template, overrides=overrides, command=command)
    return 0


def _evaluate(typed: list[str], program: str) -> int:
    if "--help" in typed or "-h" in typed:
        from safelight.cli.helping import eval_help_text

        print(eval_help_text())
        return 0
    from safelight.cli.evaluating import evaluate, find_checkpoint

    path, problems = find_checkpoint(typed)
    if problems:
        raise ConfigError(problems)
    evaluate(path, typed, started_as=program)
    return 0


def _read_flags(typed: Sequence[str]) -> tuple[set[str], list[str], list[Problem]]:
    """Flags, overrides, and flags that do not exist."""
    flags: set[str] = set()
    overrides: list[str] = []
    problems: list[Problem] = []
    words = iter(typed)
    for word in words:
        if word in ("-h", "--help"):
            flags.add("help")
        elif word == "--version":
            flags.add("version")
        elif word in ("-m", "--multirun"):
            flags.add("multirun")
        elif word in ("-c", "--cfg") or word.startswith("--cfg="):
            which = word.partition("=")[2] or next(words, "job")
            if which != "job":
                problems.append(Problem(f"--cfg {which}", "only --cfg job exists", typed=which, fix="job"))
            flags.add("cfg")
        elif word.startswith("-"):
            hint, guess = did_you_mean(word, [flag for flag in _FLAGS if flag.startswith("--")])
            if "=" in word:
                guess = word.lstrip("-")
                hint = f"keys are written without dashes: {guess}"
            problems.append(Problem(word, f"there is no option {word!r}; {hint}", typed=word, fix=guess or ""))
        else:
            overrides.append(word)
    return flags, overrides, problems


def _guarded(job: Callable[[], int], typed: Sequence[str], program: str) -> int:
    """Run a job and turn mistakes into messages: a traceback is for bugs."""
    try:
        return job()
    except ConfigError as error:
        if process_rank() == 0:
            print(render(error.problems, program, typed), file=sys.stderr)
        return USER_ERROR
    except PeerLostError as error:
        if process_rank() == 0:
            _say_lost(error, typed, program)
        return 1
    except SafelightError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        if process_rank() > 0:
            let_the_first_speak()
        print(_short(f"safelight: {error}"), file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; closing standard output would raise the same error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\nsafelight: stopped", file=sys.stderr)
        return 130
    except BaseException as error:
        from_signal = getattr(error, "signal_number", None)
        if from_signal is None:
            raise
        return _stopped(error, int(from_signal), typed, program)


def _say_lost(error: PeerLostError, typed: Sequence[str], program: str) -> None:
    """Say which process was lost and how to go on."""
    lines = [f"\nsafelight: {error}"]
    folder, last = _run_folder()
    if last.is_file():
        lines += [f"{last} holds the last saved step", _go_on(folder, typed, program)]
    print("\n".join(lines), file=sys.stderr, flush=True)


def _run_folder() -> tuple[str, Path]:
    """The run's folder as short as it can be written, and its last checkpoint."""
    from safelight.cli.ending import shown_path

    folder = shown_path(Path(os.environ.get("SAFELIGHT_RUN_DIR", "")))
    return folder, Path(folder) / "checkpoints" / "last.ckpt"


def _go_on(folder: str, typed: Sequence[str], program: str) -> str:
    kept = [word for word in typed if not word.startswith(("resume=", "run_dir=", "overwrite="))]
    return f"go on with:\n  {shlex.join([*program.split(), *kept, f'resume={folder}'])}"


def _short(text: str) -> str:
    """At most a dozen lines of a message, whatever library wrote the rest of it."""
    lines = [visible(line) for line in text.splitlines() if line.strip()]
    return "\n".join([line if len(line) <= 500 else line[:499] + "…" for line in lines[:12]])


def _stopped(error: BaseException, number: int, typed: Sequence[str], program: str) -> int:
    """Say how to go on after Ctrl-C or SIGTERM."""
    if process_rank() > 0:
        # Lightning ends the whole job when a child fails; this one did as it was asked.
        return 0
    folder, last = _run_folder()
    step = getattr(error, "saved_step", None)
    if step is not None:
        print(f"\nsafelight: stopped at step {step}; saved {last}", file=sys.stderr)
    elif last.is_file():
        print(f"\nsafelight: stopped; {last} holds the last saved step", file=sys.stderr)
    else:
        print("\nsafelight: stopped before the first checkpoint", file=sys.stderr)
        return 128 + number
    print(_go_on(folder, typed, program), file=sys.stderr)
    return 128 + number
