"""What a model with two towers says about pictures when class names are all it is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.lightning_modules.illusion_probe.prompting import spoken
from safelight.probing.language import load_tokenizer, locate
from safelight.probing.vision import VisionTower

SCALE = 100.0
"""Of cosines before the softmax (reference)."""


class TwoTowers(nn.Module):
    """A CLIP or SigLIP.

    Args:
        model: with ``text_model`` and ``vision_model``.
        tokenizer: of its text tower.
        template: class name to text, with ``{}`` for the name.
    """

    def __init__(self, model: Any, tokenizer: Any, template: str) -> None:
        super().__init__()
        self.model, self.tokenizer, self.template = model, tokenizer, template

    def embeddings_of(self, output: Any) -> Tensor:
        """(B, D), embeddings of pictures from what the vision transformer put out for them, of length 1."""
        pooled = output.pooler_output
        projection = getattr(self.model, "visual_projection", None)
        return F.normalize((pooled if projection is None else projection(pooled)).float(), dim=-1)

    def of_pictures(self, pixels: Tensor) -> Tensor:
        """(B, D), embeddings of normalised pictures (B, 3, S, S), of length 1."""
        return self.embeddings_of(self.model.vision_model(pixels))

    def of_names(self, names: Sequence[str]) -> Tensor:
        """(N, D), embeddings of class names, of length 1."""
        texts = [self.template.format(spoken(name)) for name in names]
        longest = int(self.model.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        ).to(next(self.model.text_model.parameters()).device)
        output = self.model.text_model(
            input_ids=tokens["input_ids"], attention_mask=tokens.get("attention_mask")
        ).pooler_output  # fmt: skip
        projection = getattr(self.model, "text_projection", None)
        return F.normalize((output if projection is None else projection(output)).float(), dim=-1)


def load_two_towers(source: str, template: str, vision: VisionTower | None = None) -> TwoTowers | None:
    """The model that a vision transformer is one half of, frozen; None where it is no half.

    Args:
        source: where the vision transformer came from.
        template: class name to text.
        vision: used in place of the vision transformer that it comes with, to hold it once; None where that is to be
            trained, as what it said before is the control.

    Raises:
        SafelightError: the template has no place for a name.
    """
    if template.count("{}") != 1:
        raise SafelightError(f"template={template!r}: write {{}} once, where the name of a class goes")
    from transformers import AutoConfig, AutoModel

    if source == "dinov2":
        return None
    name, local = locate(source)
    config = AutoConfig.from_pretrained(name, local_files_only=local)
    if not hasattr(config, "text_config") or not hasattr(config, "vision_config"):
        return None
    model: Any = AutoModel.from_pretrained(name, dtype=torch.float32, local_files_only=local)
    if not hasattr(model, "text_model"):
        return None
    if vision is not None:
        model.vision_model = vision.tower
    towers = TwoTowers(model, load_tokenizer(source), template)
    return towers.eval().requires_grad_(False)


def joint_choice(shapes: Tensor, scenes: Tensor) -> tuple[Tensor, Tensor]:
    """Forced choice among shapes and scenes together, the paper's list of options.

    Args:
        shapes: scores (B, shapes).
        scenes: scores (B, scenes).

    Returns:
        The shape (B,) that was chosen, and the scene (B,); -1 in each where the other kind was chosen.
    """
    best = torch.cat([shapes, scenes], 1).argmax(1)
    is_shape = best < shapes.shape[1]
    nothing = torch.full_like(best, -1)
    return best.where(is_shape, nothing), (best - shapes.shape[1]).where(~is_shape, nothing)
