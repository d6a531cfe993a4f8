"""Which weights of a vision or text transformer are trained, and how they are written."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from safelight.errors import SafelightError
from safelight.generators.lora import add_lora, lora_parameters, lora_targets
from safelight.probing.tap import blocks_of
from safelight.probing.vision import VisionTower

Tune = Literal["linear_probe", "last_block", "full", "lora", "text_proj"]
THROUGH_VISION = ("last_block", "full", "lora")
"""Those whose vision transformer changes, so that its features cannot be kept."""
_QUERIES_AND_VALUES = ["q_proj", "v_proj", "query", "value"]


def tuned_vision(
    model: VisionTower, tune: Tune, rank: int, alpha: int | None, seed: int
) -> tuple[dict[str, nn.Parameter], Any]:
    """The weights of a vision transformer that are trained, by name, and the peft model around it for ``lora``.

    Args:
        model: frozen; adapters are put into it in place.
        tune: ``last_block`` trains the last block, ``full`` everything, ``lora`` adapters of query and value.
        rank: of the adapters.
        alpha: their scale; None for ``rank``.
        seed: of their start.
    """
    if tune == "lora":
        peft_model = add_lora(model.tower, lora_targets(model.tower, _QUERIES_AND_VALUES), rank, alpha, seed)
        return lora_parameters(peft_model), peft_model
    if tune == "last_block":
        path, blocks = blocks_of(model.tower)
        return {f"{path}.{len(blocks) - 1}.{name}": p for name, p in blocks[-1].named_parameters()}, None
    if tune == "full":
        return dict(model.tower.named_parameters()), None
    return {}, None


def tuned_text(clip: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of CLIP's text transformer whose name in OpenAI's code has "proj" in it (reference).

    There they are ``attn.in_proj``, ``attn.out_proj`` and ``mlp.c_proj``; in transformers those of query, key, value,
    output and the second layer of the MLP. ``text_projection`` lies outside that transformer and stays.
    """
    text: Any = clip.text_model
    wanted = ("q_proj", "k_proj", "v_proj", "out_proj", "fc2")
    return {
        name: parameter
        for name, parameter in text.encoder.named_parameters()
        if any(f".{part}." in f".{name}" for part in wanted)
    }


def stored(parameters: dict[str, nn.Parameter]) -> nn.ParameterDict:
    """Trained weights a second time, under a name of their own: all that a checkpoint holds and an optimiser sees."""
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return nn.ParameterDict({name.replace(".", "/"): value for name, value in parameters.items()})


def untrained_like(model: VisionTower, seed: int) -> VisionTower:
    """A vision transformer of the same architecture with fresh random weights, frozen and in eval mode."""
    kind: Any = type(model.tower)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = kind(model.tower.config).float()
    mean, std = (values.flatten().tolist() for values in (model.mean, model.std))
    return VisionTower(tower, mean, std).eval().requires_grad_(False)


def check_tune(tune: Tune, source: str, has_text: bool) -> None:
    """Refuse to train what is not there.

    Raises:
        SafelightError: ``text_proj`` without a text transformer.
    """
    if tune == "text_proj" and not has_text:
        raise SafelightError(
            f"tune=text_proj: {source} has no text transformer; give a CLIP, or tune=linear_probe, last_block, full or "
            "lora"
        )
