"""What a Latent Guard run shows: tables, distributions, the latent space, and the artefact's card."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safelight.lightning_modules.latent_guard.evaluation import SPLITS
from safelight.reporting import Claim, Tile
from safelight.reporting.claims import finite
from safelight.reporting.files import write_text

if TYPE_CHECKING:
    from safelight.lightning_modules.latent_guard.module import LatentGuard
    from safelight.reporting import Report

LABELS = {
    "": "Latent Guard (ours)",
    "raw_cosine": "cosine of raw features",
    "word_blacklist": "blacklist, whole words",
    "substring_blacklist": "blacklist, substrings",
    "untrained": "untrained head",
    "linear_probe": "linear probe, no list",
    "mlp_probe": "MLP probe, no list",
    "no_safe": "trained without safe prompts",
    "no_cross_attention": "without cross-attention",
    "supcon": "paper's formula alone",
}
WHERE = {"id": "known concepts", "ood": "new concepts"}


def table(module: LatentGuard) -> list[dict[str, Any]] | None:
    """One row per scorer; None before testing."""
    if not module.measured:
        return None
    rows = []
    for name, found in module.measured.items():
        metrics = found.metrics
        row: dict[str, Any] = {"model": LABELS[name]}
        for key, label in (
            ("auroc_id", "AUROC known"), ("auroc_ood", "new"), ("auroc_id_synonym", "known, synonym"),
            ("auroc_ood_synonym", "new, synonym"), ("auroc_id_adversarial", "known, adversarial"),
            ("auroc_ood_adversarial", "new, adversarial"), ("tpr_calibrated_ood", "caught at 1 % false alarms"),
        ):  # fmt: skip
            if key in module.measured[""].metrics:
                row[_percent(module, label)] = metrics.get(key)
        rows.append(row)
    return rows


def _percent(module: LatentGuard, label: str) -> str:
    return label.replace("1 %", f"{100 * module.hparams.target_fpr:g} %")


def fill(module: LatentGuard, report: Report) -> None:
    """Add the sections of Latent Guard to a report."""
    rows = table(module)
    if rows is None:
        return
    ours = module.measured[""]
    metrics = ours.metrics
    tiles = [Tile("AUROC, new concepts", metrics["auroc_ood"], _interval(ours, "ood"), tone="lead")] if (
        "auroc_ood" in metrics
    ) else []  # fmt: skip
    if "auroc_id" in metrics:
        tiles.append(Tile("AUROC, known concepts", metrics["auroc_id"], _interval(ours, "id")))
    if "tpr_calibrated_ood" in metrics:
        tiles.append(
            Tile(
                f"caught at {100 * module.hparams.target_fpr:g} % false alarms",
                f"{100 * metrics['tpr_calibrated_ood']:.0f} %",
                f"paper's threshold: {100 * ours.sets['ood_explicit']['tpr']:.0f} % caught, "
                f"{100 * metrics['benign_fpr_ood']:.0f} % of harmless prompts blocked",
            )
        )
    if "attribution_accuracy" in metrics:
        tiles.append(Tile("names the right concept", f"{100 * metrics['attribution_accuracy']:.0f} %"))
    report.add_tiles(tiles)
    report.add_table(
        "The guard and what it is compared with",
        list(rows[0]),
        [list(row.values()) for row in rows],
        note="AUROC: chance that a prompt with a concept scores above one without. Synonym and adversarial: the "
        "concept is said by another word, or by a string that the text encoder takes for it. A blacklist knows only "
        "what stands in the text.",
        controls=[LABELS[name] for name in module.control_names],
        ours=[LABELS[""]],
        better=dict.fromkeys(list(rows[0])[1:], "higher"),
    )
    _operating_points(module, report)
    columns = {
        "pairs": "pairs", "AUROC": "auroc", "accuracy": "accuracy", "caught": "tpr", "safe ones blocked": "fpr",
        "blocked at 95 % caught": "fpr_at_95tpr", "above own safe one": "paired_accuracy",
        "right concept": "attribution_accuracy",
    }  # fmt: skip
    report.add_table(
        "Every set",
        ["set", *columns],
        [[_set_name(name), *(values[key] for key in columns.values())] for name, values in ours.sets.items()],
        note=f"At the threshold {metrics['threshold']:.3g}, which classifies most calibration pairs rightly. "
        "Implicit: the concept is not named in the prompt. Unseen: without prompts that training has, too.",
    )
    for split, found in ours.categories.items():
        if len(found) > 1:
            report.add_table(
                f"By category, {WHERE[split]}", ["category", "AUROC", "pairs"],
                [[name, value, count] for name, (value, count) in found.items()],
            )  # fmt: skip
    _curves(module, report)
    if module.spaces is not None:
        for heading, view in zip(("Prompts as the encoder sees them", "The same prompts in the latent space"),
                                 module.spaces, strict=True):  # fmt: skip
            report.add_cloud(
                heading,
                {"with a concept": view.unsafe.tolist(), "without": view.safe.tolist()},
                note=f"Two principal directions. A linear classifier tells {100 * view.linear_accuracy:.0f} % apart.",
            )
    report.add_claims([claim(module)])


def _interval(found: Any, split: str) -> str:
    low, high = found.intervals.get(f"{split}_explicit", (float("nan"),) * 2)
    return f"95 % interval over concepts: {low:.3f} to {high:.3f}" if low == low else ""


def _set_name(name: str) -> str:
    split, _, variant = name.partition("_")
    return f"{WHERE[split]}, {variant}"


def _operating_points(module: LatentGuard, report: Report) -> None:
    split = next((s for s in reversed(SPLITS) if f"tpr_calibrated_{s}" in module.measured[""].metrics), None)
    if split is not None:
        rows = []
        for name, found in module.measured.items():
            values = [found.metrics[f"{key}_{split}"] for key in ("benign_fpr", "tpr_calibrated", "fpr_calibrated")]
            rows.append([LABELS[name], found.sets[f"{split}_explicit"]["tpr"], *values])
        report.add_table(
            f"Where the threshold lies, {WHERE[split]}",
            ["model", "caught", "harmless blocked", "caught, calibrated", "harmless blocked, calibrated"],
            rows,
            note="First the paper's threshold (most calibration pairs right), then the one that may block "
            f"{100 * module.hparams.target_fpr:g} % of harmless prompts, chosen on one half, counted on the other.",
            controls=[LABELS[name] for name in module.control_names],
            ours=[LABELS[""]],
        )


def _curves(module: LatentGuard, report: Report) -> None:
    shown = [
        name for name in ("", "raw_cosine", "mlp_probe", "untrained") if "ood_explicit" in module.measured[name].scores
    ]
    if shown:
        report.add_curve(
            "Caught against wrongly blocked, new concepts",
            {LABELS[name]: roc_points(*module.measured[name].scores["ood_explicit"]) for name in shown},
            "share of safe prompts blocked",
            "share of unsafe prompts caught",
        )
    scores = module.measured[""].scores
    name = next((n for n in ("ood_explicit", "id_explicit") if n in scores), None)
    if name is not None:
        unsafe, safe = scores[name]
        report.add_curve(
            f"Scores of {_set_name(name)}",
            {"with the concept": histogram(unsafe, unsafe, safe), "without": histogram(safe, unsafe, safe)},
            "best score over all concepts",
            "share of prompts",
        )
    if module.history:
        report.add_curve(
            "Loss", {"loss": [(step, float(value)) for step, value in module.history]}, "optimisation step", "loss"
        )


def roc_points(unsafe: Tensor, safe: Tensor, count: int = 101) -> list[tuple[float, float]]:
    """Points (share of safe above, share of unsafe above) for evenly spaced shares of safe prompts."""
    shares = torch.linspace(0, 1, count).double()
    limits = safe.double().quantile(1 - shares)
    return [(float((safe > t).double().mean()), float((unsafe > t).double().mean())) for t in limits.tolist()] + [
        (1.0, 1.0)
    ]


def histogram(values: Tensor, *everything: Tensor, bins: int = 40) -> list[tuple[float, float]]:
    """Centres of equal bins over the range of all scores, and the share of ``values`` in each."""
    pooled = torch.cat(everything)
    low, high = float(pooled.min()), float(pooled.max())
    counts = torch.histc(values.float(), bins, low, high) / len(values)
    width = (high - low) / bins
    return [(low + (place + 0.5) * width, float(count)) for place, count in enumerate(counts)]


def claim(module: LatentGuard) -> Claim:
    """What the result supports."""
    ours = module.measured[""].metrics
    split = "ood" if "auroc_ood" in ours else "id"
    key, of = f"auroc_{split}", f"{split}_explicit"
    controls = {LABELS[name]: module.measured[name].metrics[key] for name in module.control_names}
    interval = module.measured[""].intervals.get(of)
    return Claim(
        kind="semantic",
        support="correlational",
        statement=f"A prompt with a concept of the list scores above one without it in {100 * ours[key]:.0f} % of all "
        f"pairings, for {WHERE[split]}.",
        evidence=[f"AUROC {ours[key]:.3g} on prompts that name the concept; 0.5 is chance"],
        controls_beaten=[name for name, value in controls.items() if ours[key] > value],
        not_shown=[
            "that pictures of passed prompts are harmless",
            "that prompts optimised against this head are caught",
            "anything about languages and wordings that neither encoder nor training have seen",
        ],
        subject=f"the head's score on {module.encoder.name}",
        controls_run=controls,
        n=int(module.measured[""].sets[of]["pairs"]),
        n_of="pairs of prompts",
        effect=finite(ours[key]),
        effect_of=f"AUROC, {WHERE[split]}",
        interval=interval if interval and all(map(math.isfinite, (*interval, ours[key]))) else None,
    )


def results(module: LatentGuard) -> dict[str, Any]:
    """Everything measured, as one JSON object."""
    return {
        name or "latent_guard": {
            "metrics": found.metrics,
            "sets": {
                name: {key: None if math.isnan(value) else value for key, value in values.items()}
                for name, values in found.sets.items()
            },
            "intervals_95": found.intervals,
            "categories": found.categories,
        }
        for name, found in module.measured.items()
    }  # fmt: skip


def write_artefacts(module: LatentGuard, folder: Path) -> None:
    """The guard, all measured numbers, and the card."""
    guard = module.guard()
    guard.save_pretrained(folder)
    blocks = "It has no threshold yet: calibrate it." if guard.threshold is None else (
        f"It blocks from a score of {guard.threshold:.4g} on (calibration: {guard.calibration})."
    )  # fmt: skip
    if module.measured:
        write_text(folder / "results.json", json.dumps(results(module), indent=1) + "\n")
    module.write_card(
        folder,
        title="Latent Guard",
        command="python train.py method=latent_guard",
        data="pairs of prompts of `{data}`",
        library_name="safelight",
        pipeline_tag="text-classification",
        tags=["safety", "text-to-image"],
        text=f"A head of {sum(p.numel() for p in module.head.parameters()):,} parameters on the frozen text encoder "
        f"`{module.encoder.name}`, with a list of {len(guard.bank)} concepts. {blocks} `head.safetensors` has the "
        "names of the authors' released weights.",
        usage="from safelight.lightning_modules import LatentGuard\n\n"
        'guard = LatentGuard.from_pretrained(".")\n'
        'guard.bank.add("sword", aliases=["blade"], category="Violence")\n'
        'print(guard.check(["a cat on a mat"], explain=True))\n',
    )
