"""Check every value of a configuration against the constructor it will be passed to, before anything is built."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import annotated_types
import yaml

from safelight.cli import places, published
from safelight.cli.crosschecks import TARGET, cross_problems
from safelight.cli.problems import Problem, did_you_mean, nearest
from safelight.cli.signatures import Parameter, Signature, signature_of
from safelight.errors import SafelightError

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    type(None): "null",
    Any: "anything",
    Path: "a path",
}


# What a backbone block without a ``_target_`` is passed to.
BACKBONE = "safelight.generators.settings.backbone_settings"
# Keys of configs/train.yaml that belong to the run itself.
RUN_KEYS: dict[str, Any] = {
    # What NumPy's generator takes.
    "seed": Annotated[int, annotated_types.Interval(ge=0, lt=2**32)],
    "name": str | None,
    "runs_dir": Annotated[str, annotated_types.MinLen(1)],
    "run_dir": Annotated[str, annotated_types.MinLen(1)] | None,
    "resume": Annotated[str, annotated_types.MinLen(1)] | None,
    "global_batch_size": Annotated[int, annotated_types.Ge(1)] | None,
    **dict.fromkeys(("overwrite", "test", "export", "report", "full_error"), bool),
}
# Arguments that the run fills in itself, and what to set instead.
_GIVEN: dict[str, dict[str, str]] = {
    "trainer": {
        "callbacks": "use callbacks=",
        "logger": "use logger=",
        "default_root_dir": "use run_dir=",
        "plugins": "it is how checkpoints are written",
    },
    "logger": {"save_dir": "use run_dir="},
    "callbacks": {"folder": "use run_dir="},
}


def targeted_blocks(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted name and content of every block that names with ``_target_`` what it is passed to."""
    for group in ("method", "backbone", "data", "trainer", "sweep"):
        block = config.get(group)
        if isinstance(block, dict) and isinstance(block.get(TARGET), str):
            yield group, block
            if group == "trainer":
                yield from ((f"trainer.{k}", v) for k, v in block.items() if isinstance(v, dict) and TARGET in v)
    for group in ("callbacks", "logger"):
        blocks = config.get(group)
        for name, block in blocks.items() if isinstance(blocks, dict) else ():
            if isinstance(block, dict) and isinstance(block.get(TARGET), str):
                yield f"{group}.{name}", block


def _shapeless_blocks(config: Mapping[str, Any]) -> Iterator[Problem]:
    """What stands where a block with a ``_target_`` has to stand."""
    if not config.get("method"):
        yield Problem("method", "choose what to run with method=<name>; --help lists them")
    places = [(group, config.get(group)) for group in ("method", "trainer", "data")]
    for group in ("callbacks", "logger"):
        blocks = config.get(group)
        if isinstance(blocks, dict):
            places += [(f"{group}.{name}", block) for name, block in blocks.items()]
        elif blocks:
            yield Problem(group, f"is {_shown(blocks)}; must be a mapping of names to blocks")
    for where, block in places:
        if not block and where != "trainer":
            continue
        if not isinstance(block, dict):
            yield Problem(where, f"is {_shown(block)}; must be a block with a {TARGET}")
        elif not isinstance(block.get(TARGET), str):
            seen = f"is {_shown(block[TARGET])}" if TARGET in block else "is missing"
            yield Problem(f"{where}.{TARGET}", f"{seen}; it names the class to build")
    backbone = config.get("backbone")
    if backbone and not isinstance(backbone, dict):
        yield Problem("backbone", f"is {_shown(backbone)}; must be a block of settings")
    elif isinstance(backbone, dict) and not isinstance(backbone.get(TARGET, ""), str):
        yield Problem(f"backbone.{TARGET}", f"is {_shown(backbone[TARGET])}; it names the class to build")


def _wrong_values(config: Mapping[str, Any], kinds: Mapping[str, Any], prefix: str = "") -> Iterator[Problem]:
    for key, annotation in kinds.items():
        if key in config and (wrong := check_value(Parameter(key, annotation, required=False), config[key])):
            good = _repair(annotation, config[key])
            yield Problem(f"{prefix}{key}", wrong, fix="" if good is None else f"{prefix}{key}={good}")


def validate(config: Mapping[str, Any]) -> list[Problem]:
    """All mistakes that can be seen without importing a method or a model.

    Args:
        config: a resolved configuration, as ``compose`` returns it.

    Returns:
        The problems, in the order of the configuration; empty when there are none.
    """
    problems = [Problem(key, "cannot be left out") for key in RUN_KEYS if key not in config]
    problems += _wrong_values(config, RUN_KEYS)
    problems += _shapeless_blocks(config)
    for where, block in targeted_blocks(config):
        try:
            signature = signature_of(str(block[TARGET]))
        except SafelightError as error:
            problems.append(Problem(f"{where}.{TARGET}", str(error)))
            continue
        problems.extend(check_block(where, block, signature))
    backbone = config.get("backbone")
    if isinstance(backbone, dict) and TARGET not in backbone:
        problems.extend(check_block("backbone", backbone, signature_of(BACKBONE)))
    known = {problem.where for problem in problems}
    problems.extend(problem for problem in places.check(config) if problem.where not in known)
    # What two blocks say together can be judged only when each says something that makes sense by itself.
    known = {problem.where for problem in problems}
    together = [*cross_problems(config), *published.problems(config)]
    return problems + [problem for problem in together if problem.where not in known]


