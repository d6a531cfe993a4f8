"""Masks of the controls: as many units off in every layer as ours, at random places or where the concept is loudest."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from ecodiff_toys import bare_generator

from safelight.errors import SafelightError
from safelight.generators import Generator, generator_for
from safelight.lightning_modules import ConceptErasure
from safelight.lightning_modules.concept_erasure import controls
from safelight.lightning_modules.concept_erasure.controls import folded, shuffled, wanda_masks
from safelight.lightning_modules.concept_erasure.evaluation import (
    COLUMNS,
    ROLES,
    Inspector,
    Measured,
    TestBatch,
    mean_of,
    measure,
    summarise,
)
from safelight.masking import find_units
from safelight.metrics import ClipJudge, FeatureDistance, load_detector
from safelight.testing.pipelines import build_pipeline

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
        floor=[0, 0, 1, 1, 1],
        as_anchor=[0, 1, 0, 0, 0],
        recognised=[1, 0, 0, 1, 0],
        erase_mse=[2, 4, 9, 9, 9],
        retain_mse=[9, 9, 1, 2, 3],
        ssim=[0, 0, 0.3, 0.6, 0.9],
        perceptual=[9, 9, 0.1, 0.2, 0.6],
    )
    found = summarise(table, looked=True)
    assert (found["target_rate"], found["anchor_rate"], found["target_rate_floor"]) == (0.5, 0.5, 0.0)
    assert (found["neighbour_accuracy"], found["retain_accuracy"]) == (0.0, 0.5)
    assert (found["erase_mse"], found["retain_mse"]) == (3.0, 2.0)
    assert found["ssim"] == pytest.approx(0.6)
    assert found["perceptual"] == pytest.approx(0.3)
    assert set(summarise(table, looked=False)) == {"erase_mse", "retain_mse"}
    with pytest.raises(SafelightError, match="no sample has the role 'neighbour'"):
        summarise(table[[0, 1, 3]], looked=True)


def samples(generator: Generator, count: int = 8) -> TestBatch:
    """One target, the others half neighbours, half things to retain."""
    prompts = ["a pistol", *(f"a {word}" for word in ("dagger", "axe", "bomb", "cat", "dog", "owl", "bee"))][:count]
    words = [prompt.removeprefix("a ") for prompt in prompts]
    noise, cond = generator.noise(range(count)), generator.encode(prompts)
    with torch.no_grad():
        dense = generator.rollout(noise, cond)
    roles = torch.tensor([0, *([1] * 3), *([2] * (count - 4))])
    return TestBatch(
        prompts, prompts, roles, words, words, torch.arange(count), noise, cond, dense, dense, generator.decode(dense)
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["kid", "fid", "cmmd"])
@pytest.mark.filterwarnings("ignore:FID from")
def test_pictures_that_should_not_change_are_compared_one_by_one_and_as_a_set(kind: Any) -> None:
    pipeline = build_pipeline("flux")
    generator = generator_for(pipeline.transformer)(pipeline, num_inference_steps=2, height=16, width=16)
    judge = ClipJudge()
    labels = ["pistol", "dagger", "axe", "bomb", "cat", "dog", "owl", "bee"]
    detector = load_detector("zoo:tiny_clip", labels, torch.device("cpu"))
    inspector = Inspector(detector, judge, labels, style=False, distance=kind)
    batch = samples(generator)
    same = measure(generator, [batch], inspector).metrics
    assert same["perceptual"] == pytest.approx(0, abs=1e-5)
    assert same["ssim"] == pytest.approx(1, abs=1e-4)
    # In two batches, one of targets alone.
    changed = generator.with_denoiser(copy.deepcopy(generator.denoiser))
    with torch.no_grad():
        for value in changed.denoiser.parameters():
            value.mul_(1.3)
    found = measure(changed, [batch], inspector)
    assert found.metrics["perceptual"] > 1e-3 > same["perceptual"]
    others = batch.roles > 0
    assert batch.pictures is not None
    distance, pictures = FeatureDistance(judge, kind), changed.decode(changed.rollout(batch.noise, batch.cond))
    distance.update(batch.pictures[others], real=True)
    distance.update(pictures[others].detach(), real=False)
    assert found.metrics[kind] == pytest.approx(float(distance.compute()), rel=1e-4)
    assert found.metrics[kind] > same[kind]


def test_the_floor_is_what_the_detector_finds_in_the_anchors_pictures() -> None:
    pipeline = build_pipeline("flux")
    generator = generator_for(pipeline.transformer)(pipeline, num_inference_steps=2, height=16, width=16)
    inspector = Inspector(
        load_detector("zoo:tiny_clip", ["cat", "dog"], torch.device("cpu")), ClipJudge(), ["x"], False
    )
    batch = samples(generator)
    batch.anchored = generator.rollout(generator.noise(range(20, 28)), batch.cond).detach()
    bright = generator.decode(batch.anchored).mean(dim=(1, 2, 3)) > generator.decode(batch.anchored).mean()
    # Bright pictures show the concept.
    inspector.find = lambda pictures, *_: (  # type: ignore[method-assign]
        (pictures.mean(dim=(1, 2, 3)) > generator.decode(batch.anchored).mean()).float(),
        torch.zeros(len(pictures)),
    )
    inspector.recognise = lambda pictures, words: torch.zeros(len(pictures))  # type: ignore[method-assign]
    assert 0 < bright.sum() < 8
    batch.roles = torch.where(torch.arange(8) < 6, 0, torch.tensor([0] * 6 + [1, 2]))
    found = measure(generator, [batch], inspector).metrics
    assert found["target_rate_floor"] == pytest.approx(float(bright[:6].float().mean()))
    drawn = generator.decode(batch.dense).mean(dim=(1, 2, 3)) > generator.decode(batch.anchored).mean()
    assert found["target_rate"] == pytest.approx(float(drawn[:6].float().mean()))
    assert found["target_rate"] != found["target_rate_floor"], "or the test shows nothing"


def test_only_the_chosen_controls_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(controls, "finetuned", lambda module, calibration, kind: ran.append(kind))
    monkeypatch.setattr(controls, "wanda_masks", lambda calibration, masks: ran.append("wanda"))
    module: Any = SimpleNamespace(
        generator=None, masks=lambda: OURS, plain_masks=lambda: OURS, calibration=lambda: None,
        hparams=SimpleNamespace(random_masks=2, seed=0), control_names=("random", "ca"),
    )  # fmt: skip
    assert [name for name, _, _ in controls.erasing_models(module)] == ["dense", "", "random", "random", "ca"]
    assert ran == ["ca"]
    for name in get_args(controls.Control):
        module.control_names = (name,)
        assert {found for found, _, _ in controls.erasing_models(module)} == {"dense", "", name}
    assert ConceptErasure.control_names == get_args(controls.Control)
    module.control_names = get_args(controls.Control)
    assert [name for name, _, _ in controls.erasing_models(module)][2:] == [
        "plain", "random", "random", "wanda", "esd", "ca",
    ]  # fmt: skip
    given = ConceptErasure(backbone=bare_generator("flux", 2), controls=["ca", "random"], minimality="none")
    assert given.control_names == ("random", "ca")


def test_several_draws_are_averaged() -> None:
    found = mean_of([Measured({"x": 1.0}), Measured({"x": 4.0})])
    assert found.metrics == {"x": 2.5}
