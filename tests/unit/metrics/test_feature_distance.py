from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from safelight.datamodules.emoji import EmojiDataset, Scene
from safelight.datamodules.emoji_words import things
from safelight.errors import SafelightError
from safelight.metrics import ClipJudge, FeatureDistance
from safelight.metrics.distance import DistanceKind, cmmd_distance, frechet_distance, kernel_distance


def _with_moments(mean: Tensor, scale: Tensor) -> Tensor:
    """Points whose sample mean and (diagonal) sample covariance are exactly the given ones."""
    width = len(mean)
    points = torch.cat([torch.eye(width), -torch.eye(width)]).double()
    return mean + points * scale * ((2 * width - 1) / 2) ** 0.5


def test_fid_of_known_gaussians() -> None:
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([1.0, 1.0, 0.0]).double()
    std_a, std_b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 2.0, 1.0]).double()
    a, b = _with_moments(mean_a, std_a), _with_moments(mean_b, std_b)
    # Commuting covariances: the distance is the sum of (difference of means)² + (difference of deviations)².
    expected = (1 + 0 + 4) + (1 + 0 + 4)
    assert frechet_distance(a, b).item() == pytest.approx(expected, rel=1e-9)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    assert frechet_distance(a @ turn, b @ turn).item() == pytest.approx(expected, rel=1e-9)


def test_fid_of_covariances_that_do_not_commute() -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(500, 4, generator=generator).double() @ torch.randn(4, 4, generator=generator).double()
    b = torch.randn(400, 4, generator=generator).double() @ torch.randn(4, 4, generator=generator).double() + 0.5
    # The eigenvalues of S1 S2 are those of its symmetric form: an independent route to the trace of the root.
    s1, s2 = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * cross
    assert frechet_distance(a, b).item() == pytest.approx(expected.item(), rel=1e-8)


def test_fid_of_fewer_samples_than_features_is_finite_and_zero_for_itself() -> None:
    a = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a).item() == pytest.approx(0, abs=1e-6)


def test_kid_is_the_sum_over_pairs_and_unbiased() -> None:
    a, b = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])

    def k(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 2 + 1) ** 3)

    within_a = k(a[0], a[1])
    within_b = (k(b[0], b[1]) + k(b[0], b[2]) + k(b[1], b[2])) / 3
    across = sum(k(x, y) for x in a for y in b) / 6
    assert kernel_distance(a, b).item() == pytest.approx(within_a + within_b - 2 * across, rel=1e-12)
    generator = torch.Generator().manual_seed(0)
    draws = [
        kernel_distance(torch.randn(20, 8, generator=generator), torch.randn(20, 8, generator=generator))
        for _ in range(200)
    ]
    values = torch.stack(draws)
    assert abs(values.mean().item()) < 4 * values.std().item() / 200**0.5
    assert values.min() < 0


def test_cmmd_of_two_points_by_hand_and_zero_for_itself() -> None:
    a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    # Unit vectors at a right angle: squared distance 2.
    expected = 1000 * (2 - 2 * torch.exp(torch.tensor(-2 / 200, dtype=torch.float64)))
    assert cmmd_distance(a, b).item() == pytest.approx(expected.item(), rel=1e-9)
    assert cmmd_distance(a, a).item() == 0


def test_cmmd_of_two_sets_is_the_sum_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.randn(count, 4, generator=generator).double() * 3 for count in (3, 2))

    def mean_kernel(first: Tensor, second: Tensor) -> float:
        gaps = [float((x / x.norm() - y / y.norm()).square().sum()) for x in first for y in second]
        return sum(math.exp(-gap / (2 * 10**2)) for gap in gaps) / len(gaps)

    wanted = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert cmmd_distance(a, b).item() == pytest.approx(wanted, rel=1e-6)
    assert wanted > 1


class _Mean(nn.Module):
    def forward(self, pictures: Tensor) -> Tensor:
        return pictures.mean((2, 3))


