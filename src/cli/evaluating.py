"""Evaluate a checkpoint: it knows its method, backbone and data, so its path is all that is needed."""

from __future__ import annotations

import filecmp
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from safelight.cli import building, composing, ending, folders, running
from safelight.cli.hydra_files import CompositionError
from safelight.cli.keys import checked_key
from safelight.cli.places import why_unwritable
from safelight.cli.problems import ConfigError, Problem, did_you_mean
from safelight.cli.validation import validate
from safelight.errors import SafelightError

if TYPE_CHECKING:
    from safelight.reporting import Summary

TOLERANCE = 1e-6
_OWN_KEYS = ("ckpt_path", "eval_dir", "allow_difference")
# Overrides of these leave the question the same; any other one asks for another number than training measured.
_SAME_QUESTION = ("trainer", "callbacks", "logger", "hydra", *_OWN_KEYS)
_SHOWN_DIFFERENCES = 5
_GROUPS = ("backbone", "data", "trainer", "callbacks", "logger")


def evaluate(
    ckpt_path: str | Path,
    overrides: Sequence[str] = (),
    export_to: Path | None = None,
    started_as: str = "python eval.py",
) -> Summary:
    """Test a checkpoint and write ``summary.json`` and a report.

    Args:
        ckpt_path: a checkpoint written by a run.
        overrides: changes to the stored configuration, for example ``["data.batch_size=8", "trainer=gpu"]``,
            ``eval_dir=<folder>`` for where the results go, and ``allow_difference=true``.
        export_to: an empty or new folder to write the method's artefact to as well.
        started_as: how the program was started, for the command that is printed.

    Returns:
        The content of the written ``summary.json``.

    Raises:
        SafelightError: the checkpoint cannot be read, an override is wrong, or the numbers are not those that the
            training run measured on the same question; then nothing is written.
    """
    started = time.monotonic()
    building.quiet()
    from safelight.callbacks.checkpointing import read_checkpoint

    checkpoint = Path(ckpt_path).expanduser()
    stored = read_checkpoint(checkpoint).get("safelight")
    template = stored.get("template") if isinstance(stored, dict) else None
    if not isinstance(template, dict) or not all(isinstance(template.get(k), dict) for k in ("trainer", "choices")):
        raise SafelightError(
            f"{str(checkpoint)!r} does not say which method it belongs to: it was not written by a Safelight run"
        )
    own = dict(item.partition("=")[::2] for item in overrides if item.partition("=")[0] in _OWN_KEYS)
    config = evaluation_config(template, [o for o in overrides if o.partition("=")[0] not in _OWN_KEYS])
    allowed = _read_switch("allow_difference", own.get("allow_difference", "false"))
    folder = _results_folder(checkpoint, own.get("eval_dir"))
    try:
        return _evaluate_into(folder, checkpoint, config, started, overrides, allowed, export_to, started_as)
    except BaseException:
        folders.remove_empty(folder, Path("runs"))
        raise


def _evaluate_into(
    folder: Path,
    checkpoint: Path,
    config: Mapping[str, Any],
    started: float,
    overrides: Sequence[str],
    allowed: bool,
    export_to: Path | None,
    started_as: str,
) -> Summary:
    from lightning.pytorch import seed_everything

    from safelight.reporting import write_summary

    seed_everything(int(config.get("seed", 0)), workers=True, verbose=False)
    datamodule, module = building.build_datamodule(config), building.build_module(config)
    progress = {"callbacks": {"progress": (config.get("callbacks") or {}).get("progress")}}
    watching = building.build_chosen(progress, folder)
    trainer = building.build_trainer(config, watching, False, folder)
    metrics, controls = running.measure(trainer, module, datamodule, checkpoint, int(config.get("seed", 0)))
    command = ending.eval_command(checkpoint, started_as)
    summary = ending.summarise(config, module, metrics, controls, None, command, started)
    comparison = compare_with_training(checkpoint, summary)
    changed = [word for word in overrides if re.split(r"[.=]", word.lstrip("+~"))[0] not in _SAME_QUESTION]
    if comparison.differences and not changed and not allowed:
        raise SafelightError(comparison.refusal())
    folder.mkdir(parents=True, exist_ok=True)
    module.eval()
    artefact = None
    if export_to is not None:
        if export_to.exists() and any(export_to.iterdir()):
            raise SafelightError(f"export_to: {str(export_to)!r} is not empty")
        typed = shlex.join(["safelight", "export", str(checkpoint), str(export_to), *overrides])
        running.state_facts(config, typed, command, module, metrics, controls)
        artefact = running.export(module, export_to)
    summary = ending.summarise(config, module, metrics, controls, artefact, command, started)
    ending.write_report(folder / "report", module, summary)
    write_summary(folder, summary)
    ending.print_end(folder, module, summary, started_as)
    print(comparison.sentence(changed))
    return summary


