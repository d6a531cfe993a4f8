"""The perceptual distance against its formula written out, and against what people would say."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from safelight.datamodules.emoji import EmojiDataset, Scene
from safelight.errors import SafelightError
from safelight.metrics import ClipMaps, PerceptualDistance
from safelight.metrics.perceptual import perceptual_distance


def test_formula_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 6, 7, generator=generator)]
    second = [torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 6, 7, generator=generator)]
    maps = 2 - 2 * F.cosine_similarity(first[0], second[0], dim=1).mean((1, 2))
    tokens = 2 - 2 * F.cosine_similarity(first[1], second[1], dim=2).mean(1)
    torch.testing.assert_close(perceptual_distance(first, second), (maps + tokens) / 2)
    opposite = perceptual_distance(first, [-layer for layer in first])
    torch.testing.assert_close(opposite, torch.full((2,), 4.0))


def test_clip_maps_are_the_patches_of_every_layer() -> None:
    maps = ClipMaps()
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    config = maps.judge.model.config.vision_config
    layers = maps(pictures)
    assert len(layers) == config.num_hidden_layers
    seen = maps.judge.model.vision_model(pixel_values=maps.judge.preprocess(pictures)).last_hidden_state[:, 1:]
    torch.testing.assert_close(layers[-1], seen)
    # Values that no picture has are those of the nearest picture.
    torch.testing.assert_close(maps(pictures * 3 - 1)[-1], maps((pictures * 3 - 1).clamp(0, 1))[-1])


def test_closer_looking_pictures_are_closer() -> None:
    data = EmojiDataset("all")
    scenes = [
        Scene("octopus", "noto", "yellow", "large"), Scene("octopus", "noto", "pink", "large"),
        Scene("rocket", "twemoji", "green", "small"),
    ]  # fmt: skip
    octopus, pink, rocket = (data.draw(scene)[None] / 2 + 0.5 for scene in scenes)
    values = []
    for other in (octopus, pink, rocket):
        metric = PerceptualDistance()
        metric.update(other, octopus)
        values.append(metric.compute().item())
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert 0.01 < values[1] < 0.7 * values[2]


class Edges(nn.Module):
    """A user's own extractor: one convolution whose activations are the maps."""

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        kernel = torch.tensor([[1.0, -1.0], [0.5, 0.5]])[:, None, None].repeat(1, 3, 1, 1)
        return [F.conv2d(pictures, kernel)]


def test_own_extractor_and_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 3, 3, 8, 8, generator=generator).unbind(0)
    metric = PerceptualDistance(Edges())
    metric.update(first, second, torch.tensor([0, 1, 2]))
    metric.update(first[:1], second[:1], torch.tensor([0]))
    expected = perceptual_distance(Edges()(first), Edges()(second)).mean()
    torch.testing.assert_close(metric.compute(), expected)
    assert expected > 0.01


def test_mistakes_are_named() -> None:
    metric = PerceptualDistance(Edges())
    with pytest.raises(SafelightError, match=r"got \(1, 3, 8, 8\) and \(2, 3, 8, 8\)"):
        metric.update(torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8))
    flat = PerceptualDistance(lambda pictures: [pictures.flatten(1)])
    with pytest.raises(SafelightError, match=r"should return a list of maps .* got a tensor \(2, 192\)"):
        flat.update(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
