"""``--help``: what can be run, read from the first comment line of each configuration file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from importlib.resources.abc import Traversable

from safelight.cli import plugins

_WIDTH = 118


def describe_group(group: str, searchpath: tuple[str, ...] = ()) -> dict[str, str]:
    """Option name to one sentence, for ``method``, ``backbone``, ``data``, ...

    Args:
        group: folder under ``configs/``.
        searchpath: further places with configs, as in ``hydra.searchpath``.
    """
    found: dict[str, str] = {}
    for root in plugins.config_roots(searchpath):
        folder = root.joinpath(group)
        if folder.is_dir():
            for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
                if file.name.endswith(".yaml"):
                    found.setdefault(file.name.removesuffix(".yaml"), first_comment(file.read_text(encoding="utf-8")))
    return found


def groups() -> list[str]:
    """Groups with something to choose from, ``method`` first."""
    found = {
        folder.name
        for root in plugins.config_roots()
        for folder in root.iterdir()
        if folder.is_dir() and any(file.name.endswith(".yaml") for file in folder.iterdir())
    }
    order = ("method", "backbone", "data", "trainer")
    return [group for group in order if group in found] + sorted(found - set(order))


def files_of(group: str) -> dict[str, Traversable]:
    """Option name to its file."""
    return {
        file.name.removesuffix(".yaml"): file
        for root in plugins.config_roots()
        if (folder := root.joinpath(group)).is_dir()
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if file.name.endswith(".yaml")
    }


def commands_text() -> str:
    """The page of the ``safelight`` command itself."""
    from safelight.cli.commands import COMMANDS

    usages = [usage for _, usage in COMMANDS.values()]
    width = max(len(usage.partition(": ")[0]) for usage in usages)
    lines = ["usage: safelight <command> ...", ""]
    lines += [f"  {'train':<{width}}  train a method, as python train.py; safelight train --help lists what there is"]
    lines += [f"  {'eval':<{width}}  evaluate a checkpoint, as python eval.py"]
    lines += [f"  {left:<{width}}  {right}" for left, _, right in (usage.partition(": ") for usage in usages)]
    return "\n".join(lines)


def first_comment(text: str) -> str:
    """The first comment of a YAML file that is not a Hydra directive."""
    for line in text.splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ").strip()
        if line.strip() and not line.startswith("#"):
            break
    return ""


def help_text(program: str = "python train.py", searchpath: tuple[str, ...] = ()) -> str:
    """The whole page.

    Args:
        program: how it was started.
        searchpath: further places with configs, as in ``hydra.searchpath``.
    """
    lines = [
        "Safelight: make generative models safe, small and understandable.",
        "",
        f"usage: {program} method=<method> [key=value ...]",
        "",
        *listing("methods", "method", searchpath),
        *listing("backbones", "backbone", searchpath),
        *listing("data", "data", searchpath),
        *listing("experiments", "experiment", searchpath),
        *listing("trainers", "trainer", searchpath),
        *listing("debug", "debug", searchpath),
        *_broken_plugins(),
        "examples",
        f"  {program} method=ecodiff",
        f"  {program} method=ecodiff backbone=tiny_sdxl method.keep=0.7 seed=1",
        f"  {program} method=ecodiff backbone=flux_schnell trainer=ddp trainer.devices=8",
        "",
        "also",
        "  run_dir=<folder>     write exactly there instead of runs/<method>/<time>-<name>",
        "  resume=auto          go on with the newest unfinished run of the method (or resume=<run folder>)",
        "  --cfg job            print the whole configuration of a run instead of running it",
        "  -m key=1,2,3         one run per value, each in its own process and folder; also range(1,5), glob(*)",
        "  safelight --help     list, validate, show, copy, export, schema: look and check without running",
        "  python eval.py ckpt_path=<run folder>/checkpoints/best.ckpt     repeat the numbers of a run",
    ]
    return "\n".join(lines)


def eval_help_text() -> str:
    """The page of ``eval.py``."""
    return "\n".join(
        [
            "Evaluate a checkpoint: method, backbone and data are rebuilt from what it stores.",
            "",
            "usage: python eval.py ckpt_path=<run folder>/checkpoints/best.ckpt [key=value ...]",
            "",
            "  eval_dir=<folder>      where summary.json and the report go; <run folder>/eval-<time> by default",
            "  data.batch_size=8      change any stored value; backbone=, data=, trainer= choose another option",
            "  allow_difference=true  write the results even if they are not those of the training run",
            "",
            "examples",
            "  python eval.py ckpt_path=runs/ecodiff/<run>/checkpoints/best.ckpt",
            "  python eval.py ckpt_path=last.ckpt trainer=gpu eval_dir=results",
            "  python eval.py ckpt_path=last.ckpt seed=1",
        ]
    )


def _broken_plugins() -> Iterator[str]:
    broken = [plugin for plugin in plugins.installed() if plugin.problem]
    if broken:
        yield "plug-ins that cannot be used"
        yield from (f"  {plugin.name}: {plugin.problem}" for plugin in broken)
        yield ""


def listing(title: str, group: str, searchpath: tuple[str, ...] = ()) -> Iterator[str]:
    """A title and one line per option of a group."""
    options = describe_group(group, searchpath)
    if not options:
        return
    yield title
    width = max(max(map(len, options)), 14)
    for name, sentence in options.items():
        indent = " " * (width + 4)
        yield textwrap.fill(f"  {name:<{width}}  {sentence}", _WIDTH, subsequent_indent=indent)
    yield ""
