"""The Diffusion-DPO loss on squared errors, and the guard that keeps it from spoiling what it prefers.

Errors are means over a sample's elements in fp32 or better. Nothing here knows a network: the same formulas serve noise
prediction (the paper's U-Nets) and velocities (FLUX and SD3; ours, the paper has U-Nets only).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LossType = Literal["sigmoid", "hinge", "ipo"]


class PairErrors(NamedTuple):
    """Squared errors of one network on both pictures of each pair.

    Attributes:
        winner: mean squared error on the preferred, safe picture, (B,).
        loser: the same on the unsafe picture, (B,).
    """

    winner: Tensor
    loser: Tensor


def squared_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each row, (B,); the authors' code has it in half precision before it is multiplied by beta.

    Args:
        prediction: (B, ...).
        target: like ``prediction``.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(dim=1)


def implicit_rewards(policy: PairErrors, reference: PairErrors, beta: float) -> PairErrors:
    """Rewards that the network implies for both pictures: ``-(beta / 2) * (error - reference error)``, (B,) each."""
    scale = -beta / 2
    return PairErrors(scale * (policy.winner - reference.winner), scale * (policy.loser - reference.loser))


def reward_margin(policy: PairErrors, reference: PairErrors, beta: float) -> Tensor:
    """By how much the winner's implicit reward exceeds the loser's, (B,): the logit ``h`` of the loss.

    ``h = -(beta / 2) * [(l(w) - l(l)) - (l_ref(w) - l_ref(l))]`` (Diffusion-DPO, arXiv 2311.12908, eq. 14, with omega
    and T in beta). diffusers' SD example has no half: its ``beta_dpo`` of 2500 is 5000 here.
    """
    rewards = implicit_rewards(policy, reference, beta)
    return rewards.winner - rewards.loser


def preference_loss(margin: Tensor, kind: LossType = "sigmoid", beta: float = 1.0) -> Tensor:
    """Loss of each pair, (B,).

    Args:
        margin: from :func:`reward_margin`.
        kind: ``sigmoid``: ``-log sigmoid(h)`` (DPO). ``hinge``: ``relu(1 - h)`` (arXiv 2305.10425). ``ipo``: squared
            distance of the difference of errors ``2 h / beta`` from ``1 / beta`` (arXiv 2310.12036).
        beta: only ``ipo`` needs it, to take it out of the margin.
    """
    if kind == "sigmoid":
        return -F.logsigmoid(margin)
    if kind == "hinge":
        return F.relu(1 - margin)
    return ((2 * margin - 1) / beta).square()


def implicit_accuracy(margin: Tensor) -> Tensor:
    """Share of pairs with a positive margin; a tie counts one half (0 in the authors' code, so it starts at 0)."""
    return ((margin > 0).double() + 0.5 * (margin == 0).double()).mean().to(margin.dtype)


def guard_factor(winner_residual: Tensor, loser_residual: Tensor, mu: float) -> Tensor:
    """How much of the loser's gradient may stay so that a small step does not raise the winner's error, (B,).

    With residuals ``g = prediction - target`` as gradients of the errors by the predictions (Diffusion-SDPO, arXiv
    2511.03317): ``clip((1 - mu) * |g_w|^2 / <g_l, g_w>, 0, 1)`` where the two agree, else 1.

    Args:
        winner_residual: (B, ...).
        loser_residual: like ``winner_residual``.
        mu: share of the winner's own progress that must be left; authors: .9 for SD1.5, .6 for SDXL.
    """
    winner, loser = winner_residual.detach().flatten(1), loser_residual.detach().flatten(1)
    wide = torch.promote_types(winner.dtype, torch.float32)
    winner, loser = winner.to(wide), loser.to(wide)
    agreement = (winner * loser).sum(dim=1)
    bound = (1 - mu) * winner.square().sum(dim=1) / agreement.clamp_min(torch.finfo(wide).tiny)
    return torch.where(agreement > 0, bound.clamp(0, 1), torch.ones_like(agreement))


def preservation_loss(residual: Tensor, reference: Tensor, beta: float) -> Tensor:
    """How far a network's predictions have moved on rows that are none of its business, (B,); ours.

    ``(beta / 2) * |prediction - reference prediction|^2``: the tie to the reference that the margin's ``beta`` weighs,
    which DPO itself holds only where its preferences are.

    Args:
        residual: prediction less target, (B, ...).
        reference: the same of the network without adapters.
        beta: of :func:`reward_margin`.
    """
    return beta / 2 * squared_errors(residual, reference.detach())


def scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """``value`` unchanged, its gradient multiplied by ``factor``."""
    return value.detach() + factor * (value - value.detach())
