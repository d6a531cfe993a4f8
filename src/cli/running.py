"""One training run, from a resolved configuration to its summary. Every stage is a function with plain arguments."""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.cli import building, composing, ending, folders, resuming
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer

    from safelight.reporting import Summary


@dataclass
class Run:
    """What the stages after training need.

    Attributes:
        config: resolved values the run uses.
        folder: the run folder.
        command: what started the run.
        module: the method.
        datamodule: the data, or None.
        trainer: the trainer.
    """

    config: dict[str, Any]
    folder: Path
    command: str
    module: LightningModule
    datamodule: LightningDataModule | None
    trainer: Trainer


def train(
    config: Mapping[str, Any],
    *,
    template: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    command: str | None = None,
) -> Summary | None:
    """Train, test, export and report one run.

    Args:
        config: what would be typed, as a plain dict, nested or dotted: ``{"method": "ecodiff", "method.keep": 0.7}``.
            Or the whole configuration, from ``compose``.
        template: ``config`` before interpolation; stored in checkpoints. None stores ``config`` itself.
        overrides: what was typed, for a resumed run: keys in it may change how the run goes on.
        command: written to ``command.txt`` and into cards; composed from the overrides when None.

    Returns:
        The content of ``summary.json``; None in processes of a higher rank and for ``trainer.fast_dev_run``.

    Raises:
        ConfigError: a plain dict has mistakes; all of them are listed.
        SafelightError: something else the user can mend.
        StopRequest: Ctrl-C or SIGTERM arrived; ``last.ckpt`` is written.
    """
    started = time.monotonic()
    building.quiet()
    if not isinstance(config.get("method"), Mapping):
        overrides = composing.as_overrides(config)
        composed = composing.compose_valid(overrides)
        config, template = composed.config, composed.template
    config, template = dict(config), dict(template or config)
    command = command or shlex.join(["python", "train.py", *overrides])
    found, finished = None, None
    if config.get("resume"):
        finished = _already_finished(config)
        found = None if finished else resuming.find_resumable(config)
    if finished:
        return finished
    if found:
        config, template, notes = resuming.merge(found, config, overrides)
        _say_resumed(found, notes)
        folder = _continue_in(found)
    else:
        folder = _start_anew(config)
    main = folders.process_rank() == 0
    try:
        if main:
            folders.write_start(folder, config, command)
            print(f"run folder: {folder}", flush=True)
        run = assemble(config, folder, template, command)
        fit(run, found.checkpoint if found else None)
    except BaseException as error:
        # A bug leaves everything for whoever looks for it; a mistake or a stop leaves nothing half made.
        expected = isinstance(error, SafelightError | KeyboardInterrupt) or hasattr(error, "signal_number")
        if main and expected and not found:
            folders.discard_unstarted(folder, Path(config["runs_dir"]).expanduser())
        raise
    if _is_dry(run.trainer):
        return None
    metrics, controls = test(run) if config["test"] else ({}, {})
    # Ranks other than 0 have nothing more to do; what follows contains no collective operation.
    if not run.trainer.is_global_zero:
        return None
    return conclude(run, metrics, controls, started)


def _already_finished(config: Mapping[str, Any]) -> Summary | None:
    """The summary of a run that ``run_dir`` and ``resume=auto`` point at, when there is nothing left to do."""
    folder = Path(str(config.get("run_dir") or "")).expanduser()
    if config["resume"] != "auto" or not config.get("run_dir") or not folders.is_finished(folder):
        return None
    from safelight.reporting import read_summary

    print(f"resume=auto: the run in {folder} is finished; resume={folder} would train it further")
    return read_summary(folder)


def _say_resumed(found: resuming.Resumable, notes: Sequence[str]) -> None:
    if folders.process_rank() == 0:
        print(f"resume: {found.checkpoint} at step {found.step}; its own configuration applies", flush=True)
        for note in notes:
            print(f"  {note}", flush=True)


def _continue_in(found: resuming.Resumable) -> Path:
    folder = folders.adopt(found.folder)
    if folders.process_rank() == 0:
        (folder / "summary.json").unlink(missing_ok=True)
    return folder


def _start_anew(config: dict[str, Any]) -> Path:
    if config.get("resume") and folders.process_rank() == 0:
        where = config.get("run_dir") or Path(config["runs_dir"]) / str(config["choices"]["method"])
        print(f"resume=auto: no unfinished run with a checkpoint in {where}; starting a new one", flush=True)
        # What a run left that died before its first checkpoint is of no use to anyone.
        config = config | {"overwrite": True}
    return folders.make_run_folder(config)


def assemble(
    config: Mapping[str, Any], folder: Path, template: Mapping[str, Any] | None = None, command: str = ""
) -> Run:
    """Seed, then build data, method, callbacks, loggers and trainer.

    Args:
        config: resolved configuration.
        folder: run folder.
        template: stored in checkpoints; ``config`` when None.
        command: what started the run.
    """
    from lightning.pytorch import seed_everything

    seed_everything(int(config.get("seed", 0)), workers=True, verbose=False)
    datamodule = building.build_datamodule(config)
    module = building.build_module(config)
    callbacks = building.build_callbacks(config, folder, template or config)
    loggers = building.build_loggers(config, folder)
    trainer = building.build_trainer(config, callbacks, loggers, folder)
    return Run(dict(config), folder, command, module, datamodule, trainer)


