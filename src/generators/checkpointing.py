"""Block-wise checkpointing of diffusers denoisers, switched on for single calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from safelight.errors import SafelightError


@contextmanager
def block_checkpointing(denoiser: nn.Module) -> Iterator[None]:
    """Switch on diffusers' own block-wise checkpointing for the time of one denoiser call."""
    if not getattr(denoiser, "_supports_gradient_checkpointing", False):
        raise SafelightError(
            f"checkpoint='step+block': {type(denoiser).__name__} has no block-wise checkpointing; use 'step'"
        )
    switchable = [m for m in denoiser.modules() if hasattr(m, "gradient_checkpointing")]
    before = [(m.gradient_checkpointing, getattr(m, "_gradient_checkpointing_func", None)) for m in switchable]
    for module in switchable:
        module.gradient_checkpointing = True  # type: ignore[assignment]
        module._gradient_checkpointing_func = _checkpoint_block  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, (flag, function) in zip(switchable, before, strict=True):
            module.gradient_checkpointing = flag
            module._gradient_checkpointing_func = function  # type: ignore[assignment]


def _checkpoint_block(block: nn.Module, *args: Any) -> Any:
    return run_checkpointed(block, *args, use_reentrant=False, preserve_rng_state=block.training)
