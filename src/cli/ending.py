"""What a run leaves for people: the report page, the summary, and the last lines on the screen."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.cli import published
from safelight.cli.folders import versions

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from safelight.reporting import Summary


def eval_command(checkpoint: Path, started_as: str = "") -> str:
    """The command that repeats a run's numbers; see ``as_started``."""
    return as_started(shlex.join(["python", "eval.py", f"ckpt_path={shown_path(checkpoint)}"]), started_as)


def as_started(command: str, started_as: str) -> str:
    """A ``python train.py`` or ``python eval.py`` line for somebody who has only the ``safelight`` program.

    Args:
        command: to print.
        started_as: how this run was started; ``safelight ...`` means that the scripts are not at hand.
    """
    if started_as.split(" ")[0] != "safelight":
        return command
    return re.sub(r"^python (train|eval)\.py", r"safelight \1", command)


def shown_path(path: Path) -> str:
    """A path as short as it can be written from the current folder."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def summarise(
    config: Mapping[str, Any],
    module: LightningModule,
    metrics: Mapping[str, float],
    controls: Mapping[str, Mapping[str, float]],
    artefact: Path | None,
    command: str,
    started: float,
) -> Summary:
    """The content of ``summary.json``.

    Args:
        config: resolved configuration.
        module: the method; its ``paper_numbers`` are taken over where the configuration quotes none.
        metrics: from ``test``.
        controls: from ``test``.
        artefact: what was exported.
        command: repeats the numbers.
        started: ``time.monotonic()`` at the start.
    """
    from safelight.reporting import Summary

    choices = config.get("choices", {})
    return Summary(
        method=str(choices.get("method")),
        backbone=choices.get("backbone"),
        data=choices.get("data"),
        seed=int(config.get("seed", 0)),
        wall_seconds=round(time.monotonic() - started, 3),
        metrics=dict(metrics),
        controls={name: dict(values) for name, values in controls.items()},
        paper=published.figures(config, module),
        artefact=shown_path(artefact) if artefact else None,
        eval_command=command,
        versions=versions(),
    )


def write_report(folder: Path, module: LightningModule, summary: Summary) -> Path:
    """The report page: the method's own sections, then the numbers with their controls, then how to repeat them."""
    from safelight.reporting import Report

    facts = {
        "method": summary.method,
        "backbone": summary.backbone,
        "data": summary.data,
        "seed": summary.seed,
        "wall time": f"{summary.wall_seconds:.0f} s",
    }
    report = Report(
        summary.method.replace("_", " "),
        _first_sentence(module),
        facts={key: value for key, value in facts.items() if value is not None},
    )
    fill = getattr(module, "fill_report", None)
    if fill is not None:
        fill(report)
    if summary.metrics:
        report.add_metrics("Numbers", summary.metrics, summary.controls, summary.paper)
    report.add_command("Repeat these numbers", summary.eval_command)
    return report.save(folder)


def _first_sentence(module: LightningModule) -> str:
    return " ".join((type(module).__doc__ or "").strip().split("\n\n")[0].split())


def print_end(folder: Path, module: LightningModule, summary: Summary, started_as: str = "") -> None:
    """The before/after table, where the artefact lies, the evaluation command, and the command at full size."""
    print(flush=True)
    table = getattr(module, "summary_table", None)
    rows = table() if table is not None else None
    if not rows and summary.metrics:
        rows = [{"": "ours", **summary.metrics}]
        rows += [{"": name, **values} for name, values in summary.controls.items()]
    if rows:
        print(as_table(rows))
        print()
    lines = [("finished in", f"{summary.wall_seconds:.0f} s")]
    if summary.artefact:
        lines.append(("artefact", summary.artefact))
    if (folder / "report" / "index.html").is_file():
        lines.append(("report", shown_path(folder / "report" / "index.html")))
    lines.append(("evaluate", summary.eval_command))
    full_size = getattr(module, "full_size_command", lambda: None)()
    if full_size:
        lines.append(("full size", as_started(full_size, started_as)))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    print(end="", flush=True)


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of dicts as aligned text; columns in order of first appearance, numbers to the right."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    numeric = [any(isinstance(row.get(c), int | float) for row in rows) for c in columns]

    def line(texts: Sequence[str]) -> str:
        aligned = [t.rjust(w) if n else t.ljust(w) for t, w, n in zip(texts, widths, numeric, strict=True)]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
