"""Scores that need no mask training: random, weight magnitude, activation energy, and one-shot second order.

All of them are ranked by ``harden`` like learned logits. Saliencies estimate the damage of losing a unit, so under a
budget in parameters or FLOPs they can be divided by the unit's price (damage per parameter, the greedy knapsack rule).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safelight.masking.bank import MaskBank
from safelight.masking.units import Price, UnitSpec


def random_scores(specs: Sequence[UnitSpec], seed: int) -> dict[str, Tensor]:
    """Uniform scores in [0, 1): the control every method must beat."""
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.rand(spec.n_units, generator=generator) for spec in specs}


@torch.no_grad()
def magnitude_scores(denoiser: nn.Module, specs: Sequence[UnitSpec]) -> dict[str, Tensor]:
    """Root mean square of the weights a unit owns: its producing rows and its consuming columns.

    The mean over weights makes heads, neurons and modulation outputs comparable under one budget.

    Returns:
        Name to ``(n_units,)`` fp32 scores on the CPU.
    """
    scores = {}
    for spec in specs:
        squares, count = torch.zeros(spec.n_units), 0
        for site in (*spec.producers, *spec.sites):
            weight: Any = denoiser.get_submodule(site.module).weight
            weight = weight if site.side == "out" else weight.T
            own = weight[site.start : site.start + spec.n_units * spec.group].float().square()
            squares += own.reshape(spec.n_units, -1).sum(1).cpu()
            count += own.numel() // spec.n_units
        scores[spec.name] = (squares / count).sqrt()
    return scores


@torch.no_grad()
def activation_scores(
    denoiser: nn.Module, specs: Sequence[UnitSpec], run: Callable[[], Any], price: Price | None = None
) -> dict[str, Tensor]:
    """Energy a unit sends into its layer's output: ``sum_j E[x_j^2] * ||W_:j||^2`` over its features (Wanda's product).

    For modulation it is the energy of the output itself.

    Args:
        denoiser: dense model without an attached bank.
        specs: layers to score.
        run: calls the denoiser on calibration inputs.
        price: divide by this price of a unit.

    Returns:
        Name to ``(n_units,)`` fp32 scores on the CPU.
    """
    energy: dict[tuple[str, str], Tensor] = {}
    rows: dict[tuple[str, str], int] = {}

    def add(key: tuple[str, str], x: Tensor) -> None:
        flat = x.detach().float().flatten(0, -2)
        energy[key] = energy.get(key, 0) + flat.square().sum(0).cpu()
        rows[key] = rows.get(key, 0) + len(flat)

    handles = []
    for path, side in {(site.module, site.side) for spec in specs for site in spec.sites}:
        linear: Any = denoiser.get_submodule(path)
        if side == "in":
            handles.append(linear.register_forward_pre_hook(lambda m, args, k=(path, side): add(k, args[0])))
        else:
            handles.append(linear.register_forward_hook(lambda m, args, out, k=(path, side): add(k, out)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    scores = {}
    for spec in specs:
        score = torch.zeros(spec.n_units)
        for site in spec.sites:
            features = slice(site.start, site.start + spec.n_units * spec.group)
            key = (site.module, site.side)
            own = energy[key][features] / rows[key]
            if site.side == "in":
                weight: Any = denoiser.get_submodule(site.module).weight
                own = own * weight[:, features].float().square().sum(0).cpu()
            score += own.reshape(spec.n_units, spec.group).sum(1)
        scores[spec.name] = score
    return _per_price(scores, specs, price)


def second_order_scores(
    bank: MaskBank, rollout: Callable[[int], Tensor], draws: int, seed: int = 0, price: Price | None = None
) -> dict[str, Tensor]:
    """One-shot curvature of the final-latent error with respect to each gate, at the dense model.

    The error ``mean((F(gates) - F(1))^2)`` has zero gradient at ones, and half its Gauss-Newton diagonal is
    ``sum_k (dF_k / dgate_j)^2 / numel``: the predicted error of losing unit j alone. It is estimated without bias by
    ``E_v[(v . dF/dgate_j)^2] / numel`` with standard normal ``v``.

    Args:
        bank: attached to the denoiser that ``rollout`` uses; it is left dense.
        rollout: ``rollout(k)`` returns the final latents of calibration batch k with a graph to the bank's gates.
        draws: how many times ``rollout`` is called, k = 0 .. draws - 1.
        seed: of the probe vectors.
        price: divide by this price of a unit.

    Returns:
        Name to ``(n_units,)`` fp32 scores on the CPU.
    """
    specs = list(bank.specs.values())
    generator = torch.Generator().manual_seed(seed)
    scores = {spec.name: torch.zeros(spec.n_units) for spec in specs}
    gates = {name: torch.ones_like(p, requires_grad=True) for name, p in bank.named_logits().items()}
    bank.set_gates(gates)
    try:
        for k in range(draws):
            with torch.enable_grad():
                latent = rollout(k)
            probe = torch.randn(latent.shape, generator=generator).to(latent) / latent.numel() ** 0.5
            found = torch.autograd.grad(latent, list(gates.values()), probe, allow_unused=True)
            for name, gradient in zip(gates, found, strict=True):
                if gradient is not None:
                    scores[name] += gradient.float().square().cpu() / draws
    finally:
        bank.set_gates(None)
    return _per_price(scores, specs, price)


def _per_price(scores: dict[str, Tensor], specs: Sequence[UnitSpec], price: Price | None) -> dict[str, Tensor]:
    if price is None:
        return scores
    return {spec.name: scores[spec.name] / max(spec.price(price), 1) for spec in specs}
