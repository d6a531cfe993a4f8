"""Masks, logits and pruned denoisers on disk: safetensors for numbers, JSON for names; nothing is pickled.

The one torch file read here is the authors' published list of logits, with ``weights_only=True``.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.masking import load
from safelight.masking.units import UnitSpec, check_names

_MASKS = "masks.safetensors"
_FORMAT = 1


def save_masks(
    path: str | Path, values: Mapping[str, Tensor], specs: Sequence[UnitSpec], meta: Mapping[str, Any] | None = None
) -> Path:
    """Write masks or logits by name, with a JSON file beside them that says what each layer is.

    Args:
        path: a folder (the file is then ``masks.safetensors``) or a ``.safetensors`` file.
        values: name to ``(n_units,)``; booleans for masks, floats for logits.
        specs: the layers.
        meta: anything JSON can hold: base model, command, settings.

    Returns:
        The safetensors file.

    Raises:
        SafelightError: a name or length does not fit the specs.
    """
    check_names(values, specs)
    file = _masks_file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in values.items()}, file)
    layers = {s.name: {"kind": s.kind, "n_units": s.n_units} for s in specs if s.name in values}
    content = {"format": _FORMAT, "meta": dict(meta or {}), "layers": layers}
    file.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    return file


def load_masks(path: str | Path, specs: Sequence[UnitSpec] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_masks`` wrote.

    Args:
        path: the folder or file.
        specs: when given, every layer must be present with its length.

    Returns:
        Values by name, and the ``meta`` that was saved with them.

    Raises:
        SafelightError: a file is missing, damaged or pickled, or does not fit the specs.
    """
    file = _masks_file(path)
    sidecar = file.with_suffix(".json")
    for needed in (file, sidecar):
        if not needed.is_file():
            raise SafelightError(f"{needed} is missing: masks are a safetensors file and a JSON file of the same name")
    try:
        values, content = load_file(file), json.loads(sidecar.read_text())
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SafelightError(f"masks in {file} are damaged: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("meta"), dict):
        raise SafelightError(f"{sidecar} does not describe masks: it has no 'meta'")
    if specs is not None:
        check_names(values, specs, complete=True)
    return values, content["meta"]


def import_reference_masks(
    attn_pt: str | Path | None,
    ff_pt: str | Path | None,
    specs: Sequence[UnitSpec],
    norm_pt: str | Path | None = None,
) -> dict[str, Tensor]:
    """Read the logits that the authors of EcoDiff and of Minimalist Concept Erasure publish.

    Their files are bare lists of tensors in execution order, one file per kind.

    Args:
        attn_pt: list of head logits, one tensor per attention layer.
        ff_pt: list of neuron logits, one tensor per feed-forward; in a FLUX block ``ff`` before ``ff_context``.
        specs: the units of the model they were trained on, from ``find_units`` or a ``MaskGroup`` (which list them in
            that order).
        norm_pt: list of modulation logits.

    Returns:
        Name to fp32 logits ``(n_units,)``.

    Raises:
        SafelightError: a file is missing, is no list of tensors, or its lengths differ from the model's.
    """
    logits: dict[str, Tensor] = {}
    for kind, file in (("head", attn_pt), ("neuron", ff_pt), ("modulation", norm_pt)):
        if file is None:
            continue
        tensors, layers = _read_list(Path(file)), [spec for spec in specs if spec.kind == kind]
        lengths, expected = [t.numel() for t in tensors], [spec.n_units for spec in layers]
        if lengths != expected:
            raise SafelightError(
                f"{file} holds {len(lengths)} layers with {sum(lengths)} {kind}s; "
                f"this model has {len(expected)} layers with {sum(expected)}, which must match one by one"
            )
        logits |= {s.name: t.detach().float().flatten() for s, t in zip(layers, tensors, strict=True)}
    return logits


def save_pruned(denoiser: nn.Module, folder: str | Path, meta: Mapping[str, Any] | None = None) -> Path:
    """Write a removed denoiser: config.json, safetensors, pruning.json and a loader that needs no Safelight.

    One line opens it: ``from load import load_pruned; denoiser = load_pruned(folder)``.

    Args:
        denoiser: a diffusers model after ``remove``.
        folder: where to; created when absent.
        meta: anything JSON can hold, such as the base model's id.

    Returns:
        The folder.

    Raises:
        SafelightError: the model was not pruned.
    """
    cast(Any, denoiser).save_pretrained(folder, safe_serialization=True)
    return write_manifest(denoiser, folder, meta)


def write_manifest(denoiser: nn.Module, folder: str | Path, meta: Mapping[str, Any] | None = None) -> Path:
    """Put pruning.json and load.py into a folder that already holds the removed denoiser's config and weights.

    For pipelines: set the component, call ``pipeline.save_pretrained(folder)``, then this on its ``unet`` or
    ``transformer`` subfolder; ``load_pipeline(folder)`` opens the whole.

    Raises:
        SafelightError: the model was not pruned.
    """
    stages = getattr(denoiser, "pruning_stages", None)
    if not stages:
        raise SafelightError("this denoiser has no record of removed units; call remove(denoiser, masks) first")
    folder = Path(folder)
    content = {"format": _FORMAT, "meta": dict(meta or {}), "stages": stages}
    (folder / load.MANIFEST).write_text(json.dumps(content, separators=(",", ":")) + "\n")
    (folder / "load.py").write_text(Path(load.__file__).read_text())
    return folder


def _masks_file(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".bin", ".pkl"):
        raise SafelightError(f"{path} is a pickled file; masks are read from and written to .safetensors")
    return path if path.suffix == ".safetensors" else path / _MASKS


def _read_list(file: Path) -> list[Tensor]:
    if not file.is_file():
        raise SafelightError(f"{file} is missing")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SafelightError(f"{file} is damaged or holds more than tensors: {reason}") from error
    if not isinstance(content, list) or not all(isinstance(item, Tensor) for item in content):
        raise SafelightError(f"{file} holds a {type(content).__name__}, not a list of tensors")
    return content
