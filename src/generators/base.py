"""The differentiable generator: condition, roll out, decode.

A :class:`Generator` turns a diffusers pipeline into plain functions of tensors. All its weights are frozen; gradients
flow through the latent and through whatever gates are hooked onto the denoiser. One subclass per denoiser family fills
in four small methods.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from safelight.errors import SafelightError
from safelight.generators.checkpointing import block_checkpointing
from safelight.generators.encoders import decode_latent, reload_text_encoders, text_encoders
from safelight.generators.quiet import quiet
from safelight.generators.samplers import FLOW, Sampler, as_markov, make_sampler

Conditioning = dict[str, Tensor]
"""What the denoiser is conditioned on. Every value has the batch dimension first, so rows can be sliced, collated and
cached. A key ``negative_<name>`` holds the unconditional counterpart of ``<name>`` for classifier-free guidance."""

Checkpoint = Literal["none", "step", "step+block"]

SETTINGS_FILE = "safelight.json"
SETTINGS = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length")
_NEGATIVE = "negative_"


class Generator(ABC):
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

    # -- what a family fills in --------------------------------------------------------------------------------------

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
        self.sampler: Sampler = make_sampler(self.scheduler, self.num_inference_steps, **self._schedule())

    @property
    def settings(self) -> dict[str, Any]:
        """The values that determine an image, besides weights, prompt and seed."""
        return {"name": self.name, **{key: getattr(self, key) for key in SETTINGS}}

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
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel along one side; 8 where there is no pipeline to ask."""
        vae = getattr(self.pipeline, "vae", None)
        return 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8

    @property
    def config(self) -> Any:
        """The denoiser's diffusers config."""
        return self.denoiser.config

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

    # -- roll out ----------------------------------------------------------------------------------------------------

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
        with self._pipeline_holding(denoiser or self.denoiser), quiet():
            self.pipeline.save_pretrained(str(folder), safe_serialization=True)
        _forget_origin(Path(folder))
        if getattr(denoiser or self.denoiser, "pruning_stages", None):
            from safelight.masking import write_manifest

            write_manifest(denoiser or self.denoiser, Path(folder) / self._denoiser_name())
        self._save_settings(Path(folder))

    def _save_settings(self, folder: Path) -> None:
        content = {**self.settings, "dtype": str(self.dtype).removeprefix("torch.")}
        (folder / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _denoiser_name(self) -> str:
        return "unet" if hasattr(self.pipeline, "unet") else "transformer"

    @contextmanager
    def _pipeline_holding(self, denoiser: nn.Module) -> Iterator[None]:
        name = self._denoiser_name()
        before = getattr(self.pipeline, name)
        setattr(self.pipeline, name, denoiser)
        try:
            yield
        finally:
            setattr(self.pipeline, name, before)

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


def _forget_origin(folder: Path) -> None:
    """Take the paths that parts were loaded from out of a saved pipeline's configurations.

    diffusers writes them; they name folders of one person's machine and would change the files of equal models.
    """
    for file in (*folder.glob("*.json"), *folder.glob("*/config.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
