"""Deterministic one-step samplers as pure functions of ``(z, prediction, i)``.

A gradient through the whole sampling loop visits the steps in reverse order, so a step may not depend on a counter
inside a scheduler. The tables (timesteps, noise levels) are read once from the diffusers scheduler; the update formulas
are written here with plain Python floats, which costs no host-device synchronisation.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FLOW = "FlowMatchEulerDiscreteScheduler"
EULER = "EulerDiscreteScheduler"
DDIM = "DDIMScheduler"


class Sampler(Protocol):
    """One deterministic Markov update rule and its tables for a fixed number of steps."""

    timesteps: tuple[float, ...]
    """What the denoiser is told at step ``i``, on the training scale (0 to 1000)."""
    init_noise_sigma: float
    """Standard deviation of the initial latent."""

    def scale(self, z: Tensor, i: int) -> Tensor:
        """Return the denoiser's input at step ``i``."""
        ...

    def update(self, z: Tensor, prediction: Tensor, i: int) -> Tensor:
        """Return the latent after step ``i``."""
        ...


class FlowEulerSampler:
    """Euler steps along a rectified flow: ``z + (sigma[i+1] - sigma[i]) * v`` (FLUX, SD3)."""

    def __init__(self, scheduler: Any) -> None:
        self.timesteps = tuple(scheduler.timesteps.tolist())
        self.sigmas = tuple(scheduler.sigmas.tolist())
        self.init_noise_sigma = 1.0

    def scale(self, z: Tensor, i: int) -> Tensor:
        """Return ``z`` unchanged: a flow model reads the latent itself."""
        return z

    def update(self, z: Tensor, prediction: Tensor, i: int) -> Tensor:
        """Move ``z`` along the predicted velocity."""
        moved: Tensor = z + (self.sigmas[i + 1] - self.sigmas[i]) * prediction
        return moved


class EulerSampler:
    """Euler steps of the variance-exploding ODE (SDXL, SD): Karras et al. 2022, algorithm 2 without churn.

    With ``x0`` the predicted clean latent, the derivative is ``(z - x0) / sigma``. For ``epsilon`` prediction it is the
    prediction itself, for ``v_prediction`` it is ``v / sqrt(sigma^2+1) + z * sigma / (sigma^2+1)``, and for ``sample``
    it is ``(z - prediction) / sigma``.
    """

    def __init__(self, scheduler: Any) -> None:
        self.timesteps = tuple(scheduler.timesteps.tolist())
        self.sigmas = tuple(scheduler.sigmas.tolist())
        self.init_noise_sigma = float(scheduler.init_noise_sigma)
        self.prediction_type = _prediction_type(scheduler)

    def scale(self, z: Tensor, i: int) -> Tensor:
        """Return ``z / sqrt(sigma^2 + 1)``, which has unit variance."""
        scaled: Tensor = z / (self.sigmas[i] ** 2 + 1.0) ** 0.5
        return scaled

    def update(self, z: Tensor, prediction: Tensor, i: int) -> Tensor:
        """Move ``z`` along the derivative implied by the prediction."""
        sigma = self.sigmas[i]
        variance = sigma**2 + 1.0
        if self.prediction_type == "epsilon":
            derivative = prediction
        elif self.prediction_type == "v_prediction":
            derivative = prediction / variance**0.5 + z * (sigma / variance)
        else:
            derivative = (z - prediction) / sigma
        moved: Tensor = z + (self.sigmas[i + 1] - sigma) * derivative
        return moved


