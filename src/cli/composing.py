"""Turn command-line overrides into one plain configuration, and find every mistake in them on the way.

Hydra does the composition (groups, defaults, interpolation). What is ours: a search path that plug-ins can join, keys
checked against the constructor they end in (so a parameter that no YAML file lists can still be set, and a misspelt one
cannot), and all mistakes reported together instead of the first one as a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from safelight.cli import choosing, hydra_files
from safelight.cli.crosschecks import batch_divisor
from safelight.cli.hydra_files import CompositionError
from safelight.cli.keys import checked_key
from safelight.cli.problems import ConfigError, Problem
from safelight.cli.validation import validate
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig


@dataclass
class Composed:
    """What came out of a command line.

    Attributes:
        config: resolved plain values, empty when nothing could be composed.
        template: the same before interpolation (``${seed}`` still in it): what a checkpoint stores, so that a later
            override of ``seed`` or ``backbone`` reaches every place that refers to it.
        defaults: the resolved configuration without the value overrides, for suggesting working values.
        overrides: the command line, one override each.
        problems: mistakes found; the overrides that caused them are left out of ``config``.
    """

    config: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def compose(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration of a run.

    Args:
        overrides: as on the command line, for example ``["method=ecodiff", "trainer.max_steps=10"]``.

    Returns:
        Plain nested dicts, lists and scalars; ``choices`` holds the picked option of each group.

    Raises:
        ConfigError: one or more overrides are wrong; all of them are listed.
    """
    composed = compose_all(overrides)
    if composed.problems:
        raise ConfigError(composed.problems)
    return composed.config


def as_overrides(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A plain dict as the command line that means the same.

    Args:
        settings: nested or dotted: ``{"method": "ecodiff", "method.keep": 0.7, "trainer": {"max_steps": 4}}``.
        prefix: put before every key.
    """
    words: list[str] = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            words += as_overrides(value, f"{prefix}{key}.")
        else:
            words.append(f"{prefix}{key}={_quoted(value)}")
    return words


def _quoted(value: Any) -> str:
    """A plain value as Hydra reads it back."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_quoted, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}: {_quoted(item)}" for key, item in value.items()) + "}"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_./~-][\w./~:-]*", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
    return f"'{escaped}'"


def compose_all(overrides: Sequence[str]) -> Composed:
    """Like ``compose``, but with everything the command line needs, and problems returned instead of raised."""
    result = Composed(overrides=list(overrides))
    parsed = parse(overrides, result)
    try:
        loader = hydra_files.loader_over(tuple(_searchpath(parsed)))
    except SafelightError as error:
        words = [str(o.input_line) for o in parsed if o.key_or_group == "hydra.searchpath"]
        result.problems.append(Problem("hydra.searchpath", str(error), typed=words[-1] if words else None))
        return result
    parsed = [override for override in parsed if override.key_or_group != "hydra.searchpath"]
    groups, values, folder = choosing.split(parsed, loader, result.problems)
    settings = choosing.stored_settings(folder, result.problems) if folder else {}
    if folder:
        groups += choosing.tuned_for(settings, groups, loader.get_group_options("tuned"))

    def with_groups(words: Sequence[str]) -> DictConfig:
        loaded = hydra_files.load(loader, words)
        if folder:
            choosing.use_folder_as_backbone(loaded, folder, settings)
        hydra_files.resolved(loaded)
        return loaded

    try:
        base = with_groups(groups)
    except CompositionError as error:
        result.problems.append(_blame(error, groups, with_groups, overrides))
        return result
    result.defaults = hydra_files.resolved(base)
    checked = [typed for override in values if (typed := checked_key(override, result.defaults, result)) is not None]
    try:
        final = hydra_files.with_values(base, checked)
        result.config = hydra_files.resolved(final)
    except CompositionError as error:
        problem = _blame(
            error, checked, lambda words: hydra_files.resolved(hydra_files.with_values(base, words)), overrides
        )
        result.problems.append(problem)
        return result
    from omegaconf import OmegaConf

    template = OmegaConf.to_container(final, resolve=False)
    assert isinstance(template, dict)
    result.template = {str(key): value for key, value in template.items()}
    _share_batch(result)
    return result


