"""Mistakes that no single value shows: blocks that do not fit each other."""

from __future__ import annotations

import ast
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safelight.cli.problems import Problem, did_you_mean, nearest
from safelight.cli.signatures import class_attribute, signature_of, source_of
from safelight.errors import SafelightError
from safelight.generators.settings import FAMILIES

TARGET = "_target_"
_LOGGED = re.compile(r"^(train|val)/[\w/.*]+$")


def cross_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Everything wrong with how the blocks of a resolved configuration fit together."""
    method = config.get("method")
    if isinstance(method, dict) and TARGET in method:
        yield from _backbone_problems(config, str(method[TARGET]))
        yield from _monitor_problems(config, str(method[TARGET]))
        yield from _sharding_problems(config, str(method[TARGET]))
    yield from _early_problems(config)
    yield from _batch_problems(config)


def family_of(backbone: Mapping[str, Any]) -> tuple[str | None, Path | None]:
    """Family of a backbone block, and the folder that shows it when it was read from there.

    A family that is not one of ours is returned as the denoiser's class name.
    """
    folder = _pipeline_folder(str(backbone.get("pretrained") or ""))
    if folder is not None:
        try:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
            part = index.get("unet") or index.get("transformer") or [None, None]
            return FAMILIES.get(part[1], part[1]), folder
        except (OSError, ValueError, AttributeError, IndexError):
            pass  # A damaged folder is reported when it is loaded, with the file's name.
    declared = backbone.get("family")
    return (declared if isinstance(declared, str) else None), None


def _pipeline_folder(pretrained: str) -> Path | None:
    if pretrained.startswith("zoo:"):
        from safelight import zoo

        try:
            folder = zoo.path(pretrained.removeprefix("zoo:"))
        except SafelightError:
            return None
    else:
        folder = Path(pretrained).expanduser()
    for candidate in (folder, folder / "pipeline", folder / "export", folder / "export" / "pipeline"):
        try:
            if pretrained and (candidate / "model_index.json").is_file():
                return candidate
        except OSError:  # A name longer than the file system takes, or a folder that may not be read.
            return None
    return None


def _backbone_problems(config: Mapping[str, Any], target: str) -> Iterator[Problem]:
    backbone, choices = config.get("backbone"), config.get("choices") or {}
    if not isinstance(backbone, dict) or TARGET in backbone:
        return
    name = target.rpartition(".")[2]
    try:
        signature = signature_of(target)
    except SafelightError:
        return
    # A method may call the argument as it likes; `${backbone}` in its file shows where it goes.
    if not ("backbone" in signature.parameters or signature.is_open or backbone in config["method"].values()):
        yield Problem("backbone", f"{name} has no backbone; leave it out", typed=_typed(choices))
        return
    family, folder = family_of(backbone)
    declared = backbone.get("family")
    if folder is not None and declared and family != declared:
        fits = _options_of(str(family))
        text = f"{str(backbone['pretrained'])!r} is of the family {family!r}, these settings are for {declared!r}"
        text += f"; begin with one of backbone={', '.join(fits)}" if fits else ""
        yield Problem("backbone.pretrained", text)
    supported = class_attribute(target, "families")
    if supported and family and family not in supported:
        fits = [option for known in supported for option in _options_of(known)]
        text = f"{name} cannot use the family {family!r}, only {', '.join(supported)}"
        text += f": backbone={', '.join(fits)}" if fits else ""
        guess = nearest(str(choices.get("backbone")), fits) or (fits[0] if fits else None)
        yield Problem("backbone", text, typed=_typed(choices), fix=f"backbone={guess}" if guess else "")


def _typed(choices: Mapping[str, Any]) -> str | None:
    return f"backbone={choices['backbone']}" if choices.get("backbone") else None


def _options_of(family: str) -> list[str]:
    """Shipped backbones of a family, the small ones first."""
    from importlib.resources import files

    found = []
    for file in files("safelight.configs").joinpath("backbone").iterdir():
        if file.name.endswith(".yaml") and f"\nfamily: {family}\n" in file.read_text(encoding="utf-8"):
            found.append(file.name.removesuffix(".yaml"))
    return sorted(found, key=lambda option: (not option.startswith("tiny_"), option))


def logged_names(target: str) -> list[str]:
    """Names that a method logs while training and validating, read from its source; ``*`` where a part is computed.

    Empty when the source does not show them.
    """
    tree = source_of(target)
    names: dict[str, None] = {}
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            names[node.value] = None
        elif isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values]
            text = "".join(parts)
            if text.startswith("*/"):
                names |= dict.fromkeys((f"train/{text[2:]}", f"val/{text[2:]}"))
            names[text] = None
    return [name for name in names if _LOGGED.match(name)]


def _monitor_problems(config: Mapping[str, Any], target: str) -> Iterator[Problem]:
    """Callbacks that watch something that is never logged."""
    names = logged_names(target)
    if not names:
        return
    own = class_attribute(target, "monitor")
    metrics = class_attribute(target, "metric_names") or ()
    known = [*names, *(f"val/{metric}" for metric in metrics if _validates(target)), *([own] if own else [])]
    callbacks, trainer = config.get("callbacks"), config.get("trainer")
    for name, block in callbacks.items() if isinstance(callbacks, dict) else ():
        monitor = block.get("monitor") if isinstance(block, dict) else None
        if not isinstance(monitor, str):
            continue
        where = f"callbacks.{name}.monitor"
        if not any(re.fullmatch(re.escape(k).replace(r"\*", r"[\w/.]+"), monitor) for k in known):
            visible = sorted({k for k in known if "*" not in k})
            hint, guess = did_you_mean(monitor, visible)
            text = f"is {monitor!r}, which {target.rpartition('.')[2]} never logs while training; {hint}"
            yield Problem(where, text, fix=f"{where}={guess}" if guess else "")
        elif monitor.startswith("val/") and isinstance(trainer, dict) and trainer.get("limit_val_batches") in (0, 0.0):
            text = f"is {monitor!r}, but trainer.limit_val_batches=0 switches validation off"
            yield Problem(where, text, fix="trainer.limit_val_batches=1.0")


def _validates(target: str) -> bool:
    tree = source_of(target)
    return tree is not None and any(isinstance(n, ast.FunctionDef) and n.name == "validation_step" for n in tree.body)


def _sharding_problems(config: Mapping[str, Any], target: str) -> Iterator[Problem]:
    """Sharded weights for a method that names none worth sharding."""
    trainer, chosen = config.get("trainer"), str((config.get("choices") or {}).get("trainer"))
    strategy = trainer.get("strategy") if isinstance(trainer, dict) else None
    kind = str(strategy.get(TARGET)).rpartition(".")[2] if isinstance(strategy, dict) else ""
    if kind in ("FullySharded", "ModelParallelStrategy") and not class_attribute(target, "sharded"):
        copied = "trainer=ddp_cpu" if chosen.endswith("_cpu") else "trainer=ddp"
        text = f"{target.rpartition('.')[2]} declares nothing that could be sharded over processes"
        text += f"; {copied} keeps a copy on each"
        yield Problem("trainer", text, typed=f"trainer={chosen}", fix=copied)


def _early_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """Words that a class of the data has looked up in a list of its own, by a function it names in ``early_check``."""
    data = config.get("data")
    if not isinstance(data, dict):
        return
    target = str(data.get(TARGET) or "")
    named = class_attribute(target, "early_check")
    # A configuration out of a checkpoint may name any class; only a package's own function is called for it.
    if not isinstance(named, str) or named.partition(".")[0] != target.partition(".")[0]:
        return
    module, _, function = named.rpartition(".")
    for argument, word, known in getattr(importlib.import_module(module), function)(data):
        hint, guess = did_you_mean(word, known)
        where, value = f"data.{argument}", data[argument]
        text = f"{word!r} is none of the words there are; {hint}"
        instead = [guess if each == word else each for each in value] if isinstance(value, list) else guess
        yield Problem(where, text, fix=f"{where}={instead}".replace("'", "") if guess else "")


def _batch_problems(config: Mapping[str, Any]) -> Iterator[Problem]:
    """A global batch that does not divide over the devices."""
    wish = config.get("global_batch_size")
    if type(wish) is not int or wish < 1:
        return
    processes, reason = batch_divisor(config)
    if reason:
        yield Problem("global_batch_size", reason)
    elif wish % processes:
        near = [n for n in (wish - wish % processes, wish + processes - wish % processes) if n]
        text = f"{wish} samples do not divide over {processes} (devices x nodes x accumulated batches)"
        text += f"; nearest: {', '.join(map(str, near))}"
        yield Problem("global_batch_size", text, fix=f"global_batch_size={near[-1]}")


def batch_divisor(config: Mapping[str, Any]) -> tuple[int, str]:
    """Into how many per-device batches an optimiser step is cut, or 1 and why that cannot be known."""
    trainer, data = config.get("trainer"), config.get("data")
    if not isinstance(trainer, dict):
        return 1, "needs a trainer with devices"
    if not isinstance(data, dict) or TARGET not in data:
        return 1, "needs data with a batch_size"
    try:
        if "batch_size" not in signature_of(str(data[TARGET])).parameters:
            return 1, f"{str(data[TARGET]).rpartition('.')[2]} has no batch_size"
    except SafelightError:
        return 1, "needs data with a batch_size"
    devices = trainer.get("devices", 1)
    if isinstance(devices, list):
        devices = len(devices)
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if type(devices) is not int or devices < 1:
        return 1, f"trainer.devices={devices} is known only on the machine; give a number"
    numbers = [devices, trainer.get("num_nodes", 1), trainer.get("accumulate_grad_batches", 1)]
    product = 1
    for number in numbers:
        product *= number if type(number) is int and number > 0 else 1
    return product, ""
