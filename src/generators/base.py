"""The differentiable generator: condition, roll out, decode.

A :class:`Generator` turns a diffusers pipeline into plain functions of tensors. All its weights are frozen; gradients
flow through the latent and through whatever gates are hooked onto the denoiser. The sampling loop stands in
``rollout``, the writing of folders in ``saving``. One subclass per denoiser family fills in four small methods.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.generators.encoders import (
    decode_latent,
    encode_picture,
    forget_output_hooks,
    reload_text_encoders,
    text_encoders,
)
from safelight.generators.rollout import Checkpoint as Checkpoint
from safelight.generators.rollout import Conditioning as Conditioning
from safelight.generators.rollout import Rollout
from safelight.generators.samplers import FLOW, as_markov, make_sampler
from safelight.generators.saving import save_pipeline, save_settings

SETTINGS = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length")


class Generator(Rollout):
    """A frozen image generator whose whole sampling loop can be differentiated.

    Args:
        pipeline: The diffusers pipeline it comes from; ``None`` for a bare denoiser, which can roll out given
            conditioning tensors but neither encode nor decode.
        denoiser: The network; by default ``pipeline.unet`` or ``pipeline.transformer``.
        scheduler: A diffusers scheduler; by default the pipeline's, else the family's. Multistep and stochastic ones
            are converted (see :func:`safelight.generators.samplers.as_markov`).
        num_inference_steps: Number of sampler steps T.
        guidance_scale: Classifier-free guidance weight. Values of at most 1 switch it off, so that one step costs one
            denoiser row per sample instead of two. Default: the family's.
        height: Image height in pixels; default: the denoiser's native size.
        width: Image width in pixels; default: the denoiser's native size.
        max_sequence_length: Number of T5 text tokens (FLUX, SD3); other families ignore it.
        name: Name shown in reports.
        source: Folder or hub id the pipeline was read from, used to read dropped text encoders again.

    Raises:
        SafelightError: If a setting is out of range.
    """

    family: ClassVar[str]
    fallback_scheduler: ClassVar[str] = FLOW
    default_guidance_scale: ClassVar[float] = 1.0
    default_sequence_length: ClassVar[int | None] = None

    def __init__(
        self,
        pipeline: Any = None,
        *,
        denoiser: nn.Module | None = None,
        scheduler: Any = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        max_sequence_length: int | None = None,
        name: str = "",
        source: str | None = None,
    ) -> None:
        if denoiser is None:
            denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
        if denoiser is None:
            raise SafelightError("denoiser: neither a denoiser nor a pipeline with 'unet' or 'transformer' was given")
        self.pipeline = pipeline
        self.denoiser = denoiser
        self.name = name or self.family
        self.source = source
        self._encoders_dropped = False
        scheduler = scheduler if scheduler is not None else getattr(pipeline, "scheduler", None)
        self.scheduler = (
            self._default_scheduler() if scheduler is None else as_markov(scheduler, self.fallback_scheduler)
        )
        if pipeline is not None and hasattr(pipeline, "scheduler"):
            pipeline.scheduler = self.scheduler
        for module in self._modules():
            module.requires_grad_(False).eval()
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = self._default_guidance() if guidance_scale is None else float(guidance_scale)
        self.height = self._native_size() if height is None else int(height)
        self.width = self._native_size() if width is None else int(width)
        self.max_sequence_length = max_sequence_length or self.default_sequence_length
        self.configure()

    # -- what a family fills in, besides denoise ----------------------------------------------------------------------

    @abstractmethod
    def _latent_shape(self) -> tuple[int, ...]:
        """Shape of one latent for the current height and width."""

    def _encode_one(self, prompt: str) -> Conditioning:
        """Conditioning of a single prompt, batch dimension 1."""
        raise SafelightError(
            f"prompts: this {self.family} generator was built without a pipeline and cannot encode text"
        )

    def _schedule(self) -> dict[str, Any]:
        """Keywords the family's pipeline passes to ``scheduler.set_timesteps``."""
        return {}

    def _default_scheduler(self) -> Any:
        import diffusers

        return getattr(diffusers, self.fallback_scheduler)()

    def _default_guidance(self) -> float:
        return self.default_guidance_scale

    def _spatial_latent(self, z: Tensor) -> Tensor:
        """``z`` as the VAE's ``(B, C, h, w)``."""
        return z

    def _noise_shape(self) -> tuple[int, ...]:
        """Shape in which the pipeline draws one sample's noise, before packing."""
        return self.latent_shape

    def _pack(self, noise: Tensor) -> Tensor:
        """Noise ``(B, *noise_shape)`` as latents ``(B, *latent_shape)``."""
        return noise

    # -- settings ----------------------------------------------------------------------------------------------------

    def configure(self, **settings: Any) -> None:
        """Change any of ``num_inference_steps, guidance_scale, height, width, max_sequence_length``.

        The sampler's tables and the latent shape follow. Conditioning encoded before a change of guidance, size or
        length has to be encoded again.

        Raises:
            SafelightError: If a name is unknown or a value is out of range.
        """
        for key, value in settings.items():
            if key not in SETTINGS:
                raise SafelightError(f"{key}={value!r}: not a generator setting; settings are {', '.join(SETTINGS)}")
            if value is not None:
                setattr(self, key, value)
        multiple = self._size_multiple()
        for key in ("height", "width"):
            value = getattr(self, key)
            if value < multiple or value % multiple:
                raise SafelightError(f"{key}={value}: must be a positive multiple of {multiple} for this model")
        self.latent_shape = self._latent_shape()
        self.sampler = make_sampler(self.scheduler, self.num_inference_steps, **self._schedule())

    @property
    def settings(self) -> dict[str, Any]:
        """The values that determine an image, besides weights, prompt and seed."""
        return {"name": self.name, **{key: getattr(self, key) for key in SETTINGS}}

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel along one side; 8 where there is no pipeline to ask."""
        vae = getattr(self.pipeline, "vae", None)
        return 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8

    @property
    def config(self) -> Any:
        """The denoiser's diffusers config."""
        return self.denoiser.config

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Generator:
        """Move every network of the generator; returns itself."""
        for module in self._modules():
            nn.Module.to(module, device=device, dtype=dtype)
        return self

    def with_denoiser(self, denoiser: nn.Module) -> Generator:
        """The same generator around another denoiser; encoders, decoder and schedule are shared."""
        other = copy.copy(self)
        other.denoiser = denoiser
        return other

    def __getstate__(self) -> dict[str, Any]:
        """For copies, by ``copy`` as well as by ``pickle``."""
        forget_output_hooks(text_encoders(self.pipeline).values())
        return self.__dict__

    # -- condition ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, without gradients.

        Each prompt passes the encoders alone, so its row does not depend on its neighbours to the last bit; equal
        prompts are encoded once.

        Args:
            prompts: B texts (class names or numbers for DiT).

        Returns:
            Conditioning with B rows on the denoiser's device; with ``negative_*`` entries if guidance is on.

        Raises:
            SafelightError: If there is nothing to encode with.
        """
        if isinstance(prompts, str) or not prompts:
            raise SafelightError(f"prompts: expected a non-empty list of texts, got {prompts!r}")
        self._restore_encoders()
        for encoder in text_encoders(self.pipeline).values():
            encoder.to(self.device)
        known = {prompt: self._encode_one(prompt) for prompt in dict.fromkeys(prompts)}
        keys = next(iter(known.values())).keys()
        return {key: torch.cat([known[prompt][key] for prompt in prompts]).to(self.device) for key in keys}

    def drop_encoders(self) -> None:
        """Free the text encoders' memory; they are read again from ``source`` when next needed.

        Raises:
            SafelightError: If the pipeline was built in memory, so that they could not come back.
        """
        if not text_encoders(self.pipeline):
            return
        if self.source is None:
            raise SafelightError(
                "drop_encoders: this pipeline was built in memory, its text encoders exist nowhere else"
            )
        for name in text_encoders(self.pipeline):
            setattr(self.pipeline, name, None)
        self._encoders_dropped = True

    def _restore_encoders(self) -> None:
        if self._encoders_dropped and self.source is not None:
            reload_text_encoders(self.pipeline, self.source, self.dtype)
            self._encoders_dropped = False

    # -- start -------------------------------------------------------------------------------------------------------

    def noise(self, seeds: Sequence[int] | Tensor) -> Tensor:
        """Initial latents, row ``i`` a function of ``seeds[i]`` only.

        Drawn on the CPU in float32, so they are the same on every device, and the same as those of the diffusers
        pipeline given one CPU ``torch.Generator`` per sample.

        Args:
            seeds: B integers.

        Returns:
            ``(B, *latent_shape)`` in ``latent_dtype``, scaled by the sampler's ``init_noise_sigma``.
        """
        values = seeds.tolist() if isinstance(seeds, Tensor) else [int(seed) for seed in seeds]
        if not values:
            raise SafelightError("seeds: expected at least one integer")
        rows = [torch.randn(self._noise_shape(), generator=torch.Generator().manual_seed(seed)) for seed in values]
        z = self._pack(torch.stack(rows)) * self.sampler.init_noise_sigma
        return z.to(self.device, self.latent_dtype)

    # -- decode, save ------------------------------------------------------------------------------------------------

    def decode(self, z: Tensor, *, grad: bool = False) -> Tensor:
        """Decode final latents to images.

        Args:
            z: ``(B, *latent_shape)``.
            grad: Keep the graph through the VAE.

        Returns:
            ``(B, 3, height, width)`` float in [0, 1] (not clamped to that range where ``grad`` is set).

        Raises:
            SafelightError: If there is no VAE.
        """
        vae = getattr(self.pipeline, "vae", None)
        if vae is None:
            raise SafelightError("decode: this generator has no VAE; build it from a whole pipeline")
        with torch.set_grad_enabled(grad):
            images = decode_latent(vae, self._spatial_latent(z))
        return images if grad else images.clamp(0, 1).to(self.latent_dtype)

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Tensor:
        """Latents of pictures: the mean that the VAE encodes them to, scaled as the denoiser sees latents.

        Args:
            pictures: ``(B, 3, height, width)`` in [-1, 1].

        Returns:
            ``(B, *latent_shape)`` in ``latent_dtype`` on the denoiser's device.

        Raises:
            SafelightError: If there is no VAE.
        """
        vae = getattr(self.pipeline, "vae", None)
        if vae is None:
            raise SafelightError("encode_pictures: this generator has no VAE; build it from a whole pipeline")
        return self._pack(encode_picture(vae, pictures)).to(self.device, self.latent_dtype)

    def save(self, folder: str | Path, denoiser: nn.Module | None = None) -> None:
        """Write an ordinary diffusers folder, plus ``safelight.json`` with the sampling settings.

        A physically pruned denoiser gets its ``pruning.json`` and a loader beside its weights.

        Args:
            folder: Where to write; created if missing.
            denoiser: A denoiser to write in place of the own one, such as a folded copy.

        Raises:
            SafelightError: If the generator has no pipeline.
        """
        if self.pipeline is None:
            raise SafelightError("save: this generator was built without a pipeline; save its denoiser instead")
        self._restore_encoders()
        save_pipeline(self.pipeline, denoiser or self.denoiser, Path(folder))
        save_settings(self, Path(folder))

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _modules(self) -> list[nn.Module]:
        parts = () if self.pipeline is None else self.pipeline.components.values()
        modules = {id(part): part for part in parts if isinstance(part, nn.Module)}
        return list((modules | {id(self.denoiser): self.denoiser}).values())

    def _native_size(self) -> int:
        size = self.config.get("sample_size") or 128
        return int(size) * self.vae_scale_factor

    def _size_multiple(self) -> int:
        return self.vae_scale_factor

    def __repr__(self) -> str:
        values = ", ".join(f"{key}={value!r}" for key, value in self.settings.items())
        return f"{type(self).__name__}({values}, dtype={self.dtype}, device={self.device})"
