"""Naming keypoints: which part of a bird is marked? A test of marks for models that know texts (CUB-200-2011).

    python -m safelight.lightning_modules.visual_prompt.naming CUB_200_2011 --prompt runs/visual_prompt/<run>

Each visible part is marked in turn, and the name that fits the picture best is the answer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safelight.lightning_modules.randomness import row_generator
from safelight.lightning_modules.visual_prompt.asking import (
    add_options,
    chosen_marks,
    evenly,
    filled,
    finish,
    reporting,
    table,
)
from safelight.lightning_modules.visual_prompt.cub_files import Bird, Cub, read_cub
from safelight.lightning_modules.visual_prompt.picture_marks import LEARNED, Mark
from safelight.lightning_modules.visual_prompt.scoring import Outcome, TextScorer, open_picture

TEMPLATE = "a photo of the {part} of a bird"
"""Ours; the paper's is not known to us."""
ELSEWHERE = "{}, at another part"


@dataclass(frozen=True)
class Naming(Outcome):
    """Answers for n keypoints.

    Attributes:
        parts: names to choose from.
        truth: (n,), which part is marked.
        chosen: (n,), which is named.
    """

    parts: tuple[str, ...]
    truth: Tensor
    chosen: Tensor

    @property
    def chance(self) -> float:
        """Accuracy of guesses."""
        return 1 / len(self.parts)

    def per_part(self) -> dict[str, float]:
        """Accuracy for each part that occurs."""
        return {
            name: float(self.right[self.truth == part].double().mean())
            for part, name in enumerate(self.parts)
            if (self.truth == part).any()
        }


def name_keypoints(
    scorer: TextScorer,
    birds: Sequence[Bird],
    parts: Sequence[str],
    mark: Mark,
    *,
    template: str = TEMPLATE,
    elsewhere: bool = False,
    seed: int = 0,
) -> Naming:
    """Mark each keypoint and take the part whose text fits best.

    Args:
        scorer: that answers.
        birds: pictures with keypoints.
        parts: their names.
        mark: see :func:`~safelight.lightning_modules.visual_prompt.picture_marks.marker_of`.
        template: part to text.
        elsewhere: a control: mark another visible part of the same picture; a random place where there is none.
        seed: of that.

    Raises:
        SafelightError: the template has no place for the part, or a picture cannot be read.
    """
    texts = [filled(template, "part", part) for part in parts]
    truth, chosen, pictures = [], [], []
    for bird in birds:
        picture = open_picture(bird.file)
        places = [(point.x, point.y) for point in bird.keypoints]
        if elsewhere:
            places = _exchanged(places, picture.size, row_generator(seed, bird.image_id))
        chosen.append(scorer.compare(scorer.features_at(picture, places, mark), texts).argmax(1).cpu())
        truth += [point.part for point in bird.keypoints]
        pictures += [bird.image_id] * len(places)
    answers, right = torch.cat(chosen), torch.tensor(truth)
    return Naming((answers == right).float(), torch.tensor(pictures), tuple(parts), right, answers)


def _exchanged(
    places: list[tuple[float, float]], sides: tuple[int, int], generator: torch.Generator
) -> list[tuple[float, float]]:
    """Places in an order in which none keeps its own."""
    if len(places) == 1:
        x, y = torch.rand(2, generator=generator).tolist()
        return [(x * sides[0], y * sides[1])]
    by = int(torch.randint(1, len(places), (), generator=generator))
    return places[by:] + places[:by]


def name_all(scorer: TextScorer, cub: Cub, marks: dict[str, Mark], template: str = TEMPLATE) -> dict[str, Naming]:
    """Results by mark, and of the trained prompt, or else the red circle, at another part."""
    found = {
        name: name_keypoints(scorer, cub.birds, cub.parts, mark, template=template) for name, mark in marks.items()
    }
    moved = LEARNED if LEARNED in marks else "red_circle"
    found[ELSEWHERE.format(moved)] = name_keypoints(
        scorer, cub.birds, cub.parts, marks[moved], template=template, elsewhere=True
    )
    return found


def _report(given: argparse.Namespace) -> dict[str, Any]:
    filled(given.template, "part", "")  # before anything is loaded
    cub = read_cub(given.folder, given.split)
    cub = Cub(cub.parts, tuple(evenly(cub.birds, given.limit)))
    marks = chosen_marks(given)
    scorer = TextScorer(given.model, batch_size=given.batch_size, device=given.device)
    found = name_all(scorer, cub, marks, given.template)
    first = found["none"]
    print(f"{len(first.right):,} keypoints in {len(cub.birds):,} pictures, {len(cub.parts)} parts")
    print(table({"guessing": first.chance}, found))
    print()
    per_part = {name: result.per_part() for name, result in found.items()}
    print("  ".join([f"{'part':16}", *(f"{name:>8}" for name in marks)]))
    for part in first.per_part():
        cells = (f"{100 * per_part[name][part]:{max(len(name), 8) - 2}.1f} %" for name in marks)
        print("  ".join([f"{part:16}", *cells]))
    return {
        "task": "keypoint naming", "model": given.model, "template": given.template, "split": given.split,
        "keypoints": len(first.right), "pictures": len(cub.birds), "chance": first.chance,
        "marks": {name: reporting(result, first) | {"per_part": per_part[name]} for name, result in found.items()},
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, mark, ask, print."""
    parser = argparse.ArgumentParser(
        prog="python -m safelight.lightning_modules.visual_prompt.naming", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", help="CUB_200_2011, as it was released")
    parser.add_argument("--split", choices=("test", "train"), default="test")
    parser.add_argument("--template", default=TEMPLATE, help="default: %(default)s")
    add_options(parser)
    return finish(parser.parse_args(arguments), _report)


if __name__ == "__main__":
    sys.exit(main())
