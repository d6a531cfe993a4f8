"""What a run of sparse autoencoders shows, and what it leaves: folders that sae-lens opens."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safelight.lightning_modules.sae.examination import PCA, RANDOM
from safelight.probing.dictionary_files import write_sae
from safelight.reporting import Claim, Tile, measured_rows
from safelight.reporting.files import write_text
from safelight.reporting.highlights import Highlighted, Passage

if TYPE_CHECKING:
    from safelight.lightning_modules.sae.module import SparseAutoencoders
    from safelight.reporting import Report

LABELS = {"": "sparse autoencoder", RANDOM: "random directions", PCA: "principal components"}
_COLUMNS = {
    "fvu": "FVU", "l0": "L0", "dead_fraction": "never active", "ce_recovered": "loss recovered",
    "ce": "cross entropy", "cosine": "cosine",
}  # fmt: skip


def table(module: SparseAutoencoders) -> list[dict[str, Any]] | None:
    """One row per kind of code; None before testing."""
    return measured_rows(module.found.measured, "code", LABELS, _COLUMNS)


def fill(module: SparseAutoencoders, report: Report) -> None:
    """Add the sections of sparse autoencoders to a report."""
    rows = table(module)
    if rows is None:
        return
    ours = module.found.measured[""]
    tiles = [
        Tile("variance unexplained (FVU)", ours["fvu"], "of held-out activations", tone="lead"),
        Tile("features active at a time", ours["l0"], f"of {module.dictionaries[0].d_sae}"),
    ]
    if "ce_recovered" in ours:
        tiles.append(
            Tile("of the loss recovered", f"{100 * ours['ce_recovered']:.1f} %", "1 minus the share lost by splicing")
        )
    report.add_tiles(tiles)
    names = list(rows[0])
    report.add_table(
        "The autoencoder and its controls", names, [[row[name] for name in names] for row in rows],
        note="Held-out rows. FVU: squared error over squared distance from the mean. Loss recovered: (CE without the "
        "site - CE with the reconstruction) / (CE without the site - CE of the model"
        + (f", {ours['ce_clean']:.3f} nats a token" if "ce_clean" in ours else "")
        + "). Random directions: as many unit vectors, of which each activation takes as many as the autoencoder does. "
        "Principal components: as many numbers as that, the same ones for every activation.",
        controls=[LABELS[RANDOM], LABELS[PCA]], ours=[LABELS[""]],
        better={"FVU": "lower", "never active": "lower", "loss recovered": "higher", "cross entropy": "lower"},
    )  # fmt: skip
    if len(module.dictionaries) > 1:
        _each(module, report)
    if any(module.history.values()):
        report.add_curve(
            "Training",
            {name: [(step, float(value)) for step, value in points] for name, points in module.history.items()},
            "optimisation step", "squared error, scaled units", log_y=True,
        )  # fmt: skip
    _densities(module, report)
    _features(module, report)
    report.add_claims([made for made in (claim(module), claim_of_features(module)) if made is not None])


def _each(module: SparseAutoencoders, report: Report) -> None:
    """Every autoencoder by itself."""
    lines = []
    for name, interval in module.found.intervals.items():
        found, random = module.found.each["", name], module.found.each.get((RANDOM, name), {})
        low, high = interval["fvu"]
        lines.append(
            [name, found["fvu"], f"{low:.3f} to {high:.3f}", random.get("fvu"), found["l0"], found.get("ce_recovered")]
        )
    report.add_table(
        "Each autoencoder",
        ["site", "FVU", "95 % of resampled rows", "random directions", "L0", "loss recovered"],
        lines,
    )


def _densities(module: SparseAutoencoders, report: Report) -> None:
    """How often features are active."""
    report.add_curve(
        "How often features are active",
        {name: histogram(density) for name, density in module.found.density.items()},
        "share of tokens, log 10", "features",
        note="Features that are never active in the test are not drawn: "
        + ", ".join(f"{int((density == 0).sum())} of {len(density)} ({name})"
                    for name, density in module.found.density.items())
        + ".",
    )  # fmt: skip


def histogram(density: Tensor, bins: int = 24) -> list[tuple[float, float]]:
    """Numbers of features by the logarithm of the share of tokens at which they are active."""
    alive = density[density > 0].double().log10()
    if not len(alive):
        return [(0.0, 0.0)]
    low = math.floor(float(alive.min()))
    counts = torch.histc(alive, bins, low, 0)
    return [(low - low * (place + 0.5) / bins, float(count)) for place, count in enumerate(counts.tolist())]


def _features(module: SparseAutoencoders, report: Report) -> None:
    """Texts at which features fire, and what is lost and gained by them."""
    read = module.found.read
    if read is None or not read.features:
        return
    cards, rows = [], []
    for found in read.features:
        pushes = ", ".join(repr(module.token_text(token)) for token in found.pushes)
        passages = [
            Passage([module.token_text(token) for token in context.tokens], [max(v, 0.0) for v in context.values])
            for context in found.contexts
        ]
        cards.append(
            Highlighted(
                f"feature {found.number}", f"active at {100 * found.rate:.2g} % of tokens; pushes {pushes}", passages
            )
        )
        rows.append(
            [found.number, found.rate, found.without, found.without_matched, repr(module.token_text(found.pushes[0])),
             found.steered, found.steered_matched, found.nearest, found.encoder_cosine]
        )  # fmt: skip
    report.add_highlights(
        "Features and where they fire", cards,
        f"Of {read.name}, drawn among those with a usual firing rate. Around the strongest token of six rows each. "
        "Pushes: tokens whose logits the feature's decoder row raises most (logit lens, past the last norm).",
    )  # fmt: skip
    report.add_table(
        "Without them, and with more of them",
        ["feature", "active at", "loss without it", "without another as frequent", "token it pushes", "steered",
         "steered by the other", "nearest decoder row", "encoder-decoder cosine"],
        rows,
        note="Rise of the cross entropy, nats a token, where the feature is active and its part of the activation is "
        "taken out, the autoencoder's error staying in. Steered: rise of the token's mean log-probability when the "
        "feature's direction is added everywhere, as strong as its largest activation; beside it another feature that "
        "is active about as often, added at the same strength.",
    )  # fmt: skip


def claim(module: SparseAutoencoders) -> Claim:
    """What the reconstruction supports."""
    ours = module.found.measured[""]
    controls = {LABELS[kind]: found["fvu"] for kind, found in module.found.measured.items() if kind}
    beaten = [name for name, fvu in controls.items() if ours["fvu"] < fvu]
    name, interval = next(iter(module.found.intervals.items()))
    what = f"`{module.hparams.model}`" if module.hparams.model else "the data"
    return Claim(
        kind="semantic",
        support="correlational",
        statement=f"A few of {module.dictionaries[0].d_sae} directions describe most of what is in {what}."
        if beaten
        else f"The dictionary describes what is in {what} no better than its controls.",
        evidence=[f"FVU {ours['fvu']:.3f} with {ours['l0']:.1f} features active"],
        controls_beaten=beaten,
        controls_run=controls,
        not_shown=["that the model uses these directions", "that another seed finds the same ones"],
        subject=f"{what}, {', '.join(module.sites)}",
        effect=module.found.each["", name]["fvu"],
        effect_of=f"FVU, {name}",
        interval=interval["fvu"],
        follow_up="Take features out and put them in, and see what the model predicts then.",
    )


def claim_of_features(module: SparseAutoencoders) -> Claim | None:
    """What taking features out and putting them in supports."""
    read = module.found.read
    if read is None or not read.features:
        return None
    count = len(read.features)
    without, other = (sum(values) / count for values in zip(
        *((found.without, found.without_matched) for found in read.features), strict=True
    ))  # fmt: skip
    steered = sum(found.steered > found.steered_matched for found in read.features)
    held = steered > count / 2
    return Claim(
        kind="semantic",
        support="interventional",
        statement="Adding a feature raises the token that its decoder row points to."
        if held
        else "Adding a feature does not raise the token that its decoder row points to more than another does.",
        evidence=[
            f"{steered} of {count} features raise it more than a feature that is active as often",
            f"without one, the loss where it is active rises by {without:.3g} nats a token on average",
        ],
        controls_beaten=["features of the same firing rate"] if held else [],
        controls_run={"features of the same firing rate": f"without them, where they are active: {other:.3g}"},
        not_shown=["that a feature means one thing to a reader", "a complete mechanism: features were changed singly"],
        subject=f"`{module.hparams.model}`, {read.name}",
        n=count,
        n_of="features",
        effect=without,
        effect_of="rise of the loss without a feature, nats a token",
    )


def write_artefacts(module: SparseAutoencoders, folder: Path) -> None:
    """Each autoencoder as sae-lens opens it, measured numbers, features, card."""
    named = module.named()
    for name, dictionary in named.items():
        place = folder if len(named) == 1 else folder / name
        place.mkdir(exist_ok=True)
        write_sae(
            dictionary.sae, place, scale=float(dictionary.scale),
            metadata={"model_name": str(module.hparams.model), "hook_name": module.site_of(name), "prepend_bos": False},
        )  # fmt: skip
    found = module.found
    if found.measured:
        results = {
            "means": {kind or "sae": figures for kind, figures in found.measured.items()},
            "each": {f"{name}{'/' + kind if kind else ''}": figures for (kind, name), figures in found.each.items()},
        }
        write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    if found.read is not None:
        text = json.dumps([asdict(feature) for feature in found.read.features], indent=1)
        write_text(folder / "features.json", text + "\n")
    where = '"."' if len(named) == 1 else f'"{next(iter(named))}"'
    module.write_card(
        folder,
        title="Sparse autoencoder" if len(named) == 1 else "Sparse autoencoders",
        command="python train.py method=sae",
        data="`{data}`",
        library_name="sae-lens",
        tags=["sae", "sparse-autoencoder", "interpretability"],
        text=f"Of activations of `{module.hparams.model}` at {', '.join(f'`{site}`' for site in module.sites)}. It "
        "takes them as they are; no scaling is needed.",
        usage=f"from sae_lens import SAE\n\nsae = SAE.load_from_disk({where})\ncodes = sae.encode(activations)\n",
    )
