"""The contrastive loss over score matrices (arXiv 2404.08031, section 3.3, and the authors' ``main.py``)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Literal["repo", "supcon"]


def concept_loss(unsafe: Tensor, safe: Tensor | None, margin: float = 0.0, ignore: Tensor | None = None) -> Tensor:
    """``L_t``: each concept has to find its own unsafe prompt among all prompts; the loss of the paper.

    ``-1/n sum_j log( exp U_jj / (sum_i exp U_ij + sum_k exp S_kj) )``

    Args:
        unsafe: (n, n) scores U of unsafe prompts (rows) with concepts (columns).
        safe: (m, n) scores S of safe prompts; None trains without (the paper's ablation).
        margin: added to the safe scores (authors: 0).
        ignore: (n, n), True where an unsafe prompt of another concept counts for nothing.

    Returns:
        The mean over concepts.
    """
    unsafe = _without(unsafe, ignore)
    columns = unsafe if safe is None else torch.cat([unsafe, safe + margin])
    return F.cross_entropy(columns.T, torch.arange(unsafe.shape[1], device=unsafe.device))


def prompt_loss(unsafe: Tensor, safe: Tensor | None, ignore: Tensor | None = None) -> Tensor:
    """``L_i``: each unsafe prompt's own concept against other concepts and the best match of every safe prompt.

    ``-1/n sum_i log( exp U_ii / (sum_j exp U_ij + sum_k exp max_j S_kj) )``; in the authors' code, not in the paper. It
    trains what is asked at inference: the largest score of a safe prompt must stay below an unsafe prompt's own.
    """
    rows = _without(unsafe, ignore)
    if safe is not None:
        rows = torch.cat([rows, safe.amax(1).expand(len(unsafe), -1)], 1)
    return F.cross_entropy(rows, torch.arange(len(unsafe), device=unsafe.device))


def guard_loss(
    unsafe: Tensor, safe: Tensor | None, kind: Loss = "repo", margin: float = 0.0, ignore: Tensor | None = None
) -> Tensor:
    """``L_i + L_t`` as in the authors' code (``repo``), or ``L_t`` alone as in the paper (``supcon``)."""
    loss = concept_loss(unsafe, safe, margin, ignore)
    return loss if kind == "supcon" else loss + prompt_loss(unsafe, safe, ignore)


def _without(unsafe: Tensor, ignore: Tensor | None) -> Tensor:
    return unsafe if ignore is None else unsafe.masked_fill(ignore, float("-inf"))