def test_feature_distance_uses_the_extractor_and_drops_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.rand(16, 3, 8, 8, generator=generator), torch.rand(16, 3, 8, 8, generator=generator) * 0.5
    metric = FeatureDistance(_Mean(), kind="fid")
    metric.update(real, real=True, index=torch.arange(16))
    metric.update(fake, real=False, index=torch.arange(16))
    expected = frechet_distance(real.mean((2, 3)), fake.mean((2, 3))).item()
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)
    metric.update(fake[:5], real=False, index=torch.arange(5))
    assert metric.compute().item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(metric.features(real=False), fake.mean((2, 3)))
    torch.testing.assert_close(metric.features(real=True), real.mean((2, 3)))


def test_fid_of_few_samples_warns_and_names_the_noise_level() -> None:
    features = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    metric = FeatureDistance(kind="fid")
    metric.update(features, real=True)
    metric.update(features, real=False)
    with pytest.warns(UserWarning, match="20 samples of 32 features is biased"):
        assert metric.compute().item() == pytest.approx(0, abs=1e-5)
    # Same set, yet its halves are far apart: this is what FID calls zero at ten samples.
    assert metric.between_halves().item() > 10
    assert metric.between_halves(seed=3).item() == metric.between_halves(seed=3).item()


@pytest.mark.parametrize(("real", "generated", "warns"), [(9, 4, 4), (3, 9, 3), (5, 6, None)])
def test_the_smaller_side_decides_whether_fid_warns(real: int, generated: int, warns: int | None) -> None:
    metric, source = FeatureDistance(kind="fid"), torch.Generator().manual_seed(0)
    metric.update(torch.randn(real, 4, generator=source), real=True)
    metric.update(torch.randn(generated, 4, generator=source), real=False)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        metric.compute()
    told = [str(one.message) for one in seen if "biased upwards" in str(one.message)]
    assert [message.split(" is ")[0] for message in told] == (
        [f"FID from {warns} samples of 4 features"] if warns else []
    )


def test_halves_are_averaged_over_the_splits() -> None:
    features = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    metric = FeatureDistance(kind="kid")
    metric.update(features, real=True)
    source, values = torch.Generator().manual_seed(3), []
    for _ in range(4):
        order = torch.randperm(9, generator=source)
        values.append(kernel_distance(features[order[:4]], features[order[4:8]]).item())
    assert metric.between_halves(splits=4, seed=3).item() == pytest.approx(sum(values) / 4, rel=1e-5)


def test_kid_and_cmmd_do_not_warn() -> None:
    for kind in ("kid", "cmmd"):
        metric = FeatureDistance(kind=kind)
        metric.update(torch.randn(6, 8), real=True)
        metric.update(torch.randn(6, 8), real=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            metric.compute()


def test_mistakes_are_named() -> None:
    with pytest.raises(SafelightError, match="kind='is'"):
        FeatureDistance(kind="is")  # type: ignore[arg-type]
    with pytest.raises(SafelightError, match=r"\(B, D\), got shape \(2, 3, 4, 4\)"):
        FeatureDistance().update(torch.zeros(2, 3, 4, 4), real=True)
    metric = FeatureDistance()
    metric.update(torch.zeros(4, 2), real=True)
    with pytest.raises(SafelightError, match="0 generated sample"):
        metric.compute()


@pytest.mark.parametrize("kind", ["fid", "kid", "cmmd"])
@pytest.mark.filterwarnings("ignore:FID from")
def test_tiny_clip_as_extractor_ranks_sets_of_pictures(kind: DistanceKind) -> None:
    data, judge = EmojiDataset("all"), ClipJudge("zoo:tiny_clip")
    names = [thing.name for thing in things()][:40]

    def pictures(style: str, background: str) -> torch.Tensor:
        return torch.stack([data.draw(Scene(name, style, background, "large")) for name in names]) / 2 + 0.5

    real = pictures("noto", "white")
    sets = {
        "other style": pictures("twemoji", "white"),
        "other background too": pictures("twemoji", "grey"),
        "noise": torch.rand(real.shape, generator=torch.Generator().manual_seed(0)),
    }
    values = []
    for generated in sets.values():
        metric = FeatureDistance(judge, kind=kind)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        values.append(metric.compute().item())
    assert values[0] < 0.5 * values[1] < 0.25 * values[2], values
