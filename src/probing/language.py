"""Frozen language models: where they come from, and what the next token costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight import zoo
from safelight.errors import SafelightError

ZOO = "zoo:"


def locate(source: str) -> tuple[str, bool]:
    """Folder or hub id of a model, and whether it is a folder.

    Args:
        source: ``zoo:<entry>``, a folder (a run's means what it exported), or an id on the hub.

    Raises:
        SafelightError: a folder is meant, and it is not there.
    """
    if source.startswith(ZOO):
        return str(zoo.path(source.removeprefix(ZOO))), True
    folder = Path(source).expanduser()
    if (folder / "export" / "config.json").is_file():
        folder = folder / "export"
    if folder.is_dir():
        return str(folder), True
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise SafelightError(f"model: there is no folder {source}")
    return source, False


def load_language_model(source: str, *, dtype: str = "float32", trust_remote_code: bool = False) -> nn.Module:
    """A causal language model of transformers, frozen and in eval mode.

    Args:
        source: see :func:`locate`.
        dtype: of the weights; a file's own would be bfloat16 for many.
        trust_remote_code: run code that lies beside the weights (exports of ``method=moe_x`` bring theirs).

    Raises:
        SafelightError: it is not there, or brings code that was not allowed.
    """
    from transformers import AutoModelForCausalLM

    name, local = locate(source)
    if local and not trust_remote_code and "auto_map" in _config(name):
        raise SafelightError(
            f"model: {source} brings its own code; look at the .py files in {name}, then set "
            "method.trust_remote_code=true"
        )
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), local_files_only=local, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SafelightError(
            f"model: {source} cannot be loaded ({reason}); give a folder with config.json and model.safetensors, an "
            "id that this machine can reach, or zoo:tiny_lm"
        ) from error
    return model.eval().requires_grad_(False)


def _config(folder: str) -> dict[str, Any]:
    file = Path(folder) / "config.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def load_tokenizer(source: str) -> Any:
    """The tokenizer beside a language model.

    Raises:
        SafelightError: there is none.
    """
    from transformers import AutoTokenizer

    name, local = locate(source)
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local)
    except Exception as error:  # a damaged tokenizer.json raises nothing more special
        raise SafelightError(f"model: {source} has no tokenizer that can be loaded ({error})") from error


def width_of(model: nn.Module) -> int:
    """Width of a transformers model's residual stream."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    width = getattr(config, "hidden_size", None) or getattr(config, "n_embd", None) or getattr(config, "d_model", None)
    if not isinstance(width, int):
        raise SafelightError(f"model: the configuration of {type(model).__name__} does not tell its width")
    return width


def token_losses(model: nn.Module, tokens: Tensor) -> Tensor:
    """(B, T), cross entropy in nats of each of the tokens (B, T + 1) but the first."""
    logits = model(tokens[:, :-1]).logits
    losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1)


@torch.no_grad()
def logit_lens(model: nn.Module, direction: Tensor) -> Tensor:
    """(..., V), what directions (..., d) in the residual stream add to the logits if only the last norm followed.

    The norm's weight is applied (Gemma's counts from 1) and, where it takes the mean away, that as well; its scale is
    left out, so only the order of tokens means something.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    norm = last_norm(model)
    if isinstance(norm, nn.LayerNorm):
        direction = direction - direction.mean(-1, keepdim=True)
    weight: Any = getattr(norm, "weight", None)
    if weight is not None:
        direction = direction * (1 + weight if type(norm).__name__.startswith("Gemma") else weight)
    return F.linear(direction.to(head.weight.dtype), head.weight)


def last_norm(model: nn.Module) -> nn.Module | None:
    """The norm before the head; None where it is at no known place."""
    for path in ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm"):
        try:
            return model.get_submodule(path)
        except AttributeError:
            continue
    return None
