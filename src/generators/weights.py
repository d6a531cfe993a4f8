"""Check a diffusers folder before loading: safetensors only, and whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from torch import nn

_ALIGNMENT = 64
"""Bytes; what torch's own allocator gives."""
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_weights(folder: Path) -> None:
    """Refuse pickled or damaged weights by name.

    Only safetensors headers are read, so the check takes milliseconds. Pickled files beside safetensors ones are left
    alone: they are never opened.

    Args:
        folder: A diffusers pipeline folder.

    Raises:
        SafelightError: If a component has only pickled weights, or a safetensors file is damaged.
    """
    for component in _components(folder):
        tensors = sorted(component.glob("*.safetensors"))
        pickled = sorted(p for p in component.iterdir() if p.suffix in PICKLED)
        if pickled and not tensors:
            raise SafelightError(
                f"{pickled[0]}: pickled weights can run code when opened and are refused; convert them to safetensors "
                "with save_pretrained(safe_serialization=True)"
            )
        for file in tensors:
            check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Check that a safetensors file has a valid header and all the bytes it announces.

    Raises:
        SafelightError: If not; the message names the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise SafelightError(f"{file}: damaged safetensors file ({error}); copy or download it again") from error


def align(module: nn.Module) -> None:
    """Give weights that lie at odd addresses, as memory-mapped files leave them, memory of their own.

    Matrix products take other paths over unaligned memory and then differ in the last bits, so a model read from a file
    would not compute quite what its copy does.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()


def _components(folder: Path) -> list[Path]:
    """Subfolders of the pipeline's components, as its index lists them."""
    index = folder / "model_index.json"
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SafelightError(f"{index}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise SafelightError(f"{index}: holds a {type(content).__name__}, not a pipeline's components")
    names = [name for name, value in content.items() if isinstance(value, list) and value and value[0] is not None]
    return [folder / name for name in names if (folder / name).is_dir()]
