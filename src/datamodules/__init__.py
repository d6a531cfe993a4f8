"""Real data behind ``LightningDataModule``s; one file per source. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safelight.datamodules.emoji import EmojiDataModule as EmojiDataModule
    from safelight.datamodules.prompts import PromptDataModule as PromptDataModule

_HOME = {"EmojiDataModule": "emoji", "PromptDataModule": "prompts", "ResumableLoader": "loading"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
