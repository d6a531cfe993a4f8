"""What an EcoDiff run shows: tables, pictures, curves, and the card of its artefact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.metrics.cost import cost_rows
from safelight.reporting import Claim, Tile
from safelight.reporting.claims import finite

if TYPE_CHECKING:
    from safelight.lightning_modules.ecodiff.module import EcoDiff
    from safelight.reporting import Report

LABELS = {
    "": "pruned (ours)",
    "random": "random mask",
    "magnitude": "weight magnitude",
    "one_shot": "one-shot 2nd order",
    "uncorrected": "ours, uncorrected",
}
"""Row names of the models that are compared; the empty name is the method itself."""


def table(module: EcoDiff) -> list[dict[str, Any]] | None:
    """Rows of dense, ours and the controls; None before testing."""
    if not module.measured:
        return None
    ours = module.measured[""].metrics
    dense: dict[str, Any] = {"model": "dense", "parameters kept": 1.0, "latent MSE (median)": 0.0}
    if "ssim" in ours:
        dense["SSIM"] = 1.0
    if "clip_accuracy_dense" in ours:
        dense["recognised"] = ours["clip_accuracy_dense"]
    dense |= {"FLOPs": 1.0, "latency": 1.0}
    rows = [dense]
    for name, result in module.measured.items():
        metrics = result.metrics
        row: dict[str, Any] = {
            "model": LABELS[name],
            "parameters kept": metrics["keep_params"],
            "latent MSE (median)": metrics["latent_mse_median"],
        }
        if "ssim" in metrics:
            row["SSIM"] = metrics["ssim"]
        if "clip_accuracy" in metrics:
            row["recognised"] = metrics["clip_accuracy"]
        rows.append(row | {"FLOPs": metrics["flops_ratio"], "latency": metrics["latency_ratio"]})
    return rows


def fill(module: EcoDiff, report: Report) -> None:
    """Add EcoDiff's sections to a report."""
    rows = table(module)
    if rows is None:
        return
    ours, controls = module.measured[""], {n: m for n, m in module.measured.items() if n}
    report.add_tiles(
        [
            Tile("prunable parameters removed", f"{100 * (1 - ours.metrics['keep_params']):.1f} %", tone="lead"),
            Tile(
                "latent error against dense (median)",
                ours.metrics["latent_mse_median"],
                f"random mask: {controls['random'].metrics['latent_mse_median']:.3g}",
            ),
            Tile("FLOPs of one call", f"{100 * ours.metrics['flops_ratio']:.0f} %", "of the dense model's"),
        ]
    )
    if "clip_accuracy" in ours.metrics:
        accuracy = f"{100 * ours.metrics['clip_accuracy']:.0f} %"
        report.add_tiles([Tile("recognised", accuracy, f"dense: {100 * ours.metrics['clip_accuracy_dense']:.0f} %")])
    if ours.pictures:
        batch = module._held_out[0]
        assert batch.pictures is not None
        columns = [list(batch.pictures.cpu()), ours.pictures, *(m.pictures for m in controls.values())]
        prompts = batch.prompts[: len(ours.pictures)]
        report.add_grid(
            "The same noise through every model",
            [[column[i] for column in columns] for i in range(len(prompts))],
            row_labels=prompts,
            column_labels=["dense", *(LABELS[name] for name in module.measured)],
            caption="Prompts and noises that were not used in mask learning. All pruned models keep the same number of "
            "parameters.",
        )
    report.add_table(
        "Dense, pruned, and the controls",
        list(rows[-1]),
        [[row.get(column) for column in rows[-1]] for row in rows],
        note="Random mask: mean over several masks. One-shot gets the same least-squares correction as ours; random "
        "and magnitude are plain masks. Uncorrected: our masks without it; learned with the correction in sight "
        "(correction=joint), they count on it.",
        controls=[LABELS[name] for name in controls],
        ours=[LABELS[""]],
        better={"latent MSE (median)": "lower", "SSIM": "higher", "recognised": "higher"},
    )
    report.add_table("Cost of one denoiser call", ["", "dense", "pruned", "ratio"], cost_rows(ours.cost))
    masks = module.masks()
    report.add_bars(
        "Units kept per layer",
        [(spec.name, int(masks[spec.name].sum()), spec.n_units, f"{spec.kind}s") for spec in module.specs],
    )
    if module.history:
        report.add_curve(
            "Mask learning",
            {
                "reconstruction": [(step, float(loss)) for step, loss, _ in module.history],
                "expected share kept": [(step, float(kept)) for step, _, kept in module.history],
            },
            "optimisation step",
            "mean squared latent error; share",
            note="The error rises while gates leave saturation and the target falls, and then settles.",
        )
    report.add_claims([claim(module)])


def claim(module: EcoDiff) -> Claim:
    """What the result supports."""
    ours = module.measured[""].metrics
    error = ours["latent_mse_median"]
    corrected = module.hparams.correction != "none"
    # Without a correction the uncorrected model is ours.
    others = [name for name in module.measured if name and (corrected or name != "uncorrected")]
    controls = {LABELS[name]: module.measured[name].metrics["latent_mse_median"] for name in others}
    mended = ", and with the layers that read them corrected," if corrected else ""
    return Claim(
        kind="algorithmic",
        support="interventional",
        statement=f"On prompts like the held-out ones, without the removed units{mended} the sampler ends "
        f"{'nearer' if error < controls[LABELS['random']] else 'no nearer'} to where the dense model ends than without "
        "random ones.",
        evidence=[
            f"{100 * (1 - ours['keep_params']):.1f} % of the prunable parameters were removed; the median squared "
            f"error of the final latent is {error:.3g}; controls have the same size",
        ],
        controls_beaten=[name for name, other in controls.items() if error < other],
        not_shown=[
            "that the units are useless for prompts unlike those used here",
            "what the kept or removed units represent",
        ],
        subject=f"{module.generator.name}: {sum(spec.n_units for spec in module.specs):,} units",
        controls_run=controls,
        n=sum(len(batch.prompts) for batch in module._held_out) if module.trainer.world_size == 1 else None,
        n_of="held-out samples",
        effect=finite(error),
        effect_of="median squared error of the final latent against the dense model's",
    )


def write_card(module: EcoDiff, folder: Path) -> None:
    """Model card of the pruned pipeline."""
    module.write_card(
        folder,
        title=f"{module.generator.name}, pruned by EcoDiff",
        command="python train.py method=ecodiff",
        data=f"{len(module.calibration_pairs)} calibration prompts; targets are the dense model's own latents",
        base=module.generator,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["pruning", "ecodiff"],
        text="Attention heads and feed-forward neurons were removed physically. The loader beside the weights needs "
        "torch, diffusers and safetensors only; `masks/` says which units stayed.",
        usage=_usage(module),
    )


def _usage(module: EcoDiff) -> str:
    part = "unet" if hasattr(module.generator.pipeline, "unet") else "transformer"
    return (
        f"import sys\n\nsys.path.insert(0, '{part}')\nfrom load import load_pipeline\n\npipeline = load_pipeline('.')\n"
    )
