"""What a SafetyDPO run shows and leaves: tables, pictures, curves, the trade-off of merges, adapters, cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.lightning_modules.safety_dpo.adapters import fused, save_adapter
from safelight.lightning_modules.safety_dpo.evaluation import PICTURES
from safelight.lightning_modules.safety_dpo.merging import compress, shares
from safelight.reporting import Claim, Tile
from safelight.reporting.claims import finite
from safelight.reporting.files import write_text

if TYPE_CHECKING:
    from safelight.lightning_modules.safety_dpo.module import SafetyDPO
    from safelight.reporting import Report

_MERGES = {
    "delta_rows": "Co-Merge, rows of the change",
    "lora_rows": "Co-Merge, rows of A and B",
    "rank1": "Co-Merge, rank-1 parts",
    "compressed": "Co-Merge, cut to one rank",
    "sum": "sum",
    "average": "mean",
    "linear": "peft linear",
    "svd": "peft svd",
    "ties": "TIES",
    "dare_linear": "DARE",
    "dare_ties": "DARE-TIES",
    "magnitude_prune": "magnitude",
    "random_rows": "random rows",
}


def label(module: SafetyDPO, name: str) -> str:
    """A measured model's name in tables."""
    if name == "":
        return f"{_MERGES[module.hparams.merge_mode]} (ours)" if module.merging else "SafetyDPO"
    if name in module.guards and module.merging:
        return "one adapter for all" if name == "all" else f"expert: {name}"
    return {"before": "dense model", "no_guard": "without the guard", **_MERGES}[name]


def table(module: SafetyDPO) -> list[dict[str, Any]] | None:
    """One row per model; None before testing."""
    if not module.measured:
        return None
    return [
        {
            "model": label(module, name),
            "unsafe pictures (IP)": result.metrics["ip"],
            "content kept": result.metrics["content_accuracy"],
            "safe counterpart shown": result.metrics["counterpart_rate"],
            "drift": result.metrics["drift"],
            "implicit accuracy": result.metrics["implicit_accuracy"],
            "delta_w": result.metrics["delta_w"],
        }
        for name, result in module.measured.items()
    ]


def category_rows(module: SafetyDPO) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of flagged pictures per category, counts beside the category's name."""
    sizes = {name: total for name, (_, total) in module.measured["before"].categories.items()}
    columns = ["model", *(f"{name} (n = {total})" for name, total in sizes.items())]
    rows = [
        [label(module, name), *(flagged / total if total else None for flagged, total in result.categories.values())]
        for name, result in module.measured.items()
    ]
    return columns, rows


def fill(module: SafetyDPO, report: Report) -> None:
    """Add the sections of SafetyDPO to a report."""
    rows = table(module)
    if rows is None:
        return
    ours, before = module.measured[""], module.measured["before"]
    prompts = sum(total for _, total in before.categories.values())
    report.add_tiles(
        [
            Tile(
                "unsafe prompts that give an unsafe picture",
                f"{100 * ours.metrics['ip']:.0f} %",
                f"before: {100 * before.metrics['ip']:.0f} % of {prompts}; without those that training has: "
                f"{100 * ours.metrics['ip_clean']:.0f} %",
                tone="lead",
            ),
            Tile(
                "content kept",
                f"{100 * ours.metrics['content_accuracy']:.0f} %",
                f"before: {100 * before.metrics['content_accuracy']:.0f} %",
            ),
            Tile("drift of safe prompts", ours.metrics["drift"], "squared latent distance from before"),
        ]
    )
    _grids(module, report)
    controls = [label(module, name) for name in module.control_names]
    report.add_table(
        "Before, after, and the controls",
        list(rows[0]),
        [list(row.values()) for row in rows],
        note=f"{prompts} unsafe test prompts, one picture each. Content: {_pair_count(module)} safe prompts of "
        "held-out pairs, whose caption has to win against nine others; safe counterpart: the same caption for the "
        "picture of the unsafe prompt. Implicit accuracy near 1 proves nothing: it is reached long before a picture "
        "changes.",
        controls=controls,
        ours=[label(module, "")],
        better={
            "unsafe pictures (IP)": "lower",
            "content kept": "higher",
            "safe counterpart shown": "higher",
            "drift": "lower",
            "delta_w": "lower",
        },
    )
    columns, lines = category_rows(module)
    report.add_table("Unsafe pictures by category", columns, lines, controls=controls, ours=[label(module, "")])
    if module.merging:
        _merging(module, report)
    if any(module.history.values()):
        _curves(module, report)
    report.add_claims([claim(module)])


def _pair_count(module: SafetyDPO) -> int:
    pairs = module.evaluation.pairs if module.evaluation is not None else []
    return sum(int(part.safe.sum()) for part in pairs)


def _shown(module: SafetyDPO) -> list[str]:
    """Models whose pictures are shown: of many merges only the telling ones."""
    if not module.merging:
        return list(module.measured)
    return [name for name in ("before", "", "all", "sum", "average", "random_rows") if name in module.measured]


def _grids(module: SafetyDPO, report: Report) -> None:
    headings = {"unsafe": "Unsafe prompts: the same noise through every model", "safe": "Safe prompts: what must stay"}
    for kind, heading in headings.items():
        rows = [module.measured[name].pictures[kind][: PICTURES[kind]] for name in _shown(module)]
        if rows and rows[0]:
            report.add_grid(
                heading,
                rows,
                row_labels=[label(module, name) for name in _shown(module)],
                caption="Prompts and noises that training never saw; the prompts themselves are not printed.",
            )


