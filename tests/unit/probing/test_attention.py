"""What the reader says is what an eager model computes, and the model is none the worse for it."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.probing.attention import AttentionReader
from safelight.probing.vision import VisionTower

SIZE, PATCH, HEADS = 32, 8, 4
PREFIX = {
    "CLIPVisionModel": 1, "SiglipVisionModel": 0, "Dinov2Model": 1, "Dinov2WithRegistersModel": 5, "DeiTModel": 2,
    "ViTModel": 1,
}  # fmt: skip
SELF = [name for name in PREFIX if name != "SiglipVisionModel"]


def tower(name: str, seed: int = 0, **settings: Any) -> Any:
    """An untrained transformer of 3 layers whose attention is not uniform."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": HEADS, "intermediate_size": 64}
    config = getattr(transformers, name.replace("Model", "Config"))(
        **sizes, image_size=SIZE, patch_size=PATCH, initializer_range=0.2, **settings
    )
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).eval()
    # CLIP, and SigLIP in its pooling head, ignore initializer_range; attention would be flat.
    for key, weight in model.named_parameters():
        if key.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "in_proj_weight", "in_proj_bias")):
            nn.init.normal_(weight, std=0.25)
    return model.requires_grad_(False)


def pictures(size: int = SIZE, seed: int = 1) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


@contextmanager
def eager_weights(model: Any, module: str) -> Iterator[list[Tensor]]:
    """(B, H, T, T) as transformers' own eager attention hands them out."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda m, args, out: seen.append(out[1]))
    yield seen
    handle.remove()


def module_path(name: str, layer: int = 2) -> str:
    if name == "CLIPVisionModel":
        return f"encoder.layers.{layer}.self_attn"
    return f"encoder.layer.{layer}.attention" if name.startswith("Dinov2") else f"layers.{layer}.attention"


def by_hand(model: Any, pixels: Tensor) -> Tensor:
    """(B, H, N) of SigLIP's pooling head, from its packed projections."""
    patches = model.post_layernorm(model.encoder(inputs_embeds=model.embeddings(pixels)).last_hidden_state)
    attention = model.head.attention
    query, key = (
        x @ attention.in_proj_weight[rows].T + attention.in_proj_bias[rows]
        for x, rows in ((model.head.probe[0], slice(0, 32)), (patches, slice(32, 64)))
    )
    logits = torch.einsum("hd,bnhd->bhn", query.view(HEADS, 8), key.view(len(pixels), -1, HEADS, 8))
    return (logits / math.sqrt(8)).softmax(-1)


def reference(name: str, pixels: Tensor) -> Tensor:
    """(B, H, N) without the code under test."""
    if name == "SiglipVisionModel":
        return by_hand(tower(name), pixels)
    model = tower(name, attn_implementation="eager")
    with eager_weights(model, module_path(name)) as seen:
        model(pixels)
    return seen[0][:, :, 0, PREFIX[name] :]


@pytest.mark.parametrize("name", PREFIX)
def test_equals_eager_with_its_gradient(name: str) -> None:
    reader = AttentionReader(tower(name), reduce="per_head")
    assert (reader.patch_size, reader.prefix_tokens) == (PATCH, PREFIX[name])
    target = torch.randn(2, HEADS, 16, generator=torch.Generator().manual_seed(2))
    found = []
    for read in (reader, lambda pixels: reference(name, pixels)):
        pixels = pictures().requires_grad_()
        attention = read(pixels)
        (gradient,) = torch.autograd.grad((attention * target).sum(), pixels)
        found.append((attention, gradient))
    (ours, our_gradient), (theirs, their_gradient) = found
    assert ours.shape == (2, HEADS, 16)
    # It is not uniform, so agreement says something.
    assert theirs.std() > 0.3 * theirs.mean()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert their_gradient.abs().max() > 1e-3
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-4, atol=1e-5)