def fit(run: Run, checkpoint: Path | None = None) -> None:
    """Train, from a checkpoint if one is given, and make sure that ``best.ckpt`` exists afterwards.

    Raises:
        SafelightError: the pieces do not fit together, such as a method without data.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        run.trainer.fit(run.module, datamodule=run.datamodule, ckpt_path=checkpoint, weights_only=True)
    except MisconfigurationException as error:
        raise SafelightError(f"training cannot start: {error}") from error
    run.folder = Path(run.trainer.strategy.broadcast(str(run.folder)))
    if _is_dry(run.trainer):
        return
    if run.trainer.is_global_zero:
        _link_best(run.folder / "checkpoints")
    run.trainer.strategy.barrier()


def _is_dry(trainer: Trainer) -> bool:
    """Whether ``fast_dev_run`` is on: one batch of everything, nothing written."""
    return bool(getattr(trainer, "fast_dev_run", False))


def _link_best(checkpoints: Path) -> None:
    """Without a monitored metric the last weights are the best known; a second name costs no space."""
    last, best = checkpoints / "last.ckpt", checkpoints / "best.ckpt"
    if not last.is_file():
        return
    if best.is_file() and not best.samefile(last) and not _is_stale(best, last):
        return
    best.unlink(missing_ok=True)
    try:
        os.link(last, best)
    except OSError:
        shutil.copyfile(last, best)


def _is_stale(best: Path, last: Path) -> bool:
    """Whether ``best`` is an old link: a run that was continued wrote a new ``last`` beside it, monitoring nothing."""
    from safelight.callbacks.checkpointing import read_checkpoint

    states = read_checkpoint(last)["callbacks"]
    monitored = [state for state in states.values() if isinstance(state, dict) and "best_value" in state]
    return all(state["best_value"] is None for state in monitored)


def test(run: Run) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Test the best weights.

    Returns:
        Metrics by name, and by control and name. Both empty when the method has no ``test_step``.
    """
    checkpoint = run.folder / "checkpoints" / "best.ckpt"
    return measure(run.trainer, run.module, run.datamodule, checkpoint, int(run.config.get("seed", 0)))


def measure(
    trainer: Trainer, module: LightningModule, datamodule: LightningDataModule | None, checkpoint: Path, seed: int
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """``trainer.test`` from a seeded state, so that training and ``eval.py`` see the same random numbers."""
    from lightning.pytorch import seed_everything
    from lightning.pytorch.utilities.model_helpers import is_overridden

    from safelight.reporting import split_logged

    if not is_overridden("test_step", module):
        return {}, {}
    seed_everything(seed, workers=True, verbose=False)
    results = trainer.test(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True, verbose=False)
    logged = {key: value for result in results for key, value in result.items()}
    return split_logged(logged)


def conclude(
    run: Run, metrics: Mapping[str, float], controls: Mapping[str, Mapping[str, float]], started: float
) -> Summary:
    """Export, report, write ``summary.json`` and print the last lines. Rank 0 only.

    Args:
        run: a trained run.
        metrics: from ``test``.
        controls: from ``test``.
        started: ``time.monotonic()`` at the start of the run.
    """
    from safelight.reporting import write_summary

    eval_command = ending.eval_command(run.folder / "checkpoints" / "best.ckpt", run.command)
    state_facts(run.config, run.command, eval_command, run.module, metrics, controls)
    run.module.eval()
    artefact = export(whole_module(run), run.folder / "export") if run.config["export"] else None
    summary = ending.summarise(run.config, run.module, metrics, controls, artefact, eval_command, started)
    if run.config["report"]:
        ending.write_report(run.folder / "report", run.module, summary)
    write_summary(run.folder, summary)
    ending.print_end(run.folder, run.module, summary, run.command)
    return summary


def whole_module(run: Run) -> LightningModule:
    """The trained method with all its weights in this process.

    Sharded weights (``trainer=fsdp2``) would need every process for every file; the checkpoint has them whole.
    """
    from lightning.pytorch.strategies import ModelParallelStrategy

    if not isinstance(run.trainer.strategy, ModelParallelStrategy):
        return run.module
    from safelight.callbacks.checkpointing import read_checkpoint

    module = building.build_module(run.config)
    module.load_state_dict(read_checkpoint(run.folder / "checkpoints" / "best.ckpt")["state_dict"])
    module.trainer, module.run_facts = run.trainer, run.module.run_facts
    return module.eval()


def state_facts(
    config: Mapping[str, Any],
    command: str,
    eval_command: str,
    module: LightningModule,
    metrics: Mapping[str, float],
    controls: Mapping[str, Mapping[str, float]],
) -> None:
    """Tell the method where its numbers come from, for cards and reports to say so."""
    choices = config["choices"]
    module.run_facts = {  # type: ignore[assignment]
        "command": command,
        "eval_command": eval_command,
        "method": choices.get("method"),
        "backbone": choices.get("backbone"),
        "data": choices.get("data"),
        "seed": config.get("seed", 0),
        "metrics": dict(metrics),
        "controls": {name: dict(values) for name, values in controls.items()},
    }


def export(module: LightningModule, folder: Path) -> Path | None:
    """Write the method's artefact to a folder of its own, replacing it; None when the method makes none."""
    exporter = getattr(module, "export", None)
    if exporter is None or getattr(exporter, "__module__", "") == "safelight.lightning_modules.base":
        return None
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    try:
        artefact = Path(exporter(folder))
    except BaseException:
        # Half an artefact looks like a whole one to whoever finds it.
        shutil.rmtree(folder, ignore_errors=True)
        raise
    if not artefact.exists():
        raise SafelightError(f"{type(module).__name__}.export returned {str(artefact)!r}, which does not exist")
    return artefact
