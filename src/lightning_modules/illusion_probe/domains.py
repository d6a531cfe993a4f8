"""Objectives of domain generalisation over scenes (arXiv 2411.06287, section on domain generalisation; DomainBed).

All take scores (B, C), classes (B,) and domains (B,), numbers of scenes. They are those of the benchmark's code without
its faults; :data:`Fault` names what can be put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Algorithm = Literal["erm", "irm", "vrex", "dro", "mixup", "regmixup"]
Fault = Literal["double_softmax", "weighted_clean", "imagenet_stats"]
"""Faults of the official code: probabilities in place of logits go into the cross entropy of every algorithm but
``erm``; RegMixUp weights the clean loss by the share of the mixture; CLIP sees pictures normalised like ImageNet's."""
ACROSS_DOMAINS = ("irm", "vrex", "dro")
MIXING = ("mixup", "regmixup")


def scores_of(logits: Tensor, double_softmax: bool = False) -> Tensor:
    """What goes into the cross entropy, in fp32: logits, or with the official fault their softmax."""
    return logits.float().softmax(-1) if double_softmax else logits.float()


def losses_by_domain(scores: Tensor, target: Tensor, domains: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of each domain in the batch.

    Returns:
        The domains (D,) in ascending order, and their losses (D,).
    """
    losses = F.cross_entropy(scores, target, reduction="none")
    present, place = domains.unique(return_inverse=True)
    member = F.one_hot(place, len(present)).to(losses)
    return present, (losses @ member) / member.sum(0)


def irm_penalty(scores: Tensor, target: Tensor, domains: Tensor) -> Tensor:
    """Mean over domains of the product of the gradients of two losses by a factor 1 on the scores (arXiv 1907.02893).

    The losses are those of every other picture of the domain (appendix D there). The gradient of a cross entropy by
    that factor is the mean of ``sum_k (p_k - y_k) s_k``. A domain with one picture has no two halves and counts as 0.
    """
    slope = ((scores.softmax(-1) - F.one_hot(target, scores.shape[-1])) * scores).sum(-1)
    penalties = []
    for domain in domains.unique():
        own = slope[domains == domain]
        penalties.append(own[::2].mean() * own[1::2].mean() if len(own) > 1 else 0 * own.sum())
    return torch.stack(penalties).mean()


def vrex_penalty(losses: Tensor) -> Tensor:
    """Variance of the losses (D,) of domains, over D (arXiv 2003.00688)."""
    return (losses - losses.mean()).square().mean()


def dro_weights(weights: Tensor, present: Tensor, losses: Tensor, eta: float) -> Tensor:
    """New weights of all domains: those in the batch times ``exp(eta * loss)``, then all to a sum of 1 (Group DRO).

    Args:
        weights: (all domains,).
        present: (D,), domains in the batch.
        losses: (D,), theirs.
        eta: step size.
    """
    factors = torch.ones_like(weights)
    factors[present] = (eta * losses.detach()).exp().to(weights)
    moved = weights * factors
    return moved / moved.sum()


def dro_loss(weights: Tensor, present: Tensor, losses: Tensor) -> Tensor:
    """Weighted mean of the losses (D,) of the domains in the batch; with all domains in it, the weights' own sum."""
    own = weights[present].to(losses)
    return (own * losses).sum() / own.sum()


def partners(domains: Tensor, generators: Sequence[torch.Generator], alpha: float) -> tuple[Tensor, Tensor]:
    """For each picture another one to mix it with, and its own share.

    The other one is of another domain where the batch has more than one.

    Args:
        domains: (B,).
        generators: source of each row's draws.
        alpha: both parameters of the Beta distribution of shares.

    Returns:
        Places (B,) in the batch and shares (B,) in [0, 1].
    """
    places, shares = [], []
    for own, generator in enumerate(generators):
        others = (domains != domains[own]).nonzero().flatten().cpu()
        others = others if len(others) else torch.arange(len(domains))
        places.append(int(others[torch.randint(len(others), (1,), generator=generator)]))
        seed = int(torch.randint(2**62, (1,), generator=generator))
        shares.append(np.random.default_rng(seed).beta(alpha, alpha))
    return torch.tensor(places, device=domains.device), torch.tensor(shares, device=domains.device).float()


def blended(values: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    """``share * own + (1 - share) * other`` for rows of values (B, ...)."""
    own = shares.to(values).view(-1, *[1] * (values.ndim - 1))
    return own * values + (1 - own) * values[places]


def mixed_loss(scores: Tensor, target: Tensor, places: Tensor, shares: Tensor) -> Tensor:
    """Cross entropy of mixed pictures with both their classes, in their shares (MixUp, arXiv 1710.09412)."""
    own = F.cross_entropy(scores, target, reduction="none")
    other = F.cross_entropy(scores, target[places], reduction="none")
    return (shares * own + (1 - shares) * other).mean()


def clean_loss(scores: Tensor, target: Tensor, shares: Tensor | None = None) -> Tensor:
    """Cross entropy of the pictures themselves; with shares, the official RegMixUp's, which weights it by them."""
    losses = F.cross_entropy(scores, target, reduction="none")
    return losses.mean() if shares is None else (shares * losses).mean()
