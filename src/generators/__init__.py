"""Diffusers pipelines made differentiable: condition, roll out, decode; one adapter per denoiser family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.lazy import lazy_exports

if TYPE_CHECKING:
    from safelight.generators.architectures import build_denoiser_on_meta as build_denoiser_on_meta
    from safelight.generators.base import Conditioning as Conditioning
    from safelight.generators.base import Generator as Generator
    from safelight.generators.dit import DiTGenerator as DiTGenerator
    from safelight.generators.flux import FluxGenerator as FluxGenerator
    from safelight.generators.loading import generator_for as generator_for
    from safelight.generators.loading import load_generator as load_generator
    from safelight.generators.sd3 import SD3Generator as SD3Generator
    from safelight.generators.unet import UNetGenerator as UNetGenerator
    from safelight.generators.velocity import VelocityGenerator as VelocityGenerator

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
