"""Put the masks of several concept-erasure runs on one model: what they share, and whether all concepts are gone.

python examples/merge_erasures.py runs/pistol/export runs/panda/export --out runs/merged
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from safelight.datamodules import ConceptDataModule
from safelight.generators import Generator, load_generator
from safelight.lightning_modules.concept_erasure.controls import folded
from safelight.masking import load_masks, merge_masks, overlap
from safelight.metrics import ClipJudge

parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
parser.add_argument("exports", type=Path, nargs="+", help="export folders of runs with the same backbone and groups")
parser.add_argument("--out", type=Path, default=Path("runs/merged"), help="where the merged pipeline goes")
parser.add_argument("--test-size", type=int, default=24, help="held-out samples per concept, neighbours and others")
given = parser.parse_args()

masks: dict[str, dict[str, Tensor]] = {}
for folder in given.exports:
    concept = str(json.loads((folder / "units.json").read_text(encoding="utf-8"))["concept"])
    masks[concept], about = load_masks(folder / "masks")
generator = load_generator(about["backbone"])
for row in overlap(masks):
    print(
        f"{row['pair']}: {row['off'][0]} and {row['off'][1]} units off, {row['shared']} of them shared "
        f"({row['by chance']:g} by chance), Jaccard {row['jaccard']:.2f}"
    )
merged = merge_masks(list(masks.values()))

data = ConceptDataModule(concept=list(masks), test_size=given.test_size)
data.setup()
judge, labels = ClipJudge("zoo:tiny_clip"), data.concepts


@torch.no_grad()
def recognised(model: Generator) -> dict[str, float]:
    """Share of samples whose picture shows what its prompt says: for each concept, for neighbours and for others."""
    hits: dict[str, list[bool]] = {}
    for batch in data.test_dataloader():
        noise = model.noise([int(seed) for seed in batch["seed"]])
        pictures = model.decode(model.rollout(noise, model.encode(list(batch["prompt"]))))
        named = judge.classify(pictures, [f"a {label}" for label in labels]).tolist()
        for role, word, found in zip(batch["role"], batch["concept"], named, strict=True):
            hits.setdefault(word if role == "target" else f"{role}s", []).append(labels[found] == word)
    return {key: sum(values) / len(values) for key, values in hits.items()}


def show(name: str, off: Mapping[str, Tensor], model: Generator) -> None:
    """Print one model's line."""
    units = sum(int((~mask).sum()) for mask in off.values())
    print(f"{name:24s} {units:5,} off  " + "  ".join(f"{k} {100 * v:3.0f} %" for k, v in recognised(model).items()))


show("dense", {}, generator)
for concept, own in masks.items():
    show(f"without {concept}", own, folded(generator, own))
erased = folded(generator, merged)
show("without all of them", merged, erased)
erased.save(given.out, denoiser=erased.denoiser)
print(f"merged pipeline: {given.out}")
