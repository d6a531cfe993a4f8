"""Does a typed key lead somewhere? Checked against the configuration files and the constructors that blocks end in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safelight.cli import choosing
from safelight.cli.crosschecks import TARGET
from safelight.cli.problems import Problem, did_you_mean
from safelight.cli.signatures import signature_of
from safelight.cli.validation import BACKBONE
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

    from safelight.cli.composing import Composed


def checked_key(override: Override, base: Mapping[str, Any], result: Composed) -> str | None:
    """The override ready for Hydra, or None (and a problem) when its key leads nowhere."""
    typed = str(override.input_line)
    if override.is_delete():
        return typed
    forced = f"++{typed.lstrip('+')}"
    parts = override.key_or_group.split(".")
    node: Any = base
    for depth, part in enumerate(parts):
        if not isinstance(node, dict):
            where = ".".join(parts[:depth])
            text = f"{where} is a single value, {override.key_or_group!r} leads nowhere"
            result.problems.append(Problem(typed, text, typed=typed))
            return None
        names = _names(node, parts[:depth])
        if names and part not in names:
            if depth == 1 and parts[0] in ("callbacks", "logger") and typed.startswith("+"):
                # A block that is not ours; whether it names a class and what that takes is validated like the others.
                return forced
            _unknown_key(override, parts[: depth + 1], names, result)
            return None
        inner = node.get(part, {})
        if TARGET in node and not (isinstance(inner, dict) and TARGET in inner):
            # An argument that the constructor takes whole: its own check decides about what is inside.
            return forced
        node = inner
    return forced


def _names(node: Mapping[str, Any], where: Sequence[str]) -> list[str]:
    """Keys that may stand in a block: those in the YAML files and the parameters of the class it names."""
    names = [str(key) for key in node if where or key != "choices"]
    if TARGET in node:
        try:
            signature = signature_of(str(node[TARGET]))
        except SafelightError:
            return names
        names += [name for name in signature.parameters if name not in names]
    elif list(where) == ["backbone"]:
        names += [name for name in signature_of(BACKBONE).parameters if name not in names]
    return names


def _unknown_key(override: Override, parts: Sequence[str], names: Sequence[str], result: Composed) -> None:
    typed = str(override.input_line)
    where = ".".join(parts[:-1])
    if not where and parts[-1] in choosing.GROUPS:
        text = f"there is no {parts[-1]} to choose from here"
        result.problems.append(Problem(typed, text, typed=typed))
        return
    if not where:
        # `lr=1` typed without its block is the commonest slip of all.
        inside = result.defaults.get("method")
        if isinstance(inside, dict) and parts[-1] in _names(inside, ["method"]):
            fix = f"method.{typed}"
            result.problems.append(Problem(typed, f"there is no key {parts[-1]!r}; did you mean {fix!r}?", typed, fix))
            return
    visible = [name for name in names if name != TARGET]
    hint, guess = did_you_mean(parts[-1], visible)
    fix = ""
    if guess:
        old, new = ".".join(parts), ".".join([*parts[:-1], guess])
        fix = typed.replace(old, new, 1)
    subject = f"{where} has no {parts[-1]!r}" if where else f"there is no key {parts[-1]!r}"
    result.problems.append(Problem(typed, f"{subject}; {hint}", typed=typed, fix=fix))
