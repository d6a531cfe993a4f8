"""Open a pruned diffusers denoiser, or a pipeline that holds one. Needs torch, diffusers and safetensors only.

    from load import load_pruned
    denoiser = load_pruned("folder")              # the folder that holds pruning.json
    pipeline = load_pipeline("pipeline folder")   # its unet/ or transformer/ may be pruned

``pruning.json`` lists, per layer, the units that were kept and the rows and columns they own; the skeleton is built
from ``config.json`` without allocating its weights, narrowed, and filled from the safetensors files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

MANIFEST = "pruning.json"


class ScatterLinear(nn.Module):
    """A ``Linear`` whose pruned outputs are exactly zero: a smaller one, scattered into the original width."""

    kept: torch.Tensor

    def __init__(self, linear: nn.Linear, kept: torch.Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.sparse_proj = linear
        _take_rows(self.sparse_proj, kept)
        self.register_buffer("kept", kept.to(linear.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)`` with zeros where outputs were pruned."""
        values: torch.Tensor = self.sparse_proj(x)
        wide = values.new_zeros(*values.shape[:-1], self.out_features)
        return wide.index_copy(-1, self.kept, values)


class EmptyAttention(nn.Module):
    """An attention layer without heads: it returns its output bias (zeros without one), for joint attention a pair.

    It keeps the children of the layer it replaces, so the names in the state dict stay.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.heads = 0
        self.fused_projections = False
        self.residual_connection = getattr(attention, "residual_connection", False)
        self.rescale_output_factor = getattr(attention, "rescale_output_factor", 1.0)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the bias with the shape the whole layer would return."""
        tokens = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        output = self._bias(getattr(self, "to_out", None), tokens)
        if hidden_states.ndim == 4:
            output = output.transpose(1, 2).reshape(hidden_states.shape)
        if self.residual_connection:
            output = output + hidden_states
        if self.rescale_output_factor != 1.0:
            output = output / self.rescale_output_factor
        if encoder_hidden_states is None or getattr(self, "add_q_proj", None) is None:
            return output
        return output, self._bias(getattr(self, "to_add_out", None), encoder_hidden_states)

    @staticmethod
    def _bias(projection: Any, like: torch.Tensor) -> torch.Tensor:
        nothing = like[..., :0]
        if projection is None:  # a block that projects later, or a context stream that ends here
            return nothing
        projected: torch.Tensor = (projection[0] if isinstance(projection, nn.ModuleList) else projection)(nothing)
        return projected


def narrow(denoiser: nn.Module, layers: list[dict[str, Any]]) -> None:
    """Delete the pruned units of a dense model in place; on the meta device only the shapes change.

    Args:
        denoiser: the model.
        layers: entries of the manifest: ``name``, ``kind``, ``n_units``, ``group``, ``kept`` (indices), ``consumers``
            and ``producers`` (lists of ``[module path, first feature]``).
    """
    rows: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    for layer in layers:
        kept = torch.zeros(layer["n_units"], dtype=torch.bool)
        kept[torch.tensor(layer["kept"], dtype=torch.long)] = True
        features = kept.repeat_interleave(layer["group"])
        if layer["kind"] in ("modulation", "linear"):
            if not bool(kept.all()):
                path = layer["consumers"][0][0]
                _replace(denoiser, path, lambda old, k=kept: ScatterLinear(old, k.nonzero()[:, 0]))
            continue
        for sites, masks, width in (
            (layer["producers"], rows, "out_features"),
            (layer["consumers"], columns, "in_features"),
        ):
            for path, start in sites:
                whole = torch.ones(getattr(denoiser.get_submodule(path), width), dtype=torch.bool)
                masks.setdefault(path, whole)[start : start + len(features)] = features
    for path, mask in rows.items():
        _take_rows(denoiser.get_submodule(path), mask.nonzero()[:, 0])
    for path, mask in columns.items():
        _take_columns(denoiser.get_submodule(path), mask.nonzero()[:, 0])
    for layer in layers:
        if layer["kind"] == "head":
            _set_heads(denoiser, layer["name"], len(layer["kept"]), layer["group"])
        elif layer["kind"] == "neuron" and layer["name"].endswith("proj_mlp"):
            _set_single_block(denoiser.get_submodule(layer["name"].rpartition(".")[0]), len(layer["kept"]))


