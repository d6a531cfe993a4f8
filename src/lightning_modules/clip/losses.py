"""The contrastive objective of CLIP."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric cross-entropy over cosine similarities (arXiv 2103.00020, figure 3).

    Args:
        image: image embeddings, (B, D); row i belongs to row i of ``text``.
        text: text embeddings, (B, D).
        logit_scale: multiplier of the cosines, scalar.

    Returns:
        Mean of the image-to-text and the text-to-image loss.
    """
    logits = logit_scale * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
