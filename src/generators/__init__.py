"""Diffusers pipelines made differentiable: condition, roll out, decode; one adapter per denoiser family."""

from __future__ import annotations

from safelight.lazy import lazy_exports

_HOME = {
    "Conditioning": "base",
    "DiTGenerator": "dit",
    "FluxGenerator": "flux",
    "Generator": "base",
    "SD3Generator": "sd3",
    "UNetGenerator": "unet",
    "VelocityGenerator": "velocity",
    "build_denoiser_on_meta": "architectures",
    "generator_for": "loading",
    "load_generator": "loading",
}

__all__ = sorted(_HOME)
__getattr__, __dir__ = lazy_exports(__name__, _HOME)
