"""Helpers of the masking tests: hard masks that hold every awkward case."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from safelight.masking.units import UnitSpec


def awkward_masks(specs: list[UnitSpec], shift: int) -> dict[str, Tensor]:
    """Per kind, layers in turn keep none, one, some and all of their units; ``shift`` moves the turn."""
    generator = torch.Generator().manual_seed(shift)
    masks, turn = {}, dict.fromkeys(("head", "neuron", "modulation"), shift)
    for spec in specs:
        case, turn[spec.kind] = turn[spec.kind] % 4, turn[spec.kind] + 1
        mask = torch.rand(spec.n_units, generator=generator) > 0.4
        if case < 2:
            mask[:] = False
        if case == 1:
            mask[spec.n_units // 2] = True
        masks[spec.name] = mask | (case == 3)
    return masks


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture
def helpers() -> type:
    class Helpers:
        awkward = staticmethod(awkward_masks)
        parameters = staticmethod(count_parameters)

    return Helpers