class DDIMSampler:
    """DDIM with eta = 0 (arXiv 2010.02502, eq. 12)."""

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.config
        if config.get("thresholding"):
            raise SafelightError(
                "scheduler: dynamic thresholding is not supported; set thresholding=false in its config"
            )
        self.prediction_type = _prediction_type(scheduler)
        self.clip = float(config.clip_sample_range) if config.clip_sample else None
        self.init_noise_sigma = float(scheduler.init_noise_sigma)
        steps = [int(t) for t in scheduler.timesteps.tolist()]
        stride = config.num_train_timesteps // scheduler.num_inference_steps
        cumulative = scheduler.alphas_cumprod.tolist()
        final = float(scheduler.final_alpha_cumprod)
        self.timesteps = tuple(float(t) for t in steps)
        self.alphas = tuple(cumulative[t] for t in steps)
        self.next_alphas = tuple(cumulative[t - stride] if t >= stride else final for t in steps)

    def scale(self, z: Tensor, i: int) -> Tensor:
        """Return ``z`` unchanged: DDIM latents have unit variance at every step."""
        return z

    def update(self, z: Tensor, prediction: Tensor, i: int) -> Tensor:
        """Split ``z`` into clean part and noise, and mix them again at the next noise level."""
        signal, noise = self.alphas[i] ** 0.5, (1.0 - self.alphas[i]) ** 0.5
        if self.prediction_type == "epsilon":
            epsilon = prediction
            clean = (z - noise * prediction) / signal
        elif self.prediction_type == "v_prediction":
            epsilon = signal * prediction + noise * z
            clean = signal * z - noise * prediction
        else:
            epsilon = (z - signal * prediction) / noise
            clean = prediction
        if self.clip is not None:
            clean = clean.clamp(-self.clip, self.clip)
        mixed: Tensor = self.next_alphas[i] ** 0.5 * clean + (1.0 - self.next_alphas[i]) ** 0.5 * epsilon
        return mixed


def _prediction_type(scheduler: Any) -> str:
    kind = str(scheduler.config.prediction_type)
    if kind not in ("epsilon", "v_prediction", "sample"):
        raise SafelightError(f"scheduler: prediction_type={kind!r}; expected 'epsilon', 'v_prediction' or 'sample'")
    return kind


def as_markov(scheduler: Any, fallback: str) -> Any:
    """Return a scheduler whose step depends on the current latent only.

    Multistep and stochastic solvers carry history or draw noise, so a reversed or repeated step would not replay the
    forward one. They are rebuilt from their own config as the ``fallback`` class, and the log says so.

    Args:
        scheduler: Any diffusers scheduler.
        fallback: ``FLOW``, ``EULER`` or ``DDIM``.

    Returns:
        ``scheduler`` itself where it is deterministic and Markov already, else the converted one.
    """
    import diffusers

    kind = type(scheduler).__name__
    allowed = (FLOW,) if fallback == FLOW else (EULER, DDIM)
    config = dict(scheduler.config)
    if kind in allowed and not config.get("stochastic_sampling"):
        return scheduler
    extra: dict[str, Any] = {}
    if fallback == FLOW:
        extra["stochastic_sampling"] = False
    if fallback == DDIM and "clip_sample" not in config:
        extra["clip_sample"] = False
    target = kind if kind in allowed else fallback
    logger.warning("scheduler %s keeps history or draws noise; sampling with a deterministic %s instead", kind, target)
    return getattr(diffusers, target).from_config(scheduler.config, **extra)


def make_sampler(scheduler: Any, num_inference_steps: int, **schedule: Any) -> Sampler:
    """Build the tables of a sampler as the diffusers pipelines do.

    Args:
        scheduler: A scheduler accepted by :func:`as_markov`; its timesteps are set.
        num_inference_steps: Number of steps T.
        **schedule: What the family's pipeline passes on: ``sigmas`` (FLUX) and the resolution shift ``mu`` (FLUX, SD3).

    Returns:
        The sampler with T timesteps.

    Raises:
        SafelightError: If the scheduler cannot give that many steps.
    """
    if num_inference_steps < 1:
        raise SafelightError(f"num_inference_steps={num_inference_steps}: at least one step is needed")
    steps = {"sigmas": schedule.pop("sigmas")} if "sigmas" in schedule else {"num_inference_steps": num_inference_steps}
    try:
        scheduler.set_timesteps(**steps, **schedule)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise SafelightError(f"num_inference_steps={num_inference_steps}: {error}") from error
    kinds: dict[str, type[Sampler]] = {FLOW: FlowEulerSampler, EULER: EulerSampler, DDIM: DDIMSampler}
    return kinds[type(scheduler).__name__](scheduler)  # type: ignore[call-arg]