def _set_heads(denoiser: nn.Module, path: str, heads: int, head_dim: int) -> None:
    attention: Any = denoiser.get_submodule(path)
    if heads == 0:
        _replace(denoiser, path, EmptyAttention)
        return
    attention.heads = heads
    for name in ("inner_dim", "inner_kv_dim"):
        if hasattr(attention, name):
            setattr(attention, name, heads * head_dim)
    if hasattr(attention, "sliceable_head_dim"):
        attention.sliceable_head_dim = heads


def _set_single_block(block: Any, neurons: int) -> None:
    block.mlp_hidden_dim = neurons
    if hasattr(block.proj_out, "_tp_packed_row_blocks"):
        block.proj_out._tp_packed_row_blocks = [block.proj_out.in_features - neurons, neurons]


def _replace(root: nn.Module, path: str, make: Any) -> None:
    parent, _, name = path.rpartition(".")
    holder = root.get_submodule(parent)
    setattr(holder, name, make(getattr(holder, name)))


def _take_rows(linear: Any, kept: torch.Tensor) -> None:
    kept = kept.to(linear.weight.device)
    linear.weight = _parameter(linear.weight, linear.weight.detach()[kept])
    if linear.bias is not None:
        linear.bias = _parameter(linear.bias, linear.bias.detach()[kept])
    linear.out_features = len(kept)


def _take_columns(linear: Any, kept: torch.Tensor) -> None:
    kept = kept.to(linear.weight.device)
    linear.weight = _parameter(linear.weight, linear.weight.detach()[:, kept].contiguous())
    linear.in_features = len(kept)


def _parameter(old: nn.Parameter, value: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=old.requires_grad)


def load_pruned(folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """Load a pruned denoiser in eval mode.

    Args:
        folder: holds config.json, pruning.json and the safetensors file or files.
        device: where the weights go.
        dtype: of the weights; None keeps the one they were saved in.

    Raises:
        ValueError: a file is missing or damaged, or the weights do not fit the manifest.
    """
    import diffusers
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from torch.nn.modules.module import register_module_parameter_registration_hook

    folder = Path(folder)
    config, manifest = _read_json(folder / "config.json"), _read_json(folder / MANIFEST)
    cls = getattr(diffusers, config["_class_name"])

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        return None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(to_meta)
    try:
        denoiser: nn.Module = cls.from_config(config)
    finally:
        hook.remove()
    for stage in manifest["stages"]:
        narrow(denoiser, stage)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
    if not weights:
        raise ValueError(f"{folder} holds no safetensors file")
    try:
        denoiser.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the weights in {folder} do not fit its {MANIFEST}: {error}") from error
    denoiser.pruning_stages = manifest["stages"]
    nn.Module.to(denoiser, device=device, dtype=dtype)
    return denoiser.eval()


def load_pipeline(folder: str | Path, dtype: torch.dtype | None = None, **kwargs: Any) -> Any:
    """Load a diffusers pipeline folder whose components may be pruned.

    Args:
        folder: what ``DiffusionPipeline.save_pretrained`` wrote.
        dtype: of all weights; None keeps the saved ones.
        kwargs: passed to ``DiffusionPipeline.from_pretrained``.
    """
    from diffusers import DiffusionPipeline

    parts = {file.parent.name: load_pruned(file.parent, dtype=dtype) for file in Path(folder).glob(f"*/{MANIFEST}")}
    return DiffusionPipeline.from_pretrained(str(folder), torch_dtype=dtype, **(parts | kwargs))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return content
