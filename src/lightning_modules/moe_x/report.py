"""What a MoE-X run shows, and what it leaves: a transformers folder that brings its own code."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.lightning_modules.moe_x import pages
from safelight.lightning_modules.moe_x.pages import LABELS
from safelight.lightning_modules.moe_x.upcycling import gpt2_from_dense, is_gpt2
from safelight.reporting import Claim, Tile, measured_rows
from safelight.reporting.claims import finite
from safelight.reporting.files import write_text

if TYPE_CHECKING:
    from safelight.lightning_modules.moe_x.module import MoEX
    from safelight.reporting import Report

CODE = ("configuration_moe_x.py", "modeling_moe_x.py", "layer.py", "pruned.py", "router.py", "dispatch.py")
"""Files of this folder that a saved model needs; they import nothing of safelight."""


def table(module: MoEX) -> list[dict[str, Any]] | None:
    """One row per model; None before testing."""
    names = {
        "val_ce": "cross entropy", "perplexity": "perplexity", "score_l0_r": "r(score, L0)",
        "active_fraction": "neurons firing", "dead_fraction": "dead neurons", "coverage": "coverage",
        "reconstruction": "reconstruction", "legal_move_rate": "legal moves", "detection": "detection score",
        "detection_swapped": "of another's explanation",
    }  # fmt: skip
    if module.hparams.vocabulary:  # of characters nobody wants the perplexity
        del names["perplexity"]
    return measured_rows(module.found.measured, "model", LABELS, names)


def fill(module: MoEX, report: Report) -> None:
    """Add the sections of MoE-X to a report."""
    rows = table(module)
    if rows is None:
        return
    ours = module.found.measured[""]
    tiles = [Tile("cross entropy, held-out", ours["val_ce"], "nats a token", tone="lead")]
    if "score_l0_r" in ours:
        tiles += [
            Tile("router's score against what fires", ours["score_l0_r"], "Pearson r, worst layer"),
            Tile("neurons of chosen experts that fire", f"{100 * ours['active_fraction']:.0f} %", "worst layer"),
        ]
    report.add_tiles(tiles)
    controls = [LABELS[name] for name in module.found.measured if name]
    elsewhere = ("coverage", "reconstruction")  # layer by layer, with what they are measured by
    columns = [name for name in rows[0] if name not in elsewhere]
    report.add_table(
        "The model and its controls", columns, [[row[name] for name in columns] for row in rows],
        note="Trained on the same batches from weights of the same seed. Of several layers the worst is shown. L0: "
        "share of an expert's neurons that fire, counted for all experts, chosen or not.",
        controls=controls, ours=[LABELS[""]],
        better={
            "cross entropy": "lower", "perplexity": "lower", "neurons firing": "lower", "dead neurons": "lower",
            "legal moves": "higher", "detection score": "higher",
        },
    )  # fmt: skip
    lines = [
        [f"{LABELS[name]}, layer {number}", layer.score_l0_r, layer.active_fraction, layer.load_entropy, layer.load_max]
        for name, layers in module.found.layers.items()
        for number, layer in layers.items()
    ]
    if lines:
        report.add_table(
            "Layer by layer",
            ["model, layer", "r(score, L0)", "neurons firing", "load entropy", "largest share of the load"],
            lines,
        )
    if any(module.history.values()):
        report.add_curve(
            "Training",
            {LABELS[name]: [(step, float(value)) for step, value in points] for name, points in module.history.items()},
            "optimisation step",
            "cross entropy, nats a token",
        )
    pages.boards(module, report)
    pages.routing(module, report)
    pages.neurons(module, report)
    pages.telling(module, report)
    claims = [claim(module) if "score_l0_r" in ours else None, pages.claim_of_neurons(module)]
    report.add_claims([made for made in claims if made is not None])


def claim(module: MoEX) -> Claim:
    """What the result supports."""
    ours = module.found.measured[""]
    controls = {
        LABELS[name]: found["score_l0_r"]
        for name, found in module.found.measured.items()
        if name and "score_l0_r" in found
    }
    return Claim(
        kind="algorithmic",
        support="correlational",
        statement="The fewer neurons of an expert fire on a token, the higher the router tends to score that expert."
        if ours["score_l0_r"] < 0
        else "The router's score is not higher where fewer neurons of an expert fire.",
        evidence=[
            f"r(score, L0), over tokens and all experts, is {ours['score_l0_r']:.3g} in the worst layer",
            "layer by layer: " + ", ".join(f"{layer.score_l0_r:.3g}" for layer in module.found.layers[""].values()),
        ],
        controls_beaten=[name for name, value in controls.items() if ours["score_l0_r"] < value],
        not_shown=["that neurons which fire less are easier to read"],
        subject="the router of every layer with experts",
        controls_run=controls,
        effect=finite(ours["score_l0_r"]),
        effect_of="Pearson r, worst layer",
        follow_up="Let each token go to the expert of the lowest score instead and count what fires there.",
    )


def save_characters(folder: Path, vocabulary: str) -> None:
    """Write a tokenizer of single characters that ``AutoTokenizer`` opens; token i is character i."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    numbers = {character: number for number, character in enumerate(vocabulary)}
    plain = Tokenizer(models.WordLevel(numbers, unk_token=vocabulary[0]))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=plain).save_pretrained(folder)


def write_artefacts(module: MoEX, folder: Path) -> None:
    """Model, code, tokenizer, measured numbers, card."""
    plain = is_gpt2(module.model.config)
    if plain:
        gpt2_from_dense(module.model).save_pretrained(folder)
    else:
        module.model.config.auto_map = {
            "AutoConfig": "configuration_moe_x.MoEXConfig", "AutoModelForCausalLM": "modeling_moe_x.MoEXForCausalLM",
        }  # fmt: skip
        module.model.save_pretrained(folder)
        for name in CODE:
            shutil.copyfile(Path(__file__).parent / name, folder / name)
    if module.found.reading is not None:
        chosen = [
            {
                "name": pages.neuron_name(module, found),
                **asdict(found),
                "effect": asdict(effect),
                "control": asdict(other),
            }
            for found, effect, other in zip(
                module.found.reading.reports, module.found.reading.effects, module.found.reading.controls, strict=True
            )
        ]
        write_text(folder / "neurons.json", json.dumps(chosen, indent=1) + "\n")
    tokenized = module.save_tokenizer(folder)
    if module.found.measured:
        found = {
            name or "moe_x": {
                "metrics": metrics,
                "layers": {number: asdict(layer) for number, layer in module.found.layers.get(name, {}).items()},
            }
            for name, metrics in module.found.measured.items()
        }
        write_text(folder / "results.json", json.dumps(found, indent=1) + "\n")
    prompt = ";1.e4 " if module.hparams.vocabulary else "It is a truth"
    module.write_card(
        folder,
        title="A dense language model" if plain else "MoE-X",
        command="python train.py method=moe_x",
        data="`{data}`",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["moe", "interpretability"],
        text="A dense model with GPT-2's architecture."
        if plain
        else "Its code lies beside it (`trust_remote_code=True`) and needs torch and transformers only.",
        usage="from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("."{"" if plain else ", trust_remote_code=True"})\n'
        + (
            'tokenizer = AutoTokenizer.from_pretrained(".")\n'
            f'tokens = tokenizer("{prompt}", return_tensors="pt").input_ids\n'
            "print(tokenizer.decode(model.generate(tokens, max_new_tokens=60, do_sample=True)[0]))\n"
            if tokenized
            else "# Tokens are bytes, and 256 for the end of a document.\n"
        ),
    )
