"""``--help``: what can be run, read from the first comment line of each configuration file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

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
        *_listing("methods", "method", searchpath),
        *_listing("backbones", "backbone", searchpath),
        *_listing("data", "data", searchpath),
        *_listing("trainers", "trainer", searchpath),
        *_listing("debug", "debug", searchpath),
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
        "  -m key=1,2,3         one run per value, each in its own process and folder",
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


def _listing(title: str, group: str, searchpath: tuple[str, ...]) -> Iterator[str]:
    options = describe_group(group, searchpath)
    if not options:
        return
    yield title
    width = max(max(map(len, options)), 14)
    for name, sentence in options.items():
        indent = " " * (width + 4)
        yield textwrap.fill(f"  {name:<{width}}  {sentence}", _WIDTH, subsequent_indent=indent)
    yield ""
