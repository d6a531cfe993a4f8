"""Referring expressions: which box does a sentence mean? A test of marks for models that know texts (RefCOCO).

    python -m safelight.lightning_modules.visual_prompt.referring refcoco_val.jsonl train2014 --prompt <run folder>

Each proposed box is marked in turn, and the one whose picture fits the sentence best is the answer.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.visual_prompt.asking import (
    add_options,
    chosen_marks,
    evenly,
    filled,
    finish,
    reporting,
    table,
)
from safelight.lightning_modules.visual_prompt.picture_marks import Mark
from safelight.lightning_modules.visual_prompt.refcoco_files import Box, Referred, read_proposals, read_refcoco
from safelight.lightning_modules.visual_prompt.scoring import Outcome, TextScorer, open_picture

TEMPLATE = "a photo of {caption}"
"""Of arXiv 2306.04356."""
ENOUGH = 0.5
"""Intersection over union above which a box is right."""
UNRELATED = 500
"""Captions whose mean score is subtracted (arXiv 2306.04356)."""
TIE = 1e-4
"""Logits closer than this tie: they differ by how a product was rounded."""


@dataclass(frozen=True)
class Referring(Outcome):
    """Answers for n sentences.

    Attributes:
        chosen: (n,), the place of the box among the picture's proposals; the first of those that tie.
    """

    chosen: Tensor


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes (P, 4) and (G, 4), each ``x, y, w, h``: (P, G)."""
    starts = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    ends = torch.minimum((boxes[:, :2] + boxes[:, 2:])[:, None], (others[:, :2] + others[:, 2:])[None])
    shared = (ends - starts).clamp(min=0).prod(-1)
    return shared / (boxes[:, 2:].prod(-1)[:, None] + others[:, 2:].prod(-1)[None] - shared)


def subtracted(logits: Tensor, unrelated: Tensor) -> Tensor:
    """Scores of boxes for sentences, less what each box scores with any sentence (arXiv 2304.06712).

    Args:
        logits: (P, S) of P boxes and S sentences.
        unrelated: (P, Q) of the boxes and Q sentences about other pictures.
    """
    return logits - unrelated.mean(1, keepdim=True)


def best(scores: Tensor, fits: Tensor) -> tuple[float, int]:
    """Whether the box with the highest score is right, and which it is; those that tie share the answer.

    Args:
        scores: (P,).
        fits: (P,), whether each box is right.
    """
    top = scores >= scores.max() - TIE
    return float(fits[top].double().mean()), int(top.double().argmax())


def boxes_of(item: Referred, proposals: Mapping[int, Sequence[Box]] | None = None) -> tuple[Box, ...]:
    """Boxes to choose from: proposals, the whole picture where there are none for it, or all that are annotated.

    Raises:
        SafelightError: the picture cannot be read.
    """
    if proposals is None:
        return item.boxes
    if boxes := proposals.get(item.image_id):
        return tuple(boxes)
    width, height = open_picture(item.file).size
    return ((0.0, 0.0, float(width), float(height)),)


def fitting(boxes: Sequence[Box], item: Referred) -> Tensor:
    """Which boxes are right for an object, (P,)."""
    one, other = (torch.tensor(each, dtype=torch.float64) for each in (boxes, item.gold))
    return (iou(one, other) > ENOUGH).any(1)


def refer(
    scorer: TextScorer,
    items: Sequence[Referred],
    mark: Mark,
    *,
    proposals: Mapping[int, Sequence[Box]] | None = None,
    crop: bool = False,
    unrelated: int = 0,
    template: str = TEMPLATE,
    seed: int = 0,
) -> Referring:
    """Mark each proposal, and take the one whose picture fits a sentence best.

    Args:
        scorer: that answers.
        items: objects with sentences, written in small letters as they are asked.
        mark: see :func:`~safelight.lightning_modules.visual_prompt.picture_marks.marker_of`.
        proposals: boxes by picture; all annotated boxes without.
        crop: add the logits of each box cut out.
        unrelated: subtract the mean over so many captions of other pictures; 0 for none.
        template: caption to text.
        seed: of which captions these are.

    Returns:
        Answers in the order of the items and their sentences.

    Raises:
        SafelightError: the template has no place for the caption, there are no other captions, or a picture cannot be
            read.
    """
    if unrelated < 0:
        raise SafelightError(f"unrelated={unrelated}: give 0 or more captions")
    bank = _bank(items, template, seed) if unrelated else []
    answers: dict[int, list[tuple[float, int]]] = {}
    for together in _by_picture(items):
        first = items[together[0]]
        picture = open_picture(first.file)
        boxes = boxes_of(first, proposals)
        texts = [filled(template, "caption", sentence.lower()) for at in together for sentence in items[at].sentences]
        others = list(islice((text for image, text in bank if image != first.image_id), unrelated))
        if unrelated and not others:
            raise SafelightError(f"unrelated={unrelated}: all captions are about one picture")
        scores = scorer.compare(scorer.features_at(picture, [_corners(box) for box in boxes], mark), texts + others)
        if crop:
            scores = scores + scorer.compare(scorer.features([cut(picture, box) for box in boxes]), texts + others)
        scores = scores.cpu()
        if others:
            scores = subtracted(scores[:, : len(texts)], scores[:, len(texts) :])
        columns = iter(scores[:, : len(texts)].T)
        for at in together:
            fits = fitting(boxes, items[at])
            answers[at] = [best(next(columns), fits) for _ in items[at].sentences]
    right, chosen = zip(*(answer for at in range(len(items)) for answer in answers[at]), strict=True)
    return Referring(torch.tensor(right), _pictures(items), torch.tensor(chosen))


