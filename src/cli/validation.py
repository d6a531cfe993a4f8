"""Check every value of a configuration against the constructor it will be passed to, before anything is built."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import annotated_types
import yaml

from safelight.cli.crosschecks import TARGET, cross_problems
from safelight.cli.problems import Problem, did_you_mean, nearest
from safelight.cli.signatures import Parameter, Signature, signature_of
from safelight.errors import SafelightError

_PATH_NAMES = ("path", "folder", "dir", "root", "file")
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
    "seed": Annotated[int, annotated_types.Ge(0)],
    "name": str | None,
    "runs_dir": str,
    "run_dir": str | None,
    "resume": str | None,
    "global_batch_size": Annotated[int, annotated_types.Ge(1)] | None,
    **dict.fromkeys(("overwrite", "test", "export", "report", "full_error"), bool),
}


def targeted_blocks(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted name and content of every block that names with ``_target_`` what it is passed to."""
    for group in ("method", "backbone", "data", "trainer", "sweep"):
        block = config.get(group)
        if isinstance(block, dict) and TARGET in block:
            yield group, block
            if group == "trainer":
                yield from ((f"trainer.{k}", v) for k, v in block.items() if isinstance(v, dict) and TARGET in v)
    for group in ("callbacks", "logger"):
        for name, block in (config.get(group) or {}).items():
            if isinstance(block, dict) and TARGET in block:
                yield f"{group}.{name}", block


def validate(config: Mapping[str, Any]) -> list[Problem]:
    """All mistakes that can be seen without importing a method or a model.

    Args:
        config: a resolved configuration, as ``compose`` returns it.

    Returns:
        The problems, in the order of the configuration; empty when there are none.
    """
    problems: list[Problem] = []
    for key, annotation in RUN_KEYS.items():
        wrong = check_value(Parameter(key, annotation, required=False), config[key]) if key in config else None
        if wrong:
            problems.append(Problem(key, wrong))
    if not isinstance(config.get("method"), dict):
        problems.append(Problem("method", "choose what to run with method=<name>; --help lists them"))
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
    problems.extend(_missing_paths(config))
    problems.extend(_run_folder_problems(config))
    # What two blocks say together can be judged only when each says something that makes sense by itself.
    known = {problem.where for problem in problems}
    problems.extend(problem for problem in cross_problems(config) if problem.where not in known)
    return problems


def check_block(where: str, block: Mapping[str, Any], signature: Signature) -> Iterator[Problem]:
    """Unknown, missing and wrong keyword arguments of one block."""
    for name, value in block.items():
        if name == TARGET:
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
    injected = {"trainer": ("callbacks", "logger"), "logger": ("save_dir",), "callbacks": ("folder",)}
    skipped = injected.get(where.split(".")[0], ())
    for name, parameter in signature.parameters.items():
        if parameter.required and name not in block and name not in skipped:
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
    if _fits(parameter.annotation, value):
        return None
    shown = f"{value!r}" if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=60)
    shown = shown.removesuffix("\n...\n").strip()
    text = f"is {shown[:80]}; must be {describe(parameter.annotation)}"
    good = _repair(parameter.annotation, value)
    text = f"{text}; did you mean {good}?" if good is not None else text
    return f"{text} [{first_sentence(parameter.doc)}]" if parameter.doc else text


def first_sentence(doc: str) -> str:
    """The beginning of a description, up to its first full stop or semicolon."""
    return re.split(r"(?<=[\w)`]{2})[.;:](?:\s|$)", doc, maxsplit=1)[0].rstrip(".").replace("``", "")


def _repair(annotation: Any, value: Any) -> Any:
    """The value that was probably meant, or None: the nearest allowed word, or the whole number behind 1e3."""
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


def _missing_paths(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Files and folders that are named but do not exist."""
    for group in ("backbone", "data", "method"):
        block = config.get(group)
        for name, value in block.items() if isinstance(block, dict) else ():
            if not isinstance(value, str) or not value or "cache" in name:
                continue
            if name == "pretrained":
                problem = _missing_pretrained(f"{group}.{name}", value)
                if problem:
                    yield problem
            elif _names_a_path(name) and not Path(value).expanduser().exists():
                yield Problem(f"{group}.{name}", f"there is no {value!r} here{_nearest_sibling(value)}")


def _names_a_path(name: str) -> bool:
    return name in _PATH_NAMES or name.endswith(tuple(f"_{word}" for word in _PATH_NAMES))


def _run_folder_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A run folder that is in use, and a run to resume that is not there."""
    from safelight.cli.folders import is_used, process_rank

    resume, run_dir = config.get("resume"), config.get("run_dir")
    if isinstance(resume, str) and resume != "auto" and not Path(resume).expanduser().exists():
        text = f"there is no run folder or checkpoint {resume!r}; resume=auto finds the newest unfinished run"
        yield Problem("resume", text + _nearest_sibling(resume))
    new = not resume and not config.get("overwrite") and process_rank() == 0
    if new and isinstance(run_dir, str) and is_used(Path(run_dir).expanduser()):
        text = f"{run_dir!r} holds an earlier run; add resume=auto to go on with it or overwrite=true to replace it"
        yield Problem("run_dir", text)


def _missing_pretrained(where: str, value: str) -> Problem | None:
    """A ``pretrained`` that can only be a local folder, or a zoo name, and does not exist."""
    if value.startswith("zoo:"):
        from safelight import zoo

        try:
            zoo.path(value.removeprefix("zoo:"))
        except SafelightError as error:
            return Problem(where, str(error))
        return None
    # A hub id is `name` or `owner/name`; anything else with a slash, a dot or a tilde in front is a folder.
    local = value.startswith(("/", "./", "../", "~")) or value.count("/") > 1
    if local and not Path(value).expanduser().exists():
        return Problem(
            where, f"there is no folder {value!r}; give a diffusers folder or a hub id{_nearest_sibling(value)}"
        )
    return None


def _nearest_sibling(value: str) -> str:
    path = Path(value).expanduser()
    if not path.parent.is_dir():
        return ""
    guess = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return f"; did you mean {str(Path(value).parent / guess)!r}?" if guess else ""
