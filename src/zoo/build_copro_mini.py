"""Make the ``copro_mini`` data set: prompt pairs in CoProV2's formats, with pictures drawn by ``tiny_sdxl``.

Run once, by hand, when the pipeline or the list of things changes::

    python -m safelight.zoo.build_copro_mini

Written are ``CoProv2_train.csv``, ``CoProv2_test.csv`` and ``images.zip`` with ``u_idx_<i>_0.jpg`` (unsafe) and
``s_idx_<i>_0.jpg`` (safe), both pictures of a pair from one noise.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from safelight.datamodules.concept_emoji import ANCHORS
from safelight.datamodules.copro_v2_files import PromptPair
from safelight.datamodules.emoji import Scene, scenes
from safelight.datamodules.emoji_words import things
from safelight.generators import Generator, load_generator

FOLDER = Path(__file__).parent / "copro_mini"
PAIRS_PER_THING, TESTS_PER_THING = 24, 12
SEVERAL = {
    "blood": "Violence", "skull": "Violence", "razor": "Violence", "pill": "Illegal Activity", "cigarette": "self-harm",
    "lipstick": "Shocking",
}  # fmt: skip
"""Things one pair of which stands under a second category, too, as 2 % of the released pairs do."""
# How often a wording leaves size, background or style out.
_SHORTENED = 0.2


def wordings(thing: str, split: str, generator: torch.Generator) -> list[tuple[Scene, tuple[bool, bool, bool]]]:
    """Scenes of a thing in random order, each with what its caption names: size, background, style."""
    found = scenes("train" if split == "train" else "held_out", (thing,))
    order = torch.randperm(len(found), generator=generator).tolist()
    return [(found[place], _named(generator)) for place in order]


def _named(generator: torch.Generator) -> tuple[bool, bool, bool]:
    size, background, style = (torch.rand(3, generator=generator) >= _SHORTENED).tolist()
    return size, background, style


def train_rows() -> list[tuple[str, str, list[str]]]:
    """Unsafe prompt, safe prompt and categories of every pair."""
    rows = []
    for number, thing in enumerate(thing for thing in things() if thing.unsafe):
        generator = torch.Generator().manual_seed(number)
        for place, (scene, named) in enumerate(wordings(thing.name, "train", generator)[:PAIRS_PER_THING]):
            safe = replace(scene, thing=ANCHORS[thing.name])
            categories = (
                [thing.category, SEVERAL[thing.name]] if thing.name in SEVERAL and place == 0 else [thing.category]
            )
            rows.append((scene.describe(*named), safe.describe(*named), categories))
    return rows


def test_rows() -> list[tuple[str, str]]:
    """Unsafe prompts of held-out scenes with their category: full captions, then shortened ones, all different."""
    rows = []
    for number, thing in enumerate(thing for thing in things() if thing.unsafe):
        generator = torch.Generator().manual_seed(1000 + number)
        found = [scene for scene, _ in wordings(thing.name, "test", generator)]
        shorter = [
            scene.describe(*named)
            for named in ((False, True, True), (True, True, False), (True, False, True), (False, True, False))
            for scene in found
        ]
        prompts = dict.fromkeys([*(scene.caption for scene in found), *shorter])
        rows += [(prompt, thing.category) for prompt in list(prompts)[:TESTS_PER_THING]]
    return rows


def write_csv(file: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    """Write ``prompt,image,category``."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerows([("prompt", "image", "category"), *rows])


def draw(generator: Generator, prompts: Sequence[str], seeds: Sequence[int]) -> list[bytes]:
    """The prompts' pictures as JPEG files."""
    files = []
    for start in range(0, len(prompts), 32):
        part = slice(start, start + 32)
        with torch.no_grad():
            latents = generator.rollout(generator.noise(seeds[part]), generator.encode(prompts[part]))
        pixels = (generator.decode(latents) * 255).round().to(torch.uint8)
        for pixel in pixels:
            buffer = io.BytesIO()
            Image.fromarray(pixel.permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=95)
            files.append(buffer.getvalue())
    return files


def main() -> None:
    """Write the three files."""
    FOLDER.mkdir(exist_ok=True)
    rows, table = train_rows(), []
    for number, (unsafe, safe, categories) in enumerate(rows):
        pair = PromptPair(number, unsafe, safe, ())
        for category in categories:
            table += [(unsafe, pair.image("unsafe"), category), (safe, pair.image("safe"), category)]
    write_csv(FOLDER / "CoProv2_train.csv", table)
    tests = test_rows()
    test_table = [(prompt, f"{number:07d}_0.jpg", category) for number, (prompt, category) in enumerate(tests)]
    write_csv(FOLDER / "CoProv2_test.csv", test_table)

    generator = load_generator("tiny_sdxl")
    seeds = list(range(len(rows)))
    with zipfile.ZipFile(FOLDER / "images.zip", "w", zipfile.ZIP_STORED) as archive:
        for kind, prompts in (("u", [row[0] for row in rows]), ("s", [row[1] for row in rows])):
            for number, data in enumerate(draw(generator, prompts, seeds)):
                # A fixed date, so that the same pictures make the same archive.
                archive.writestr(zipfile.ZipInfo(f"{kind}_idx_{number:07d}_0.jpg", (2026, 1, 1, 0, 0, 0)), data)
    print(f"{len(rows)} pairs, {len(tests)} test prompts")


if __name__ == "__main__":
    main()
