"""Safety experts as plain matrices: read from peft, written as diffusers LoRA files, multiplied into weights and back.

The scale of an adapter is folded into B everywhere, so that ``B A`` is the change of the weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.reporting.files import write_text

FILE = "pytorch_lora_weights.safetensors"
"""Where diffusers' ``load_lora_weights`` looks."""
FACTS = "safety_dpo.json"


class LowRank(NamedTuple):
    """Change of one weight as a product.

    Attributes:
        a: (R, d_in).
        b: (d_out, R), scale included.
    """

    a: Tensor
    b: Tensor

    @property
    def delta(self) -> Tensor:
        """``B A``, (d_out, d_in)."""
        return self.b @ self.a


Adapter = dict[str, LowRank]
"""Changes of ``Linear`` weights by their path in the denoiser."""


def tuned_layers(denoiser: nn.Module) -> dict[str, Any]:
    """The layers of a denoiser that peft has wrapped, by path."""
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in denoiser.named_modules() if isinstance(module, LoraLayer)}


def read_adapter(denoiser: nn.Module, name: str) -> Adapter:
    """One of the adapters that peft holds in a denoiser, detached.

    Args:
        denoiser: wrapped in place by peft.
        name: of the adapter.

    Raises:
        SafelightError: there is none of that name.
    """
    layers = {path: layer for path, layer in tuned_layers(denoiser).items() if name in layer.lora_A}
    if not layers:
        raise SafelightError(f"adapter: the denoiser has none called {name!r}")
    return {
        path: LowRank(
            layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach() * float(layer.scaling[name])
        )
        for path, layer in layers.items()
    }


def save_adapter(folder: Path, adapter: Mapping[str, LowRank], part: str, facts: Mapping[str, Any]) -> Path:
    """Write an adapter as diffusers does, with what is known about it beside it.

    No alpha is stored: diffusers then takes the rank for it, which is a scale of 1.

    Args:
        folder: created if missing.
        adapter: what to write.
        part: the denoiser's name in its pipeline, ``unet`` or ``transformer``.
        facts: JSON values.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, pair in adapter.items():
        tensors[f"{part}.{path}.lora_A.weight"] = pair.a.cpu().contiguous()
        tensors[f"{part}.{path}.lora_B.weight"] = pair.b.cpu().contiguous()
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    write_text(folder / FACTS, json.dumps(dict(facts), indent=1) + "\n")
    return folder / FILE


def load_adapter(folder: Path) -> tuple[Adapter, dict[str, Any]]:
    """Read what :func:`save_adapter` wrote; alphas that other programs store are folded into B.

    Args:
        folder: with ``pytorch_lora_weights.safetensors``, or the run folder of a training with it in ``export/``.

    Returns:
        The adapter, and the facts beside it, empty where there are none.

    Raises:
        SafelightError: there is no such file, or it is no LoRA for linear layers.
    """
    found = next((place for place in (folder, folder / "export") if (place / FILE).is_file()), None)
    if found is None:
        raise SafelightError(f"{folder} holds no {FILE}; give the export folder of a safety_dpo run")
    file, facts = found / FILE, found / FACTS
    try:
        tensors = load_file(file)
        known = json.loads(facts.read_text(encoding="utf-8")) if facts.is_file() else {}
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SafelightError(f"{found}: cannot be read ({error})") from error
    adapter: Adapter = {}
    for key, a in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        stem = key.removesuffix(".lora_A.weight")
        b = tensors.get(f"{stem}.lora_B.weight")
        if b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise SafelightError(f"{file}: {stem} is no pair of matrices (R, d_in) and (d_out, R)")
        alpha = tensors.get(f"{stem}.alpha")
        adapter[stem.partition(".")[2]] = LowRank(a, b if alpha is None else b * (float(alpha) / a.shape[0]))
    if not adapter:
        raise SafelightError(f"{file}: holds no lora_A.weight; keys start with {sorted(tensors)[:1]}")
    return adapter, known


def _linear(denoiser: nn.Module, path: str) -> nn.Linear:
    try:
        layer: Any = denoiser.get_submodule(path)
    except AttributeError as error:
        raise SafelightError(
            f"adapter: {type(denoiser).__name__} has no layer {path}; is it for another model?"
        ) from error
    layer = getattr(layer, "base_layer", layer)
    if not isinstance(layer, nn.Linear):
        raise SafelightError(f"adapter: {path} of {type(denoiser).__name__} is a {type(layer).__name__}, not a Linear")
    return layer


@torch.no_grad()
def fuse(denoiser: nn.Module, adapter: Mapping[str, LowRank], scale: float = 1.0) -> dict[str, Tensor]:
    """Add an adapter to the weights of a denoiser.

    Args:
        denoiser: plain, or wrapped in place by peft, whose own adapters stay as they are.
        adapter: what to add.
        scale: how much of it.

    Returns:
        The weights from before, for :func:`unfuse`.

    Raises:
        SafelightError: a layer is missing or has another shape; nothing is changed then.
    """
    layers = {path: _linear(denoiser, path) for path in adapter}
    for path, layer in layers.items():
        shape = (adapter[path].b.shape[0], adapter[path].a.shape[1])
        if layer.weight.shape != shape:
            raise SafelightError(f"adapter: {path} has a weight of {tuple(layer.weight.shape)}, the adapter {shape}")
    before = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    for path, layer in layers.items():
        # In fp32: a small change would be lost in the rounding of a half-precision product.
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        delta = LowRank(*(value.to(layer.weight.device, wide) for value in adapter[path])).delta
        layer.weight.copy_(layer.weight.to(wide) + scale * delta)
    return before


@torch.no_grad()
def unfuse(denoiser: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Put back the weights that :func:`fuse` returned, bit for bit."""
    for path, weight in before.items():
        _linear(denoiser, path).weight.copy_(weight)


@contextmanager
def fused(denoiser: nn.Module, adapter: Mapping[str, LowRank] | None, scale: float = 1.0) -> Iterator[None]:
    """A denoiser with an adapter in its weights for the length of a ``with`` block; None for none."""
    before = fuse(denoiser, adapter or {}, scale)
    try:
        yield
    finally:
        unfuse(denoiser, before)
