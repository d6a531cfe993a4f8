"""Which option of each group was chosen: ``method=ecodiff``, ``trainer=cpu``, or a folder as ``backbone=``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safelight.cli.problems import Problem, did_you_mean

if TYPE_CHECKING:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

# The groups of configs/train.yaml, also those that may have no option yet.
GROUPS: Final = (
    "method", "backbone", "data", "trainer", "callbacks", "logger", "tuned", "experiment", "debug", "local",
)  # fmt: skip
# Groups of which several options can be merged, as in callbacks=[default,mine].
_MERGED: Final = ("callbacks", "logger", "debug", "experiment")
# Groups that a run can do without.
_OPTIONAL: Final = ("data", "callbacks", "logger")


def split(
    parsed: Sequence[Override], loader: ConfigLoaderImpl, problems: list[Problem]
) -> tuple[list[str], list[Override], Path | None]:
    """Sort overrides into choices and values.

    Args:
        parsed: the overrides.
        loader: knows the options.
        problems: what is wrong with the choices is added here; a wrong one is replaced by the nearest option.

    Returns:
        Group choices in Hydra's words, value overrides, and a folder that was given as the backbone.
    """
    groups: list[str] = []
    values: list[Override] = []
    folder: Path | None = None
    known = loader.list_groups("")
    for override in parsed:
        key, typed = override.key_or_group, str(override.input_line)
        if key not in known:
            values.append(override)
            continue
        if override.package is not None:
            fix = f"{key}={override.value()}"
            problems.append(Problem(typed, f"a group has one place here; write {fix!r}", typed=typed, fix=fix))
            continue
        choice = override.value()
        if override.is_delete():
            groups.append(typed)
        elif choice is None or choice == []:
            groups += _nothing(key, typed, problems)
        elif key == "backbone" and isinstance(choice, str) and ("/" in choice or choice.startswith((".", "~"))):
            folder = _backbone_folder(choice, typed, problems)
        elif isinstance(choice, list):
            groups += _several(key, choice, typed, loader.get_group_options(key), problems)
        else:
            groups += _one(key, choice, typed, loader.get_group_options(key), problems)
    return groups, values, folder


def _one(key: str, choice: Any, typed: str, available: Sequence[str], problems: list[Problem]) -> list[str]:
    if str(choice) in available:
        return [typed]
    hint, guess = did_you_mean(str(choice), available)
    fix = f"{key}={guess}" if guess else ""
    problems.append(Problem(typed, f"there is no {key} {str(choice)!r}; {hint}", typed=typed, fix=fix))
    # Go on with what was probably meant, so that mistakes in its keys are found in the same pass.
    return [fix] if guess else []


def _several(key: str, choice: list[Any], typed: str, available: Sequence[str], problems: list[Problem]) -> list[str]:
    if key not in _MERGED:
        fix = f"{key}={choice[0]}" if str(choice[0]) in available else ""
        problems.append(Problem(typed, f"{key} is one of {', '.join(available)}, not a list", typed=typed, fix=fix))
        return [fix] if fix else []
    unknown = [name for name in choice if str(name) not in available]
    if not unknown:
        return [typed]
    hint, _ = did_you_mean(str(unknown[0]), available)
    problems.append(Problem(typed, f"there is no {key} {str(unknown[0])!r}; {hint}", typed=typed))
    return []


def _nothing(key: str, typed: str, problems: list[Problem]) -> list[str]:
    """``callbacks=null``: Hydra wants ``~callbacks`` for it."""
    if key in _OPTIONAL:
        return [f"~{key}"]
    problems.append(Problem(typed, f"leave {key} out for its default, or name an option", typed=typed))
    return []


def _backbone_folder(choice: str, typed: str, problems: list[Problem]) -> Path | None:
    """A run folder or an exported pipeline given as ``backbone=<folder>``."""
    path = Path(choice).expanduser()
    if not path.is_dir():
        text = (
            f"there is no folder {choice!r}; give a run folder, an exported pipeline, or the name of a backbone config"
        )
        problems.append(Problem(typed, text, typed=typed))
        return None
    return (path / "export" if (path / "export").is_dir() else path).resolve()


def stored_settings(folder: Path, problems: list[Problem]) -> dict[str, Any]:
    """``safelight.json`` beside an exported pipeline: sampler steps, guidance, size."""
    file = folder / "safelight.json"
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        problems.append(Problem("backbone", f"{file} is not valid JSON ({error})"))
        return {}
    if not isinstance(content, dict):
        problems.append(Problem("backbone", f"{file} holds a {type(content).__name__}, not settings by name"))
        return {}
    return content


def tuned_for(settings: Mapping[str, Any], groups: Sequence[str], available: Sequence[str]) -> list[str]:
    """Which tuned settings a folder as backbone gets: those of the model it was made from, and none if that is unknown.

    Without this it would get those of the method's default backbone, which it is not.

    Args:
        settings: ``safelight.json`` of the folder.
        groups: the choices so far.
        available: names of all tuned files.
    """
    chosen = {word.partition("=")[0].lstrip("~"): word.partition("=")[2] for word in groups}
    if "tuned" in chosen:
        return []
    wanted = f"{chosen.get('method')}-{settings.get('name')}"
    return [f"tuned={wanted}" if wanted in available else "~tuned"]


def use_folder_as_backbone(config: DictConfig, folder: Path, settings: Mapping[str, Any]) -> None:
    """Point the backbone block at a folder, with the settings that were saved beside it."""
    from omegaconf import open_dict

    before = config.get("backbone") or {}
    name = folder.parent.name if folder.name == "export" else folder.name
    # A folder's family is read from the folder; what the block had before is another model's.
    block = dict(before) | {"family": None} | dict(settings) | {"name": name, "pretrained": str(folder)}
    with open_dict(config):
        config.backbone = block
        config.choices.backbone = str(folder)
