"""From a name, a folder, a hub id or a mapping to a :class:`Generator`."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safelight.errors import SafelightError
from safelight.generators.settings import DTYPES, FAMILIES, KEYS
from safelight.generators.weights import align, check_weights
from safelight.quiet import quiet

if TYPE_CHECKING:
    from safelight.generators.base import Generator

logger = logging.getLogger(__name__)

_GENERATORS = {"flux": "FluxGenerator", "sd3": "SD3Generator", "unet": "UNetGenerator", "dit": "DiTGenerator"}
_OFFLINE = "backbone=tiny_flux and backbone=tiny_sdxl ship with Safelight and run without any download"


def generator_for(denoiser: Any) -> type[Generator]:
    """The generator class for a denoiser, picked by the denoiser's class.

    Raises:
        SafelightError: If the denoiser is of no supported family.
    """
    for cls in type(denoiser).__mro__:
        if cls.__name__ in FAMILIES:
            family = FAMILIES[cls.__name__]
            found: type[Generator] = getattr(import_module(f"safelight.generators.{family}"), _GENERATORS[family])
            return found
    raise SafelightError(
        f"denoiser: {type(denoiser).__name__} is not supported; supported are {', '.join(FAMILIES)}, and any velocity "
        "network through safelight.generators.VelocityGenerator"
    )


def load_generator(spec: str | Path | Mapping[str, Any] | Generator, **overrides: Any) -> Generator:
    """Load a generator.

    Args:
        spec: One of: the name of a shipped backbone (``"tiny_flux"``, ``"sdxl"``); ``"zoo:<name>"``; a local diffusers
            folder, or a run folder with one in ``export/``; a hub id; a mapping with the keys of a
            ``configs/backbone/*.yaml``; a :class:`Generator`, which is returned after applying the overrides. Settings
            that are missing or ``None`` come from the folder's ``safelight.json``, else from the model family.
        **overrides: The same keys as the mapping; they win.

    Returns:
        The generator, frozen and in eval mode.

    Raises:
        SafelightError: If a key is unknown, the weights cannot be found or read, or they are not safetensors.
    """
    from safelight.generators.base import Generator

    if isinstance(spec, Generator):
        return _adjusted(spec, overrides)
    config = {**_as_mapping(spec), **overrides}
    _check_keys(config)
    pretrained = config.get("pretrained")
    if not pretrained:
        raise SafelightError("backbone.pretrained: missing; give 'zoo:<name>', a local diffusers folder or a hub id")
    source, folder = _locate(str(pretrained))
    settings = _stored_settings(folder) | {key: value for key, value in config.items() if value is not None}
    dtype = _torch_dtype(settings.get("dtype") or "float32")
    pipeline = _load_pipeline(source, folder, dtype)
    denoiser = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    family = settings.get("family")
    if family and generator_for(denoiser).family != family:
        raise SafelightError(
            f"backbone.family={family!r}: {source} is of the family {generator_for(denoiser).family!r}; the other "
            "settings of this backbone are not meant for it"
        )
    chosen = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length", "name")
    keywords = {key: settings[key] for key in chosen if settings.get(key) is not None}
    keywords.setdefault("name", Path(source).name)
    generator = generator_for(denoiser)(pipeline, source=source, **keywords)
    generator.to(config.get("device"), dtype)
    for module in generator._modules():
        align(module)
    return generator


def backbone_names() -> list[str]:
    """Names of the shipped ``configs/backbone/*.yaml``, sorted."""
    from importlib.resources import files

    folder = files("safelight.configs") / "backbone"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _adjusted(generator: Generator, overrides: Mapping[str, Any]) -> Generator:
    rest = dict(overrides)
    device, dtype = rest.pop("device", None), rest.pop("dtype", None)
    generator.configure(**rest)
    return generator.to(device, None if dtype is None else _torch_dtype(dtype))


def _as_mapping(spec: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(spec, Mapping):
        return dict(spec)
    if isinstance(spec, str) and spec in backbone_names():
        from importlib.resources import files

        import yaml

        text = (files("safelight.configs") / "backbone" / f"{spec}.yaml").read_text(encoding="utf-8")
        config: dict[str, Any] = yaml.safe_load(text)
        return config
    return {"pretrained": str(spec)}


def _check_keys(config: Mapping[str, Any]) -> None:
    unknown = [key for key in config if key not in KEYS]
    if unknown:
        near = difflib.get_close_matches(unknown[0], KEYS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SafelightError(
            f"backbone.{unknown[0]}={config[unknown[0]]!r}: unknown key{hint}; keys are {', '.join(KEYS)}"
        )


def _torch_dtype(name: Any) -> Any:
    import torch

    text = str(name).removeprefix("torch.")
    if text not in DTYPES:
        raise SafelightError(f"backbone.dtype={name!r}: choose one of {', '.join(DTYPES)}")
    return getattr(torch, text)


def _locate(pretrained: str) -> tuple[str, Path | None]:
    """Where to read from: ``(source, folder)``; ``folder`` is ``None`` for a hub id."""
    if pretrained.startswith("zoo:"):
        from safelight.zoo import path

        folder = Path(path(pretrained.removeprefix("zoo:")))
        return str(folder), folder
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        found = _pipeline_folder(folder)
        return str(found), found
    looks_local = pretrained.startswith((".", "/", "~")) or "\\" in pretrained or pretrained.count("/") > 1
    if looks_local or folder.exists():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise SafelightError(f"backbone.pretrained: {pretrained} {what}{_neighbour_hint(folder)}; {_OFFLINE}")
    if pretrained.count("/") == 1:
        return pretrained, None
    near = difflib.get_close_matches(pretrained, backbone_names(), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise SafelightError(
        f"backbone.pretrained: {pretrained!r} is neither a folder nor a backbone{hint}; "
        f"backbones are {', '.join(backbone_names())}"
    )


def _pipeline_folder(folder: Path) -> Path:
    """The diffusers folder in a pipeline folder, an export folder or a run folder."""
    for candidate in (folder, folder / "pipeline", folder / "export", folder / "export" / "pipeline"):
        if (candidate / "model_index.json").is_file():
            return candidate
    raise SafelightError(
        f"backbone.pretrained: {folder} holds no diffusers pipeline (no model_index.json in it or in its export "
        f"folder); {_OFFLINE}"
    )


def _neighbour_hint(folder: Path) -> str:
    parent = folder.parent
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, names, n=1)
    return f" (did you mean {parent / near[0]}?)" if near else ""


def _stored_settings(folder: Path | None) -> dict[str, Any]:
    from safelight.generators.saving import SETTINGS_FILE

    file = folder / SETTINGS_FILE if folder is not None else None
    if file is None or not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SafelightError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise SafelightError(f"{file}: holds a {type(content).__name__}, not settings by name")
    return {key: value for key, value in content.items() if key in KEYS and value is not None}


def _load_pipeline(source: str, folder: Path | None, dtype: Any) -> Any:
    parts: dict[str, Any] = {}
    if folder is not None:
        check_weights(folder)
        for name in ("unet", "transformer"):
            if (folder / name / "pruning.json").is_file():
                parts[name] = _load_pruned(folder / name, dtype)
    try:
        with quiet():
            from diffusers import DiffusionPipeline

            # The dtype is always stated: transformers 5 would else take the one stored in the checkpoint.
            return DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **parts)
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        raise SafelightError(_explain(source, folder, error)) from error


def _load_pruned(folder: Path, dtype: Any) -> Any:
    """A pruned denoiser; its loader ships with the artefact and so knows no SafelightError."""
    from safelight.masking import load_pruned

    try:
        return load_pruned(folder).to(dtype)
    except SafelightError:
        raise
    except (OSError, ValueError, RuntimeError, AttributeError, TypeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise SafelightError(f"backbone.pretrained: the pruned model in {folder} cannot be opened: {reason}") from error


def _explain(source: str, folder: Path | None, error: Exception) -> str:
    """One readable sentence for what from_pretrained raised."""
    reason = str(error).strip().splitlines()[0].split(" (")[0][:200] if str(error).strip() else type(error).__name__
    if folder is not None:
        return f"backbone.pretrained: cannot load the pipeline in {folder}: {reason}"
    if type(error).__name__ == "GatedRepoError":
        return f"backbone.pretrained: {source} is gated; accept its licence and run 'hf auth login'; {_OFFLINE}"
    return (
        f"backbone.pretrained: {source} is not on this machine and could not be downloaded ({reason}). Set "
        f"backbone.pretrained=<folder>, a diffusers folder with model_index.json and safetensors weights; {_OFFLINE}"
    )
