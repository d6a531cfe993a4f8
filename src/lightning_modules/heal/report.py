"""What a healing run shows: a table, pictures, and the cards of its artefacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.reporting import Tile

if TYPE_CHECKING:
    from safelight.lightning_modules.heal.module import Heal
    from safelight.reporting import Report

LABELS = {"dense": "dense", "unhealed": "pruned, unhealed", "": "pruned and healed"}
"""Row names of the models that are compared; the empty name is the method itself."""


def parameters(module: Heal) -> dict[str, int]:
    """Denoiser parameters: dense, pruned, and of the adapters."""
    adapters = sum(value.numel() for value in module.lora.values())
    pruned = sum(value.numel() for value in module.peft_model.parameters()) - adapters
    return {"dense": sum(value.numel() for value in module.teacher_denoiser.parameters())} | {
        "pruned": pruned,
        "adapters": adapters,
    }


def table(module: Heal) -> list[dict[str, Any]] | None:
    """Rows of dense, unhealed and healed; None before testing."""
    if not module.measured:
        return None
    counts = parameters(module)
    rows = [{"model": "dense", "parameters": counts["dense"], "latent MSE (median)": 0.0, "latent MSE (mean)": 0.0}]
    for name in ("unhealed", ""):
        metrics = module.measured[name]
        rows.append(
            {
                "model": LABELS[name],
                "parameters": counts["pruned"],
                "latent MSE (median)": metrics["latent_mse_median"],
                "latent MSE (mean)": metrics["latent_mse_mean"],
            }
        )
    if "ssim" in module.measured[""]:
        for row, ssim in zip(
            rows, (1.0, module.measured["unhealed"]["ssim"], module.measured[""]["ssim"]), strict=True
        ):
            row["SSIM"] = ssim
    return rows


def fill(module: Heal, report: Report) -> None:
    """Add the healing sections to a report."""
    rows = table(module)
    if rows is None:
        return
    counts = parameters(module)
    before, after = (module.measured[name]["latent_mse_median"] for name in ("unhealed", ""))
    report.add_tiles(
        [
            Tile("latent error against dense (median)", after, f"unhealed: {before:.3g}", tone="lead"),
            Tile("trained parameters", f"{100 * counts['adapters'] / counts['pruned']:.1f} %", "of the pruned model's"),
        ]
    )
    prompts, pictures = module._shown
    if prompts:
        names = ["dense", "unhealed", ""]
        report.add_grid(
            "The same noise through every model",
            [[pictures[name][i] for name in names] for i in range(len(prompts))],
            row_labels=prompts,
            column_labels=[LABELS[name] for name in names],
            caption="Prompts and noises that were not used in training.",
        )
    report.add_table(
        "Dense, pruned, healed",
        list(rows[0]),
        [list(row.values()) for row in rows],
        note="The adapters are multiplied into the weights, so healing adds no parameters and no time.",
        controls=[LABELS["unhealed"]],
        ours=[LABELS[""]],
        better={"latent MSE (median)": "lower", "latent MSE (mean)": "lower", "SSIM": "higher"},
    )


def write_cards(module: Heal, folder: Path) -> None:
    """Model cards of the adapter and, where there is one, of the healed pipeline."""
    name = module.teacher.name
    common: dict[str, Any] = {
        "command": "python train.py method=heal",
        "data": "calibration prompts of `{data}`; targets are the dense model's own latents",
        "base": module.teacher,
        "tags": ["pruning", "lora"],
    }
    base = "../pruned" if module.pruned_here else "<the pruned denoiser's folder>"
    module.write_card(
        folder / "adapter",
        title=f"LoRA for a pruned {name}",
        library_name="peft",
        text="Adapters for the pruned denoiser; `load.py` beside its weights opens that without further packages.",
        usage="import sys\n\nfrom peft import PeftModel\n\n"
        f"sys.path.insert(0, {base!r})\nfrom load import load_pruned\n\n"
        f"denoiser = PeftModel.from_pretrained(load_pruned({base!r}), '.')\n",
        **common,
    )
    if module.student.pipeline is None:
        return
    part = "unet" if hasattr(module.student.pipeline, "unet") else "transformer"
    module.write_card(
        folder,
        title=f"{name}, pruned and healed",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        text="The adapters are multiplied into the weights. `adapter/` holds them by themselves.",
        usage=f"import sys\n\nsys.path.insert(0, '{part}')\nfrom load import load_pipeline\n\n"
        "pipeline = load_pipeline('.')\n",
        **common,
    )
