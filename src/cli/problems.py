"""Mistakes in a command line: collected first, then shown together with a command that would work."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from safelight.errors import SafelightError

_MAX_SHOWN = 5
_MAX_OPTIONS = 12
_LINE_WIDTH = 150
_LONGEST_COMMAND = 4000


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
        where: the configuration key or the words as typed.
        text: what is wrong and what would be right, one sentence.
        typed: the override on the command line that caused it, or None if it came from a file.
        fix: what to type instead; an empty string leaves the override out.
    """

    where: str
    text: str
    typed: str | None = None
    fix: str = ""


class ConfigError(SafelightError):
    """One or more mistakes in what was asked for; ``problems`` has them all."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(f"{problem.where}: {problem.text}" for problem in problems))


def nearest(word: str, options: Iterable[str]) -> str | None:
    """The option that ``word`` was probably meant to be, or None."""
    options = list(options)
    # Case apart, and a beginning counts: `lr` for `lr_attention` is a better guess than its distance says.
    by_lower = {option.lower(): option for option in options}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    if close:
        return by_lower[close[0]]
    starts = [option for option in options if len(word) > 1 and option.lower().startswith(word.lower())]
    return starts[0] if starts else None


def did_you_mean(word: str, options: Iterable[str]) -> tuple[str, str | None]:
    """Half a sentence with the nearest match and the possible words, and that match."""
    names = sorted(options)
    guess = nearest(word, names)
    if not names:
        return "there is nothing to choose from", None
    if guess and len(names) > _MAX_OPTIONS:
        return f"did you mean {guess!r}?", guess
    listed = ", ".join(names[:_MAX_OPTIONS]) + (f", … ({len(names)} in all)" if len(names) > _MAX_OPTIONS else "")
    return (f"did you mean {guess!r}? (possible: {listed})" if guess else f"possible: {listed}"), guess


def corrected(program: str, arguments: Sequence[str], problems: Sequence[Problem]) -> str:
    """The command line with every mistake replaced by its fix."""
    fixes = {problem.typed: problem.fix for problem in problems if problem.typed is not None}
    words = [fixes.get(argument, argument) for argument in arguments]
    extra = [problem.fix for problem in problems if problem.typed is None and problem.fix]
    return shlex.join([*program.split(), *(word for word in [*words, *extra] if word)])


def render(problems: Sequence[Problem], program: str = "", arguments: Sequence[str] = ()) -> str:
    """All problems on one screen (at most 15 lines), ending with a command to paste.

    Args:
        problems: at least one.
        program: how the program was started, for example ``python train.py``; empty leaves the command out.
        arguments: what was typed after it.
    """
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    lines = [f"safelight: {count}, nothing was run"]
    for problem in problems[:_MAX_SHOWN]:
        lines.append(_shorten(f"  {visible(problem.typed or problem.where) or repr('')}"))
        lines.append(_shorten(f"    {visible(problem.text)}"))
    if len(problems) > _MAX_SHOWN:
        lines.append(f"  … and {len(problems) - _MAX_SHOWN} more")
    command = corrected(program, arguments, problems) if program else ""
    # A command that cannot be shown on a screen cannot be pasted from it.
    if command and len(command) <= _LONGEST_COMMAND and visible(command) == command:
        lines += ["Try:", f"  {command}"]
    return "\n".join(lines)


def visible(text: str) -> str:
    """Text for one line of a terminal: line breaks and control characters as escapes, nothing that moves a cursor."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _shorten(line: str) -> str:
    return line if len(line) <= 2 * _LINE_WIDTH else line[: 2 * _LINE_WIDTH - 1] + "…"
