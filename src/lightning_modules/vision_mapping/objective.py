"""What the map is trained on: answers, each counting alike however long (arXiv 2506.11976, authors' code)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def answer_losses(logits: Tensor, ids: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the answers of each row: mean over a turn's tokens, then over turns.

    ``L_b = 1/A_b sum_a mean_{t in a} CE(logits_{t-1}, token_t)``.

    Args:
        logits: (B, n, V), of the last n positions.
        ids: (B, T).
        turns: (B, T), number of the answer from 1, 0 for what is no answer.

    Returns:
        (B,), nats a token, 0 for rows without an answer; and (B,), which rows have one.
    """
    logits, wanted, turns = _aligned(logits, ids, turns)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none").view_as(wanted)
    member = F.one_hot(turns, int(turns.max()) + 1)[..., 1:].to(losses.dtype)
    tokens = member.sum(1)
    means = (losses[..., None] * member).sum(1) / tokens.clamp(min=1)
    count = (tokens > 0).sum(1)
    return means.sum(1) / count.clamp(min=1), count > 0


def mean_loss(losses: Tensor, answered: Tensor) -> Tensor:
    """Mean over the rows that have an answer."""
    return (losses * answered).sum() / answered.sum().clamp(min=1)


@torch.no_grad()
def answered_exactly(logits: Tensor, ids: Tensor, turns: Tensor) -> Tensor:
    """(B,), whether every token of every answer is the likeliest one, closing tokens included.

    That is when greedy decoding would say the right answers, word for word, and stop. Arguments as for
    :func:`answer_losses`.
    """
    logits, wanted, turns = _aligned(logits, ids, turns)
    right = logits.argmax(-1) == wanted
    said = turns > 0
    return (right | ~said).all(1) & said.any(1)


def _aligned(logits: Tensor, ids: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions with what they predict: position t - 1 has the logits of token t."""
    first = ids.shape[1] - logits.shape[1] + 1
    return logits[:, :-1], ids[:, first:], turns[:, first:]
