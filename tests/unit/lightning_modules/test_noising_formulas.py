"""Losses and noising against formulas written down independently."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.generators.noising import denoising_loss, diffuse, diffusion_target, flow_interpolate, logit_normal
from safelight.lightning_modules.autoencoder.module import gradient_difference
from safelight.lightning_modules.clip.losses import contrastive_loss
from safelight.lightning_modules.clip.module import roughen
from safelight.lightning_modules.randomness import step_generator, step_seed
from safelight.lightning_modules.schedules import warmup_cosine


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_flow_runs_straight_from_data_to_noise() -> None:
    clean, noise = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    sigma = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    z, velocity = flow_interpolate(clean, noise, sigma)
    assert torch.equal(z[0], clean[0])
    assert torch.allclose(z[1], 0.75 * clean[1] + 0.25 * noise[1])
    assert torch.equal(z[2], noise[2])
    ahead, _ = flow_interpolate(clean, noise, sigma + 1e-6)
    assert torch.allclose(velocity, (ahead - z) / 1e-6, atol=1e-6)
    # One Euler step along the velocity leads back to the data.
    assert torch.allclose(z - sigma.view(3, 1, 1) * velocity, clean)


def test_diffusion_keeps_the_variance() -> None:
    clean, noise = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    alpha = torch.tensor([0.36, 1.0], dtype=torch.float64)
    noisy = diffuse(clean, noise, alpha)
    assert torch.allclose(noisy[0], 0.6 * clean[0] + 0.8 * noise[0])
    assert torch.equal(noisy[1], clean[1])
    many = diffuse(normal(100_000, 1), normal(100_000, 1, seed=2), torch.full((100_000,), 0.3, dtype=torch.float64))
    assert many.var().item() == pytest.approx(1.0, abs=0.02)


def test_noise_levels_have_a_normal_logit() -> None:
    levels = logit_normal(20_000, 0.5, 1.2, torch.Generator().manual_seed(0)).double()
    assert 0 < levels.min() < levels.max() < 1
    logit = torch.log(levels / (1 - levels))
    assert logit.mean().item() == pytest.approx(0.5, abs=0.03)
    assert logit.std().item() == pytest.approx(1.2, abs=0.03)
    draws = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(logit, 0.5 + 1.2 * draws, atol=1e-3)


def test_what_is_to_be_predicted() -> None:
    clean, noise = normal(2, 3, 4), normal(2, 3, 4, seed=1)
    alpha = torch.tensor([0.36, 0.64], dtype=torch.float64)
    assert torch.equal(diffusion_target("epsilon", clean, noise, alpha), noise)
    assert torch.equal(diffusion_target("sample", clean, noise, alpha), clean)
    velocity = diffusion_target("v_prediction", clean, noise, alpha)
    assert torch.allclose(velocity[0], 0.6 * noise[0] - 0.8 * clean[0])
    assert torch.allclose(velocity[1], 0.8 * noise[1] - 0.6 * clean[1])


def test_denoising_loss_is_the_mean_square_in_single_precision() -> None:
    loss = denoising_loss(torch.tensor([1.0, 3.0]).bfloat16(), torch.tensor([0.0, 5.0]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((1 + 4) / 2)
    weight = torch.tensor([3.0, 0.5])
    pair = denoising_loss(torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.zeros(2, 2), weight)
    assert pair.item() == pytest.approx((3 * (1 + 9) / 2 + 0.5 * (4 + 4) / 2) / 2)


def test_contrastive_loss_by_hand() -> None:
    image, text, scale = normal(4, 3), normal(4, 3, seed=1), 7.0
    cosine = [[float(a @ b / (a.norm() * b.norm())) for b in text] for a in image]
    rows = [math.log(sum(math.exp(scale * c) for c in row)) - scale * row[i] for i, row in enumerate(cosine)]
    columns = [math.log(sum(math.exp(scale * cosine[i][j]) for i in range(4))) - scale * cosine[j][j] for j in range(4)]
    wanted = (sum(rows) / 4 + sum(columns) / 4) / 2
    assert contrastive_loss(image, text, torch.tensor(scale)).item() == pytest.approx(wanted, rel=1e-6)
    # Lengths do not matter, pairs do.
    assert contrastive_loss(3 * image, text, torch.tensor(scale)).item() == pytest.approx(wanted, rel=1e-6)
    assert contrastive_loss(image, image, torch.tensor(50.0)).item() < 0.05
    assert contrastive_loss(image, image.roll(1, 0), torch.tensor(50.0)).item() > 5


def test_gradient_difference_by_hand() -> None:
    a = torch.tensor([[[[0.0, 2.0], [1.0, 5.0]]]])
    # Across: |2|, |4|; down: |1|, |3|.
    assert gradient_difference(a, torch.zeros_like(a)).item() == pytest.approx(3 + 2)
    assert gradient_difference(a, a + 7).item() == pytest.approx(0)


def test_warmup_and_cosine() -> None:
    factors = [warmup_cosine(step, 4, 12) for step in range(13)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == pytest.approx(0.0)
    assert warmup_cosine(99, 4, 12) == pytest.approx(0.0)
    assert warmup_cosine(0, 0, 10) == pytest.approx(1.0)
    assert warmup_cosine(4, 4, 4) == pytest.approx(1.0)  # nothing left to decay over


def test_seeds_are_a_function_of_seed_step_and_rank() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(5) for step in range(50) for rank in range(4)}
    assert len(seeds) == 5 * 50 * 4
    draws = [torch.rand(3, generator=step_generator(0, step)) for step in (1, 2, 1)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


def test_roughening_shifts_softens_and_adds_noise() -> None:
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)

    def rough(shift: int, noise: float, seed: int = 0) -> Tensor:
        rows = [torch.Generator().manual_seed(seed + row) for row in (1, 2)]
        return roughen(images, torch.Generator().manual_seed(seed), rows, shift, noise)

    assert rough(4, 0.1).shape == images.shape
    assert torch.equal(rough(4, 0.1), rough(4, 0.1))
    # A linear ramp is its own blur away from the border.
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    assert torch.allclose(rough(0, 0.0)[inner], images[inner], atol=1e-3)
    assert 0.005 < (rough(0, 0.5) - rough(0, 0.0)).std() < 0.5
    assert not torch.allclose(rough(4, 0.0)[inner], images[inner], atol=1e-2)


def test_roughening_by_hand() -> None:
    images, seeds = normal(2, 3, 8, 8).float(), (1, 2)
    rows = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = roughen(images, torch.Generator().manual_seed(5), rows, 2, 0.3)
    down, right = torch.randint(-2, 3, (2,), generator=torch.Generator().manual_seed(5)).tolist()
    assert 0 not in (down, right, down - right, down + right)
    places = torch.arange(8)
    moved = images[:, :, (places + down).clamp(0, 7)][..., (places + right).clamp(0, 7)]  # the border repeats
    soft = F.interpolate(F.avg_pool2d(moved, 2), size=(8, 8), mode="bilinear")
    for row, seed in enumerate(seeds):
        source = torch.Generator().manual_seed(seed)
        blur, grain = 0.8 * torch.rand(1, generator=source), 0.3 * torch.rand(1, generator=source)
        wanted = (1 - blur) * moved[row] + blur * soft[row] + grain * torch.randn(3, 8, 8, generator=source)
        torch.testing.assert_close(found[row], wanted)
