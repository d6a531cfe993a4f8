"""The helpers of the ``safelight`` command: look at what there is and check it, without running anything."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from safelight.cli import composing, helping
from safelight.cli.crosschecks import TARGET
from safelight.cli.problems import ConfigError, Problem, did_you_mean
from safelight.cli.signatures import NOT_LITERAL, signature_of
from safelight.cli.validation import BACKBONE, describe, first_sentence, validate

# Given by the program itself, so not a setting.
_GIVEN: Final = {"trainer": ("callbacks", "logger", "plugins"), "logger": ("save_dir",), "callbacks": ("folder",)}


def list_options(words: Sequence[str]) -> int:
    """``safelight list [group ...]``: what can be written after ``group=``, one sentence each."""
    groups = helping.groups()
    _refuse_unknown(words, groups, "group")
    for group in words or groups:
        print("\n".join(helping.listing(group, group)))
    return 0


def _refuse_unknown(words: Sequence[str], known: Collection[str], kind: str) -> None:
    """All words that name nothing, in one message."""
    problems = []
    for word in words:
        if word not in known:
            hint, guess = did_you_mean(word, known)
            problems.append(Problem(word, f"there is no {kind} {word!r}; {hint}", typed=word, fix=guess or ""))
    if problems:
        raise ConfigError(problems)


def validate_command(words: Sequence[str]) -> int:
    """``safelight validate key=value …`` or ``safelight validate <file.yaml>``: every mistake, or what is fine."""
    if len(words) == 1 and "=" not in words[0]:
        config = _read_config(words[0])
        problems = validate({**config, "run_dir": None})  # A finished run's own folder is in use, of course.
    else:
        composed = composing.compose_all(words)
        config, problems = composed.config, composing.all_problems(composed)
    if problems:
        raise ConfigError(problems)
    choices = config.get("choices") or {}
    chosen = [f"{group}={choices[group]}" for group in ("method", "backbone", "data", "trainer") if choices.get(group)]
    print(f"valid: {' '.join(chosen)}")
    return 0


def show(words: Sequence[str]) -> int:
    """``safelight show [block …] key=value …``: the configuration with every argument, its default and its meaning."""
    blocks = [word for word in words if "=" not in word]
    config = composing.compose([word for word in words if "=" in word])
    _refuse_unknown(blocks, config, "block")
    for key, value in config.items():
        if not blocks or key in blocks:
            print("\n".join(_shown(key, value, key)))
    return 0


def _shown(key: str, value: Any, where: str) -> list[str]:
    """A key of the configuration as commented YAML."""
    group = where.partition(".")[0]
    if not isinstance(value, dict):
        return [f"{key}: {_inline(value)}"]
    if TARGET not in value and where != "backbone":
        inner = [line for name, block in value.items() for line in _shown(name, block, f"{where}.{name}")]
        return [f"{key}:{'' if value else ' {}'}", *_indent(inner)]
    signature = signature_of(str(value.get(TARGET, BACKBONE)))
    lines = [f"{TARGET}: {value[TARGET]}"] if TARGET in value else []
    for name, parameter in signature.parameters.items():
        about = "; ".join(part for part in (first_sentence(parameter.doc), describe(parameter.annotation)) if part)
        if name in value:
            if isinstance(value[name], dict):
                lines += [f"# {about}", *_shown(name, value[name], f"{where}.{name}")]
            else:
                lines.append(f"{name}: {_inline(value[name])}  # {about}")
        elif name not in _GIVEN.get(group, ()):
            default = "…" if parameter.default is NOT_LITERAL else _inline(parameter.default)
            lines.append(f"# {name}: {default}  # default; {about}")
    return [f"{key}:", *_indent(lines)]


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def _inline(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n...\n").strip()


def copy(words: Sequence[str]) -> int:
    """``safelight copy <group>/<name> [file]``: a shipped configuration file to edit, under a name of its own."""
    shipped = {f"{group}/{name}": file for group in helping.groups() for name, file in helping.files_of(group).items()}
    if not words or words[0] not in shipped:
        word = words[0] if words else ""
        hint, guess = did_you_mean(word, shipped)
        raise ConfigError(
            [Problem(word or "copy", f"name a shipped file; {hint}", typed=word or None, fix=guess or "")]
        )
    group, _, name = words[0].partition("/")
    target = Path(words[1]) if len(words) > 1 else Path("my_configs") / group / f"my_{name}.yaml"
    if target.suffix != ".yaml":
        target = target / group / f"my_{name}.yaml"
    problem = ""
    if target.exists():
        problem = f"{str(target)!r} exists already; name another file"
    elif target.parent.name != group:
        problem = f"files of this group lie in a folder {group!r}: {target.parent / group / target.name}"
    elif target.stem in helping.files_of(group):
        problem = f"{target.stem!r} is the name of a shipped {group}, which would win; choose another name"
    if problem:
        raise ConfigError([Problem(str(target), problem, typed=words[1] if len(words) > 1 else None)])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(shipped[words[0]].read_text(encoding="utf-8"), encoding="utf-8")
    place = f"hydra.searchpath=[{target.parent.parent.absolute()}]"
    print(f"copied to {target}; use it with\n  {shlex.join(['python', 'train.py', place, f'{group}={target.stem}'])}")
    return 0


def export(words: Sequence[str]) -> int:
    """``safelight export <run folder or checkpoint> [folder]``: measure a checkpoint and write its artefact again."""
    from safelight.cli.evaluating import evaluate, find_checkpoint

    plain = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word and not word.startswith(("ckpt_path=", "export_dir="))]
    given = dict(word.split("=", 1) for word in words if word.startswith(("ckpt_path=", "export_dir=")))
    source = given.get("ckpt_path") or (plain[0] if plain else "")
    run = Path(source).expanduser()
    if source and (run / "checkpoints" / "best.ckpt").is_file():
        source = str(run / "checkpoints" / "best.ckpt")
    path, problems = find_checkpoint([f"ckpt_path={source}"] if source else [])
    target = Path(given.get("export_dir") or (plain[1] if len(plain) > 1 else "export")).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        problems.append(Problem("export_dir", f"{str(target)!r} is not empty; give another folder"))
    if problems:
        raise ConfigError(problems)
    evaluate(path, overrides, export_to=target, started_as="safelight export")
    return 0


def schema(words: Sequence[str]) -> int:
    """``safelight schema key=value …``: JSON schema of what may stand in the configuration of such a run."""
    from safelight.cli.schema import schema_of

    config = composing.compose(words)
    print(json.dumps(schema_of(config), indent=1))
    return 0


def _read_config(name: str) -> dict[str, Any]:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError([Problem(name, f"there is no file {name!r}; give a config.yaml or key=value …", typed=name)])
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError([Problem(name, f"is not YAML: {' '.join(str(error).split())}", typed=name)]) from error
    if not isinstance(config, dict) or "method" not in config:
        text = "is not the configuration of a run (config.yaml in a run folder is one)"
        raise ConfigError([Problem(name, text, typed=name)])
    return {str(key): value for key, value in config.items()}


COMMANDS: Final[dict[str, tuple[Callable[[Sequence[str]], int], str]]] = {
    "list": (list_options, "list [group ...]: what can be written after group="),
    "validate": (validate_command, "validate key=value ... | file.yaml: every mistake, without running"),
    "show": (show, "show [block ...] key=value ...: every argument with default, type and meaning"),
    "copy": (copy, "copy group/name [file.yaml]: a shipped file to edit"),
    "export": (export, "export <run folder or checkpoint> [folder]: write the artefact again"),
    "schema": (schema, "schema key=value ...: JSON schema for editors"),
}