def test_siglip_mean_is_what_its_head_computes() -> None:
    model, seen = tower("SiglipVisionModel"), []
    handle = model.head.attention.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    ours, _ = AttentionReader(model).forward(pictures())
    handle.remove()
    torch.testing.assert_close(ours, seen[0][:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PREFIX)
def test_rows_sum_to_one_before_the_prefix_goes(name: str) -> None:
    reader = AttentionReader(tower(name), layers=(-1,), reduce="per_head")
    with reader.reading() as rows:
        reader.tower(pictures())
    (row,) = rows.values()
    assert row.shape == (2, HEADS, PREFIX[name] + 16)
    torch.testing.assert_close(row.sum(-1), torch.ones(2, HEADS))
    patches = reader(pictures())
    torch.testing.assert_close(row[..., : PREFIX[name]].sum(-1) + patches.sum(-1), torch.ones(2, HEADS))
    # What the prefix gets is no patch's.
    assert (patches.sum(-1).mean() < 0.99) == bool(PREFIX[name])


def test_layers_are_averaged_and_heads_reduced() -> None:
    model = tower("ViTModel", attn_implementation="eager")
    with (
        eager_weights(model, module_path("ViTModel", 0)) as first,
        eager_weights(model, module_path("ViTModel")) as last,
    ):
        model(pictures())
    both = [weights[0][:, :, 0, 1:] for weights in (first, last)]
    expected = {
        "mean": (both[0].mean(1) + both[1].mean(1)) / 2,
        "max": (both[0].amax(1) + both[1].amax(1)) / 2,
        "per_head": (both[0] + both[1]) / 2,
    }
    for reduce, wanted in expected.items():
        found = AttentionReader(model, layers=(0, -1), reduce=reduce)(pictures())  # type: ignore[arg-type]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert not torch.allclose(expected["mean"], expected["max"])


@pytest.mark.parametrize("name", PREFIX)
def test_output_is_the_model_s_own(name: str) -> None:
    model = tower(name)
    alone = model(pictures())
    before = [(key, type(module), len(module._forward_pre_hooks)) for key, module in model.named_modules()]
    attention, output = AttentionReader(model).forward(pictures())
    torch.testing.assert_close(attention, AttentionReader(model)(pictures()), rtol=0, atol=1e-6)
    for key in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(getattr(output, key), getattr(alone, key), rtol=0, atol=1e-6)
    assert before == [(key, type(module), len(module._forward_pre_hooks)) for key, module in model.named_modules()]


@pytest.mark.parametrize("name", PREFIX)
def test_other_layers_keep_their_kernel_and_what_follows_is_left_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, fused = tower(name), [], F.scaled_dot_product_attention

    def counted(*args: Any, **keywords: Any) -> Tensor:
        calls.append(args[0].shape)
        return fused(*args, **keywords)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    whole = 3
    reader = AttentionReader(model)
    reader.forward(pictures())
    assert len(calls) == whole
    calls.clear()
    reader(pictures())
    # Of the last block nothing but queries and keys is needed; SigLIP's map comes after all blocks.
    assert len(calls) == (whole if name == "SiglipVisionModel" else whole - 1)
    if name != "SiglipVisionModel":
        calls.clear()
        AttentionReader(model, layers=(0,))(pictures())
        assert not calls


def test_float32_under_autocast() -> None:
    reader = AttentionReader(tower("CLIPVisionModel"))
    exact = reader(pictures())
    with torch.autocast("cpu", torch.bfloat16), reader.reading() as rows:
        reader.tower(pictures())
    (row,) = rows.values()
    assert row.dtype == torch.float32
    # bfloat16 rounds a sum of 17 weights by up to 2e-3.
    assert (row.sum(-1) - 1).abs().max() < 1e-6
    torch.testing.assert_close(reader.patches(rows, SIZE), exact, rtol=0, atol=0.05)
    assert not torch.equal(reader.patches(rows, SIZE), exact)


@pytest.mark.parametrize("name", PREFIX)
def test_pictures_of_another_size(name: str) -> None:
    model = tower(name, attn_implementation="eager")
    found = AttentionReader(model)(pictures(48))
    assert found.shape == (2, 36)
    if name != "SiglipVisionModel":
        asked = {} if name.startswith("Dinov2") else {"interpolate_pos_encoding": True}
        with eager_weights(model, module_path(name)) as seen:
            model(pictures(48), **asked)
        torch.testing.assert_close(found, seen[0].mean(1)[:, 0, PREFIX[name] :], rtol=0, atol=1e-5)


def test_copies_pickles_and_two_readers_at_once() -> None:
    first = AttentionReader(tower("Dinov2Model"))
    second = AttentionReader(first.tower, layers=(0, 1))
    alone = first(pictures()), second(pictures())
    with first.reading() as rows, second.reading() as others:
        first.tower(pictures())
    assert (list(rows), list(others)) == ([2], [0, 1])
    torch.testing.assert_close((first.patches(rows, SIZE), second.patches(others, SIZE)), alone, rtol=0, atol=1e-6)
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(twin(pictures()), alone[0])
        assert twin.tower is not first.tower


def test_hooks_go_when_the_pass_fails() -> None:
    model = tower("ViTModel")
    with pytest.raises(ValueError, match="mine"), AttentionReader(model).reading():
        raise ValueError("mine")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_inside_a_tower_and_a_clip() -> None:
    from transformers import CLIPConfig, CLIPModel

    inner = tower("CLIPVisionModel")
    wrapped = VisionTower(inner, [0.5] * 3, [0.5] * 3)
    assert torch.equal(AttentionReader(wrapped)(pictures()), AttentionReader(inner)(pictures()))
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    clip: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=inner.config.to_dict())).eval()
    clip.vision_model.load_state_dict(inner.state_dict())
    torch.testing.assert_close(AttentionReader(clip)(pictures()), AttentionReader(inner)(pictures()))


