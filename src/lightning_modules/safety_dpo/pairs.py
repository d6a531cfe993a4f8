"""Noised pictures of a pair and the errors that networks make on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators import Conditioning, Generator
from safelight.generators.noising import diffuse, diffusion_target, flow_interpolate
from safelight.generators.targets import DenseTargets
from safelight.lightning_modules.randomness import normal, uniform
from safelight.lightning_modules.safety_dpo.batches import PreferenceBatch
from safelight.lightning_modules.safety_dpo.objective import PairErrors, squared_errors


class NoisedPairs(NamedTuple):
    """Both pictures of B pairs at one noise level each; rows of the safe ones first.

    Attributes:
        noisy: (2B, ...).
        target: what a perfect network predicts, like ``noisy``.
        timestep: on the scale 0 to 1000, (2B,).
        captions: B texts, "" where the caption was dropped.
    """

    noisy: Tensor
    target: Tensor
    timestep: Tensor
    captions: list[str]

    def rows(self, chosen: Sequence[int]) -> NoisedPairs:
        """Some of the pairs."""
        noisy, target, timestep = (rows_of(both, chosen) for both in (self.noisy, self.target, self.timestep))
        return NoisedPairs(noisy, target, timestep, [self.captions[row] for row in chosen])


def noise_pairs(
    generator: Generator, winner: Tensor, loser: Tensor, captions: Sequence[str], rows: Sequence[torch.Generator],
    prompt_dropout: float,
) -> NoisedPairs:  # fmt: skip
    """Noise both pictures of every pair alike, at a uniform time, and drop some captions.

    Args:
        generator: says what its network predicts.
        winner: latents of the safe pictures, (B, ...).
        loser: latents of the unsafe ones, like ``winner``.
        captions: B texts.
        rows: one stream of random numbers for each pair.
        prompt_dropout: share of captions that become "".
    """
    noise = normal(rows, winner.shape[1:]).to(winner)
    time, dropped = uniform(rows).to(winner), (uniform(rows) < prompt_dropout).tolist()
    if generator.family == "unet":
        scheduler = generator.scheduler
        steps = (time * scheduler.config.num_train_timesteps).long()
        signal = scheduler.alphas_cumprod.to(winner)[steps]
        kind = scheduler.config.prediction_type
        noisy = [diffuse(clean, noise, signal) for clean in (winner, loser)]
        target = [diffusion_target(kind, clean, noise, signal) for clean in (winner, loser)]
        timestep = steps.to(winner)
    else:
        both = [flow_interpolate(clean, noise, time) for clean in (winner, loser)]
        noisy, target = [pair[0] for pair in both], [pair[1] for pair in both]
        timestep = 1000 * time
    kept = ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
    return NoisedPairs(torch.cat(noisy), torch.cat(target), timestep.repeat(2), kept)


def rows_of(both: Tensor, chosen: Sequence[int]) -> Tensor:
    """Rows of some pairs, (2n, ...), out of those of B, (2B, ...), safe pictures before unsafe ones."""
    return both[[*chosen, *(len(both) // 2 + row for row in chosen)]]


class PairLatents:
    """Latents of both pictures, computed on first sight of a row and kept on the CPU.

    One picture at a time: the last bits depend on how many there are, and a resumed run, whose cache starts empty,
    meets a picture in other company than the uninterrupted run did.

    Args:
        generator: encodes given pictures with its autoencoder's mean, or draws them from their prompts.
        folder: where drawn latents are kept between runs; None for memory only.
    """

    def __init__(self, generator: Generator, folder: str | None = None) -> None:
        self.generator = generator
        self.drawn = DenseTargets(generator, folder)
        self._known: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def __call__(self, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
        """Latents of the safe and of the unsafe pictures, (B, ...) each."""
        if batch.pixels is None:
            return self._draw(batch.prompts[0], batch.seeds), self._draw(batch.prompts[1], batch.seeds)
        self._check(batch.pixels[0])
        keys = list(zip(batch.index, batch.flipped, strict=True))
        for row, key in enumerate(keys):
            if key not in self._known:
                winner, loser = (self._encode(pixels[row : row + 1]) for pixels in batch.pixels)
                self._known[key] = (winner, loser)
        device = self.generator.device
        winners, losers = (torch.cat([self._known[key][side] for key in keys]).to(device) for side in (0, 1))
        return winners, losers

    def _draw(self, prompts: list[str], seeds: list[int]) -> Tensor:
        def rollout(rows: list[int]) -> Tensor:
            noise = self.generator.noise([seeds[row] for row in rows])
            cond = self.drawn.conditioning([prompts[row] for row in rows])
            with torch.no_grad():
                drawn: Tensor = self.generator.rollout(noise, cond)
            return drawn

        return self.drawn.latents(prompts, seeds, rollout)

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        return self.generator.encode_pictures(pixels).cpu()

    def _check(self, pixels: Tensor) -> None:
        wanted = (self.generator.height, self.generator.width)
        if tuple(pixels.shape[-2:]) != wanted:
            raise SafelightError(
                f"batch: pictures of {tuple(pixels.shape[-2:])} pixels for a backbone of {wanted}; "
                "set data.image_size, or backbone.height and backbone.width"
            )


def predict(generator: Generator, pairs: NoisedPairs, cond: Conditioning) -> Tensor:
    """What the generator's network, as it stands, predicts for all rows of ``noisy``.

    Args:
        generator: whose network is asked, without guidance.
        pairs: N noised latents.
        cond: N rows.
    """
    dtype = generator.dtype
    own = {key: value for key, value in cond.items() if not key.startswith("negative_")}
    cast = {key: value.to(dtype) if value.is_floating_point() else value for key, value in own.items()}
    return generator.denoise(pairs.noisy.to(dtype), pairs.timestep, cast)


def pair_errors(generator: Generator, pairs: NoisedPairs, cond: Conditioning) -> tuple[PairErrors, Tensor]:
    """Errors of the generator's network, as it stands, on both pictures; and its residuals, (2B, ...).

    Args:
        generator: whose network is asked.
        pairs: B pairs.
        cond: of their captions, B rows.
    """
    prediction = predict(generator, pairs, {key: torch.cat([value, value]) for key, value in cond.items()})
    winner, loser = squared_errors(prediction, pairs.target).chunk(2)
    return PairErrors(winner, loser), prediction - pairs.target
