"""EcoDiff's objective: the masked sampler shall end where the dense one ended, with fewer units (arXiv 2412.02852).

``L(logits) = E ||F(z_T, y) - F_gates(z_T, y)||^2 + beta * R(logits)``, the whole sampling loop F inside the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from safelight.generators import Conditioning, Generator
from safelight.masking import MaskBank

GradMode = Literal["checkpoint", "manual", "full"]
Distance = Literal["l2", "l1"]


def distance(latent: Tensor, target: Tensor, kind: Distance = "l2") -> Tensor:
    """Element-wise mean of the squared (``l2``, the paper's) or absolute (``l1``) difference, in fp32 or better."""
    if latent.dtype in (torch.float16, torch.bfloat16):
        latent = latent.float()
    return F.mse_loss(latent, target.to(latent)) if kind == "l2" else F.l1_loss(latent, target.to(latent))


def final_latent_loss(
    generator: Generator,
    bank: MaskBank,
    noise: Tensor,
    cond: Conditioning,
    target: Tensor,
    grad_mode: GradMode = "checkpoint",
    kind: Distance = "l2",
) -> Tensor:
    """Distance of the masked model's final latent from the dense model's.

    The gates in force in ``bank`` must have been sampled before: every step, recomputed ones included, replays them.

    Args:
        generator: whose denoiser ``bank`` is attached to.
        bank: gates with a graph to the logits.
        noise: initial latents, (B, ...).
        cond: conditioning with B rows.
        target: dense final latents, like ``noise``.
        grad_mode: ``checkpoint`` keeps T latents and the activations of one step and recomputes (3T - 1 forward
            equivalents a sample); ``manual`` does the same with explicit vector-Jacobian products; ``full`` keeps all
            activations (2T). All three give the same gradient.
        kind: see :func:`distance`.

    Returns:
        Scalar with a graph to the logits.
    """
    if grad_mode == "manual":
        return _manual(generator, bank, noise, cond, lambda latent: distance(latent, target, kind))
    latent = generator.rollout(noise, cond, checkpoint="step" if grad_mode == "checkpoint" else "none")
    return distance(latent, target, kind)


def _manual(
    generator: Generator, bank: MaskBank, noise: Tensor, cond: Conditioning, loss_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Time-step checkpointing by hand: one no-grad pass, then one VJP per step, last step first."""
    gates = dict(bank.current)
    leaves = {name: gate.detach().requires_grad_() for name, gate in gates.items()}
    bank.set_gates(leaves)
    with torch.no_grad():
        latents = generator.rollout(noise, cond, trajectory=True)
    final = latents[-1].detach().requires_grad_()
    with torch.enable_grad():
        loss = loss_of(final)
    (cotangent,) = torch.autograd.grad(loss, final)
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for i in reversed(range(len(latents) - 1)):
        bank.set_gates(leaves)
        z = latents[i].detach().requires_grad_()
        with torch.enable_grad():
            following = generator.step(z, i, cond)
        # One call for both: a second one would run the backward pass of the step again.
        found = torch.autograd.grad(following, [z, *leaves.values()], cotangent, allow_unused=True)
        cotangent = found[0]
        for name, gradient in zip(leaves, found[1:], strict=True):
            if gradient is not None:
                total[name] += gradient
    bank.set_gates(gates)
    # A scalar of the loss's value whose gradient with respect to the gates is what was accumulated, so that automatic
    # optimisation, gradient synchronisation and clipping work as for the other modes.
    pull = torch.stack([(total[name] * gate).sum() for name, gate in gates.items()]).sum()
    return loss.detach() + pull - pull.detach()


def per_step_loss(
    generator: Generator, bank: MaskBank, noise: Tensor, cond: Conditioning, kind: Distance = "l2"
) -> Tensor:
    """The ablation's objective: masked and dense prediction compared at each step of the dense trajectory.

    Args:
        generator: whose denoiser ``bank`` is attached to.
        bank: gates with a graph to the logits.
        noise: initial latents, (B, ...).
        cond: conditioning with B rows.
        kind: see :func:`distance`.

    Returns:
        Mean over the steps, with a graph to the logits.
    """
    gates = dict(bank.current)
    bank.set_gates(None)
    with torch.no_grad():
        latents = generator.rollout(noise, cond, trajectory=True)
        targets = [generator.predict(z, i, cond) for i, z in enumerate(latents[:-1])]
    bank.set_gates(gates)
    losses = []
    for i, (z, target) in enumerate(zip(latents[:-1], targets, strict=True)):
        prediction = checkpoint(generator.predict, z, i, cond, use_reentrant=False, preserve_rng_state=False)
        losses.append(distance(prediction, target, kind))
    return torch.stack(losses).mean()


class SparsityTarget(nn.Module):
    """Augmented Lagrangian that brings the expected kept fraction to a wanted one.

    ``penalty = l1 * c + strength / 2 * c^2`` with ``c = kept - target``, and after every optimisation step
    ``l1 += rate * strength * c``. The target moves from where training starts to its end value during the first part of
    training, so that units leave one after another and the reconstruction decides which.

    The multiplier is slow on purpose. Adam moves a logit by its learning rate whatever the size of the gradient, so a
    fast multiplier goes on growing while the logits are still on their way, and the kept fraction swings past its
    target and back for longer than a run lasts.

    Args:
        keep: wanted kept fraction, in (0, 1].
        strength: weight of the quadratic term, in units of the loss.
        anneal: share of training during which the target moves.
        start: kept fraction that the target starts from: that of the untrained gates.
        rate: rate of the multiplier against ``strength``.
    """

    multiplier: Tensor

    def __init__(
        self, keep: float, strength: float = 1.0, anneal: float = 0.5, start: float = 1.0, rate: float = 0.02
    ) -> None:
        super().__init__()
        self.keep, self.strength, self.anneal, self.start, self.rate = keep, strength, anneal, start, rate
        self.register_buffer("multiplier", torch.zeros(()))

    def target(self, progress: float, start: float | None = None) -> float:
        """Wanted kept fraction when ``progress`` (0 to 1) of training is done, on the way from ``start``."""
        start = self.start if start is None else start
        share = min(progress / self.anneal, 1.0) if self.anneal > 0 else 1.0
        return start + (self.keep - start) * share

    def penalty(self, kept: Tensor, progress: float) -> Tensor:
        """Term of the loss; ``kept`` carries the graph to the logits."""
        excess = kept - self.target(progress)
        return self.multiplier * excess + 0.5 * self.strength * excess.square()

    @torch.no_grad()
    def update(self, kept: Tensor, progress: float) -> None:
        """Gradient ascent on the multiplier, once per optimisation step."""
        self.multiplier += self.rate * self.strength * (kept - self.target(progress))
