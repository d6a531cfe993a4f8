"""A user's own velocity network as a generator.

The network learns a rectified flow: with ``x`` data and ``e`` standard normal noise, ``z(t) = (1 - t) x + t e`` and the
network predicts ``dz/dt = e - x`` from ``z`` and ``t``. That is all Safelight needs to roll it out differentiably::

    class Net(nn.Module):
        def forward(self, z, t, label):          # (B, *latent_shape), (B,) in [0, 1], what encode returns
            ...

    def encode(prompts):                         # negative_label is needed for guidance_scale > 1 only
        ids = torch.tensor([int(p) for p in prompts])
        return {"label": ids, "negative_label": torch.full_like(ids, 10)}

    generator = VelocityGenerator(Net(), latent_shape=(1, 8, 8), encode=encode, num_inference_steps=8)
    images = generator.decode(generator.rollout(generator.noise([0, 1]), generator.encode(["3", "7"])))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.generators.base import Conditioning, Generator
from safelight.generators.saving import save_settings


class VelocityGenerator(Generator):
    """Wrap ``velocity(z, t, **cond)`` and an ``encode(prompts)`` function.

    Args:
        velocity: The network; called with the latent ``(B, *latent_shape)``, ``t`` of shape ``(B,)`` in [0, 1] and the
            conditioning tensors as keywords.
        latent_shape: Shape of one sample.
        encode: Turns B prompts into a dict of tensors with B rows, ``negative_*`` rows included for guidance.
        decode: Turns latents into images in [0, 1]; by default ``z / 2 + 0.5`` clamped.
        num_inference_steps: Number of Euler steps T.
        guidance_scale: Classifier-free guidance weight; at most 1 means none.
        shift: Shift of the time grid towards noise, as in SD3; 1 keeps it uniform.
        name: Name shown in reports.
    """

    family = "velocity"

    def __init__(
        self,
        velocity: nn.Module,
        latent_shape: Sequence[int],
        encode: Callable[[list[str]], Conditioning],
        *,
        decode: Callable[[Tensor], Tensor] | None = None,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.0,
        shift: float = 1.0,
        name: str = "",
    ) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self._shape = tuple(int(size) for size in latent_shape)
        self._encode = encode
        self._decode = decode
        size = self._shape[-2:] if len(self._shape) > 2 else (1, 1)
        super().__init__(
            denoiser=velocity,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            height=size[0],
            width=size[1],
            name=name,
        )

    def denoise(self, z: Tensor, timestep: Tensor, cond: Conditioning) -> Tensor:
        """See :meth:`Generator.denoise`; the network is told ``timestep / 1000``."""
        output: Tensor = self.denoiser(z, (timestep / 1000).to(z.dtype), **cond)
        return output

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """See :meth:`Generator.encode`; calls the given function once with all prompts."""
        cond = self._encode(list(prompts))
        wrong = {key: tuple(value.shape) for key, value in cond.items() if value.shape[:1] != (len(prompts),)}
        if wrong:
            raise SafelightError(f"encode: every tensor needs {len(prompts)} rows, one per prompt; got {wrong}")
        return {
            key: value.to(self.device)
            for key, value in cond.items()
            if self.uses_cfg or not key.startswith("negative_")
        }

    def decode(self, z: Tensor, *, grad: bool = False) -> Tensor:
        """See :meth:`Generator.decode`."""
        with torch.set_grad_enabled(grad):
            return self._decode(z) if self._decode else (z / 2 + 0.5).clamp(0, 1)

    def save(self, folder: str | Path, denoiser: nn.Module | None = None) -> None:
        """Write the network's weights as ``model.safetensors`` and the settings beside them."""
        from safetensors.torch import save_model

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(denoiser or self.denoiser, str(folder / "model.safetensors"))
        save_settings(self, folder)

    def _latent_shape(self) -> tuple[int, ...]:
        return self._shape

    def _schedule(self) -> dict[str, Any]:
        # The uniform grid 1, 1 - 1/T, ..., 1/T, which the scheduler then shifts.
        steps = self.num_inference_steps
        return {"sigmas": [1.0 - i / steps for i in range(steps)]}

    def _size_multiple(self) -> int:
        return 1
