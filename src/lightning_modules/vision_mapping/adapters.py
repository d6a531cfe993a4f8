"""The trained map from a picture's patches to the language model: made, and read from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.errors import SafelightError

Kind = Literal["linear", "mlp"]
FILE, SETTINGS = "projection.safetensors", "config.json"
_PREFIXES = ("module.", "projection.")


def new_adapter(kind: Kind, d_in: int, d_out: int, seed: int, gain: float = 1.0) -> nn.Module:
    """A map with torch's initial weights, the same for the same seed.

    Args:
        kind: ``linear`` (paper) or ``mlp``, two layers with a GELU between them (LLaVA-1.5).
        d_in: width of the vision transformer.
        d_out: width of the language model.
        seed: of the weights.
        gain: what they are multiplied by.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: nn.Module = nn.Linear(d_in, d_out)
        if kind == "mlp":
            made = nn.Sequential(made, nn.GELU(), nn.Linear(d_out, d_out))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(gain)
    return made


def load_adapter(adapter: nn.Module, source: str) -> None:
    """Put weights of a file into an adapter.

    Args:
        adapter: of the right kind and widths.
        source: an exported folder or a run with one, ``projection.safetensors``, a checkpoint of ours, or a state dict
            (``.pth``) with the names of :class:`torch.nn.Linear`, as the authors' training writes it. Prefixes
            ``module.`` (of DDP) and ``projection.`` are taken off.

    Raises:
        SafelightError: there is no such file, or it holds another map.
    """
    state = _stripped(_read(source))
    own = adapter.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    wanted = {name: tuple(value.shape) for name, value in own.items()}
    if shapes != wanted:
        raise SafelightError(f"adapter_ckpt: {source} holds {shapes}, this adapter is {wanted}")
    adapter.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()})


def _read(source: str) -> dict[str, Tensor]:
    path = Path(source).expanduser()
    for folder in (path / "export", path):
        if (folder / FILE).is_file():
            path = folder / FILE
            break
    if not path.is_file():
        raise SafelightError(f"adapter_ckpt: there is no file {path}, nor {FILE} in a folder of that name")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise SafelightError(f"adapter_ckpt: {path} cannot be read ({error})") from error
    except Exception as error:  # what an untrusted pickle raises has no common class
        raise SafelightError(f"adapter_ckpt: {path} holds more than tensors, which is not read ({error})") from error
    if isinstance(content, dict) and "state_dict" in content:
        # Of a whole run only the map is wanted; its dictionaries are read where they are asked for.
        content = {name: value for name, value in content["state_dict"].items() if name.startswith("projection.")}
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise SafelightError(f"adapter_ckpt: {path} is no state dict")
    return content


def _stripped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def write_adapter(adapter: nn.Module, folder: Path, settings: dict[str, Any]) -> None:
    """Write ``projection.safetensors``, whose names are those of the torch module, and ``config.json``."""
    save_file({name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()}, folder / FILE)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
