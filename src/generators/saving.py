"""Write a generator as an ordinary diffusers folder with its sampling settings beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from safelight.quiet import quiet

if TYPE_CHECKING:
    from safelight.generators.base import Generator

SETTINGS_FILE = "safelight.json"


def save_pipeline(pipeline: Any, denoiser: nn.Module, folder: Path) -> None:
    """Write a diffusers folder; a physically pruned denoiser gets its ``pruning.json`` and a loader beside its weights.

    Args:
        pipeline: The diffusers pipeline.
        denoiser: Written in place of the pipeline's own one.
        folder: Where to write; created if missing.
    """
    part = "unet" if hasattr(pipeline, "unet") else "transformer"
    own = getattr(pipeline, part)
    setattr(pipeline, part, denoiser)
    try:
        with quiet():
            pipeline.save_pretrained(str(folder), safe_serialization=True)
    finally:
        setattr(pipeline, part, own)
    _forget_origin(folder)
    if getattr(denoiser, "pruning_stages", None):
        from safelight.masking import write_manifest

        write_manifest(denoiser, folder / part)


def save_settings(generator: Generator, folder: Path) -> None:
    """Write ``safelight.json``: the sampling settings and the type of the weights."""
    content = {**generator.settings, "dtype": str(generator.dtype).removeprefix("torch.")}
    (folder / SETTINGS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _forget_origin(folder: Path) -> None:
    """Take the paths that parts were loaded from out of a saved pipeline's configurations.

    diffusers writes them; they name folders of one person's machine and would change the files of equal models.
    """
    for file in (*folder.glob("*.json"), *folder.glob("*/config.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
