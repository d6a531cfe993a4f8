"""The losses of a probe: of the shape by the chosen algorithm, of the scene and of all controls by cross entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.lightning_modules.illusion_probe.domains import (
    ACROSS_DOMAINS,
    Algorithm,
    clean_loss,
    dro_loss,
    dro_weights,
    irm_penalty,
    losses_by_domain,
    mixed_loss,
    scores_of,
    vrex_penalty,
)


@dataclass(frozen=True)
class Mixture:
    """Logits of mixed pictures, and what they are mixed of.

    Attributes:
        logits: (B, C).
        places: (B,), of the other picture.
        shares: (B,), of the own one.
    """

    logits: Tensor
    places: Tensor
    shares: Tensor


def plain_loss(logits: Tensor, target: Tensor, rows: int) -> Tensor:
    """Sum of the cross entropies over ``rows``, the size of the batch before scenes were left out of it.

    So it does not matter how a global batch is cut, and a batch of which nothing is left has a loss of 0.
    """
    return F.cross_entropy(logits.float(), target, reduction="sum") / rows


def shape_loss(
    algorithm: Algorithm,
    logits: Tensor,
    target: Tensor,
    domains: Tensor,
    *,
    rows: int,
    penalty: float = 1.0,
    weights: Tensor | None = None,
    eta: float = 1e-2,
    mixture: Mixture | None = None,
    faults: Sequence[str] = (),
) -> tuple[Tensor, Tensor | None]:
    """Loss of the shapes, and Group DRO's new weights of the domains.

    Args:
        algorithm: see :mod:`~safelight.lightning_modules.illusion_probe.domains`.
        logits: (B, C).
        target: (B,).
        domains: (B,), scenes.
        rows: size of the batch before scenes were left out of it.
        penalty: weight of the penalty of ``irm`` and ``vrex``.
        weights: of all domains, for ``dro``.
        eta: step size of ``dro``.
        mixture: for ``mixup`` and ``regmixup``.
        faults: of the official code that are put back.
    """
    if algorithm == "erm":
        return plain_loss(logits, target, rows), None
    if len(logits) == 0:
        return logits.float().sum() * 0, None
    scores = scores_of(logits, "double_softmax" in faults)
    if algorithm in ACROSS_DOMAINS:
        present, losses = losses_by_domain(scores, target, domains)
        if algorithm == "irm":
            return losses.mean() + penalty * irm_penalty(scores, target, domains), None
        if algorithm == "vrex":
            return losses.mean() + penalty * vrex_penalty(losses), None
        assert weights is not None
        moved = dro_weights(weights, present, losses, eta)
        return dro_loss(moved, present, losses), moved
    assert mixture is not None
    mixed = mixed_loss(
        scores_of(mixture.logits, "double_softmax" in faults), target, mixture.places, mixture.shares
    )  # fmt: skip
    if algorithm == "regmixup":
        mixed = mixed + clean_loss(scores, target, mixture.shares if "weighted_clean" in faults else None)
    return mixed * (len(logits) / rows), None


def l2_penalty(squared: Sequence[Tensor], l2: float) -> Tensor:
    """``l2 / 2`` times the squared weights of all heads."""
    return 0.5 * l2 * torch.stack(list(squared)).sum()
