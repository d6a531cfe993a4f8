from __future__ import annotations

import math

import pytest
import torch

from safelight.errors import SafelightError
from safelight.metrics import SSIM, ConceptAccuracy, LatentError, SampleMean, ShuffledAccuracy
from safelight.metrics.samples import distinct
from safelight.metrics.structure import structural_similarity


def test_distinct_sorts_drops_repeats_and_keeps_unknown() -> None:
    index = torch.tensor([4, 1, 4, -1, 0, -1])
    (kept,) = distinct(index, torch.arange(6))
    assert kept.tolist() == [4, 1, 0, 3, 5]


def test_latent_error_counts_a_repeated_sample_once() -> None:
    target = torch.zeros(4, 2, 3)
    prediction = torch.tensor([1.0, 2.0, 3.0, 10.0])[:, None, None].expand(4, 2, 3)
    metric = LatentError()
    metric.update(prediction, target, torch.tensor([0, 1, 2, 3]))
    # DDP padding sends the outlier twice more; without its index the median would move from 6.5 to 54.5.
    metric.update(prediction[3:].repeat(2, 1, 1), target[:2], torch.tensor([3, 3]))
    result = metric.compute()
    assert result["median"].item() == pytest.approx((4 + 9) / 2)
    assert result["mean"].item() == pytest.approx((1 + 4 + 9 + 100) / 4)
    assert result["q90"].item() == pytest.approx(9 + 0.7 * 91)


def test_latent_error_without_index_counts_every_row() -> None:
    metric = LatentError(quantiles=())
    metric.update(torch.ones(2, 5), torch.zeros(2, 5))
    metric.update(3 * torch.ones(1, 5), torch.zeros(1, 5))
    assert {k: v.item() for k, v in metric.compute().items()} == pytest.approx({"mean": 11 / 3, "median": 1.0})


def test_latent_error_in_half_precision_does_not_overflow() -> None:
    metric = LatentError()
    metric.update(torch.full((1, 4), 300.0).half(), torch.zeros(1, 4).half())
    assert metric.compute()["mean"].item() == 90_000


def test_latent_error_refuses_other_shapes_and_emptiness() -> None:
    with pytest.raises(SafelightError, match=r"\(2, 3\).*\(2, 4\)"):
        LatentError().update(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(SafelightError, match="one integer per sample"):
        LatentError().update(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([1]))
    with pytest.raises(SafelightError, match="never called"):
        LatentError().compute()
    with pytest.raises(SafelightError, match=r"\(0, 1\), got 1.5"):
        LatentError(quantiles=(1.5,))


def test_merging_two_ranks_equals_one_process() -> None:
    torch.manual_seed(0)
    prediction, target = torch.randn(5, 7), torch.randn(5, 7)
    whole = LatentError()
    whole.update(prediction, target, torch.arange(5))
    first, second = LatentError(), LatentError()
    first.update(prediction[[0, 2, 4]], target[[0, 2, 4]], torch.tensor([0, 2, 4]))
    second.update(prediction[[1, 3, 0]], target[[1, 3, 0]], torch.tensor([1, 3, 0]))
    # What Metric does when it gathers: states of kind "cat" are joined across ranks.
    first.index += second.index
    first.values += second.values
    for name, value in whole.compute().items():
        assert first.compute()[name].item() == pytest.approx(value.item(), abs=1e-7)


def test_ssim_is_one_for_identical_pictures_and_falls_as_computed_by_hand() -> None:
    flat = torch.full((1, 3, 16, 16), 0.4)
    metric = SSIM()
    metric.update(flat, flat, torch.tensor([0]))
    assert metric.compute().item() == pytest.approx(1.0, abs=1e-6)
    # Two flat pictures differ in brightness only: SSIM = (2ab + C1) / (a² + b² + C1) with C1 = 0.01².
    metric.reset()
    metric.update(flat, torch.full_like(flat, 0.8), torch.tensor([0]))
    assert metric.compute().item() == pytest.approx((2 * 0.32 + 1e-4) / (0.16 + 0.64 + 1e-4), abs=1e-4)


def test_ssim_of_an_inverted_picture_is_negative_and_repeats_do_not_count() -> None:
    torch.manual_seed(0)
    picture = (torch.rand(1, 3, 24, 24) > 0.5).float()
    metric = SSIM()
    metric.update(picture, picture, torch.tensor([7]))
    metric.update(picture, 1 - picture, torch.tensor([8]))
    two = metric.compute().item()
    metric.update(picture, 1 - picture, torch.tensor([8]))
    assert metric.compute().item() == pytest.approx(two)
    inverted = structural_similarity(picture, 1 - picture).item()
    assert inverted < 0
    assert two == pytest.approx((1 + inverted) / 2)


def test_ssim_refuses_pictures_smaller_than_its_window() -> None:
    with pytest.raises(SafelightError, match="smaller than the 11 px window"):
        SSIM().update(torch.zeros(1, 3, 24, 8), torch.zeros(1, 3, 24, 8))
    with pytest.raises(SafelightError, match=r"of one shape, got \(1, 3, 16, 16\) and \(2, 3, 16, 16\)"):
        SSIM().update(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))


def test_concept_accuracy_by_class_and_by_score() -> None:
    metric = ConceptAccuracy()
    metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]))
    metric.update(torch.tensor([2]), torch.tensor([0]), torch.tensor([2]))
    assert metric.compute().item() == pytest.approx(2 / 3)
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1]])
    best, second = ConceptAccuracy(), ConceptAccuracy(top_k=2)
    for m in (best, second):
        m.update(scores, torch.tensor([2, 2]))
    assert (best.compute().item(), second.compute().item()) == (0.0, 0.5)
    every = ConceptAccuracy(top_k=9)  # more than there are classes
    every.update(scores, torch.tensor([2, 2]))
    assert every.compute().item() == 1.0
    with pytest.raises(SafelightError, match=r"prediction \(3,\) should be"):
        best.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1]))
    with pytest.raises(SafelightError, match="needs scores"):
        second.update(torch.tensor([1]), torch.tensor([1]))


def test_metric_survives_a_state_dict_and_a_reset() -> None:
    metric = LatentError()
    metric.update(torch.ones(1, 2), torch.zeros(1, 2))
    metric.reset()
    metric.update(torch.zeros(1, 2), torch.zeros(1, 2))
    assert metric.compute()["mean"].item() == 0
    assert not math.isnan(metric.compute()["median"].item())


def test_sample_mean_counts_a_repeated_sample_once() -> None:
    metric = SampleMean()
    metric.update(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]))
    metric.update(torch.tensor([6.0, 1.0]), torch.tensor([2, 0]))
    assert metric.compute().item() == pytest.approx(3.0)


def test_shuffled_accuracy_asks_for_what_is_half_a_set_away() -> None:
    metric = ShuffledAccuracy()
    # In the order of the indices: seen 0 1 2 3, asked 2 0 0 1 (never what was seen), asked half a set away 0 1 2 0.
    metric.update(torch.tensor([3, 1]), torch.tensor([1, 0]), torch.tensor([9, 4]))
    metric.update(torch.tensor([2, 0, 0]), torch.tensor([0, 2, 2]), torch.tensor([7, 1, 1]))
    assert metric.compute().item() == pytest.approx(0.75)
