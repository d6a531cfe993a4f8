"""Real data behind ``LightningDataModule``s; one file per source. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.lazy import lazy_exports

if TYPE_CHECKING:
    from safelight.datamodules.activations import ActivationDataModule as ActivationDataModule
    from safelight.datamodules.chess import ChessDataModule as ChessDataModule
    from safelight.datamodules.concepts import ConceptDataModule as ConceptDataModule
    from safelight.datamodules.copro import CoProDataModule as CoProDataModule
    from safelight.datamodules.copro_v2 import CoProV2DataModule as CoProV2DataModule
    from safelight.datamodules.emoji import EmojiDataModule as EmojiDataModule
    from safelight.datamodules.illusionbench import IllusionBenchDataModule as IllusionBenchDataModule
    from safelight.datamodules.llava import LLaVADataModule as LLaVADataModule
    from safelight.datamodules.photos import PhotoDataModule as PhotoDataModule
    from safelight.datamodules.prompts import PromptDataModule as PromptDataModule
    from safelight.datamodules.text import TextDataModule as TextDataModule

_HOME = {
    "ActivationDataModule": "activations",
    "ChessDataModule": "chess",
    "CoProDataModule": "copro",
    "CoProV2DataModule": "copro_v2",
    "ConceptDataModule": "concepts",
    "EmojiDataModule": "emoji",
    "IllusionBenchDataModule": "illusionbench",
    "LLaVADataModule": "llava",
    "PhotoDataModule": "photos",
    "PromptDataModule": "prompts",
    "ResumableLoader": "loading",
    "TextDataModule": "text",
}
__all__ = sorted(_HOME)
__getattr__, __dir__ = lazy_exports(__name__, _HOME)
