"""Sparse autoencoders as files: those of four libraries are read as sae-lens' own, and its own are written.

What is read takes the model's vectors as they are, unscaled, in float32. Its weights are frozen.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from safelight import zoo
from safelight.errors import SafelightError
from safelight.probing.dictionary import sae_lens

Weights = dict[str, Tensor]
HUB = "sae-lens:"
ZOO = "zoo:"
FORMATS: dict[str, tuple[str, ...]] = {
    "sae-lens": ("cfg.json", "sae_weights.safetensors"),
    "gemma-scope": ("params.npz",),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
}
"""Formats, and the files by which a folder is known to have one."""
TOLERANCE = 1e-4
"""How far codes and reconstructions of a written SAE may be from the original's, relative to their norm."""

_LOOKED_FOR = "; ".join(f"{name}: {' and '.join(files)}" for name, files in FORMATS.items())
_BY_THRESHOLD = ("batchtopk", "matryoshka_batchtopk")
_WRITABLE = ("standard", "gated", "jumprelu", "topk", *_BY_THRESHOLD)
_READABLE = (*_WRITABLE, "abstopk", "matching_pursuit")
# What sparsify can add to a plain TopK autoencoder; each would change its codes or what it puts together again.
_PLAIN = {"activation": "topk"} | dict.fromkeys(("transcode", "skip_connection", "embed_skip", "gram_lookup", "signed"))
# What the libraries call tensors that sae-lens calls otherwise.
_NAMES = {
    "encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "bias": "b_dec",
    "decoder_bias": "b_dec", "gate_bias": "b_gate", "mag_bias": "b_mag", "w_enc": "W_enc", "w_dec": "W_dec",
}  # fmt: skip
_JUMPRELU = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_GATED_DECODER = ("decoder.weight", "decoder_bias")
_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
# Classes of dictionary_learning: architecture, tensors, and further tensors that inference can do without.
_CLASSES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "AutoEncoder": ("standard", (*_LINEAR, "bias"), ()),
    "AutoEncoderTopK": ("topk", (*_LINEAR, "b_dec"), ("k", "threshold")),
    "BatchTopKSAE": ("jumprelu", (*_LINEAR, "b_dec", "threshold"), ("k",)),
    "JumpReluAutoEncoder": ("jumprelu", _JUMPRELU, ()),
    "GatedAutoEncoder": ("gated", ("encoder.weight", "r_mag", "gate_bias", "mag_bias", *_GATED_DECODER), ()),
}
# These multiply a code by the norm of its row of the decoder and divide by it again to decode.
_CODES_IN_DECODER_NORMS = ("JumpReluAutoEncoder", "GatedAutoEncoder")


def sae_format(path: Path) -> str | None:
    """Which of :data:`FORMATS` a folder, or an ``.npz`` file, has; None for another. No weight is read."""
    if path.is_file():
        return "gemma-scope" if path.suffix == ".npz" else None
    return next((name for name, files in FORMATS.items() if all((path / file).is_file() for file in files)), None)


def read_sae(source: str, device: str = "cpu") -> Any:
    """An inference SAE of sae-lens, in float32, in eval mode, without gradients.

    Codes are those of the library that wrote the files. Nothing in a file is executed.

    Args:
        source: a folder in one of :data:`FORMATS`; Gemma Scope's ``.npz``; a folder with ``export/`` or with exactly
            one SAE anywhere below; ``zoo:<entry>/<folder below>``; or ``sae-lens:<release>/<sae_id>`` of the hub.
        device: where it is to be.

    Raises:
        SafelightError: sae-lens is not installed, there is no SAE, or it is damaged or of an unknown kind.
    """
    if source.startswith(HUB):
        return _ready(_from_hub(source), source, device)
    place = _place(source)
    readers = (_read_lens, _read_gemma_scope, _read_sparsify, _read_dictionary_learning)
    reader = dict(zip(FORMATS, readers, strict=True))[sae_format(place) or ""]
    return _ready(reader(place), str(place), device)


