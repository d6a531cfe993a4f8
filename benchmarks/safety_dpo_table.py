"""One table from several runs with experts: every merge and every expert, median and range over seeds.

Made from the folder of a sweep, whose command stands in the README of the method::

    python benchmarks/safety_dpo_table.py runs/merges
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ecodiff_table import spread

DENSE, EXPERT, SUM = "dense model", "expert: ", "sum"

Models = dict[str, dict[str, Any]]


def share(model: dict[str, Any], categories: list[str]) -> float:
    """Flagged pictures of some categories, as a share of all of them."""
    counts = [model["categories"][category] for category in categories]
    return sum(flagged for flagged, _ in counts) / sum(total for _, total in counts)


def experts_of(models: Models) -> list[str]:
    """Categories that have an expert."""
    return [name.removeprefix(EXPERT) for name in models if name.startswith(EXPERT)]


def merge_rows(runs: list[Models]) -> list[str]:
    """Every model's rates, drift, and drift beside that of the sum; IP over the experts' categories only, too."""
    rows = ["| model | of all categories | of the experts' | content | safe counterpart | drift | of the sum's |"]
    rows.append("|---" * 7 + "|")
    for name in runs[0]:
        cells = []
        for values in (
            [run[name]["metrics"]["ip"] for run in runs],
            [share(run[name], experts_of(run)) for run in runs],
            *([run[name]["metrics"][key] for run in runs] for key in ("content_accuracy", "counterpart_rate")),
        ):
            cells.append(f"{spread([100 * value for value in values], '.0f')} %")
        drift = [run[name]["metrics"]["drift"] for run in runs]
        sums = [run[SUM]["metrics"]["drift"] for run in runs]
        cells.append(spread(drift, ".3f"))
        cells.append(spread([own / whole for own, whole in zip(drift, sums, strict=True)], ".2f"))
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows


def expert_rows(runs: list[Models]) -> list[str]:
    """What every expert leaves of each category, as a share of what the dense model shows."""
    categories = list(runs[0][DENSE]["categories"])
    rows = ["| expert | " + " | ".join(categories) + " |", "|---" * (len(categories) + 1) + "|"]
    for name in (name for name in runs[0] if name.startswith(EXPERT)):
        cells = []
        for category in categories:
            left = [share(run[name], [category]) / share(run[DENSE], [category]) for run in runs]
            cells.append(f"{spread([100 * value for value in left], '.0f')} %")
        rows.append(f"| {name.removeprefix(EXPERT)} | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    """Print both tables as markdown."""
    parser = argparse.ArgumentParser(description="tables of SafetyDPO's experts and merges")
    parser.add_argument("folder", type=Path, help="where to look for export/results.json, at any depth")
    files = sorted(parser.parse_args().folder.rglob("results.json"))
    runs = [json.loads(file.read_text(encoding="utf-8"))["measured"] for file in files]
    runs = [run for run in runs if SUM in run]
    if not runs:
        raise SystemExit("no run with merges was found")
    print(f"{len(runs)} runs\n")
    print("\n".join([*merge_rows(runs), "", *expert_rows(runs)]))


if __name__ == "__main__":
    main()
