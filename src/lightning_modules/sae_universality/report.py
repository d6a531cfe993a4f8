"""What a comparison of dictionaries shows, and what it leaves: pairs and scores as CSV, dictionaries, a card."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from safelight.lightning_modules.sae_universality.comparison import Comparison
from safelight.lightning_modules.sae_universality.examination import AGAIN, RERANDOMISED, SHUFFLED
from safelight.probing.dictionary_files import write_sae
from safelight.reporting import Claim, Tile
from safelight.reporting.files import write_text

if TYPE_CHECKING:
    from safelight.lightning_modules.sae_universality.module import SAEUniversality
    from safelight.reporting import Report

LABELS = {
    "": "two models", AGAIN: "two seeds on one model", SHUFFLED: "tokens shuffled", RERANDOMISED: "weights drawn anew"
}  # fmt: skip
_SHOWN = 24


def table(module: SAEUniversality) -> list[dict[str, Any]] | None:
    """The headline pair of sites beside its controls; None before testing."""
    if not module.found.measured:
        return None
    names = {
        "pairs": "pairs", "mean_correlation": "mean correlation", "rsa": "RSA", "rsa_null": "shuffled", "rsa_p": "p",
        "svcca": "SVCCA", "svcca_null": "shuffled pairs", "svcca_p": "p of SVCCA", "pc1": "first component",
        "pc1_p": "p of it",
    }  # fmt: skip
    return [
        {"compared": LABELS[name], **{label: _shown(key, found.get(key)) for key, label in names.items()}}
        for name, found in module.found.measured.items()
    ]


def _shown(name: str, value: float | None) -> float | int | None:
    return int(value) if name == "pairs" and value is not None else value


def fill(module: SAEUniversality, report: Report) -> None:
    """Add the sections of a comparison to a report."""
    rows = table(module)
    if rows is None:
        return
    ours = module.found.measured[""]
    report.add_tiles(
        [
            Tile("RSA of paired features", ours.get("rsa", math.nan), _beside(ours, "rsa"), tone="lead"),
            Tile("SVCCA", ours.get("svcca", math.nan), _beside(ours, "svcca")),
            Tile("pairs", int(ours["pairs"]), f"{module.headline['a']} and {module.headline['b']}"),
        ]
    )
    names = list(rows[0])
    report.add_table(
        "Two models and their controls", names, [[row[name] for name in names] for row in rows],
        note="Features are paired by how their activations correlate on the same tokens; then the decoder rows of the "
        "pairs are compared. Mean correlation: of each feature of the second with its best of the first, before any "
        "filter. Shuffled: mean over shuffled pairs, which is what chance gives. SVCCA is high for random pairs, too: "
        "read it beside its null only. First component: what the paper's code computes under the name of SVCCA.",
        controls=[LABELS[name] for name in module.control_names], ours=[LABELS[""]],
    )  # fmt: skip
    _grids(module, report)
    _map(module, report)
    _pairs(module, report)
    _subspaces(module, report)
    _followed(module, report)
    if module.history:
        report.add_curve(
            "Training", {"mean of all dictionaries": [(step, float(value)) for step, value in module.history]},
            "optimisation step", "squared error, scaled units", log_y=True,
        )  # fmt: skip
    report.add_claims([made for made in (claim(module), claim_of_cuts(module)) if made is not None])


def _beside(found: dict[str, float], name: str) -> str:
    if name not in found:
        return "too few pairs"
    return f"shuffled pairs: {found[f'{name}_null']:.3f}, p {found[f'{name}_p']:.2g}"


def _grids(module: SAEUniversality, report: Report) -> None:
    """Scores of every site with every site (paper: Table of layers)."""
    if len(module.found.comparisons) < 2:
        return
    for name, what in (("rsa", "RSA"), ("svcca_excess", "SVCCA beyond its null"), ("mean_correlation", "correlation")):
        lines = []
        for one in module.sites["a"]:
            figures = [module.found.comparisons[one, two].figures().get(name) for two in module.sites["b"]]
            lines.append([f"A {one}", *figures])
        report.add_table(f"Site by site: {what}", ["", *(f"B {two}" for two in module.sites["b"])], lines)


def headline(module: SAEUniversality) -> Comparison:
    """The comparison whose figures are logged."""
    return module.found.comparisons[module.headline["a"], module.headline["b"]]


def rows_of(module: SAEUniversality, side: str) -> Tensor:
    """(m, d), decoder rows of the headline's dictionary of a side."""
    coder = next(c for c in module.coders if (c.name, c.site) == (side, module.headline[side]))
    return coder.dictionary.decoder.float().cpu()