def _merging(module: SafetyDPO, report: Report) -> None:
    names = list(module.experts())
    report.add_scatter(
        "Safety against content",
        {
            label(module, name): (result.metrics["drift"] ** 0.5, result.metrics["ip"])
            for name, result in module.measured.items()
        },
        "drift of safe prompts, root mean squared latent distance",
        "unsafe pictures (IP)",
        ours=[label(module, "")],
        note="Lower left is better. Sums suppress the most and spoil the most.",
    )
    assert module.statistics is not None
    owned = shares(module.statistics.owners("b"), len(names))
    report.add_shares(
        "Who owns the rows",
        names,
        list(owned.items()),
        "adapted layer, in order",
        note="For every output row of a layer the expert that was the most active one on the calibration pictures.",
    )


def _curves(module: SafetyDPO, report: Report) -> None:
    series = {
        f"{what}, {name}": [(step, float(entry[place])) for step, *entry in entries]
        for name, entries in module.history.items()
        for place, what in ((1, "safe"), (2, "unsafe"))
    }
    report.add_curve(
        "By how much the errors have grown over the reference's",
        series,
        "optimisation step",
        "squared error, minus the reference's",
        note="The error on unsafe pictures is meant to grow, that on safe ones is not: a margin grows either way.",
    )


def claim(module: SafetyDPO) -> Claim:
    """What the result supports."""
    ours, before = module.measured[""].metrics, module.measured["before"].metrics
    controls = {label(module, name): module.measured[name].metrics for name in module.control_names}
    return Claim(
        kind="behavioural",
        support="interventional",
        statement=f"With one low-rank adapter the model answers {100 * ours['ip']:.0f} % of the unsafe test prompts "
        f"with an unsafe picture, without it {100 * before['ip']:.0f} %.",
        evidence=[
            f"flagged {ours['ip']:.3g}, before {before['ip']:.3g}",
            f"content kept {ours['content_accuracy']:.3g}, before {before['content_accuracy']:.3g}",
        ],
        controls_beaten=[
            name for name, m in controls.items()
            if ours["ip"] <= m["ip"] + 0.05 and ours["content_accuracy"] > m["content_accuracy"]
        ],
        not_shown=[
            "that other wordings, optimised prompts or fine-tuning cannot bring the unsafe pictures back",
            "that the judge sees what a person would object to",
        ],
        subject=module.generator.name,
        assumptions=["the judge errs alike before and after"],
        controls_run={
            name: f"flagged {m['ip']:.3g}, content kept {m['content_accuracy']:.3g}" for name, m in controls.items()
        },
        n=sum(total for _, total in module.measured["before"].categories.values()) or None,
        n_of="unsafe test prompts",
        effect=finite(ours["ip"] - before["ip"]),
        effect_of="change of the share of unsafe pictures",
    )  # fmt: skip


def results(module: SafetyDPO) -> dict[str, Any]:
    """Everything measured, as one JSON object; counts per category are ``[flagged, all]``."""
    found = {
        label(module, name): {"metrics": result.metrics, "categories": result.categories}
        for name, result in module.measured.items()
    }
    judge = module.evaluation.judge.facts() if module.evaluation is not None else None
    return {"judge": judge, "lora_scale": module.hparams.lora_scale, "measured": found}


def facts(module: SafetyDPO, name: str) -> dict[str, Any]:
    """What an adapter's file is accompanied by."""
    hparams = module.hparams
    return {
        "method": "safety_dpo", "adapter": name, "backbone": module.generator.name, "rank": hparams.rank,
        "lora_seed": hparams.lora_seed, "beta": hparams.beta, "guard": module.guards.get(name, hparams.guard),
        "loss_type": hparams.loss_type, "step": module.trainer.global_step if module._trainer else None,
        "metrics": module.measured[name].metrics if name in module.measured else {},
    }  # fmt: skip


def write_artefacts(module: SafetyDPO, folder: Path) -> None:
    """Adapter, experts, measured numbers, pipeline and card."""
    generator = module.generator
    part = "unet" if hasattr(generator.pipeline, "unet") else "transformer"
    merged = module.merged()
    told = facts(module, "") | ({"merge": module.hparams.merge_mode} if module.merging else {})
    save_adapter(folder, merged, part, told)
    if module.merging:
        for name in module.guards:
            save_adapter(folder / "experts" / name, module.adapter_of(name), part, facts(module, name))
        assert module.statistics is not None
        points = {path: pair[1].tolist() for path, pair in module.statistics.compute().items()}
        write_text(folder / "ownership.json", json.dumps({"experts": list(module.experts()), "points": points}) + "\n")
    if module.measured:
        write_text(folder / "results.json", json.dumps(results(module), indent=1) + "\n")
    if generator.pipeline is not None and module.hparams.export_pipeline:
        with fused(generator.denoiser, merged, module.hparams.lora_scale):
            generator.save(folder / "pipeline", denoiser=module.plain_denoiser())
    rank = next(iter(merged.values())).a.shape[0]
    small = (
        f" Cut to rank {module.hparams.rank} it would lose {compress(merged, module.hparams.rank)[1]:.0%} of its size."
    )
    module.write_card(
        folder,
        title=f"{generator.name}, aligned by preference",
        command="python train.py method=safety_dpo",
        data="pairs of a safe and an unsafe picture of `{data}`",
        base=generator,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["safety", "lora", "dpo"],
        text=f"A LoRA of rank {rank}." + (small if module.merging else "")
        + (" `pipeline/` is the whole pipeline with it in its weights." if module.hparams.export_pipeline else ""),
        usage="from diffusers import DiffusionPipeline\n\n"
        f"pipeline = DiffusionPipeline.from_pretrained({str(generator.source or generator.name)!r})\n"
        "pipeline.load_lora_weights('.')\n",
    )  # fmt: skip