def check_block(where: str, block: Mapping[str, Any], signature: Signature) -> Iterator[Problem]:
    """Unknown, missing and wrong keyword arguments of one block."""
    group, _, inner = where.partition(".")
    # A strategy inside the trainer's block has arguments of its own.
    given = {} if group == "trainer" and inner else _GIVEN.get(group, {})
    for name, value in block.items():
        if name == TARGET:
            continue
        if name in given and name in signature.parameters:
            yield Problem(f"{where}.{name}", f"is set by the run itself; {given[name]}")
            continue
        parameter = signature.parameters.get(name)
        if parameter is None:
            if not signature.is_open:
                hint, _ = did_you_mean(name, signature.parameters)
                yield Problem(f"{where}.{name}", f"{_short(signature)} has no argument {name!r}; {hint}")
            continue
        wrong = check_value(parameter, value)
        if wrong:
            good = _repair(parameter.annotation, value)
            yield Problem(f"{where}.{name}", wrong, fix="" if good is None else f"{where}.{name}={good}")
    for name, parameter in signature.parameters.items():
        if parameter.required and name not in block and name not in given:
            about = f" [{first_sentence(parameter.doc)}]" if parameter.doc else ""
            text = f"{_short(signature)} needs it: {describe(parameter.annotation)}{about}"
            yield Problem(f"{where}.{name}", text)


def _short(signature: Signature) -> str:
    return signature.target.rpartition(".")[2]


def check_value(parameter: Parameter, value: Any) -> str | None:
    """Why a value does not fit a parameter, in words; None when it fits."""
    if isinstance(value, dict) and TARGET in value and parameter.takes_object:
        return None
    if value == "???":
        return f"must be given: {describe(parameter.annotation)}"
    if parameter.annotation is Any:
        return None
    # No setting means infinity or NaN: they come from a typo or a division, and end in a NaN much later.
    if not (isinstance(value, float) and not math.isfinite(value)) and _fits(parameter.annotation, value):
        return None
    finite = " that is finite" if isinstance(value, float) and not math.isfinite(value) else ""
    text = f"is {_shown(value)}; must be {describe(parameter.annotation)}{finite}"
    good = _repair(parameter.annotation, value)
    text = f"{text}; did you mean {good}?" if good is not None else text
    return f"{text} [{first_sentence(parameter.doc)}]" if parameter.doc else text


def first_sentence(doc: str) -> str:
    """The beginning of a description, up to its first full stop or semicolon."""
    return re.split(r"(?<=[\w)`]{2})[.;:](?:\s|$)", doc, maxsplit=1)[0].rstrip(".").replace("``", "")


def _shown(value: Any) -> str:
    shown = f"{value!r}" if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=60)
    return shown.removesuffix("\n...\n").strip()[:80]


def _repair(annotation: Any, value: Any) -> Any:
    """The value that was probably meant, or None: the nearest allowed word, or the whole number behind 1e3."""
    if isinstance(value, str) and _fits(annotation, [value]):
        return f"[{value}]"
    if isinstance(value, float) and value.is_integer() and _fits(annotation, int(value)):
        return int(value)
    return nearest(str(value), [str(choice) for choice in _choices(annotation)])


def _fits(annotation: Any, value: Any) -> bool:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
    from pydantic_core import SchemaError

    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, SchemaError, TypeError):
        return True
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError:
        # YAML has lists where a constructor may say tuple, and text where it says Path; it never has "3" for 3.
        if not isinstance(value, list | tuple | dict) and not _mentions_path(annotation):
            return False
        try:
            adapter.validate_python(value)
        except ValidationError:
            return False
    return True


def _mentions_path(annotation: Any) -> bool:
    return annotation is Path or any(_mentions_path(argument) for argument in typing.get_args(annotation))


def _choices(annotation: Any) -> list[Any]:
    """Literal values anywhere in an annotation."""
    if typing.get_origin(annotation) is typing.Literal:
        return list(typing.get_args(annotation))
    return [choice for argument in typing.get_args(annotation) for choice in _choices(argument)]


def describe(annotation: Any) -> str:
    """An annotation in words: ``Annotated[float, Interval(ge=0, le=1)]`` is "a number >= 0 and <= 1"."""
    if annotation is None:
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        limits = [text for constraint in arguments[1:] for text in _limits(constraint)]
        return " ".join([describe(arguments[0]), " and ".join(limits)]).strip()
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        literals = [choice for argument in arguments for choice in _choices(argument)]
        others = [describe(argument) for argument in arguments if not _choices(argument)]
        listed = ["one of " + ", ".join(dict.fromkeys(map(str, literals)))] if literals else []
        return " or ".join(dict.fromkeys(listed + others))
    if origin in (list, set, frozenset, tuple) or getattr(origin, "__name__", "") in ("Sequence", "Iterable"):
        inner = [describe(argument) for argument in arguments if argument is not ...]
        if origin is tuple and ... not in arguments:
            return f"a list of {len(inner)}: [{', '.join(inner)}]"
        return f"a list, each {inner[0]}" if inner else "a list"
    if origin is dict or getattr(origin, "__name__", "") == "Mapping" or annotation is dict:
        return f"a mapping to {describe(arguments[1])}" if len(arguments) == 2 else "a mapping"
    return _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _limits(constraint: Any) -> Iterator[str]:
    if isinstance(constraint, annotated_types.GroupedMetadata):
        for part in constraint:
            yield from _limits(part)
    for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"), ("multiple_of", "a multiple of")):
        if getattr(constraint, name, None) is not None and not isinstance(constraint, annotated_types.GroupedMetadata):
            yield f"{sign} {getattr(constraint, name)}"
    if isinstance(constraint, annotated_types.MinLen):
        yield f"with at least {constraint.min_length} item(s)"
    if isinstance(constraint, annotated_types.MaxLen):
        yield f"with at most {constraint.max_length} item(s)"
