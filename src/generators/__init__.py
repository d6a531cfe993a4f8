"""Diffusers pipelines made differentiable: condition, roll out, decode; one adapter per denoiser family."""

from __future__ import annotations

from importlib import import_module
from typing import Any

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


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that importing the package stays light."""
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
