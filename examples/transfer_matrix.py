"""Visual prompts on encoders that they were not trained on: a table of lifts.

    python examples/transfer_matrix.py runs/visual_prompt/<run> [...] --encoders zoo:tiny_clip:64 dinov2:112

Each row is a prompt, each column an encoder and the size of its pictures; marks made by hand stand below. Pictures are
crops of photographs that no prompt was trained on: those of scikit-image, or of a folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from safelight.datamodules import PhotoDataModule
from safelight.lightning_modules.visual_prompt.deploy import read_prompt
from safelight.lightning_modules.visual_prompt.encoders import Encoder, load_encoder
from safelight.lightning_modules.visual_prompt.transfer import matrix


def main() -> None:
    """Read, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="runs of method=visual_prompt, or their exports")
    parser.add_argument("--encoders", nargs="+", default=["zoo:tiny_clip:64"], help="name:size of its pictures")
    parser.add_argument("--path", default="scikit-image", help="photographs: a folder, or scikit-image")
    parser.add_argument("--crops", type=int, default=36)
    asked = parser.parse_args()
    prompts = {Path(run).name: read_prompt(run) for run in asked.runs}
    encoders: dict[str, Encoder] = {}
    images: dict[str, Tensor] = {}
    for word in asked.encoders:
        name, _, size = word.rpartition(":")
        data = PhotoDataModule(path=asked.path, image_size=int(size), test_crops=asked.crops)
        data.setup()
        pictures = [data.test_set[place]["image"] for place in range(len(data.test_set))]
        encoders[word], images[word] = load_encoder(name), (torch.stack(pictures) + 1) / 2
    print(f"{'lift':28}" + "".join(f"{name:>24}" for name in encoders))
    for name, row in matrix(prompts, encoders, images).items():
        print(f"{name:28}" + "".join(f"{row[encoder]:24.2f}" for encoder in encoders))


if __name__ == "__main__":
    main()
