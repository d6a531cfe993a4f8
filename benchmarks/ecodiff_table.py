"""One table from many EcoDiff runs: error of the pruned models by backbone and kept share, median and range over seeds.

Made from the folder of a sweep, whose command stands in the README of the method::

    python benchmarks/ecodiff_table.py runs/study
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

COLUMNS = {
    "ours": None,
    "ours, uncorrected": "uncorrected",
    "one-shot + correction": "one_shot",
    "magnitude": "magnitude",
    "random": "random",
}


def spread(values: list[float], form: str = ".3g") -> str:
    """Median, and the range when there are several values, each in the given format."""
    text = f"{median(values):{form}}"
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def grouped_runs(method: str, key: Callable[[dict[str, Any], Path], Any]) -> dict[Any, list[dict[str, Any]]]:
    """Summaries of a method's runs in the folder on the command line, by backbone and ``key(summary, run folder)``."""
    parser = argparse.ArgumentParser(description=f"table of {method} runs")
    parser.add_argument("folder", type=Path, help="where to look for summary.json, at any depth")
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(parser.parse_args().folder.rglob("summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        if summary["method"] == method:
            groups[summary["backbone"], key(summary, file.parent)].append(summary)
    return groups


def main() -> None:
    """Print the table as markdown."""
    groups = grouped_runs("ecodiff", lambda summary, _: round(summary["metrics"]["keep_params"], 2))
    print("| backbone | kept | seeds |", " | ".join(COLUMNS), "| recognised, dense | ours |")
    print("|---" * (len(COLUMNS) + 5) + "|")
    for (backbone, keep), runs in sorted(groups.items(), key=lambda item: (item[0][0], -item[0][1])):
        cells = [
            spread([(run["controls"][name] if name else run["metrics"])["latent_mse_median"] for run in runs])
            for name in COLUMNS.values()
        ]
        seen = [spread([100 * run["metrics"][key] for run in runs]) for key in ("clip_accuracy_dense", "clip_accuracy")]
        cells += [f"{text} %" for text in seen]
        print(f"| {backbone} | {keep:.0%} | {len(runs)} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
