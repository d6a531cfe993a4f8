"""Values per unit as values per feature, on a layer layout small enough to write down."""

from __future__ import annotations

import torch

from safelight.masking.features import spread, unit_numbers
from safelight.masking.units import Site, UnitSpec


def spec(name: str, n_units: int, group: int, *sites: Site) -> UnitSpec:
    return UnitSpec(name, "head", n_units, group, sites, (), 1, 1)


# Two streams of an attention, a Linear that reads [one free feature | heads | neurons], and an output.
SPECS = [
    spec("heads", 2, 3, Site("out", "in", 1), Site("text", "in")),
    spec("neurons", 2, 1, Site("out", "in", 7)),
    spec("norm", 2, 1, Site("norm", "out")),
]
WIDTHS = {("out", "in"): 10, ("text", "in"): 6, ("norm", "out"): 2}


def test_gates_stand_over_the_features_of_their_units() -> None:
    heads = torch.tensor([0.25, 0.5], requires_grad=True)
    found = spread({"neurons": torch.tensor([0.0, 0.75]), "heads": heads}, SPECS, WIDTHS)
    assert {key: value.tolist() for key, value in found.items()} == {
        ("out", "in"): [1, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0, 0.75, 1],
        ("text", "in"): [0.25, 0.25, 0.25, 0.5, 0.5, 0.5],
    }
    weights = torch.arange(10.0)
    (found["out", "in"] * weights).sum().backward()
    assert heads.grad is not None
    assert heads.grad.tolist() == [1 + 2 + 3, 4 + 5 + 6]


def test_masks_stay_masks_and_unlisted_linears_are_passed_over() -> None:
    found = spread(
        {"norm": torch.tensor([True, False]), "heads": torch.tensor([False, True])}, SPECS, {("out", "in"): 10}
    )
    assert list(found) == [("out", "in")]
    assert found["out", "in"].dtype == torch.bool
    assert found["out", "in"].int().tolist() == [1, 0, 0, 0, 1, 1, 1, 1, 1, 1]


def test_features_of_one_unit_have_one_number() -> None:
    numbers = unit_numbers(SPECS, WIDTHS)
    assert numbers["out", "in"].tolist() == [0, 1, 1, 1, 4, 4, 4, 7, 8, 9]
    assert numbers["text", "in"].tolist() == [0, 0, 0, 3, 3, 3]
    assert numbers["norm", "out"].tolist() == [0, 1]
