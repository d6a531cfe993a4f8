"""Turn command-line overrides into one plain configuration, and find every mistake in them on the way.

Hydra does the composition (groups, defaults, interpolation). What is ours: a search path that plug-ins can join, keys
checked against the constructor they end in (so a parameter that no YAML file lists can still be set, and a misspelt one
cannot), and all mistakes reported together instead of the first one as a traceback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from safelight.cli import choosing, plugins
from safelight.cli.crosschecks import TARGET, batch_divisor
from safelight.cli.problems import ConfigError, Problem, did_you_mean
from safelight.cli.signatures import signature_of
from safelight.cli.validation import BACKBONE, validate
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

SHIPPED = "pkg://safelight.configs"


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
        loader = _loader(tuple(_searchpath(parsed)))
    except SafelightError as error:
        words = [str(o.input_line) for o in parsed if o.key_or_group == "hydra.searchpath"]
        result.problems.append(Problem("hydra.searchpath", str(error), typed=words[-1] if words else None))
        return result
    parsed = [override for override in parsed if override.key_or_group != "hydra.searchpath"]
    groups, values, folder = choosing.split(parsed, loader, result.problems)
    settings = choosing.stored_settings(folder, result.problems) if folder else {}

    def with_groups(words: Sequence[str]) -> DictConfig:
        loaded = _load(loader, words)
        if folder:
            choosing.use_folder_as_backbone(loaded, folder, settings)
        _resolved(loaded)
        return loaded

    try:
        base = with_groups(groups)
    except CompositionError as error:
        result.problems.append(_blame(error, groups, with_groups, overrides))
        return result
    result.defaults = _resolved(base)
    checked = [typed for override in values if (typed := checked_key(override, result.defaults, result)) is not None]
    try:
        final = _with_values(base, checked)
        result.config = _resolved(final)
    except CompositionError as error:
        problem = _blame(error, checked, lambda words: _resolved(_with_values(base, words)), overrides)
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
        raise CompositionError(_one_line(error), getattr(error, "full_key", None)) from error
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
    return sorted(_loader(tuple(searchpath)).get_group_options(group))


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


@cache
def _loader(extra: tuple[str, ...]) -> ConfigLoaderImpl:
    """Hydra's loader over the shipped configs, installed plug-ins and ``extra`` folders, in this order."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path

    path = create_config_search_path(SHIPPED)
    schema = path.get_path().pop(-1)
    for plugin in plugins.usable():
        path.append(provider=plugin.name, path=f"pkg://{plugin.configs}")
    for place in extra:
        scheme, found, _ = place.partition("://")
        if found and scheme not in ("pkg", "file"):
            raise SafelightError(f"{place!r} begins with {scheme}://; a place is a folder or pkg://<package>")
        path.append(provider="hydra.searchpath", path=place)
    path.append(schema.provider, schema.path)
    loader = ConfigLoaderImpl(config_search_path=path)
    for source in loader.repository.get_sources():
        if source.provider == "hydra.searchpath" and not source.available():
            raise SafelightError(f"there is no folder or package {source.path!r} with configs")
    return loader


class CompositionError(SafelightError):
    """Hydra or OmegaConf could not make a configuration of what they were given.

    Attributes:
        key: the configuration key it is about, or None.
    """

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


@contextmanager
def _translated() -> Iterator[None]:
    """One exception for everything that Hydra, OmegaConf and YAML raise."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except yaml.YAMLError as error:
        raise CompositionError(f"a configuration file is not valid YAML: {_one_line(error)}") from error
    except UnicodeDecodeError as error:
        raise CompositionError(f"a configuration file is not text in UTF-8 ({error})") from error
    except (HydraException, OmegaConfBaseException, ValueError, TypeError, AttributeError) as error:
        # Hydra itself raises plain ValueErrors, and stumbles in other ways over files that are not mappings.
        text = _one_line(error).partition(" Config search path:")[0]
        raise CompositionError(text, getattr(error, "full_key", None)) from error


def _load(loader: ConfigLoaderImpl, groups: Sequence[str]) -> DictConfig:
    """What the files say for a choice of groups."""
    from hydra.types import RunMode
    from omegaconf import OmegaConf, open_dict

    with _translated():
        config = loader.load_configuration("train", list(groups), run_mode=RunMode.RUN, from_shell=False)
        choices = {str(k): v for k, v in config.hydra.runtime.choices.items() if not str(k).startswith("hydra/")}
        with open_dict(config):
            del config["hydra"]
            config.choices = {key: value for key, value in choices.items() if "@" not in key}
        OmegaConf.set_struct(config, False)
        return config


def _with_values(base: DictConfig, words: Sequence[str]) -> DictConfig:
    """A copy with value overrides applied, as Hydra does it last."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.overrides_parser import OverridesParser

    config = deepcopy(base)
    with _translated():
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(list(words)), config)
    return config


def _resolved(config: DictConfig) -> dict[str, Any]:
    from omegaconf import OmegaConf

    with _translated():
        resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return {str(name): value for name, value in resolved.items()}


def _one_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if not line.strip().startswith(("full_key:", "object_type="))]
    return " ".join(" ".join(lines).split())


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
