"""What a run of the map shows, and what it leaves: the map as safetensors, figures by layer, dictionaries."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from safelight.lightning_modules.vision_mapping.adapters import FILE, write_adapter
from safelight.lightning_modules.vision_mapping.evaluation import (
    CAPTION,
    NOISE,
    NORMED,
    RANDOM,
    RANDOM_SAE,
    SHUFFLED,
    TRAINED,
)
from safelight.lightning_modules.vision_mapping.probe import AFTER, IMAGE, TEXT
from safelight.probing.dictionary_files import write_sae
from safelight.reporting import Claim, Tile, measured_rows
from safelight.reporting.claims import finite
from safelight.reporting.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from safelight.lightning_modules.vision_mapping.module import VisionMapping
    from safelight.reporting import Report

LABELS = {
    "": "trained map",
    RANDOM: "untrained map",
    NORMED: "untrained map, norm of words",
    SHUFFLED: "trained map, another picture",
    RANDOM_SAE: "trained map, random directions",
    NOISE: "caption in words, with noise",
    CAPTION: "caption in words (ceiling)",
}
COLUMNS = {
    "adapter_accuracy": "right answers", "adapter_ce": "cross entropy", "fvu_first": "FVU, first layer",
    "fvu_last": "FVU, last layer", "match_rate": "match rate, last layer",
}  # fmt: skip
CURVES = {
    "fvu": ("Variance unexplained by layer", "FVU", True),
    "l0": ("Active features by layer", "L0", False),
    "norm": ("Norms by layer", "mean norm of the residual stream", True),
    "match_rate": ("Match rate by layer", "share of pictures", False),
}
LINES = {
    (TRAINED, TEXT): "words alone", (TRAINED, AFTER): "words behind the picture", (TRAINED, IMAGE): "picture",
    (RANDOM, IMAGE): "picture, untrained map", (NORMED, IMAGE): "picture, untrained, norm of words",
    (SHUFFLED, IMAGE): "another picture",
}  # fmt: skip


def table(module: VisionMapping) -> list[dict[str, Any]] | None:
    """One row per adapter or control; None before testing."""
    return measured_rows(module.found.measured, "tokens", LABELS, COLUMNS)


def fill(module: VisionMapping, report: Report) -> None:
    """Add the sections of the map to a report."""
    rows = table(module)
    if rows is None:
        return
    report.add_tiles(_tiles(module))
    names = list(rows[0])
    report.add_table(
        "The map and its controls", names, [[row[name] for name in names] for row in rows],
        note="Held-out pictures. An answer is right when greedy decoding says it word for word and stops. FVU: squared "
        "error of the dictionary over squared distance from the mean, at the picture's tokens (with noise: at the "
        "words). Match: one of the strongest features stands for what is in the picture. The caption in words is what "
        "the language model can do at best; the dictionaries were trained on such words.",
        controls=[LABELS[name] for name in module.control_names], ours=[LABELS[""]],
        better={"right answers": "higher", "cross entropy": "lower"},
    )  # fmt: skip
    _examples(module, report)
    _curves(module, report)
    if module.history:
        report.add_curve(
            "Training", {"answers": [(step, float(loss)) for step, loss in module.history]}, "optimisation step",
            "cross entropy of the answers, nats a token", log_y=True,
        )  # fmt: skip
    report.add_claims([claim_of_answers(module), claim_of_features(module)])


def _tiles(module: VisionMapping) -> list[Tile]:
    measured = module.found.measured
    ours = measured[""]
    other = measured.get(SHUFFLED, {}).get("adapter_accuracy")
    note = "" if other is None else f"with another picture: {100 * other:.1f} %"
    tiles = [
        Tile("right answers about unseen pictures", f"{100 * ours['adapter_accuracy']:.1f} %", note, tone="lead"),
        Tile(
            "FVU at the picture, against an untrained map",
            f"{ours['fvu_ratio_first']:.2f} to {ours['fvu_ratio_last']:.2f}",
            "first layer to last; words alone: " + f"{ours['fvu_text']:.3f}",
        ),
        Tile(
            "match rate, last layer", f"{100 * ours['match_rate']:.1f} %",
            f"beside other pictures: {100 * ours['match_chance']:.1f} %",
        ),
    ]  # fmt: skip
    layer = int(ours["convergence_layer"])
    tiles.append(Tile("sparse as words from layer", "none" if layer < 0 else str(layer), "until the last"))
    return tiles


def _examples(module: VisionMapping, report: Report) -> None:
    """Pictures with what was said about them and what their tokens' features stand for."""
    found = module.found.examples
    if not found:
        return
    report.add_grid(
        "What the language model says", [[example.image for example in found]],
        column_labels=[f"{example.said or '(nothing)'}" for example in found],
        caption=f"Asked “{found[0].question}”. Above each picture is the likeliest token at each place of the answer.",
    )  # fmt: skip
    shown = sorted({module.layers[0], module.layers[len(module.layers) // 2], module.layers[-1]})
    report.add_table(
        "What the strongest features of the pictures stand for",
        ["picture", "said", *(f"layer {layer}" for layer in shown)],
        [
            [example.answer, example.said, *(" · ".join(example.features[layer]) or "-" for layer in shown)]
            for example in found
        ],
        note="Words at which a feature is strongest in text. Features that are active in more than "
        f"{100 * module.hparams.freq_max:g} % of pictures are left out.",
    )


def _curves(module: VisionMapping, report: Report) -> None:
    for metric, (heading, label, log_y) in CURVES.items():
        series = {
            name: sorted(module.found.figure(adapter, kind, metric).items()) for (adapter, kind), name in LINES.items()
        }
        if metric == "match_rate":
            chance = module.found.figure(TRAINED, IMAGE, "match_chance")
            series["picture, judged beside another"] = sorted(chance.items())
        report.add_curve(
            heading, {name: points for name, points in series.items() if points}, "layer", label, log_y=log_y
        )


def claim_of_answers(module: VisionMapping) -> Claim:
    """What accuracy supports: the picture was exchanged, and the answer changed."""
    measured, gain = module.found.measured, module.found.gain
    accuracy = {
        LABELS[name]: found["adapter_accuracy"] for name, found in measured.items() if "adapter_accuracy" in found
    }
    ours = accuracy[LABELS[""]]
    fair = {name: value for name, value in accuracy.items() if name not in (LABELS[""], LABELS[CAPTION], LABELS[NOISE])}
    held = gain is not None and gain[1] > 0
    return Claim(
        kind="behavioural",
        support="interventional" if gain is not None else "correlational",
        statement="Which picture goes through the map changes what the language model answers."
        if held
        else "Answers were not seen to depend on the picture that goes through the map.",
        evidence=[f"{100 * ours:.1f} % right answers about unseen pictures"],
        controls_beaten=[name for name, value in fair.items() if ours > value],
        not_shown=["where in the language model the picture is read, and how", "answers to questions of other kinds"],
        subject=f"{module.hparams.vision_model} before {module.hparams.llm}",
        controls_run=fair,
        n=None if gain is None else gain[3],
        n_of="unseen pictures",
        effect=None if gain is None else gain[0],
        effect_of="right answers above those with another picture, share",
        interval=None if gain is None else (gain[1], gain[2]),
    )


def claim_of_features(module: VisionMapping) -> Claim:
    """What reconstructions and matches support."""
    ours = module.found.measured[""]
    layer = module.layers[-1]
    match = next(
        row for row in module.found.rows
        if (row.adapter, row.token_type, row.metric, row.layer) == (TRAINED, IMAGE, "match_rate", layer)
    )  # fmt: skip
    run = {
        "other pictures": ours["match_chance"],
        "untrained map": module.found.figure(RANDOM, IMAGE, "match_rate")[layer],
    }
    ratios = [
        value / module.found.figure(RANDOM, IMAGE, "fvu")[number]
        for number, value in module.found.figure(TRAINED, IMAGE, "fvu").items()
    ]
    words = module.found.figure(TRAINED, TEXT, "fvu")[layer]
    held = match.low > max(run.values())
    return Claim(
        kind="semantic",
        support="correlational",
        statement=f"In layer {layer}, the strongest features at a picture's tokens stand for what it shows more often "
        "than for what other pictures show."
        if held
        else f"In layer {layer}, the strongest features at a picture's tokens were not seen to stand for it.",
        evidence=[
            f"match rate {match.mean:.3f}; features described by the words at which they fire in text"
            if module.hparams.descriptions is None
            else f"match rate {match.mean:.3f} with given descriptions",
            f"FVU {ours['fvu_first']:.3g} in the first probed layer and {ours['fvu_last']:.3g} in the last "
            f"(words alone, there: {words:.3g})",
            f"FVU against an untrained map: {min(ratios):.2f} to {max(ratios):.2f} over layers",
        ],
        controls_beaten=[name for name, value in run.items() if match.low > value],
        not_shown=[
            "that the language model reads these features: none was taken out",
            "that layers whose FVU is high hold nothing like language; another basis may",
            "that words alone are matched for their meaning: in early layers the word itself is the token",
        ],
        subject=f"{module.hparams.llm}, output of layer {layer}, {IMAGE} positions",
        assumptions=["the judge's word for a feature is what it stands for", "dictionaries of text are valid for text"],
        controls_run=run,
        n=match.n,
        n_of="unseen pictures",
        effect=finite(match.mean - ours["match_chance"]),
        effect_of="match rate above that beside other pictures",
        follow_up="Take these features out at the picture's tokens and ask again.",
    )


def layers_csv(module: VisionMapping) -> str:
    """Every figure by layer, with its interval over pictures."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "token_type", "adapter", "metric", "mean", "ci_lo", "ci_hi", "n"])
    for row in sorted(module.found.rows, key=lambda row: (row.layer, row.token_type, row.adapter, row.metric)):
        numbers = [f"{value:.6g}" for value in (row.mean, row.low, row.high)]
        writer.writerow([row.layer, row.token_type, row.adapter, row.metric, *numbers, row.n])
    return text.getvalue()


def write_artefacts(module: VisionMapping, folder: Path) -> None:
    """The map, dictionaries that were trained here, figures, and the card."""
    h = module.hparams
    settings = {
        "vision_model": h.vision_model, "llm": h.llm, "vision_feature_layer": h.vision_feature_layer, "pool": h.pool,
        "drop_cls": h.drop_cls, "insert_pos": h.insert_pos, "adapter": h.adapter,
        "d_in": module.vision.width, "d_out": module.width,
    }  # fmt: skip
    write_adapter(module.projection, folder, settings)
    for layer, dictionary in module.coders().items() if module.given is None else ():
        write_sae(
            dictionary.sae, folder / "saes" / f"layer_{layer}", scale=float(dictionary.scale),
            metadata={"model_name": h.llm, "hook_name": f"resid_post.{layer}", "prepend_bos": True},
        )  # fmt: skip
    if module.found.rows:
        write_text(folder / "layers.csv", layers_csv(module))
    left_out = "class token left out, " if h.drop_cls else ""
    kind = "One linear layer" if h.adapter == "linear" else "Two layers"
    module.write_card(
        folder,
        title="Map from vision to language",
        command="python train.py method=vision_mapping",
        data="pictures with conversations of `{data}`",
        tags=["vision", "interpretability"],
        licence="that of the models it was trained between" if not h.llm.startswith("zoo:") else "apache-2.0",
        text=f"{kind} from block {h.vision_feature_layer} of `{h.vision_model}` ({left_out}no last norm) to "
        f"what enters the first layer of `{h.llm}`, from position {h.insert_pos} on. Both models are unchanged.",
        usage="import json\n\nfrom safetensors.torch import load_file\nfrom torch import nn\n\n"
        'settings = json.load(open("config.json"))\nprojection = nn.Linear(settings["d_in"], settings["d_out"])\n'
        f'projection.load_state_dict(load_file("{FILE}"))\n'
        if h.adapter == "linear"
        else f'from safetensors.torch import load_file\n\nweights = load_file("{FILE}")  # 0, GELU, 2\n',
    )
