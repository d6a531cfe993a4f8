"""One table from many concept-erasure runs: rates of ours and the controls by concept, median and range over seeds.

Made from the folder of a sweep, whose command stands in the README of the method::

    python benchmarks/concept_erasure_table.py runs/erasures
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from ecodiff_table import spread

MODELS = {"ours": None, "plain training": "plain", "random": "random", "Wanda": "wanda", "ESD": "esd", "CA": "ca"}
RATES = ("target_rate", "retain_accuracy", "neighbour_accuracy")


def concept_of(file: Path) -> str:
    """What a run erased, from its configuration."""
    concept = yaml.safe_load((file.parent / "config.yaml").read_text(encoding="utf-8"))["data"]["concept"]
    return concept if isinstance(concept, str) else " + ".join(concept)


def main() -> None:
    """Print the table as markdown."""
    parser = argparse.ArgumentParser(description="table of concept-erasure runs")
    parser.add_argument("folder", type=Path, help="where to look for summary.json, at any depth")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for file in sorted(parser.parse_args().folder.rglob("summary.json")):
        summary = json.loads(file.read_text(encoding="utf-8"))
        if summary["method"] == "concept_erasure":
            groups[summary["backbone"], concept_of(file)].append(summary)
    print("| backbone | concept | model | shows the concept | others recognised | neighbours | units off |")
    print("|---" * 7 + "|")
    for (backbone, concept), runs in sorted(groups.items()):
        dense = [spread([100 * run["metrics"][f"{rate}_before"] for run in runs]) for rate in RATES]
        print(
            f"| {backbone} | {concept} | dense ({len(runs)} seeds) | " + " | ".join(f"{d} %" for d in dense) + " | 0 |"
        )
        for label, name in MODELS.items():
            measured = [run["controls"][name] if name else run["metrics"] for run in runs]
            cells = [f"{spread([100 * m[rate] for m in measured])} %" for rate in RATES]
            off = sorted(int(m["units_off"]) for m in measured)
            units = f"{off[len(off) // 2]:,}" + (f" ({off[0]:,} to {off[-1]:,})" if len(off) > 1 else "")
            print(f"| | | {label} | {' | '.join(cells)} | {units} |")


if __name__ == "__main__":
    main()
