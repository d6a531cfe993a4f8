"""Packages that bring methods, backbones and data of their own, found by their entry point.

A plug-in says in its ``pyproject.toml`` which package it is::

    [project.entry-points."safelight.plugins"]
    yours = "your_package"

and the folder ``your_package/configs`` joins the search path: its files are listed by ``--help``, completed, validated
and built like the shipped ones. Nothing of a plug-in but its packages' ``__init__`` files is imported for that, so
these should stay light.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from safelight.errors import SafelightError

GROUP = "safelight.plugins"


@dataclass(frozen=True)
class Plugin:
    """One installed plug-in.

    Attributes:
        name: what its entry point is called.
        configs: dotted name of its folder of configurations.
        problem: why it cannot be used; empty when it can.
    """

    name: str
    configs: str
    problem: str = ""


@cache
def installed() -> tuple[Plugin, ...]:
    """All plug-ins by name, also those that cannot be used."""
    found = {entry.name: entry.value.partition(":")[0] for entry in entry_points(group=GROUP)}
    return tuple(_look(name, f"{package}.configs") for name, package in sorted(found.items()))


def usable() -> list[Plugin]:
    """The plug-ins whose configurations can be read."""
    return [plugin for plugin in installed() if not plugin.problem]


def _look(name: str, configs: str) -> Plugin:
    try:
        found = importlib.util.find_spec(configs)
    except Exception as error:
        # A plug-in runs its own code here. One that is broken must not take --help and every other method with it.
        return Plugin(name, configs, f"{configs} cannot be imported: {type(error).__name__}: {error}")
    return Plugin(name, configs, "" if found else f"there is no package {configs}")


def config_roots(searchpath: tuple[str, ...] = ()) -> list[Traversable]:
    """Folders with configurations, in the order in which they are searched: shipped, plug-ins, ``hydra.searchpath``.

    Args:
        searchpath: ``pkg://a.package``, ``file:///a/folder`` or ``/a/folder``.

    Raises:
        SafelightError: one of ``searchpath`` does not exist.
    """
    roots = [files("safelight.configs"), *(files(plugin.configs) for plugin in usable())]
    for place in searchpath:
        kind, _, name = place.rpartition("://")
        try:
            root = files(name) if kind == "pkg" else Path(name)
        except (ModuleNotFoundError, TypeError, ValueError) as error:
            raise SafelightError(f"hydra.searchpath: there is no package {name!r}") from error
        if not root.is_dir():
            raise SafelightError(f"hydra.searchpath: there is no folder {name!r}")
        roots.append(root)
    return roots
