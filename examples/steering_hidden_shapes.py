"""Does steering attention to a hidden shape rescue its recognition?

A linear probe reads the shape from a vision transformer's features of IllusionBench pictures, plain and steered: by a
bias on attention that is as strong as the hidden silhouette is there, or by a frame around the silhouette's box, cut
from the prompt of a ``visual_prompt`` run. Where the silhouette is known, features may tell *where* one looks and not
what one sees; so the same bias is also put over scenes in which nothing is hidden, and over pictures that hide
something else. Each kind of features has probes of its own, on several seeds.

    python examples/steering_hidden_shapes.py --prompt runs/visual_prompt/<run>
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from safelight.datamodules import IllusionBenchDataModule
from safelight.datamodules.illusion_rows import IllusionRow, IllusionRows, Placement
from safelight.datamodules.illusion_scenes import hide
from safelight.datamodules.illusion_silhouettes import Silhouette, mask
from safelight.lightning_modules.illusion_probe.heads import features_of, low_passed
from safelight.lightning_modules.visual_prompt.deploy import VisualPromptFile, prompt_image, read_prompt
from safelight.probing.steering import biased_attention
from safelight.probing.vision import VisionTower, load_vision_model

BATCH = 64
NOTHING_HIDDEN = ("bias, nothing hidden",)
Sample = tuple[np.ndarray, np.ndarray]
"""A picture (S, S, 3) and the silhouette that is to be looked at (S, S)."""


def silhouette(row: IllusionRow, placed: Placement, size: int) -> np.ndarray:
    """What is hidden in a row's picture, where it is hidden."""
    one = Silhouette(row.subset, row.shape, row.source_id)
    return mask(one, size, scale=placed.scale, shift=placed.shift)


def samples(rows: IllusionRows, kind: str) -> Iterator[Sample]:
    """Pictures with what is to be looked at in them."""
    size = rows.image_size
    # By chance: a fixed distance between the two would tell the shape as well as its own silhouette does.
    others = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    for other, row in zip((rows.rows[place] for place in others), rows.rows, strict=True):
        placed = rows.placement(row)
        shape = silhouette(row, placed, size)
        if kind in NOTHING_HIDDEN:
            yield hide(None, row.scene, 0.0, placed.scene_seed, size=size), shape
            continue
        picture = hide(shape, row.scene, row.strength, placed.scene_seed)
        if kind == "bias, of another picture":
            shape = silhouette(other, rows.placement(other), size)
        yield picture, shape


def framed(picture: np.ndarray, shape: np.ndarray, prompt: VisualPromptFile) -> np.ndarray:
    """The picture with the prompt's frame around the silhouette's box."""
    lines, columns = (np.flatnonzero(shape.max(axis) > 0.5) for axis in (1, 0))
    box = (columns[0] - 2, lines[0] - 2, columns[-1] + 3, lines[-1] + 3)
    return np.asarray(prompt_image(Image.fromarray(picture), box, prompt))


@torch.no_grad()
def features(
    model: VisionTower, rows: IllusionRows, kind: str, strength: float, prompt: VisualPromptFile | None
) -> Tensor:
    """(N, 2 d), the class token beside the mean patch, of all rows."""
    config: Any = model.tower.config
    found, waiting = [], list(samples(rows, kind))
    for start in range(0, len(waiting), BATCH):
        pictures, shapes = zip(*waiting[start : start + BATCH], strict=True)
        if kind == "prompt around it":
            assert prompt is not None
            pictures = tuple(framed(picture, shape, prompt) for picture, shape in zip(pictures, shapes, strict=True))
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        if kind == "low-pass":
            images = low_passed(images, images.shape[-1] // 4)
        bias = F.avg_pool2d(torch.from_numpy(np.stack(shapes))[:, None].float(), config.patch_size).flatten(1)
        steered = biased_attention(model, strength * bias) if kind.startswith("bias") else nullcontext()
        with steered:
            found.append(features_of(model, model.tower(model.normalised(images))))
    return torch.cat(found)


def probe(x: Tensor, labels: Tensor, test: Tensor, seeds: int, steps: int, l2: float = 1e-3) -> Tensor:
    """Predictions (seeds, N) of linear probes on other pictures; full batches, each seed on a bootstrap of the rows."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    x, test = (x - mean) / deviation, (test - mean) / deviation
    guesses = []
    for seed in range(seeds):
        chosen = torch.randint(len(x), (len(x),), generator=torch.Generator().manual_seed(seed))
        weight = torch.zeros(int(labels.max()) + 1, x.shape[1], requires_grad=True)
        optimizer = torch.optim.Adam([weight], lr=1e-2)
        for _ in range(steps):
            loss = F.cross_entropy(x[chosen] @ weight.T, labels[chosen]) + l2 * weight.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        guesses.append((test @ weight.detach().T).argmax(1))
    return torch.stack(guesses)


def table(rows: Sequence[tuple[str, Tensor]], right: Callable[[Tensor], Tensor], strengths: Tensor) -> None:
    """Print share of right answers by strength, median over seeds with the range over all strengths."""
    known = strengths.unique().tolist()
    print(f"{'shape read from':32}" + "".join(f"{f'c = {value:.2f}':>12}" for value in known) + f"{'all':>20}")
    for name, guesses in rows:
        hits = right(guesses).float()
        each = [f"{100 * hits[:, strengths == value].mean(1).median():.1f} %" for value in known]
        overall = 100 * hits.mean(1)
        whole = f"{overall.median():.1f} ({overall.min():.1f}-{overall.max():.1f})"
        print(f"{name:32}" + "".join(f"{text:>12}" for text in each) + f"{whole:>20}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vision-model", default="zoo:tiny_clip")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--prompt", help="a run of method=visual_prompt on the same model, or its export")
    parser.add_argument("--bias", type=float, default=3.0, help="on the logits where the silhouette is, nats")
    parser.add_argument("--placements", type=int, default=3)
    parser.add_argument("--split", default="placement", choices=["placement", "source"])
    parser.add_argument("--shapes", nargs="*", help="fewer shapes")
    parser.add_argument("--scenes", nargs="*", help="fewer scenes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    asked = parser.parse_args()
    data = IllusionBenchDataModule(
        split=asked.split, placements=asked.placements, image_size=asked.image_size, shapes=asked.shapes,
        scenes=asked.scenes,
    )  # fmt: skip
    data.setup()
    assert data.train_set is not None
    model = load_vision_model(asked.vision_model)
    prompt = read_prompt(asked.prompt) if asked.prompt else None
    labels, truth = (
        torch.tensor([data.shapes.index(row.shape) for row in rows.rows]) for rows in (data.train_set, data.test_set)
    )
    strengths = torch.tensor([row.strength for row in data.test_set.rows])
    print(f"{len(labels)} pictures to train on, {len(truth)} to test on, chance {100 / len(data.shapes):.1f} %")
    kinds = ["plain", "bias to the shape", "bias, nothing hidden", "bias, of another picture", "low-pass"]
    measured = []
    for kind in kinds + (["prompt around it"] if prompt is not None else []):
        train, test = (features(model, rows, kind, asked.bias, prompt) for rows in (data.train_set, data.test_set))
        measured.append((kind, probe(train, labels, test, asked.seeds, asked.steps)))
    table(measured, lambda guesses: guesses == truth, strengths)


if __name__ == "__main__":
    main()