def _share_batch(result: Composed) -> None:
    """``global_batch_size`` in terms of what a data module knows: samples per device and batch."""
    wish = result.config.get("global_batch_size")
    divisor, reason = batch_divisor(result.config)
    if type(wish) is int and wish > 0 and not reason and wish % divisor == 0:
        for config in (result.config, result.template):
            config["data"] = {**config["data"], "batch_size": wish // divisor}


def compose_valid(overrides: Sequence[str]) -> Composed:
    """Compose a command line and check every value of it.

    Raises:
        ConfigError: all mistakes.
    """
    composed = compose_all(overrides)
    problems = all_problems(composed)
    if problems:
        raise ConfigError(problems)
    return composed


def all_problems(composed: Composed) -> list[Problem]:
    """Everything wrong with a command line: what could not be composed, then what its values may not be."""
    return composed.problems + (explain(composed, validate(composed.config)) if composed.config else [])


def resolve(template: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fill in the interpolations of a stored template after setting dotted keys to new values.

    Args:
        template: from ``Composed.template`` or a checkpoint.
        changes: dotted key to value.

    Raises:
        SafelightError: a reference leads nowhere, or a key leads into a single value.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = OmegaConf.create(dict(template))
        for key, value in (changes or {}).items():
            OmegaConf.update(config, key, value, merge=False, force_add=True)
        resolved = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise CompositionError(hydra_files.one_line(error), getattr(error, "full_key", None)) from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def explain(composed: Composed, problems: Sequence[Problem]) -> list[Problem]:
    """Trace problems of values back to what was typed, with a value that works in its place.

    A value that arrives at several places through interpolation (``seed``) is reported once, where it was set.
    """
    typed: dict[str, str] = {}
    for override in composed.overrides:
        key, _, _ = override.lstrip("+").partition("=")
        typed[key] = override
    culprits = {problem.where for problem in problems}
    explained = []
    for problem in problems:
        source = _lookup(composed.template, problem.where)
        if isinstance(source, str) and source.startswith("${") and source[2:-1] in culprits:
            continue
        if problem.typed is None and problem.where in typed:
            default = _lookup(composed.defaults, problem.where)
            good = default if not isinstance(default, dict | list) and default not in (None, "???") else None
            fix = "" if good is None else f"{problem.where}={_as_typed(good)}"
            problem = replace(problem, typed=typed[problem.where], fix=problem.fix or fix)
        elif problem.typed is None:
            # Something above it was set or deleted (`~method.lr`), or something inside it (`seed.x=1`).
            place = f"{problem.where}."
            near = [key for key in typed if place.startswith(f"{key.lstrip('~')}.") or key.startswith(place)]
            if near:
                problem = replace(problem, typed=typed[near[-1]], text=f"{problem.where}: {problem.text}")
        explained.append(problem)
    return explained


def _lookup(config: Mapping[str, Any], dotted: str) -> Any:
    node: Any = config
    for part in dotted.split("."):
        if not isinstance(node, dict):
            return None
        node = node.get(part)
    return node


def _as_typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def options(group: str, searchpath: Sequence[str] = ()) -> list[str]:
    """Names one can write after ``group=``."""
    return sorted(hydra_files.loader_over(tuple(searchpath)).get_group_options(group))


def parse(overrides: Sequence[str], result: Composed) -> list[Override]:
    """Hydra's reading of each override; what cannot be read becomes a problem in ``result``."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    parsed = []
    for typed in overrides:
        try:
            (override,) = parser.parse_overrides([typed])
        except HydraException:
            text = "cannot be read as key=value; put text with special signs in quotes: key='\"a, b\"'"
            if "=" not in typed.strip("="):
                text = "is not of the form key=value; --help shows the options"
            result.problems.append(Problem(typed, text, typed=typed, fix=_in_quotes(typed, parser)))
            continue
        if not override.key_or_group:
            text = "is not of the form key=value; --help shows the options"
            result.problems.append(Problem(typed, text, typed=typed))
            continue
        if override.is_sweep_override():
            result.problems.append(
                Problem(typed, "several values need a sweep: add -m in front", typed=typed, fix=typed)
            )
            continue
        parsed.append(override)
    return parsed


def searchpath(overrides: Sequence[str]) -> tuple[str, ...]:
    """Folders and packages that ``hydra.searchpath=[...]`` names in a command line.

    Raises:
        SafelightError: it is not a list.
    """
    typed = [word for word in overrides if word.startswith("hydra.searchpath=")]
    return tuple(_searchpath(parse(typed, Composed()))) if typed else ()


def _in_quotes(typed: str, parser: OverridesParser) -> str:
    """The override with its value in quotes, if that is all it needs."""
    from hydra.errors import HydraException

    key, _, value = typed.partition("=")
    if not value or any(sign in value for sign in "\"'[]{}()$\\") or not typed.isprintable():
        return ""
    try:
        parser.parse_override(f'{key}="{value}"')
    except HydraException:
        return ""
    return f'{key}="{value}"'


def _searchpath(parsed: Sequence[Override]) -> list[str]:
    """Folders and packages named by ``hydra.searchpath=[...]``; several such words add up."""
    places: list[str] = []
    for override in parsed:
        if override.key_or_group == "hydra.searchpath":
            value = override.value()
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise SafelightError("must be a list such as [pkg://their_package.configs] or [/folder/with/configs]")
            places += [str(item) for item in value]
    return list(dict.fromkeys(places))


def _blame(
    error: CompositionError, words: Sequence[str], load: Callable[[Sequence[str]], Any], overrides: Sequence[str]
) -> Problem:
    """The override without which it works: Hydra often names another place, or none."""
    for index, word in enumerate(words):
        try:
            load([*words[:index], *words[index + 1 :]])
        except CompositionError:
            continue
        typed = next((each for each in overrides if each.lstrip("+") == word.lstrip("+")), None)
        return Problem(word.lstrip("+").partition("=")[0], str(error), typed=typed)
    return Problem(error.key or "config", str(error))