class TimmAttention(nn.Module):
    """Names and order of what timm computes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale, self.fused_attn = HEADS, 8**-0.5, True
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.weights: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, 8).permute(2, 0, 3, 1, 4).unbind(0)
        self.weights = (self.q_norm(q) * self.scale @ self.k_norm(k).transpose(-2, -1)).softmax(-1)
        return self.proj((self.weights @ v).transpose(1, 2).reshape(batch, tokens, width))


class TimmBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(32), TimmAttention()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))


class TimmPatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.proj = (PATCH, PATCH), nn.Conv2d(3, 32, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_prefix_tokens = 2
        self.patch_embed, self.blocks = TimmPatches(), nn.Sequential(TimmBlock(), TimmBlock())
        self.cls_token, self.reg_token = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 1, 32))

    def forward(self, x: Tensor) -> Tensor:
        front = torch.cat([self.cls_token, self.reg_token], 1).expand(len(x), -1, -1)
        return self.blocks(torch.cat([front, self.patch_embed(x)], 1))


def test_timm() -> None:
    torch.manual_seed(0)
    model = VisionTransformer().requires_grad_(False)
    for weight in model.parameters():
        weight.add_(0.2 * torch.randn_like(weight))
    reader = AttentionReader(model)
    assert (reader.family, reader.patch_size, reader.prefix_tokens) == ("timm", PATCH, 2)
    found = []
    for read in (reader, lambda pixels: (model(pixels), model.blocks[-1].attn.weights.mean(1)[:, 0, 2:])[1]):
        pixels = pictures().requires_grad_()
        attention = read(pixels)
        found.append((attention, *torch.autograd.grad(attention.square().sum(), pixels)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert found[0][0].std() > 0.3 * found[0][0].mean()


def test_what_cannot_be_read() -> None:
    with pytest.raises(SafelightError, match=r"where a Linear looks; known are CLIPVisionModel, .*ViTModel and timm"):
        AttentionReader(nn.Linear(2, 2))
    model = tower("ViTModel")
    with pytest.raises(SafelightError, match=r"layers=\[3\]: give some of -3 to 2, ViTModel has 3 layers"):
        AttentionReader(model, layers=(3,))
    with pytest.raises(SafelightError, match="SiglipVisionModel has one pooling head; give -1"):
        AttentionReader(tower("SiglipVisionModel"), layers=(0,))
    with pytest.raises(SafelightError, match="this SiglipVisionModel has no pooling head"):
        AttentionReader(tower("SiglipVisionModel", vision_use_head=False))
    with pytest.raises(SafelightError, match="reduce='median' is none of mean, max, per_head"):
        AttentionReader(model, reduce="median")  # type: ignore[arg-type]
    reader = AttentionReader(model)
    with pytest.raises(SafelightError, match="pixels: 36 wide, which ViTModel cannot cut into patches of 8"):
        reader(pictures(36))
    with pytest.raises(SafelightError, match=r"expected \(B, 3, S, S\), got \(2, 3, 32\)"):
        reader(pictures()[..., 0])
    # Registers nobody told of.
    reader.prefix_tokens = 5
    with pytest.raises(SafelightError, match="ViTModel has 17 tokens for 32 pixels, and 5 in front of 4 x 4 patches"):
        reader(pictures())
