"""What a concept-erasure run shows: tables, pictures, curves, units off per layer, and the card of its artefact."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.lightning_modules.concept_erasure.evaluation import PICTURES, ROLES
from safelight.lightning_modules.concept_erasure.minimality import units_off
from safelight.masking import removed_params
from safelight.reporting import Claim, Tile
from safelight.reporting.claims import finite
from safelight.reporting.files import write_text

if TYPE_CHECKING:
    from safelight.lightning_modules.concept_erasure.module import ConceptErasure
    from safelight.reporting import Report

LABELS = {
    "dense": "dense",
    "": "erased (ours)",
    "plain": "plain training (paper)",
    "random": "random mask",
    "wanda": "Wanda mask",
    "esd": "ESD fine-tuning",
    "ca": "concept ablation",
}
"""Row names of the models that are compared; the empty name is the method itself."""

_HEADINGS = {"target": "The concept", "neighbour": "Its neighbours", "retain": "Other things"}


def table(module: ConceptErasure) -> list[dict[str, Any]] | None:
    """One row per model; None before testing."""
    if not module.measured:
        return None
    rows = []
    for name, result in module.measured.items():
        metrics = result.metrics
        row: dict[str, Any] = {"model": LABELS[name], "units off": int(metrics["units_off"])}
        if "target_rate" in metrics:
            row |= {
                "concept shown": metrics["target_rate"],
                "anchor shown": metrics["anchor_rate"],
                "others recognised": metrics["retain_accuracy"],
                "neighbours": metrics["neighbour_accuracy"],
            }
        rows.append(row | {"erase MSE": metrics["erase_mse"], "retain MSE": metrics["retain_mse"]})
    return rows


def fill(module: ConceptErasure, report: Report) -> None:
    """Add the sections of concept erasure to a report."""
    rows = table(module)
    if rows is None:
        return
    ours, dense = module.measured[""].metrics, module.measured["dense"].metrics
    if "target_rate" in ours:
        report.add_tiles(
            [
                Tile(
                    "prompts that still show the concept",
                    f"{100 * ours['target_rate']:.0f} %",
                    ", ".join(
                        [_rate(module, name) for name in ("dense", "random") if name in module.measured]
                        + [f"anchors' own pictures: {100 * dense['target_rate_floor']:.0f} %"]
                    ),
                    tone="lead",
                ),
                Tile(
                    "other things recognised",
                    f"{100 * ours['retain_accuracy']:.0f} %",
                    f"dense: {100 * dense['retain_accuracy']:.0f} %",
                ),
                Tile(
                    "neighbours recognised",
                    f"{100 * ours['neighbour_accuracy']:.0f} %",
                    f"dense: {100 * dense['neighbour_accuracy']:.0f} %",
                ),
            ]
        )
    off = f"{int(ours['units_off']):,} of {sum(spec.n_units for spec in module.specs):,}"
    plain = module.measured["plain"].metrics["units_off"] if "plain" in module.measured else None
    report.add_tiles([Tile("units off", off, "" if plain is None else f"plain training: {int(plain):,}")])
    _grids(module, report)
    report.add_table(
        "Dense, erased, and the controls",
        list(rows[0]),
        [[row.get(column) for column in rows[0]] for row in rows],
        note="The same held-out prompts and noises for all. Random and Wanda masks switch off as many units of every "
        "layer as ours; random is the mean over several. ESD and concept ablation change weights instead.",
        controls=[LABELS[name] for name in module.measured if name not in ("", "dense")],
        ours=[LABELS[""]],
        better={"concept shown": "lower", "others recognised": "higher", "neighbours": "higher", "retain MSE": "lower"},
    )
    masks = module.masks()
    report.add_bars(
        "Units kept per layer",
        [(spec.name, int(masks[spec.name].sum()), spec.n_units, f"{spec.kind}s") for spec in module.specs],
    )
    if module.history:
        _curves(module, report)
    report.add_claims([claim(module)])


def _rate(module: ConceptErasure, name: str) -> str:
    return f"{LABELS[name]}: {100 * module.measured[name].metrics['target_rate']:.0f} %"


def _grids(module: ConceptErasure, report: Report) -> None:
    shown = [name for name in module.measured if module.measured[name].pictures["target"]]
    for number, role in enumerate(ROLES):
        prompts = [prompt for batch in module._test_batches for prompt in batch.prompts_of(number)]
        columns = [module.measured[name].pictures[role] for name in shown]
        if shown and columns[0]:
            report.add_grid(
                f"{_HEADINGS[role]}: the same noise through every model",
                [[column[row] for column in columns] for row in range(len(columns[0]))],
                row_labels=prompts[: PICTURES[role]],
                column_labels=[LABELS[name] for name in shown],
                caption="Prompts and noises that training never saw.",
            )


def _curves(module: ConceptErasure, report: Report) -> None:
    steps = [entry[0] for entry in module.history]
    names = ("erase", "retain", "share of logits below zero")
    report.add_curve(
        "Mask learning",
        {
            name: [(step, float(entry[i + 1])) for step, entry in zip(steps, module.history, strict=True)]
            for i, name in enumerate(names)
        },
        "optimisation step",
        "mean squared latent distance; share",
        note="Nothing happens until the first gates have left saturation; then the concept goes within a few steps."
        + (" The last steps see binary gates and pay for every unit that is off." if module.refining else ""),
    )


def claim(module: ConceptErasure) -> Claim:
    """What the result supports."""
    ours, dense = module.measured[""].metrics, module.measured["dense"].metrics
    looked = "target_rate" in ours
    key = "target_rate" if looked else "erase_mse"
    controls = {
        LABELS[name]: m.metrics[key] for name, m in module.measured.items() if name not in ("", "dense", "plain")
    }
    asked = sum(len(batch.prompts_of(ROLES.index("target"))) for batch in module._test_batches)
    return Claim(
        kind="algorithmic",
        support="interventional",
        statement=f"With {int(ours['units_off'])} units off, {100 * ours[key]:.0f} % of the prompts for the concept "
        f"still show it, with all units on {100 * dense[key]:.0f} %."
        if looked
        else f"With {int(ours['units_off'])} units off, prompts for the concept end at a squared latent distance of "
        f"{ours[key]:.3g} from the anchor's pictures, with all units on at {dense[key]:.3g}.",
        evidence=[
            f"{key} {ours[key]:.3g}, dense {dense[key]:.3g}",
            f"other things recognised: {ours['retain_accuracy']:.3g}, dense {dense['retain_accuracy']:.3g}"
            if looked
            else f"squared latent distance of other things from the dense model's: {ours['retain_mse']:.3g}",
        ],
        controls_beaten=[name for name, value in controls.items() if ours[key] < value],
        not_shown=[
            "that the concept cannot be reached by other prompts, optimised embeddings or fine-tuning",
            "what each of these units represents by itself",
        ],
        subject=f"{module.generator.name}: {sum(spec.n_units for spec in module.specs):,} units",
        assumptions=["the detector errs alike with units on and off"] if looked else (),
        controls_run=controls,
        n=asked if module.trainer.world_size == 1 else None,
        n_of="prompts for the concept",
        effect=finite(ours[key] - dense[key]),
        effect_of="change of the share that shows the concept" if looked else "change of the squared latent distance",
    )


def results(module: ConceptErasure) -> dict[str, Any]:
    """Everything about a run as one JSON object: how it was made, erasure, retention, units and cost.

    ``prompts`` counts test samples of each role, ``measured`` has every model's metrics, ``zeroed`` what went with the
    units that are off.
    """
    masks = module.masks()
    groups = {
        name: {
            "off": sum(int((~masks[spec.name]).sum()) for spec in specs) / sum(spec.n_units for spec in specs),
            "per_module": {spec.name: int((~masks[spec.name]).sum()) for spec in specs},
        }
        for name, specs in module.group_specs.items()
    }
    measured = {LABELS[name]: result.metrics for name, result in module.measured.items()}
    zeroed = {"units": units_off(masks), "params": removed_params(masks, module.specs)}
    return {
        "run": {key: module.run_facts.get(key) for key in ("command", "backbone", "data", "seed")},
        "concept": module.concept(),
        "detector": module.detector_facts,
        "prompts": {
            role: sum(len(batch.prompts_of(number)) for batch in module._test_batches)
            for number, role in enumerate(ROLES)
        },
        "mask": groups,
        "zeroed": zeroed,
        "cost": {"optimiser_steps": len(module.history)},
        "measured": measured,
    }


def write_units(module: ConceptErasure, file: Path) -> None:
    """Which units are off, group by group and module by module, beside all measured numbers."""
    write_text(file, json.dumps(results(module), indent=1) + "\n")


def write_card(module: ConceptErasure, folder: Path) -> None:
    """Model card of the erased pipeline."""
    module.write_card(
        folder,
        title=f"{module.generator.name} without {module.concept()}",
        command="python train.py method=concept_erasure",
        data=f"{sum(row[2] for row in module.calibration_rows)} prompts with the concept, and prompts of other things; "
        "targets are the dense model's own latents",
        base=module.generator,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["concept-erasure", "safety"],
        text="An ordinary diffusers folder: units that are off have zero weights. `masks/` and `units.json` say which.",
        usage="from diffusers import DiffusionPipeline\n\npipeline = DiffusionPipeline.from_pretrained('.')\n",
    )