def _map(module: SAEUniversality, report: Report) -> None:
    """Paired features of both models in one plane, B turned onto A."""
    pairs = headline(module).pairs
    if len(pairs) < 3:
        return
    x, y = rows_of(module, "a")[pairs.a], rows_of(module, "b")[pairs.b]
    places = in_one_plane(x, y)
    groups = {
        name: [(float(one), float(two)) for one, two in points.tolist()]
        for name, points in zip(("model A", "model B"), places, strict=True)
    }
    report.add_cloud(
        "Paired features in one plane", groups,
        "Decoder rows of the pairs at unit length, B's turned onto A's by the best rotation, in the two directions in "
        "which A's spread most. A rotation fitted to as many dimensions brings any pairs closer: the tests above do "
        "not need it.",
    )  # fmt: skip


def in_one_plane(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows (n, d_a) and (n, d_b), the second turned onto the first, as points (n, 2) each."""
    width = max(x.shape[1], y.shape[1])
    one, two = (torch.nn.functional.normalize(side.double(), dim=1) for side in (x, y))
    one, two = (torch.nn.functional.pad(side, (0, width - side.shape[1])) for side in (one, two))
    u, _, v = torch.linalg.svd(two.T @ one)
    turned = two @ (u @ v)
    mean = one.mean(0)
    _, _, directions = torch.linalg.svd(one - mean, full_matrices=False)
    return (one - mean) @ directions[:2].T, (turned - mean) @ directions[:2].T


def _pairs(module: SAEUniversality, report: Report) -> None:
    """Pairs with the tokens at which both are strongest."""
    pairs, words = headline(module).pairs, module.found.words
    if not len(pairs) or words is None:
        return
    order = pairs.correlation.argsort(descending=True)[:: max(len(pairs) // _SHOWN, 1)][:_SHOWN]
    lines = [
        [f"{int(pairs.a[n])} and {int(pairs.b[n])}", float(pairs.correlation[n]),
         " ".join(map(repr, words[0].tokens[int(pairs.a[n])])), " ".join(map(repr, words[1].tokens[int(pairs.b[n])]))]
        for n in order.tolist()
    ]  # fmt: skip
    left = headline(module).left
    report.add_table(
        "Pairs, from the best to the worst",
        ["features", "correlation", "A is strongest at", "B is strongest at"],
        lines,
        note=f"{left['paired']} pairs; {left['concept']} with a common token and none of punctuation, "
        f"{left['one_to_one']} one to one, {left['correlated']} that correlate more than {module.hparams.corr_min}.",
    )


def _subspaces(module: SAEUniversality, report: Report) -> None:
    """Features of one concept at a time."""
    if not module.found.subspaces:
        return
    names = ["concept", "pairs", "RSA", "shuffled", "adjusted p", "first component", "its adjusted p"]
    report.add_table(
        "Features of one concept", names,
        [
            [one.name, len(one.pairs), one.rsa.score, one.rsa.null_mean, one.adjusted[0], one.pc1.score,
             one.adjusted[2]]
            for one in module.found.subspaces
        ],
        note="A feature belongs to a concept if one of its five strongest tokens is a word of the concept's list. p "
        "values are adjusted over all concepts and scores (Benjamini-Hochberg).",
    )  # fmt: skip


def _followed(module: SAEUniversality, report: Report) -> None:
    """What is lost without paired features."""
    found = module.found.followed
    if found is None:
        return
    report.add_cloud(
        "Both features of a pair taken out",
        {"a pair": list(zip(found.lost_a.tolist(), found.lost_b.tolist(), strict=True))},
        f"Rise of the cross entropy where the feature is active, nats a token, in model A and in model B. Spearman "
        f"{found.alike.score:.2f}, shuffled pairs {found.alike.null_mean:.2f}, p {found.alike.p:.2g}.",
        x_label="model A", y_label="model B",
    )  # fmt: skip


def claim(module: SAEUniversality) -> Claim:
    """What the comparison supports."""
    ours = module.found.measured[""]
    held = ours.get("rsa_p", 1.0) <= 0.05
    controls = {"shuffled pairs": ours.get("rsa_null")} | {
        LABELS[name]: found.get("rsa", "too few pairs") for name, found in module.found.measured.items() if name
    }
    beaten = [
        LABELS[name]
        for name in (SHUFFLED, RERANDOMISED)
        if name in module.found.measured and module.found.measured[name].get("rsa", 0.0) < ours.get("rsa", 0.0)
    ]
    return Claim(
        kind="semantic",
        support="correlational",
        statement="Features of the two models that fire on the same tokens are arranged alike."
        if held
        else "No common arrangement of the two models' features was found.",
        evidence=[f"RSA {ours.get('rsa', math.nan):.3f}, SVCCA {ours.get('svcca', math.nan):.3f} beside "
                  f"{ours.get('svcca_null', math.nan):.3f} of shuffled pairs"],
        controls_beaten=["shuffled pairs", *beaten] if held else [],
        controls_run=controls,
        not_shown=[
            "that the features are identical",
            "that what is done with a feature of one model works in the other",
        ],
        subject=f"`{module.hparams.model_a}`, {module.headline['a']}, and `{module.hparams.model_b}`, "
        f"{module.headline['b']}",
        assumptions=["features that correlate on these tokens belong together"],
        n=int(ours["pairs"]) or None,
        n_of="pairs",
        effect=ours.get("rsa"),
        effect_of="RSA",
        p=ours.get("rsa_p"),
        follow_up="Take both features of a pair out of their models.",
    )  # fmt: skip


def claim_of_cuts(module: SAEUniversality) -> Claim | None:
    """What taking paired features out supports."""
    found = module.found.followed
    if found is None:
        return None
    held = found.alike.p <= 0.05 and found.alike.score > 0
    return Claim(
        kind="semantic",
        support="interventional",
        statement="A feature that one model needs is paired with one that the other needs as well."
        if held
        else "How much one model needs a feature does not tell how much the other needs its partner.",
        evidence=["Spearman correlation of what is lost in either model without a feature, where it is active"],
        controls_beaten=["shuffled pairs"] if held else [],
        controls_run={"shuffled pairs": found.alike.null_mean},
        not_shown=["that both do the same thing: a frequent token's feature may cost much in any model"],
        subject=f"`{module.hparams.model_a}` and `{module.hparams.model_b}`",
        n=len(found.pairs),
        n_of="pairs",
        effect=found.alike.score,
        effect_of="Spearman correlation",
        p=found.alike.p,
    )


def write_artefacts(module: SAEUniversality, folder: Path) -> None:
    """Pairs and scores of every comparison, the dictionaries trained here, a card."""
    for coder in module.coders:
        if coder.learns:
            place = folder / f"{coder.name}-{coder.site}"
            place.mkdir(exist_ok=True)
            source = module.hparams.model_b if coder.model == "b" else module.hparams.model_a
            write_sae(
                coder.dictionary.sae, place, scale=float(coder.dictionary.scale),
                metadata={"model_name": source, "hook_name": coder.site, "control": coder.name not in ("a", "b")},
            )  # fmt: skip
    if module.found.comparisons:
        _write_csv(folder / "pairs.csv", ["site_a", "site_b", "feature_a", "feature_b", "correlation"], [
            [*sites, a, b, f"{c:.6f}"]
            for sites, found in module.found.comparisons.items()
            for a, b, c in zip(
                found.pairs.a.tolist(), found.pairs.b.tolist(), found.pairs.correlation.tolist(), strict=True
            )
        ])  # fmt: skip
        figures = {sites: found.figures() for sites, found in module.found.comparisons.items()}
        figures |= {(name, name): found.figures() for name, found in module.found.controls.items()}
        names = sorted({name for one in figures.values() for name in one})
        _write_csv(folder / "scores.csv", ["a", "b", *names], [
            [*sites, *(one.get(name, "") for name in names)] for sites, one in figures.items()
        ])  # fmt: skip
    module.write_card(
        folder,
        title="Features of two language models",
        command="python train.py method=sae_universality",
        data="`{data}`",
        library_name="sae-lens",
        tags=["sae", "interpretability", "universality"],
        text=f"`scores.csv`: how alike the features of `{module.hparams.model_a}` and `{module.hparams.model_b}` are, "
        "site by site; `pairs.csv`: which go together. The folders hold the dictionaries that were trained for it.",
        usage='import csv\n\nrows = list(csv.DictReader(open("scores.csv")))\n',
    )


def _write_csv(file: Path, names: list[str], rows: list[list[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows(rows)
    write_text(file, text.getvalue())
