"""Shipped configuration files as they stand, for the tests that hold them against their sources."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml

from safelight.cli.composing import options

CONFIGS = files("safelight.configs")


def text_of(file: str) -> str:
    """A shipped file, ``group/name``."""
    return CONFIGS.joinpath(f"{file}.yaml").read_text(encoding="utf-8")


def read(file: str) -> dict[str, Any]:
    """The content of a shipped file, not composed with others."""
    content: dict[str, Any] = yaml.safe_load(text_of(file))
    return content


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values, without the defaults list."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        elif key != "defaults":
            found[f"{prefix}{key}"] = value
    return found


def chosen(file: str) -> dict[str, str]:
    """What a file's defaults list overrides: group to option; a file it is built on (a plain name) is none."""
    entries = [entry for entry in read(file)["defaults"] if isinstance(entry, dict)]
    return {key.removeprefix("override /"): option for entry in entries for key, option in entry.items()}


def every(*groups: str) -> list[str]:
    """All files of some groups."""
    return [f"{group}/{name}" for group in groups for name in options(group)]
