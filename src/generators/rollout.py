"""The sampling loop as pure functions of a latent: predict, step, roll out, and what the backward pass recomputes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from safelight.errors import SafelightError
from safelight.generators.checkpointing import block_checkpointing
from safelight.generators.samplers import Sampler

Conditioning = dict[str, Tensor]
"""What the denoiser is conditioned on. Every value has the batch dimension first, so rows can be sliced, collated and
cached. A key ``negative_<name>`` holds the unconditional counterpart of ``<name>`` for classifier-free guidance."""

Checkpoint = Literal["none", "step", "step+block"]

_NEGATIVE = "negative_"


class Rollout(ABC):
    """A denoiser, a sampler and a guidance weight: all that is needed to go from noise to the final latent.

    Attributes:
        denoiser: The network.
        sampler: The tables of all T steps.
        guidance_scale: Classifier-free guidance weight; at most 1 switches it off.
    """

    denoiser: nn.Module
    sampler: Sampler
    guidance_scale: float

    @abstractmethod
    def denoise(self, z: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """One plain denoiser call without guidance.

        Args:
            z: Denoiser input ``(B, *latent_shape)``, already scaled by the sampler.
            timestep: ``(B,)`` on the training scale 0 to 1000.
            cond: Conditioning rows; ``negative_*`` entries are ignored.

        Returns:
            The prediction ``(B, *latent_shape)``: velocity for flow models, else what the scheduler's
            ``prediction_type`` says.
        """

    @property
    def timesteps(self) -> Tensor:
        """``(T,)`` float32: what the denoiser is told at each step, on the training scale 0 to 1000."""
        return torch.tensor(self.sampler.timesteps, dtype=torch.float32)

    @property
    def uses_cfg(self) -> bool:
        """Whether a step evaluates a negative row beside each positive one."""
        return self.guidance_scale > 1

    @property
    def denoiser_calls(self) -> int:
        """Denoiser rows evaluated per generated sample: T, twice that with classifier-free guidance."""
        return len(self.sampler.timesteps) * (2 if self.uses_cfg else 1)

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the denoiser's weights."""
        return next(p.dtype for p in self.denoiser.parameters() if p.is_floating_point())

    @property
    def latent_dtype(self) -> torch.dtype:
        """Type in which latents are carried: float32, or float64 for a float64 denoiser.

        A 16-bit denoiser computes in 16 bits, but rounding the latent after each of T steps would add an error that
        hides what a mask does.
        """
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def predict(self, z: Tensor, i: int, cond: Conditioning) -> Tensor:
        """The guided prediction at step ``i``: one denoiser call, negative rows first where guidance is on.

        Args:
            z: ``(B, *latent_shape)``.
            i: Step index, ``0 <= i < T``.
            cond: From :meth:`encode`.

        Returns:
            ``(B, *latent_shape)`` in the latent's dtype.
        """
        rows = z.shape[0]
        z_in = self.sampler.scale(z, i).to(self.dtype)
        positive = {key: value for key, value in cond.items() if not key.startswith(_NEGATIVE)}
        if self.uses_cfg:
            if len(positive) == len(cond):
                raise SafelightError(
                    f"cond: guidance_scale={self.guidance_scale} needs negative conditioning; encode the prompts again"
                )
            positive = {key: torch.cat([cond.get(_NEGATIVE + key, value), value]) for key, value in positive.items()}
            z_in = torch.cat([z_in, z_in])
        positive = {key: v.to(self.dtype) if v.is_floating_point() else v for key, v in positive.items()}
        timestep = torch.full((z_in.shape[0],), self.sampler.timesteps[i], dtype=torch.float32, device=z.device)
        prediction = self.denoise(z_in, timestep, positive).to(z.dtype)
        if not self.uses_cfg:
            return prediction
        negative, wanted = prediction[:rows], prediction[rows:]
        return negative + self.guidance_scale * (wanted - negative)

    def step(self, z: Tensor, i: int, cond: Conditioning) -> Tensor:
        """One sampler step: a pure function of its arguments (and of the gates hooked onto the denoiser).

        Args:
            z: Latent before step ``i``, ``(B, *latent_shape)``.
            i: Step index, ``0 <= i < T``; any order of calls gives the same results.
            cond: From :meth:`encode`.

        Returns:
            Latent after step ``i``, same shape and dtype.
        """
        return self.sampler.update(z, self.predict(z, i, cond), i)

    @overload
    def rollout(
        self,
        z: Tensor,
        cond: Conditioning,
        *,
        checkpoint: Checkpoint = ...,
        trajectory: Literal[False] = ...,
        before_step: Callable[[int], object] | None = ...,
    ) -> Tensor: ...

    @overload
    def rollout(
        self,
        z: Tensor,
        cond: Conditioning,
        *,
        checkpoint: Checkpoint = ...,
        trajectory: Literal[True],
        before_step: Callable[[int], object] | None = ...,
    ) -> list[Tensor]: ...

    def rollout(
        self,
        z: Tensor,
        cond: Conditioning,
        *,
        checkpoint: Checkpoint = "none",
        trajectory: bool = False,
        before_step: Callable[[int], object] | None = None,
    ) -> Tensor | list[Tensor]:
        """Run all T steps.

        Gates have to be sampled before the call: hooks replay them when a step is recomputed in the backward pass.

        Args:
            z: Initial latents ``(B, *latent_shape)``.
            cond: Conditioning with B rows.
            checkpoint: What the backward pass recomputes. ``"none"`` keeps all activations (memory grows with T);
                ``"step"`` keeps T latents and the activations of one step, for one more forward pass; ``"step+block"``
                also recomputes within a step, block by block.
            trajectory: Return all latents instead of the last.
            before_step: Called with the index of each step before it runs, also when it is recomputed; puts the gates
                of that step in force where they differ from step to step.

        Returns:
            The final latent, or the list of T+1 latents beginning with ``z``.

        Raises:
            SafelightError: If ``checkpoint`` is unknown or the denoiser has no block-wise checkpointing.
        """
        if checkpoint not in ("none", "step", "step+block"):
            raise SafelightError(f"checkpoint={checkpoint!r}: choose 'none', 'step' or 'step+block'")
        plain = self._step_by_blocks if checkpoint == "step+block" and torch.is_grad_enabled() else self.step

        def function(z: Tensor, i: int, cond: Conditioning) -> Tensor:
            if before_step is not None:
                before_step(i)
            return plain(z, i, cond)

        last = len(self.sampler.timesteps) - 1
        latents = [z]
        for i in range(last + 1):
            # The backward pass begins with the last step: recomputing it at once would cost a forward and save nothing.
            if checkpoint == "none" or not torch.is_grad_enabled() or i == last:
                z = function(z, i, cond)
            else:
                # Stashing the random state per step is only needed where a layer draws (dropout in training mode).
                stash = self.denoiser.training
                z = run_checkpointed(function, z, i, cond, use_reentrant=False, preserve_rng_state=stash)
            if trajectory:
                latents.append(z)
        return latents if trajectory else z

    def _step_by_blocks(self, z: Tensor, i: int, cond: Conditioning) -> Tensor:
        # The switch is set inside the step so that the recomputation, which runs in the backward pass, sees it too.
        with block_checkpointing(self.denoiser):
            return self.step(z, i, cond)
