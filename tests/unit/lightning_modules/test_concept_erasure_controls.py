"""Masks of the controls: as many units off in every layer as ours, at random places or where the concept is loudest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ecodiff_toys import bare_generator

from safelight.errors import SafelightError
from safelight.lightning_modules.concept_erasure import controls
from safelight.lightning_modules.concept_erasure.controls import folded, shuffled, wanda_masks
from safelight.lightning_modules.concept_erasure.evaluation import COLUMNS, ROLES, Measured, mean_of, summarise
from safelight.masking import find_units

OURS = {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([False, True, True])}


def test_random_masks_keep_the_counts_and_change_the_places() -> None:
    draws = [shuffled(OURS, seed=0, draw=draw) for draw in range(20)]
    assert all(int((~mask[name]).sum()) == int((~OURS[name]).sum()) for mask in draws for name in OURS)
    assert len({str(mask["a"].tolist()) for mask in draws}) > 3
    assert all(torch.equal(shuffled(OURS, 0, 3)[name], draws[3][name]) for name in OURS)


def test_wanda_takes_what_is_louder_for_the_concept_than_for_its_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    energies = iter(
        [
            {"a": torch.tensor([9.0, 5.0, 1.0, 4.0]), "b": torch.tensor([1.0, 2.0, 3.0])},  # the concept's prompts
            {"a": torch.tensor([9.0, 1.0, 1.0, 1.0]), "b": torch.tensor([0.0, 2.0, 3.0])},  # the anchors'
        ]
    )
    monkeypatch.setattr(controls, "activation_scores", lambda denoiser, specs, run: next(energies))
    calibration: Any = SimpleNamespace(
        generator=SimpleNamespace(denoiser=None), bank=SimpleNamespace(specs={}), chunks=lambda erase_only: []
    )
    found = wanda_masks(calibration, OURS)
    assert found["a"].tolist() == [True, False, True, False]  # not the loudest unit, which is as loud for both
    assert found["b"].tolist() == [False, True, True]


def test_folding_leaves_the_original_alone() -> None:
    generator = bare_generator("flux", 2)
    specs = find_units(generator.denoiser, ["neuron"], "ff$")
    before = {key: value.clone() for key, value in generator.denoiser.state_dict().items()}
    erased = folded(generator, {spec.name: torch.arange(spec.n_units) > 0 for spec in specs})
    after = generator.denoiser.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    column = erased.denoiser.get_submodule(specs[0].sites[0].module).weight[:, 0]
    assert not column.any()


def rows(**values: list[float]) -> torch.Tensor:
    table = torch.zeros(len(values["role"]), len(COLUMNS))
    for name, column in values.items():
        table[:, COLUMNS.index(name)] = torch.tensor(column)
    return table


def test_metrics_are_means_over_their_role() -> None:
    target, near, other = (float(ROLES.index(role)) for role in ("target", "neighbour", "retain"))
    table = rows(
        role=[target, target, near, other, other],
        found=[1, 0, 1, 1, 1],
        as_anchor=[0, 1, 0, 0, 0],
        recognised=[1, 0, 0, 1, 0],
        erase_mse=[2, 4, 9, 9, 9],
        retain_mse=[9, 9, 1, 2, 3],
        ssim=[0, 0, 0.3, 0.6, 0.9],
    )
    found = summarise(table, looked=True)
    assert (found["target_rate"], found["anchor_rate"]) == (0.5, 0.5)
    assert (found["neighbour_accuracy"], found["retain_accuracy"]) == (0.0, 0.5)
    assert (found["erase_mse"], found["retain_mse"]) == (3.0, 2.0)
    assert found["ssim"] == pytest.approx(0.6)
    assert set(summarise(table, looked=False)) == {"erase_mse", "retain_mse"}
    with pytest.raises(SafelightError, match="no sample has the role 'neighbour'"):
        summarise(table[[0, 1, 3]], looked=True)


def test_several_draws_are_averaged() -> None:
    found = mean_of([Measured({"x": 1.0}), Measured({"x": 4.0})])
    assert found.metrics == {"x": 2.5}
