"""Filtering of erase pairs: a pair is good when its two pictures differ in the concept and in nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators.base import Generator
from safelight.metrics.clip import ClipJudge

Scorer = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""(pictures of the concept, pictures of the anchor, prompts without the concept's words) to one score per pair; the
larger, the worse the pair. Pictures are (N, 3, H, W) in [0, 1]."""

ScorerName = Literal["clip", "clip_foreground", "distance"]
# What the authors average over to ask CLIP for the concept alone; wordings are ours.
_ENSEMBLE = ("a photo of {}", "a picture of {}", "an image that shows {}", "{}")


class PairLike(Protocol):
    """What is read of a pair."""

    @property
    def prompt(self) -> str:
        """The prompt with the concept."""

    @property
    def anchor(self) -> str:
        """The prompt with the anchor."""

    @property
    def concept(self) -> str:
        """The concept's words."""

    @property
    def anchor_concept(self) -> str:
        """The anchor's words."""

    @property
    def rest(self) -> str:
        """The prompt without the concept's words."""


def clip_background(judge: ClipJudge) -> Scorer:
    """How differently the two pictures fit what the prompt says beside the concept: |CLIP(a, rest) - CLIP(b, rest)|."""

    def score(concept: Tensor, anchor: Tensor, rest: Sequence[str]) -> Tensor:
        return (judge.score(concept, rest) - judge.score(anchor, rest)).abs()

    return score


def clip_foreground(judge: ClipJudge, concepts: Sequence[str], anchors: Sequence[str]) -> Scorer:
    """The background score, plus how much more the first picture shows the concept than the anchor; 1 if less.

    So pairs whose first picture does not show the concept at all come last, and among the others those come first that
    show it about as much as the anchor, as in the authors' code.

    Args:
        judge: the CLIP model.
        concepts: N words, of each pair.
        anchors: N words, of each pair.
    """
    background = clip_background(judge)

    def score(concept: Tensor, anchor: Tensor, rest: Sequence[str]) -> Tensor:
        pictures = judge.features(concept)
        shown = []
        for words in (concepts, anchors):
            texts = torch.stack([judge.text_features([form.format(w) for form in _ENSEMBLE]).mean(0) for w in words])
            shown.append((pictures * torch.nn.functional.normalize(texts, dim=1)).sum(1))
        difference = shown[0] - shown[1]
        return background(concept, anchor, rest) + torch.where(difference < 0, 1.0, difference)

    return score


def picture_distance(concept: Tensor, anchor: Tensor, rest: Sequence[str]) -> Tensor:
    """Mean squared difference of the two pictures, or latents: needs no judge."""
    return (concept - anchor).square().flatten(1).mean(1)


def make_scorer(name: ScorerName, pairs: Sequence[PairLike], judge: ClipJudge | None = None) -> Scorer:
    """The scorer of a name.

    Args:
        name: ``clip``, ``clip_foreground`` or ``distance``.
        pairs: those that will be scored.
        judge: for the first two.

    Raises:
        SafelightError: it needs a judge and there is none, or the name is unknown.
    """
    if name == "distance":
        return picture_distance
    if name not in ("clip", "clip_foreground"):
        raise SafelightError(f"data.filter_scorer={name!r}: choose clip, clip_foreground or distance")
    if judge is None:
        raise SafelightError(f"data.filter_scorer={name!r} needs a CLIP judge; choose 'distance' where there is none")
    if name == "clip":
        return clip_background(judge)
    return clip_foreground(judge, [pair.concept for pair in pairs], [pair.anchor_concept for pair in pairs])


def kept_places(scores: Tensor, ratio: float, zeros: int = 0) -> list[int]:
    """Places of the scores up to a quantile, in order.

    Args:
        scores: (N,), the larger the worse.
        ratio: the quantile; 0.9 drops the worst tenth.
        zeros: further scores of 0 that the quantile counts. The authors count one for every retain prompt, so that with
            as many of them 0.9 drops the worst fifth.

    Raises:
        SafelightError: a score is not a number, or ``ratio`` is no quantile.
    """
    if not 0 < ratio <= 1:
        raise SafelightError(f"data.filter_ratio={ratio}: it must be > 0 and <= 1")
    if not scores.isfinite().all():
        raise SafelightError("data.filter_scorer: it gave scores that are no finite numbers")
    limit = torch.quantile(torch.cat([scores, scores.new_zeros(zeros)]), ratio)
    return (scores <= limit).nonzero().flatten().tolist()


@torch.no_grad()
def final_latents(generator: Generator, prompts: Sequence[str], seeds: Sequence[int], batch_size: int = 16) -> Tensor:
    """Final latents of prompts, (N, *latent_shape) on the CPU."""
    parts = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        parts.append(generator.rollout(generator.noise(seeds[rows]), generator.encode(prompts[rows])).cpu())
    return torch.cat(parts)


@torch.no_grad()
def filter_pairs(
    generator: Generator,
    pairs: Sequence[PairLike],
    seeds: Sequence[int],
    scorer: Scorer,
    ratio: float,
    zeros: int = 0,
    batch_size: int = 16,
) -> list[int]:
    """Places of the pairs to train on: those whose pictures, drawn from the same noise, a scorer finds best.

    Args:
        generator: the original model.
        pairs: erase pairs, see ``ConceptDataModule.erase_pairs``.
        seeds: noise seed of each.
        scorer: see :func:`make_scorer`.
        ratio: share to keep; 1 keeps all and draws nothing.
        zeros: see :func:`kept_places`.
        batch_size: pictures drawn at once.

    Raises:
        SafelightError: see :func:`kept_places`.
    """
    if ratio == 1:
        return list(range(len(pairs)))
    pictures = []
    for prompts in ([pair.prompt for pair in pairs], [pair.anchor for pair in pairs]):
        latents = final_latents(generator, prompts, seeds, batch_size)
        pictures.append(torch.cat([generator.decode(z.to(generator.device)).cpu() for z in latents.split(batch_size)]))
    return kept_places(scorer(pictures[0], pictures[1], [pair.rest for pair in pairs]).cpu(), ratio, zeros)


def keep_good_pairs(generator: Generator, data: Any, judge: str | None) -> None:
    """Filter a data module's erase pairs as its ``filter_*`` arguments say.

    Args:
        generator: the original model.
        data: a ``ConceptDataModule`` that is set up.
        judge: CLIP folder or ``zoo:`` name for the scorers that need one; None where nothing can be decoded.
    """
    pairs, seeds = zip(*data.erase_pairs(), strict=True)
    clip = ClipJudge(judge) if judge is not None and data.filter_scorer != "distance" else None
    scorer = make_scorer(data.filter_scorer, pairs, clip)
    zeros = len(pairs) * data.retain_per_erase if data.filter_parity else 0
    data.keep_pairs(filter_pairs(generator, pairs, seeds, scorer, data.filter_ratio, zeros))