def evaluation_config(template: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration stored in a checkpoint, on one device, with overrides applied.

    Args:
        template: configuration before interpolation.
        overrides: ``group=option`` for backbone, data and trainer, and ``key=value``.

    Raises:
        ConfigError: all mistakes in the overrides.
    """
    shipped = yaml.safe_load(files("safelight.configs").joinpath("eval.yaml").read_text(encoding="utf-8"))
    merged = dict(template)
    merged["trainer"] = {**template["trainer"], **shipped["trainer"]}
    merged |= {"resume": None, "run_dir": None, "overwrite": False, "global_batch_size": None}
    groups = [o for o in overrides if o.partition("=")[0] in _GROUPS]
    plugins = [o for o in overrides if o.startswith("hydra.searchpath=")]
    problems: list[Problem] = []
    if groups:
        # Compose the same method with the other option, and take the blocks that were asked for.
        other = composing.compose_all([f"method={template['choices']['method']}", *plugins, *groups])
        problems += other.problems
        if not other.template:
            raise ConfigError(problems)
        for group in {o.partition("=")[0] for o in groups}:
            merged[group] = other.template.get(group)
            merged["choices"] = {**merged["choices"], group: other.template.get("choices", {}).get(group)}
    base = composing.resolve(merged)
    values, changes = [o for o in overrides if o not in groups + plugins], {}
    composed = composing.Composed(template=merged, defaults=base, overrides=list(overrides))
    for override in composing.parse(values, composed):
        if override.key_or_group == "method":
            text = "the method is the checkpoint's; train another one with train.py"
            composed.problems.append(Problem("method", text, typed=str(override.input_line)))
        elif checked_key(override, base, composed) is not None:
            changes[override.key_or_group] = override.value()
    problems += composed.problems
    try:
        config = composing.resolve(merged, changes)
    except CompositionError as error:
        typed = next((o for o in values if o.lstrip("+").partition("=")[0] == error.key), None)
        raise ConfigError([*problems, Problem(error.key or "config", str(error), typed=typed)]) from error
    problems += composing.explain(composed, validate(config))
    if problems:
        raise ConfigError(problems)
    return config


def find_checkpoint(overrides: Sequence[str]) -> tuple[str, list[Problem]]:
    """The value of ``ckpt_path=`` and what is wrong with it."""
    for item in overrides:
        key, _, value = item.partition("=")
        if key != "ckpt_path":
            continue
        if Path(value).expanduser().is_file():
            return value, []
        folder = Path(value).expanduser()
        inside = folder / "checkpoints" / "best.ckpt"
        if inside.is_file():
            text = f"is a folder; its checkpoint is {inside}"
            return value, [Problem("ckpt_path", text, typed=item, fix=f"ckpt_path={inside}")]
        names = [str(p) for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint, guess = did_you_mean(value, names) if names else ("", None)
        text = f"there is no file {value!r}" + (f"; {hint}" if guess else "")
        return value, [Problem("ckpt_path", text, typed=item, fix=f"ckpt_path={guess}" if guess else "")]
    return "", [Problem("ckpt_path", "must be given: the checkpoint to evaluate", fix="ckpt_path=<file>")]


def _results_folder(checkpoint: Path, wish: str | None) -> Path:
    if wish:
        folder = Path(wish).expanduser()
        wrong = why_unwritable(folder)
        if wrong:
            raise SafelightError(f"eval_dir: {wrong}")
        if folder.is_dir() and any(folder.iterdir()):
            raise SafelightError(f"eval_dir {str(folder)!r} is not empty; give another one")
    else:
        run = checkpoint.absolute().parent.parent
        parent = run if (run / "config.yaml").is_file() else Path("runs") / "eval"
        folder = parent / f"eval-{datetime.now():%Y-%m-%d_%H-%M-%S}"
        while folder.exists():
            folder = folder.with_name(folder.name + "x")
    return folder


def _read_switch(key: str, typed: str) -> bool:
    if typed.lower() not in ("true", "false"):
        raise ConfigError([Problem(key, f"is {typed!r}; it must be true or false", f"{key}={typed}", f"{key}=true")])
    return typed.lower() == "true"


@dataclass(frozen=True)
class Comparison:
    """The numbers of an evaluation beside those that its training run wrote.

    Attributes:
        shared: how many numbers both have, clocks left out.
        differences: one text each, for numbers that differ or that the evaluation lacks.
        silent: why there is nothing to compare with; empty when there is.
        versions: packages that changed in between.
    """

    shared: int = 0
    differences: tuple[str, ...] = ()
    silent: str = ""
    versions: tuple[str, ...] = ()

    def sentence(self, changed: Sequence[str] = ()) -> str:
        """The last line of an evaluation; ``changed`` are the overrides that asked another question."""
        if self.silent:
            return self.silent
        if not self.differences:
            return f"all {self.shared} numbers equal the training run's (to {TOLERANCE:g})"
        why = f", with {' '.join(changed)}" if changed else ", allowed by allow_difference=true"
        text = f"{len(self.differences)} of {self.shared} numbers differ from the training run's{why}"
        return f"{text} ({self.differences[0]})"

    def refusal(self) -> str:
        """What to say when the same question got another answer."""
        shown = "".join(f"\n  {text}" for text in self.differences[:_SHOWN_DIFFERENCES])
        more = len(self.differences) - _SHOWN_DIFFERENCES
        shown += f"\n  … and {more} more" if more > 0 else ""
        changed = f"\nwritten with other versions: {', '.join(self.versions)}" if self.versions else ""
        return (
            f"{len(self.differences)} of {self.shared} numbers are not those of the training run (tolerance "
            f"{TOLERANCE:g}); nothing was written{shown}{changed}\n"
            "another machine, device or precision can do this, and so can a changed file; to write the new numbers "
            "anyway add allow_difference=true"
        )


def compare_with_training(checkpoint: Path, summary: Summary) -> Comparison:
    """Whether these numbers are those the training run wrote for this checkpoint.

    Equal means: not further apart than 1e-6. Latencies differ from call to call and are left out:
    names that end in ``_seconds``, ``_ms`` or ``latency_ratio``.
    """
    from safelight.reporting import read_summary

    folder = checkpoint.absolute().parent.parent
    if not (folder / "summary.json").is_file():
        return Comparison(silent="the run of this checkpoint has no summary.json to compare with")
    before = read_summary(folder)
    old, new = ({k: v for k, v in _flat(s).items() if not _is_time(k)} for s in (before, summary))
    if not old:
        return Comparison(silent="the run of this checkpoint measured nothing to compare with")
    measured = folder / "checkpoints" / "best.ckpt"
    if not measured.is_file() or not filecmp.cmp(measured, checkpoint, shallow=False):
        return Comparison(silent="training measured best.ckpt, not this checkpoint: there is nothing to compare with")
    differences = [
        f"{name} is {new[name]:.9g}, was {value:.9g}" if name in new else f"{name} is missing, was {value:.9g}"
        for name, value in sorted(old.items())
        if name not in new or not abs(value - new[name]) <= TOLERANCE
    ]
    versions = [
        f"{package} {version} → {summary.versions[package]}"
        for package, version in before.versions.items()
        if summary.versions.get(package, version) != version
    ]
    return Comparison(len(old), tuple(differences), versions=tuple(versions))


def _flat(summary: Summary) -> dict[str, float]:
    named = {f"{control}/{name}": v for control, values in summary.controls.items() for name, v in values.items()}
    return {**summary.metrics, **named}


def _is_time(name: str) -> bool:
    return name.endswith(("_seconds", "_ms", "latency_ratio"))