def write_sae(sae: Any, folder: Path, *, scale: float = 1.0, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write an SAE as a folder from which sae-lens loads its inference model; it is read back and compared.

    An SAE that was fed ``x * scale`` is written as one that takes ``x``. Its reconstructions have the units of ``x``:
    they are the old ones divided by ``scale``. Its codes are the old ones on ``x * scale``, number by number, for
    every architecture: codes stay in the units of training, and the decoder has the ``1 / scale``. To that end the
    decoder's norms, by which ``topk``, ``batchtopk`` and ``matryoshka`` weigh their codes, go into the encoder first;
    sae-lens' own folding alone would divide these codes by ``scale``. The last two become ``jumprelu``, with the
    threshold they have learnt.

    Args:
        sae: of sae-lens, for training or inference; it stays as it is.
        folder: to write ``cfg.json`` and ``sae_weights.safetensors`` to, in float32; made if it is not there.
        scale: what vectors were multiplied with.
        metadata: further entries of the file's metadata, such as ``model_name`` and ``hook_name``.

    Returns:
        The folder.

    Raises:
        SafelightError: an argument cannot be used, or what is read back differs by more than :data:`TOLERANCE`.
    """
    _refuse_to_write(sae, scale)
    try:
        entries = json.loads(json.dumps(dict(metadata or {})))
    except (TypeError, ValueError) as error:
        raise SafelightError(f"metadata: give only what JSON can hold ({error})") from error
    model = copy.deepcopy(sae).to(device="cpu", dtype=torch.float32)
    for tensor in model.parameters():
        tensor.data = tensor.data.contiguous()
    if sae.cfg.architecture() == "jumprelu":
        # A training step clamps it before use, so one that the last update left below 0 means 0.
        model.threshold.data.clamp_(min=0.0)
    with torch.no_grad():
        x = _vectors(model.b_dec) / scale
        codes = _codes(model, x * scale)
        made = model.decode(codes) / scale
        if getattr(model.cfg, "rescale_acts_by_decoder_norm", False):
            model.fold_W_dec_norm()
            model.cfg.rescale_acts_by_decoder_norm = False
        model.fold_activation_norm_scaling_factor(scale)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            _save(model, sae.cfg, Path(draft), entries)
            _compare(read_sae(draft), x, codes, made, folder)
            for name in FORMATS["sae-lens"]:
                os.replace(Path(draft) / name, folder / name)
    return folder


def _refuse_to_write(sae: Any, scale: float) -> None:
    kind = sae.cfg.architecture()
    if kind not in _WRITABLE:
        raise SafelightError(f"sae: the architecture {kind!r} cannot be written; give one of {', '.join(_WRITABLE)}")
    normalized, reshaped = sae.cfg.normalize_activations, sae.cfg.reshape_activations
    if normalized not in ("none", "expected_average_only_in") or reshaped != "none":
        raise SafelightError(
            f"sae: normalize_activations={normalized!r} with reshape_activations={reshaped!r} cannot go into weights; "
            "both must be 'none', and scale= says what vectors were multiplied with"
        )
    if not (math.isfinite(scale) and scale > 0):
        raise SafelightError(f"scale={scale}: give a finite number above 0")
    _refuse_not_finite(sae, "sae")


def _save(model: Any, original: Any, folder: Path, metadata: dict[str, Any]) -> None:
    if hasattr(model, "save_inference_model"):
        model.save_inference_model(folder)
        # How it was trained, said by the configuration as it was: that of the model has its norms folded.
        metadata = {"training_architecture_details": original.get_training_architecture_details()} | metadata
    else:
        model.save_model(folder)
    file = folder / "cfg.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["metadata"] |= metadata
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _vectors(centre: Tensor) -> Tensor:
    """Vectors (32, d_in) around ``centre`` (d_in,), from small to large, always the same ones."""
    noise = torch.randn(32, len(centre), generator=torch.Generator().manual_seed(0))
    return centre + noise * torch.logspace(0, 2, 32)[:, None]


def _codes(sae: Any, x: Tensor) -> Tensor:
    """Codes (N, d_sae) of ``x`` (N, d_in) as they are at inference."""
    codes: Tensor
    if sae.cfg.architecture() in _BY_THRESHOLD:
        hidden = sae.encode_with_hidden_pre(x)[1]
        codes = hidden.relu() * (hidden > sae.topk_threshold)
    else:
        codes = sae.encode(x)
    return codes.to_dense() if codes.is_sparse else codes


def _compare(sae: Any, x: Tensor, codes: Tensor, made: Tensor, folder: Path) -> None:
    """Fail where ``sae`` does not give ``codes`` (N, d_sae) of ``x`` and ``made`` (N, d_in) of ``codes``."""
    found = sae.encode(x)
    active, also = codes != 0, found != 0
    both = active & also
    # Where a feature is just about to fire, rounding decides; among many features there is always one.
    flipped = int((active != also).sum())
    off = {"codes": _distance(found[both], codes[both]), "reconstruction": _distance(sae.decode(codes), made)}
    wrong = [f"{name} by {error:.2g}" for name, error in off.items() if not error <= TOLERANCE]
    if flipped > 1e-3 * int(active.sum()):
        wrong.append(f"which features are active in {flipped} of {int(active.sum())} cases")
    if wrong:
        raise SafelightError(
            f"{folder}: nothing is written, for what is read back differs from the SAE in {', '.join(wrong)} "
            f"(allowed: {TOLERANCE:g}); sae-lens may have changed its files"
        )


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp(min=torch.finfo(wanted.dtype).tiny))


def _place(source: str) -> Path:
    """The folder or file of ``source`` that has a format."""
    entry, _, below = source.removeprefix(ZOO).partition("/")
    path = zoo.path(entry) / below if source.startswith(ZOO) else Path(source).expanduser()
    if sae_format(path):
        return path
    if not path.is_dir():
        what = "this file is no SAE" if path.exists() else "there is no such file or folder"
        raise SafelightError(f"{source}: {what}; give a folder with the files of one ({_LOOKED_FOR}), or {HUB}...")
    start = path / "export" if (path / "export").is_dir() else path
    found = sorted(folder for folder in (start, *start.rglob("*")) if folder.is_dir() and sae_format(folder))
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(folder.relative_to(path)) for folder in found)
        raise SafelightError(f"{source} holds {len(found)} SAEs, so give the folder of one of them: {names}")
    names = ", ".join(sorted(file.name for file in start.iterdir())[:20]) or "nothing"
    raise SafelightError(f"{start} holds no SAE. Looked for, there and below: {_LOOKED_FOR}. It holds: {names}")


def _from_hub(source: str) -> Any:
    release, _, name = source.removeprefix(HUB).partition("/")
    if not release or not name:
        raise SafelightError(f"{source}: write {HUB}<release>/<sae_id>, or give a folder")
    lens = sae_lens()
    try:
        return lens.SAE.from_pretrained(release, name, device="cpu")
    except Exception as error:  # of the hub, of sae-lens or of the network: they have no common class
        raise SafelightError(
            f"{source} cannot be had from the hub ({_line(error)}); download its files elsewhere and give their "
            f"folder instead ({_LOOKED_FOR})"
        ) from error


def _read_lens(folder: Path) -> Any:
    config = _json(folder / "cfg.json")
    kind = config.get("architecture", "standard")  # the first releases had only this one and did not say so
    _refuse_unknown(kind, str(folder))
    lens = sae_lens()
    try:
        if kind not in _BY_THRESHOLD and "jumprelu_bandwidth" not in config:
            return lens.SAE.load_from_disk(folder, device="cpu", dtype="float32")
        # These only the training classes can read: the model for inference has another form.
        trained = lens.TrainingSAE.load_from_disk(folder, device="cpu", dtype="float32")
        weights = trained.state_dict()
        trained.process_state_dict_for_saving_inference(weights)
        settings = trained.cfg.get_inference_sae_cfg_dict()
    except Exception as error:  # sae-lens lets through whatever goes wrong underneath
        raise SafelightError(
            f"{folder}: sae-lens cannot read it ({_line(error)}); one of cfg.json and sae_weights.safetensors is "
            "damaged, or they do not belong together"
        ) from error
    return _built(settings.pop("architecture"), weights, folder, **settings)


def _read_gemma_scope(place: Path) -> Any:
    file = place if place.is_file() else place / "params.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    except Exception as error:  # of numpy, of the archive or of its compression: they have no common class
        raise SafelightError(f"{file} is damaged, or is no archive of plain numbers ({_line(error)})") from error
    found = {_NAMES.get(name, name): tensor for name, tensor in found.items()}
    return _built("jumprelu", _renamed(found, _JUMPRELU, file), file, apply_b_dec_to_input=False)


def _read_sparsify(folder: Path) -> Any:
    file, config = folder / "sae.safetensors", _json(folder / "cfg.json")
    odd = [f"{name}={config[name]!r}" for name, plain in _PLAIN.items() if (config.get(name) or plain) != plain]
    if odd:
        raise SafelightError(f"{folder / 'cfg.json'}: {', '.join(odd)} is not supported; only plain TopK is read")
    d_in, k = (_whole(config, name, folder / "cfg.json") for name in ("d_in", "k"))
    by_factor = not config.get("num_latents")
    d_sae = _whole(config, "expansion_factor" if by_factor else "num_latents", folder / "cfg.json")
    try:
        found = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise SafelightError(f"{file} is damaged ({_line(error)})") from error
    weights = _renamed(found, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), file)
    return _built("topk", weights, file, d_in=d_in, d_sae=d_sae * (d_in if by_factor else 1), k=k)


def _read_dictionary_learning(folder: Path) -> Any:
    file, trainer = folder / "ae.pt", _json(folder / "config.json").get("trainer")
    if not isinstance(trainer, dict):
        raise SafelightError(f"{folder / 'config.json'} has no 'trainer', where dictionary_learning says what it is")
    name = str(trainer.get("dict_class"))
    if name not in _CLASSES:
        raise SafelightError(f"{folder / 'config.json'}: dict_class={name!r} is not one of {', '.join(_CLASSES)}")
    kind, names, ignored = _CLASSES[name]
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of the archive, of the pickle or of torch: they have no common class
        raise SafelightError(
            f"{file} is damaged, or holds more than tensors, which is not read as it could run code "
            f"({_line(error)}); save the model's state_dict() alone"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise SafelightError(f"{file} is no state dict: save the model's state_dict() alone")
    sizes = (("d_in", "activation_dim"), ("d_sae", "dict_size"))
    settings: dict[str, Any] = {new: _whole(trainer, old, folder / "config.json") for new, old in sizes}
    if kind == "topk":
        settings["k"] = _whole({"k": found["k"].tolist()} if "k" in found else trainer, "k", file)
    if name == "JumpReluAutoEncoder":
        settings["apply_b_dec_to_input"] = bool(trainer.get("apply_b_dec_to_input", False))
    weights = _renamed(found, names, file, ignored)
    if kind == "jumprelu" and weights["threshold"].ndim == 0:
        weights["threshold"] = weights["threshold"].repeat(settings["d_sae"])
    sae = _built(kind, weights, file, **settings)
    if name in _CODES_IN_DECODER_NORMS:
        sae.fold_W_dec_norm()
    return sae


def _renamed(found: Weights, names: tuple[str, ...], file: Path, ignored: tuple[str, ...] = ()) -> Weights:
    """Tensors by sae-lens' names; torch's ``weight`` of a linear layer has them the other way round."""
    missing, unknown = [name for name in names if name not in found], sorted(found.keys() - {*names, *ignored})
    if missing or unknown:
        what = f"lacks {', '.join(missing)}" if missing else f"also has {', '.join(unknown)}; that is another model"
        raise SafelightError(f"{file} {what} (expected: {', '.join(names)})")
    for name in names:
        if _NAMES.get(name, name) in ("W_enc", "W_dec") and found[name].ndim != 2:
            raise SafelightError(f"{file}: {name} has the shape {tuple(found[name].shape)} and is no matrix")
    return {_NAMES.get(name, name): found[name].T if name.endswith(".weight") else found[name] for name in names}


def _built(kind: str, weights: Weights, place: Path, **settings: Any) -> Any:
    """An inference SAE with ``weights``; sizes that ``settings`` do not give are those of the encoder."""
    d_in, d_sae = weights["W_enc"].shape
    # On no device at all, initial weights take neither memory nor numbers of the global generator.
    settings = {"d_in": d_in, "d_sae": d_sae} | settings | {"dtype": "float32", "device": "meta"}
    sae = sae_lens().SAE.from_dict({"architecture": kind, **settings})
    for name, expected in sae.state_dict().items():
        if weights[name].shape != expected.shape:
            shapes = f"{tuple(weights[name].shape)}, expected is {tuple(expected.shape)}"
            raise SafelightError(f"{place}: {name} has the shape {shapes} (by its configuration, or by W_enc)")
    sae.load_state_dict({name: tensor.float().contiguous() for name, tensor in weights.items()}, assign=True)
    return sae.to(device="cpu", dtype=torch.float32)


def _ready(sae: Any, place: str, device: str) -> Any:
    """``sae``, frozen and on its device, once it is clear that its codes can mean something."""
    _refuse_unknown(sae.cfg.architecture(), place)
    if sae.cfg.normalize_activations == "expected_average_only_in":
        raise SafelightError(
            f"{place} expects vectors that are scaled to the norm sqrt(d_in), and does not say by what factor; "
            "call sae.fold_activation_norm_scaling_factor(factor) and save it again"
        )
    k = getattr(sae.cfg, "k", 1)
    if not isinstance(k, int) or not 0 < k <= sae.cfg.d_sae:
        raise SafelightError(f"{place}: k={k!r} of {sae.cfg.d_sae} features cannot be active")
    _refuse_not_finite(sae, place)
    return sae.eval().requires_grad_(False).to(device=device)


def _refuse_unknown(kind: Any, place: str) -> None:
    if kind not in _READABLE:
        raise SafelightError(f"{place}: the architecture {kind!r} is not one of {', '.join(_READABLE)}")


def _refuse_not_finite(sae: Any, place: str) -> None:
    for name, tensor in sae.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise SafelightError(f"{place}: {name} has numbers that are not finite; its training or the file is broken")


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SafelightError(f"{file} is not JSON ({_line(error)})") from error
    if not isinstance(content, dict):
        raise SafelightError(f"{file} holds a {type(content).__name__}, expected are names and values")
    return content


def _whole(config: Mapping[str, Any], name: str, file: Path) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SafelightError(f"{file}: {name}={value!r}, expected is a whole number above 0")
    return value


def _line(error: Exception) -> str:
    """An error's class and first 200 characters on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