def without_looking(
    items: Sequence[Referred], proposals: Mapping[int, Sequence[Box]] | None = None
) -> dict[str, Outcome]:
    """What needs no model: a random proposal (its expectation), the largest one, and the best possible answer."""
    rules: dict[str, Callable[[tuple[Box, ...], Tensor], float]] = {
        "random_box": lambda boxes, fits: float(fits.double().mean()),
        "largest_box": lambda boxes, fits: best(torch.tensor(boxes)[:, 2:].prod(1), fits)[0],
        "best_possible": lambda boxes, fits: float(fits.any()),
    }
    asked = [(item, boxes_of(item, proposals)) for item in items for _ in item.sentences]
    return {
        name: Outcome(torch.tensor([rule(boxes, fitting(boxes, item)) for item, boxes in asked]), _pictures(items))
        for name, rule in rules.items()
    }


def cut(picture: Image.Image, box: Box) -> Image.Image:
    """A box of a picture, what lies inside it, at least a pixel."""
    left, top, right, bottom = _corners(box)
    start = (min(max(math.floor(left), 0), picture.width - 1), min(max(math.floor(top), 0), picture.height - 1))
    end = (min(math.ceil(right), picture.width), min(math.ceil(bottom), picture.height))
    return picture.crop((*start, max(end[0], start[0] + 1), max(end[1], start[1] + 1)))


def _corners(box: Box) -> Box:
    return box[0], box[1], box[0] + box[2], box[1] + box[3]


def _by_picture(items: Sequence[Referred]) -> list[list[int]]:
    """Places of the objects that share a picture and its boxes, which are looked at together."""
    groups: dict[tuple[Path, tuple[Box, ...]], list[int]] = {}
    for at, item in enumerate(items):
        groups.setdefault((item.file, item.boxes), []).append(at)
    return list(groups.values())


def _pictures(items: Sequence[Referred]) -> Tensor:
    return torch.tensor([item.image_id for item in items for _ in item.sentences])


def _bank(items: Sequence[Referred], template: str, seed: int) -> list[tuple[int, str]]:
    """All captions and their pictures, in an order by chance."""
    captions = [(item.image_id, filled(template, "caption", each.lower())) for item in items for each in item.sentences]
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(seed)).tolist()
    return [captions[place] for place in order]


def _report(given: argparse.Namespace) -> dict[str, Any]:
    filled(given.template, "caption", "")  # before anything is loaded
    items = evenly(read_refcoco(given.file, given.images), given.limit)
    proposals = None if given.proposals is None else read_proposals(given.proposals)
    absent = sorted({item.image_id for item in items} - set(proposals or {})) if proposals is not None else []
    if proposals is not None and len(absent) == len({item.image_id for item in items}):
        raise SafelightError(f"--proposals: {given.proposals} has no box in any picture of {given.file}")
    marks = chosen_marks(given)
    scorer = TextScorer(given.model, batch_size=given.batch_size, device=given.device)
    found = {
        name: refer(
            scorer, items, mark,
            proposals=proposals, crop=given.crop, unrelated=given.unrelated, template=given.template,
        )
        for name, mark in marks.items()
    }  # fmt: skip
    first, fixed = found["none"], without_looking(items, proposals)
    print(f"{len(first.right):,} sentences, {len(items):,} objects, {len({item.file for item in items}):,} pictures")
    if absent:
        print(f"{len(absent):,} pictures have no proposals; theirs is the whole picture")
    if given.crop:
        print("every mark with the boxes cut out beside it: none is these alone")
    print(table({name: outcome.accuracy for name, outcome in fixed.items()}, found))
    return {
        "task": "referring expressions", "model": given.model, "template": given.template, "crop": given.crop,
        "unrelated": given.unrelated, "sentences": len(first.right), "without_proposals": len(absent),
        "marks": {name: reporting(result, first) for name, result in (fixed | found).items()},
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, mark, ask, print."""
    parser = argparse.ArgumentParser(
        prog="python -m safelight.lightning_modules.visual_prompt.referring",
        description=(__doc__ or "").splitlines()[0],
    )
    parser.add_argument("file", help="refcoco_val.jsonl or another, in ReCLIP's format")
    parser.add_argument("images", help="folder of the pictures, COCO's train2014")
    parser.add_argument("--proposals", help="JSON list of {image_id, box}; default: the annotated boxes")
    parser.add_argument("--crop", action="store_true", help="add the logits of each box cut out")
    parser.add_argument(
        "--unrelated", type=int, default=0, metavar="N",
        help=f"subtract the mean over N captions of other pictures ({UNRELATED} in FGVP)",
    )  # fmt: skip
    parser.add_argument("--template", default=TEMPLATE, help="default: %(default)s")
    add_options(parser)
    return finish(parser.parse_args(arguments), _report)


if __name__ == "__main__":
    sys.exit(main())
