"""What a run of the prompt shows, and what it leaves: attention with and without it, tables, the prompt as files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.lightning_modules.visual_prompt.deploy import TENSORS, write_prompt
from safelight.lightning_modules.visual_prompt.evaluation import BIAS, SHUFFLED
from safelight.lightning_modules.visual_prompt.objective import over_patches
from safelight.reporting import Claim, Tile, measured_rows
from safelight.reporting.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from safelight.lightning_modules.visual_prompt.module import VisualPrompt
    from safelight.reporting import Report

LABELS = {
    "": "learned prompt",
    "none": "no prompt",
    "red_circle": "red circle",
    "red_circle_keypoint": "red circle of keypoints",
    "red_square": "red square",
    "grey": "grey square",
    "noise": "noise",
    "checkerboard": "checkerboard",
    "blur_outside": "blur outside",
    SHUFFLED: "learned for another place",
    BIAS: "attention biased from inside",
}
COLUMNS = {
    "lift": "lift", "argmax_hit": "peak inside", "kl": "KL, nats", "raw_mass": "share of all attention",
    "peak_error": "peak off by, px", "pointing_accuracy": "right of four",
}  # fmt: skip
INSIDE = (SHUFFLED, BIAS, "blur_outside")
"""Not marks that someone could paste into a picture beside the prompt."""
HEAT = ((0.05, 0.03, 0.2), (0.45, 0.1, 0.45), (0.85, 0.25, 0.25), (1.0, 0.6, 0.1), (1.0, 1.0, 0.65))
"""Colours of an attention map, from none to most."""


def overlay(image: Tensor, attention: Tensor, strength: float = 0.65) -> Tensor:
    """A picture under its attention map, (3, n, n) in [0, 1].

    Args:
        image: (3, n, n) in [0, 1].
        attention: (N,); the largest value is brightest.
        strength: of the map.
    """
    grid = round(len(attention) ** 0.5)
    level = (attention / attention.max().clamp(min=1e-12)).view(1, 1, grid, grid)
    level = F.interpolate(level, image.shape[-2:], mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
    colours = torch.tensor(HEAT)
    place = level * (len(colours) - 1)
    below = place.floor().long().clamp(max=len(colours) - 2)
    heat = torch.lerp(colours[below], colours[below + 1], (place - below)[..., None]).permute(2, 0, 1)
    grey = image.mean(0, keepdim=True)
    return torch.lerp(grey.expand_as(heat), heat, strength)


def table(module: VisualPrompt) -> list[dict[str, Any]] | None:
    """One row per prompt or mark; None before testing."""
    return measured_rows(module.found.measured, "prompt", LABELS, COLUMNS)


def fill(module: VisualPrompt, report: Report) -> None:
    """Add the sections of the prompt to a report."""
    rows = table(module)
    if rows is None:
        return
    report.add_tiles(_tiles(module))
    _pictures(module, report)
    names = list(rows[0])
    report.add_table(
        "The prompt and its controls", names, [[row[name] for name in names] for row in rows],
        note="Pictures and places that were not trained on. Lift: share of the attention on patches that the region of "
        f"{module.prompt.size} x {module.prompt.size} pixels has, over its share of the patches; 1 is chance. Without "
        "a prompt it is above 1 where pictures have their things in the middle. Right of four: a frame of the prompt "
        "around one of four things in a picture; chance is a quarter.",
        controls=[LABELS[name] for name in module.control_names], ours=[LABELS[""]],
        better={"lift": "higher", "peak inside": "higher", "KL, nats": "lower"},
    )  # fmt: skip
    found = module.found
    kept = {
        "as it is": found.measured[""]["lift"], "rounded to 8 bits": found.measured[""]["lift_8bit"],
        "halved and enlarged again": found.measured[""]["lift_resized"], **found.variants,
    }  # fmt: skip
    report.add_table(
        "What the prompt survives", ["prompt", "lift"], [[name, value] for name, value in kept.items()],
        note="The region is the same in all rows, also where the prompt is pasted larger or smaller.",
        ours=["as it is"],
    )  # fmt: skip
    if found.transfer:
        prompts = list(next(iter(found.transfer.values())))
        report.add_table(
            "Other encoders", ["encoder", *(LABELS[name] for name in prompts)],
            [[source, *row.values()] for source, row in found.transfer.items()],
            note=f"Lift on encoders that it was not trained on; that was {module.hparams.vision_model}.",
        )  # fmt: skip
    if module.history:
        report.add_curve(
            "Training", {"KL": [(step, float(loss)) for step, loss in module.history]}, "optimisation step",
            "distance from the Gaussian, nats",
        )  # fmt: skip
    report.add_claims([claim(module)])


def best_control(module: VisualPrompt) -> str:
    """The mark with most lift among those that are pasted like the prompt."""
    marks = [name for name in module.found.measured if name and name not in INSIDE]
    return max(marks, key=lambda name: module.found.measured[name]["lift"], default="")


def _tiles(module: VisualPrompt) -> list[Tile]:
    measured, best = module.found.measured, best_control(module)
    ours = measured[""]
    against = f"{LABELS[best]}: {measured[best]['lift']:.2f}" if best else ""
    tiles = [
        Tile("attention at the prompt, over chance", f"{ours['lift']:.2f}", against, tone="lead"),
        Tile(
            "most attended patch is inside", f"{100 * ours['argmax_hit']:.0f} %",
            f"no prompt: {100 * measured['none']['argmax_hit']:.0f} %" if "none" in measured else "",
        ),
        Tile("after 8 bits and after halving", f"{ours['lift_8bit']:.2f} and {ours['lift_resized']:.2f}", "lift"),
    ]  # fmt: skip
    if "pointing_accuracy" in ours:
        none = measured.get("none", {}).get("pointing_accuracy")
        note = "chance: 25 %" + ("" if none is None else f"; no prompt: {100 * none:.0f} %")
        tiles.append(Tile("points at one of four things", f"{100 * ours['pointing_accuracy']:.0f} %", note))
    return tiles


def _pictures(module: VisualPrompt, report: Report) -> None:
    found = module.found
    if found.prompt is not None:
        report.add_picture(
            "The prompt", found.prompt[:3] * found.prompt[3:] + 1 - found.prompt[3:],
            f"{module.prompt.size} x {module.prompt.size} pixels, shown enlarged.",
        )  # fmt: skip
    if not found.examples:
        return
    wanted = dict.fromkeys(["none", "", best_control(module), "red_circle"])
    shown = [name for name in wanted if name in found.examples[0]]
    rows = [[example[""][0] for example in found.examples]]
    labels = ["with the prompt"]
    for name in shown:
        maps = [example[name] for example in found.examples]
        rows.append([overlay(image, _mean(attention)) for image, attention in maps])
        labels.append(f"attention: {LABELS[name]}")
    report.add_grid(
        "Where the encoder looks", rows, labels,
        caption="Attention of the summary token in the last layer, brightest where it is largest; unseen pictures and "
        "places.",
    )  # fmt: skip


def _mean(attention: Tensor) -> Tensor:
    return over_patches(attention if attention.ndim == 1 else attention.mean(0))


def claim(module: VisualPrompt) -> Claim:
    """What the lift supports: the pixels were exchanged, and attention moved."""
    found = module.found
    lifts = {LABELS[name]: figures["lift"] for name, figures in found.measured.items() if name}
    fair = {name: lift for name, lift in lifts.items() if name not in (LABELS[BIAS], LABELS["blur_outside"])}
    best = best_control(module)
    gain = found.gain(best) if best else None
    held = gain is not None and gain[1] > 0
    ours, low, high = found.lift()
    return Claim(
        kind="behavioural",
        support="interventional",
        statement="Pasting the learned prompt moves the encoder's attention to where it is, more than marks made by "
        "hand do."
        if held
        else "The learned prompt was not seen to move attention more than every mark made by hand.",
        evidence=[f"lift {ours:.2f} (95 % over pictures: {low:.2f} to {high:.2f})"],
        controls_beaten=[name for name, lift in fair.items() if ours > lift],
        controls_run=fair,
        not_shown=[
            "that the encoder's answer depends on what the attention in one layer is",
            "that a person sees nothing odd: the prompt hides what it covers",
        ],
        subject=f"{module.hparams.vision_model}, layers {module.hparams.layers}",
        n=len(found.rows[""]),
        n_of="pictures and places",
        effect=None if gain is None else gain[0],
        effect_of=f"lift above {LABELS[best]}" if best else "",
        interval=None if gain is None else (gain[1], gain[2]),
    )


def write_artefacts(module: VisualPrompt, folder: Path) -> None:
    """The prompt, its settings, figures, and the card."""
    h = module.hparams
    with torch.no_grad():
        colours, opacity = module.prompt()
    settings = {
        "vision_model": h.vision_model, "layers": list(h.layers), "prompt_size": module.prompt.size,
        "image_size": module.image_size, "patch_size": module.encoder.patch_size,
        "mean": module.encoder.vision.mean.flatten().tolist(), "std": module.encoder.vision.std.flatten().tolist(),
        "sigma": module.sigma, "prior": h.prior, "shape": h.shape,
    }  # fmt: skip
    write_prompt(folder, colours, opacity, settings)
    if module.found.measured:
        results = {name or "learned": figures for name, figures in module.found.measured.items()}
        write_text(folder / "results.json", json.dumps(results | {"transfer": module.found.transfer}, indent=1) + "\n")
    module.write_card(
        folder,
        title="Visual prompt",
        command="python train.py method=visual_prompt",
        data="pictures of `{data}`, without labels",
        tags=["visual-prompt", "attention"],
        text=f"{module.prompt.size} x {module.prompt.size} pixels that draw the attention of `{h.vision_model}` to "
        "where they are pasted. Paste before the encoder's normalisation; pixels are replaced, not added.",
        usage="from PIL import Image\nfrom safetensors.torch import load_file\n\n"
        'prompt = Image.open("prompt.png")  # RGBA\npicture.paste(prompt, (left, top), prompt)\n'
        f'tensors = load_file("{TENSORS}")  # colours (3, m, m), opacity (1, m, m) in [0, 1]\n',
    )
