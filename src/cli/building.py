"""Build the objects of a run from plain blocks of configuration."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.cli.crosschecks import TARGET
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.loggers import Logger


def build(where: str, block: Mapping[str, Any], kind: type | tuple[type, ...], **given: Any) -> Any:
    """Call what a block names, with the block's values as keyword arguments.

    Args:
        where: name of the block, for messages.
        block: plain values and ``_target_``.
        kind: what the class must derive from; a function is accepted from this package only. A checkpoint brings
            its own configuration, so a ``_target_`` is never called before it is known to be of the expected kind.
        given: further keyword arguments.

    Raises:
        SafelightError: no such class, not of that kind, or its constructor refused a value.
    """
    module_name, _, name = str(block[TARGET]).rpartition(".")
    try:
        target = getattr(importlib.import_module(module_name), name)
    except ModuleNotFoundError as error:
        raise SafelightError(f"{where}: {block[TARGET]} needs {error.name!r}, which is not installed") from error
    except AttributeError as error:
        raise SafelightError(f"{where}: module {module_name!r} has no class {name!r}") from error
    ours = not isinstance(target, type) and callable(target) and module_name.startswith("safelight.")
    if not ours and not (isinstance(target, type) and issubclass(target, kind)):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise SafelightError(f"{where}: {block[TARGET]} is not a {wanted}")
    values = {key: value for key, value in block.items() if key != TARGET}
    try:
        return target(**values | given)
    except SafelightError:
        raise
    except (TypeError, ValueError) as error:
        raise SafelightError(f"{where}: {target.__name__} refused its settings: {error}") from error


def build_module(config: Mapping[str, Any]) -> LightningModule:
    """The method of a run."""
    from lightning.pytorch import LightningModule

    module = build("method", config["method"], LightningModule)
    assert isinstance(module, LightningModule)
    return module


def build_datamodule(config: Mapping[str, Any]) -> LightningDataModule | None:
    """The data of a run; None when the method brings its own loaders."""
    from lightning.pytorch import LightningDataModule

    block = config.get("data")
    if not block:
        return None
    datamodule = build("data", block, LightningDataModule)
    assert isinstance(datamodule, LightningDataModule)
    return datamodule


def build_callbacks(config: Mapping[str, Any], folder: Path, template: Mapping[str, Any]) -> list[Callback]:
    """Callbacks from the configuration, and those without which a run could not be continued.

    The order matters: the random streams are taken before a checkpoint is written, and lines of ``metrics.jsonl`` that
    will be written again are dropped before anything is logged.
    """
    from safelight.callbacks import TrimMetrics
    from safelight.callbacks.checkpointing import Checkpoints, StoreConfig
    from safelight.callbacks.resume import ExactResume, StopCleanly

    chosen = build_chosen(config, folder)
    checkpoints = next((callback for callback in chosen if isinstance(callback, Checkpoints)), None)
    return [StoreConfig(config, template), ExactResume(), TrimMetrics(), *chosen, StopCleanly(checkpoints)]


def build_chosen(config: Mapping[str, Any], folder: Path) -> list[Callback]:
    """The callbacks of the configuration; a block set to null is left out."""
    from lightning.pytorch import Callback

    from safelight.callbacks.checkpointing import Checkpoints

    chosen = []
    for name, block in (config.get("callbacks") or {}).items():
        if block:
            is_checkpoints = str(block[TARGET]).endswith(f".{Checkpoints.__name__}")
            given = {"folder": folder / "checkpoints"} if is_checkpoints else {}
            chosen.append(build(f"callbacks.{name}", block, Callback, **given))
    return chosen


def build_loggers(config: Mapping[str, Any], folder: Path) -> list[Logger]:
    """Loggers from the configuration, and ``metrics.jsonl`` always."""
    from lightning.pytorch.loggers import Logger

    from safelight.callbacks import MetricsJsonl

    loggers: list[Logger] = [MetricsJsonl(folder)]
    for name, block in (config.get("logger") or {}).items():
        if block:
            loggers.append(build(f"logger.{name}", block, Logger, save_dir=str(folder)))
    return loggers


def build_trainer(
    config: Mapping[str, Any], callbacks: list[Callback], loggers: list[Logger] | bool, folder: Path
) -> Trainer:
    """The trainer; nested blocks with a ``_target_`` become strategies, profilers or plug-ins."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Trainer
    from lightning.pytorch.accelerators import Accelerator
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy

    from safelight.callbacks.checkpointing import AtomicCheckpointIO

    block = dict(config["trainer"])
    for key, value in block.items():
        if isinstance(value, dict) and TARGET in value:
            block[key] = build(f"trainer.{key}", value, (Strategy, Profiler, Accelerator))
    if not any(isinstance(callback, ProgressBar) for callback in callbacks):
        # Otherwise Lightning adds a bar of its own, which floods a log file.
        block["enable_progress_bar"] = False
    given = {"callbacks": callbacks, "logger": loggers, "default_root_dir": str(folder)}
    try:
        trainer = build("trainer", block, Trainer, plugins=[AtomicCheckpointIO()], **given)
    except MisconfigurationException as error:
        raise SafelightError(f"trainer: {error}") from error
    assert isinstance(trainer, Trainer)
    return trainer


def quiet() -> None:
    """Silence what libraries print without being asked; warnings about the user's own run stay."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Loading bars of transformers and diffusers; the run's own progress does not use tqdm.
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Lightning sets its own level when it is imported, so it must be there first.
    importlib.import_module("lightning.pytorch")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for pattern in (
        r".*does not have many workers.*",
        r".*Found \d+ module\(s\) in eval mode.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
        r".*available but not used.*",
        r".*callbacks used to create the checkpoint need to be provided.*",
        r".*tensorboardX.*",
        # Data modules offer validation to the methods that have a use for it.
        r".*but have no `validation_step`.*",
        # Blocks of diffusers and transformers return views; the contract compares sharded with whole training.
        r".*FSDP2-wrapped module .* returned a view tensor.*",
    ):
        warnings.filterwarnings("ignore", message=pattern)
