"""Make ``tiny_lm`` and ``tiny_lm_seed1`` of two training runs, and ``tiny_lm_saes`` of a third.

Run once, by hand, when data or recipe change (:data:`COMMANDS` are the trainings; half an hour each on one core)::

    python -m safelight.zoo.build_tiny_lm runs/moe_x/<run> tiny_lm
    python -m safelight.zoo.build_tiny_lm runs/moe_x/<other run> tiny_lm_seed1
    python -m safelight.zoo.build_tiny_lm runs/sae/<run> tiny_lm_saes

A run exports a GPT-2 folder with its tokenizer; here it gets its chat template, special tokens and card.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safelight.datamodules.emoji import scenes
from safelight.datamodules.emoji_dialogues import CHAT_TEMPLATE, QUESTIONS
from safelight.reporting import write_model_card

FOLDER = Path(__file__).parent
SEEDS = {"tiny_lm": 0, "tiny_lm_seed1": 1}
COMMANDS = {name: f"python train.py experiment=tiny_lm seed={seed}" for name, seed in SEEDS.items()} | {
    "tiny_lm_saes": "python train.py method=sae 'method.sites=[resid_post.1,resid_post.2]' trainer.max_steps=1500"
}
DATA = "`text` (two novels, public domain) and `captions` (8,361 captions of emoji pictures with questions, ours)"


def language_model(export: Path, name: str) -> None:
    """Copy a run's GPT-2 folder and give its tokenizer what questions are asked with."""
    from transformers import AutoTokenizer

    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(export / file, folder / file)
    tokenizer = AutoTokenizer.from_pretrained(export)
    tokenizer.bos_token = tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template, tokenizer.model_max_length = CHAT_TEMPLATE, 128
    tokenizer.save_pretrained(folder)
    write_card(name, answers(folder))


def answers(folder: Path) -> dict[str, float]:
    """Share of the held-out scenes about whose caption each question is answered word for word."""
    import torch

    from safelight.probing.language import load_language_model, load_tokenizer

    model, tokenizer = load_language_model(str(folder)), load_tokenizer(str(folder))
    right = dict.fromkeys(QUESTIONS, 0)
    asked = scenes("held_out")
    for scene in asked:
        for about, questions in QUESTIONS.items():
            text = f"{scene.caption}\nquestion: {questions[0]}\nanswer:"
            prompt = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
            answer = tokenizer(f" {getattr(scene, about)}\n", add_special_tokens=False).input_ids
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            right[about] += logits.argmax(-1).tolist() == answer
    return {f"answers_{about}": count / len(asked) for about, count in right.items()}


def write_card(name: str, metrics: dict[str, float]) -> None:
    """The card of a language model."""
    write_model_card(
        FOLDER / name,
        title=name,
        command=COMMANDS[name],
        data=DATA,
        metrics=metrics,
        licence="apache-2.0",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["safelight", "emoji"],
        text="A small GPT-2 (4 layers, width 96, context 128, 1,536 byte-pair tokens) trained from scratch on prose "
        "and on captions of the emoji pictures with questions about them, which it answers. "
        f"`answers_*`: share of the {len(scenes('held_out'))} held-out scenes whose caption it never saw and about "
        "which it answers word for word, the caption before the question. "
        "`tiny_lm` and `tiny_lm_seed1` differ in their seed only. It is made to be looked into, not to be talked to.",
        usage="from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained(".")\n'
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        'text = "<|endoftext|>a small crab on a blue background in noto style\\nquestion: what is this?\\nanswer:"\n'
        'tokens = tokenizer(text, return_tensors="pt").input_ids\n'
        "print(tokenizer.decode(model.generate(tokens, max_new_tokens=3, do_sample=False)[0]))\n",
    )


def dictionaries(export: Path, name: str) -> None:
    """Copy a run's sparse autoencoders."""
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    for place in sorted(path for path in export.iterdir() if path.is_dir()):
        (folder / place.name).mkdir(exist_ok=True)
        for file in ("cfg.json", "sae_weights.safetensors"):
            shutil.copyfile(place / file, folder / place.name / file)
    results: dict[str, Any] = json.loads((export / "results.json").read_text(encoding="utf-8"))
    metrics = {
        f"{metric} ({site})": figures[metric]
        for site, figures in results["each"].items() if "/" not in site
        for metric in ("fvu", "l0", "ce_recovered", "dead_fraction")
    }  # fmt: skip
    write_model_card(
        folder,
        title=name,
        command=COMMANDS[name],
        data=DATA,
        metrics=metrics,
        licence="apache-2.0",
        library_name="sae-lens",
        tags=["safelight", "sae"],
        text="TopK sparse autoencoders (768 features, 16 active) of `tiny_lm`'s residual stream behind its blocks 1 "
        "and 2. They take activations as they are.",
        usage='from sae_lens import SAE\n\nsae = SAE.load_from_disk("resid_post.2")\n',
    )


def main() -> None:
    """Make one entry."""
    parser = argparse.ArgumentParser(description="make tiny_lm, tiny_lm_seed1 or tiny_lm_saes of a run")
    parser.add_argument("run", type=Path, help="its folder")
    parser.add_argument("name", choices=sorted(COMMANDS))
    arguments = parser.parse_args()
    make = dictionaries if arguments.name == "tiny_lm_saes" else language_model
    make(arguments.run / "export", arguments.name)


if __name__ == "__main__":
    main()
