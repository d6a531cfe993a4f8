"""What the head does to the space of prompts: the same texts before and after, in two directions, and a number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.lightning_modules.latent_guard.features import FeatureStore
from safelight.lightning_modules.latent_guard.head import EmbeddingMappingLayer


@dataclass(frozen=True)
class Space:
    """Prompts in one space.

    Attributes:
        unsafe: (N, 2), in the two principal directions.
        safe: (N, 2).
        linear_accuracy: share of prompts that a linear classifier of the other half tells apart.
    """

    unsafe: Tensor
    safe: Tensor
    linear_accuracy: float


def space(unsafe: Tensor, safe: Tensor) -> Space:
    """Look at vectors of unsafe and safe prompts, (N, D) each, pairs in the same order."""
    values = F.normalize(torch.cat([unsafe, safe]).double().cpu(), dim=-1)
    values = values - values.mean(0)
    directions = torch.linalg.svd(values, full_matrices=False)[2][:2]
    plane = values @ directions.T
    return Space(plane[: len(unsafe)], plane[len(unsafe) :], linear_accuracy(values))


def linear_accuracy(values: Tensor, ridge: float = 1e-2) -> float:
    """Two-fold accuracy of regularised least squares on +1 and -1.

    Args:
        values: (2 N, D), unsafe ones first; pairs stay on the same side.
        ridge: added to the diagonal of the covariance, relative to its mean.
    """
    count = len(values) // 2
    label = torch.cat([torch.ones(count), -torch.ones(count)]).to(values)
    fold = torch.arange(count).repeat(2) % 2
    right = 0
    for side in (0, 1):
        train, test = fold != side, fold == side
        inputs = torch.cat([values, values.new_ones(len(values), 1)], 1)
        gram = inputs[train].T @ inputs[train]
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
        weights = torch.linalg.solve(gram, inputs[train].T @ label[train])
        right += int(((inputs[test] @ weights > 0) == (label[test] > 0)).sum())
    return right / len(values)


@torch.no_grad()
def before_and_after(
    head: EmbeddingMappingLayer,
    store: FeatureStore,
    unsafe: Sequence[str],
    safe: Sequence[str],
    concepts: Sequence[str],
) -> tuple[Space, Space]:
    """Pooled features of prompts, and their latents under the concept that each matches best (paper's t-SNE)."""
    device, dtype = head.tempr.device, head.tempr.dtype
    bank = head.concepts(store.pooled(concepts, device).to(dtype))
    latents = []
    for texts in (unsafe, safe):
        features = store(texts, device)
        tokens = features.tokens.to(dtype)
        best = head(tokens, bank, features.mask).argmax(1)
        latents.append(head.latents(tokens, bank.rows(best.tolist()), features.mask))
    return space(store.pooled(unsafe), store.pooled(safe)), space(*latents)
