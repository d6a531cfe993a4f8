"""Autoencoder: whitening by hand, what it learns, its metrics by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecodiff_toys import trainer
from torch.nn import functional as F
from zoo_toys import Losses, load, pictures

from safelight.lightning_modules import Autoencoder
from safelight.lightning_modules.autoencoder.module import whiten_latents
from safelight.lightning_modules.randomness import row_generator, step_seed
from safelight.testing.contracts import MethodContract


class TestContract(MethodContract):
    method = "autoencoder"
    opens_with = """
import torch
from diffusers import AutoencoderKL
model = AutoencoderKL.from_pretrained(folder)
latents = model.encode(torch.linspace(-1, 1, 3 * 256).view(1, 3, 16, 16)).latent_dist.mode()
assert latents.shape == (1, 3, 8, 8) and latents.std() > 0
assert model.decode(latents).sample.shape == (1, 3, 16, 16)
"""
    # Some gradients are zero but for rounding (the bias of keys, for one), and Adam divides by their size.
    equivalence_precision = "64-true"

    def overrides(self) -> list[str]:
        return [
            "method.block_out_channels=[8,16]", "method.latent_channels=3", "method.warmup_steps=2", "method.lr=1e-2",
            "data.image_size=16", "data.test_size=5",
        ]  # fmt: skip


def small_autoencoder(**settings: Any) -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder(block_out_channels=(8, 16), latent_channels=3, **settings)


@torch.no_grad()
def test_whitening_changes_the_latents_and_not_the_pictures() -> None:
    model = small_autoencoder().autoencoder.double()
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    old = model.encode(images).latent_dist
    mean, std = old.mean.mean((0, 2, 3)), old.mean.var((0, 2, 3), correction=0).sqrt()
    first = model.decoder.conv_in(old.mean)
    whiten_latents(model, mean, std)
    new = model.encode(images).latent_dist
    assert torch.allclose(new.mean.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-10)
    assert torch.allclose(new.mean.var((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-10)
    assert torch.allclose(new.logvar, old.logvar - 2 * std.log().view(3, 1, 1), atol=1e-10)
    again = model.decoder.conv_in(new.mean)
    assert torch.allclose(again[..., 1:-1, 1:-1], first[..., 1:-1, 1:-1], atol=1e-10)
    # Only what the padding stands for changes, so without a shift whole pictures stay.
    before = model.decode(new.mean).sample
    whiten_latents(model, torch.zeros(3).double(), torch.tensor([0.5, 2.0, 3.0]).double())
    assert torch.allclose(model.decode(model.encode(images).latent_dist.mode()).sample, before, atol=1e-9)


def test_first_loss_is_the_formula_and_the_moments_follow() -> None:
    module, losses = small_autoencoder(lr=1e-9, kl_weight=0.3, edge_weight=0.7, seed=5), Losses()
    trainer(max_steps=1, callbacks=[losses]).fit(module, load(pictures()))
    images, other = next(iter(load(pictures())))["image"], small_autoencoder().autoencoder
    with torch.no_grad():
        latent = other.encode(images).latent_dist
        mean, variance = latent.mean, latent.logvar.exp()
        rows = [row_generator(step_seed(5, 0), row) for row in range(4)]
        noise = torch.stack([torch.randn(mean.shape[1:], generator=row) for row in rows])
        gap = other.decode(mean + variance.sqrt() * noise).sample - images
    across, down = gap[..., 1:] - gap[..., :-1], gap[..., 1:, :] - gap[..., :-1, :]
    # KL divergence from the standard normal, per number of the latent.
    kl = (mean.square() + variance - 1 - latent.logvar).mean() / 2
    wanted = gap.abs().mean() + 0.7 * (across.abs().mean() + down.abs().mean()) + 0.3 * kl
    assert losses.values[0] == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(module.latent_mean, 0.01 * mean.mean((0, 2, 3)))
    torch.testing.assert_close(module.latent_square, 0.99 + 0.01 * mean.square().mean((0, 2, 3)))


def test_moments_are_those_of_all_accumulated_batches() -> None:
    module = small_autoencoder(lr=1e-9)
    trainer(max_steps=1, accumulate_grad_batches=2).fit(module, load(pictures()))
    with torch.no_grad():
        mean = (
            small_autoencoder().autoencoder.encode(torch.stack([item["image"] for item in pictures()])).latent_dist.mean
        )
    torch.testing.assert_close(module.latent_mean, 0.01 * mean.mean((0, 2, 3)))
    torch.testing.assert_close(module.latent_square, 0.99 + 0.01 * mean.square().mean((0, 2, 3)))


def test_autoencoder_learns_and_exports_whitened(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    module, losses = small_autoencoder(lr=1e-2, warmup_steps=5), Losses()
    items = pictures(32, 16)
    trainer(max_steps=30, callbacks=[losses]).fit(module, load(items, 16))
    assert sum(losses.values[-5:]) < 0.7 * sum(losses.values[:5])
    model = AutoencoderKL.from_pretrained(module.export(tmp_path))
    assert (model.config.scaling_factor, model.config.shift_factor) == (1.0, 0.0)
    images = torch.stack([item["image"] for item in items])
    with torch.no_grad():
        own, exported = module.eval()(images), model.decode(model.encode(images).latent_dist.mode()).sample
    error = [F.l1_loss(pictures, images).item() for pictures in (own, exported)]
    assert error[1] == pytest.approx(error[0], rel=0.1)


def test_autoencoder_metrics_by_hand() -> None:
    module = small_autoencoder().eval()
    items = pictures(32, 4)
    (numbers,) = trainer().test(module, load(items), verbose=False)
    images = torch.stack([item["image"] for item in items])
    with torch.no_grad():
        restored = module(images).clamp(-1, 1)
    squares = ((restored - images) / 2).square().mean((1, 2, 3))
    assert numbers["test/psnr"] == pytest.approx((10 * torch.log10(1 / squares)).mean().item(), rel=1e-4)
    assert numbers["test/l1"] == pytest.approx((restored - images).abs().mean().item(), rel=1e-4)
