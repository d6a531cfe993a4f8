"""One table from many concept-erasure runs: rates of ours and the controls by concept, median and range over seeds.

Made from the folder of a sweep, whose command stands in the README of the method::

    python benchmarks/concept_erasure_table.py runs/erasures
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from ecodiff_table import grouped_runs, spread

MODELS = {"ours": None, "plain training": "plain", "random": "random", "Wanda": "wanda", "ESD": "esd", "CA": "ca"}
RATES = ("target_rate", "retain_accuracy", "neighbour_accuracy")


def concept_of(_: dict[str, Any], run: Path) -> str:
    """What a run erased, from its configuration."""
    concept = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]["concept"]
    return concept if isinstance(concept, str) else " + ".join(concept)


def main() -> None:
    """Print the table as markdown."""
    groups = grouped_runs("concept_erasure", concept_of)
    print("| backbone | concept | model | shows the concept | others recognised | neighbours | units off |")
    print("|---" * 7 + "|")
    for (backbone, concept), runs in sorted(groups.items()):
        dense = [spread([100 * run["metrics"][f"{rate}_before"] for run in runs], ".0f") for rate in RATES]
        print(
            f"| {backbone} | {concept} | dense ({len(runs)} seeds) | " + " | ".join(f"{d} %" for d in dense) + " | 0 |"
        )
        for label, name in MODELS.items():
            if name is not None and any(name not in run["controls"] for run in runs):
                continue  # method.controls left it out
            measured = [run["controls"][name] if name else run["metrics"] for run in runs]
            cells = [f"{spread([100 * m[rate] for m in measured], '.0f')} %" for rate in RATES]
            units = spread([m["units_off"] for m in measured], ",.0f")
            print(f"| | | {label} | {' | '.join(cells)} | {units} |")


if __name__ == "__main__":
    main()
