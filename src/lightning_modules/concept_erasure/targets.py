"""Where an erased prompt should end: the dense model on the anchor prompt, on nothing, or a FlowEdit of its picture."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.generators import Generator
from safelight.generators.samplers import FlowEulerSampler
from safelight.generators.targets import DenseTargets

Target = Literal["anchor", "empty", "flowedit", "file"]


@dataclass(frozen=True)
class FlowEditSettings:
    """FlowEdit as the authors run it on FLUX.1-dev.

    Attributes:
        steps: T of its own schedule; None for the generator's.
        n_max: how many of the last steps are edited; None for all.
        n_avg: noise draws averaged per step.
        source_guidance: scale for the concept prompt; None for the generator's.
        target_guidance: scale for the anchor prompt; None for the generator's.
    """

    steps: int | None = None
    n_max: int | None = None
    n_avg: int = 1
    source_guidance: float | None = None
    target_guidance: float | None = None


@torch.no_grad()
def flow_edit(
    generator: Generator,
    latent: Tensor,
    prompts: Sequence[str],
    anchors: Sequence[str],
    seeds: Sequence[int],
    settings: FlowEditSettings | None = None,
) -> Tensor:
    """Move final latents of ``prompts`` to ``anchors`` without inverting them (FlowEdit, arXiv 2412.08629).

    With ``z_src = (1 - sigma) x + sigma n`` and ``z_tar = z_edit + z_src - x``, each step adds
    ``(sigma' - sigma) * mean_n(v(z_tar, anchor) - v(z_src, prompt))``.

    Args:
        generator: a flow model; not changed.
        latent: what it made of the prompts, (B, ...).
        prompts: B texts.
        anchors: B texts.
        seeds: B integers, of the noise.
        settings: schedule and guidance.

    Returns:
        Edited latents, like ``latent``.

    Raises:
        SafelightError: the generator is no flow model.
    """
    settings = settings or FlowEditSettings()
    source, target = copy.copy(generator), copy.copy(generator)
    for one, guidance in ((source, settings.source_guidance), (target, settings.target_guidance)):
        one.configure(num_inference_steps=settings.steps, guidance_scale=guidance)
    if not isinstance(source.sampler, FlowEulerSampler):
        raise SafelightError(
            f"target='flowedit' needs a flow model (FLUX, SD3); {generator.name} is none: use 'anchor'"
        )
    source_cond, target_cond = source.encode(prompts), target.encode(anchors)
    sigmas = source.sampler.sigmas
    total = len(sigmas) - 1
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    edited = latent.clone()
    for i in range(total - min(settings.n_max or total, total), total):
        change = torch.zeros_like(latent)
        for _ in range(settings.n_avg):
            noise = torch.stack([torch.randn(latent.shape[1:], generator=stream) for stream in streams]).to(latent)
            noisy = (1 - sigmas[i]) * latent + sigmas[i] * noise
            moved = edited + noisy - latent
            change += target.predict(moved, i, target_cond) - source.predict(noisy, i, source_cond)
        edited = edited + (sigmas[i + 1] - sigmas[i]) * change / settings.n_avg
    return edited


class ErasureTargets:
    """Targets of mixed batches, each (prompt, noise) computed once.

    Args:
        generator: the dense one.
        kind: what an erased prompt should become; ``file`` targets come with the batch.
        folder: where latents are kept between runs; None for memory only.
        flow: settings of ``flowedit``.
    """

    def __init__(
        self, generator: Generator, kind: Target, folder: str | None = None, flow: FlowEditSettings | None = None
    ) -> None:
        self.generator, self.kind, self.flow = generator, kind, flow
        self.dense = DenseTargets(generator, folder)
        self._edited = DenseTargets(generator, folder, f"flowedit {flow}")

    def latents(
        self, prompts: Sequence[str], anchors: Sequence[str], erase: Sequence[bool], seeds: Sequence[int]
    ) -> Tensor:
        """Where each row should end, (B, ...). No gates may be in force.

        Args:
            prompts: B texts.
            anchors: B texts; used where ``erase``.
            erase: B truth values.
            seeds: B noise seeds.
        """
        wanted = [
            prompt if not gone or self.kind == "flowedit" else "" if self.kind == "empty" else anchor
            for prompt, anchor, gone in zip(prompts, anchors, erase, strict=True)
        ]
        target = self.plain(wanted, seeds)
        rows = [row for row, gone in enumerate(erase) if gone]
        if self.kind == "flowedit" and rows:
            target[rows] = self._flow_edits([(prompts[r], anchors[r], seeds[r]) for r in rows], target[rows])
        return target

    def plain(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """The dense model's final latents, (B, ...)."""

        def rollout(rows: list[int]) -> Tensor:
            cond = self.dense.conditioning([prompts[row] for row in rows])
            with torch.no_grad():
                return self.generator.rollout(self.generator.noise([seeds[row] for row in rows]), cond)

        return self.dense.latents(prompts, seeds, rollout)

    def _flow_edits(self, rows: Sequence[tuple[str, str, int]], latent: Tensor) -> Tensor:
        prompts, anchors, seeds = (list(column) for column in zip(*rows, strict=True))

        def edit(new: list[int]) -> Tensor:
            texts, others, noises = ([column[row] for row in new] for column in (prompts, anchors, seeds))
            return flow_edit(self.generator, latent[new], texts, others, noises, self.flow)

        names = [f"{prompt}\n{anchor}" for prompt, anchor in zip(prompts, anchors, strict=True)]
        return self._edited.latents(names, seeds, edit)
