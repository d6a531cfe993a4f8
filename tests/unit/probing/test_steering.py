"""A bias on attention logits multiplies weights by its exponential, where and for whom it was asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.probing.attention import AttentionReader, attention_paths
from safelight.probing.steering import biased_attention

HEADS, PATCHES = 4, 16
NAMES = [
    "CLIPVisionModel", "SiglipVisionModel", "Dinov2Model", "Dinov2WithRegistersModel", "DeiTModel", "ViTModel",
]  # fmt: skip
BIAS = torch.randn(2, PATCHES, generator=torch.Generator().manual_seed(3))


def tower(name: str, **settings: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": HEADS, "intermediate_size": 64}
    config = getattr(transformers, name.replace("Model", "Config"))(
        **sizes, image_size=32, patch_size=8, initializer_range=0.2, **settings
    )
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval().requires_grad_(False)
    for key, weight in model.named_parameters():
        if key.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "in_proj_weight", "in_proj_bias")):
            nn.init.normal_(weight, std=0.25)
    return model


def pictures() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pooled(model: Any) -> Tensor:
    found: Tensor = model(pictures()).pooler_output
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_no_bias_changes_nothing(name: str, implementation: str) -> None:
    model = tower(name, attn_implementation=implementation)
    alone = pooled(model)
    for queries in ("summary", "all"):
        with biased_attention(model, torch.zeros(PATCHES), queries=queries):  # type: ignore[arg-type]
            torch.testing.assert_close(pooled(model), alone, rtol=0, atol=1e-6)
        with biased_attention(model, 3 * BIAS, queries=queries):  # type: ignore[arg-type]
            assert (pooled(model) - alone).abs().max() > 1e-3
    # Nothing is left behind, whatever happened inside.
    with pytest.raises(ValueError, match="mine"), biased_attention(model, BIAS):
        raise ValueError("mine")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(pooled(model), alone)


@pytest.mark.parametrize("name", NAMES)
def test_a_large_bias_draws_nearly_all_attention(name: str) -> None:
    model = tower(name)
    reader = AttentionReader(model)
    for patch in (0, 5, 15):
        bias = torch.zeros(PATCHES)
        bias[patch] = 25.0
        assert reader(pictures())[:, patch].max() < 0.5
        # The reader is told of it, whichever of the two came first.
        with biased_attention(model, bias):
            assert reader(pictures())[:, patch].min() > 0.99
        with reader.reading() as rows, biased_attention(model, bias, [-1]):
            model(pictures())
        assert reader.patches(rows, 32)[:, patch].min() > 0.99
        with biased_attention(model, -bias, [-1]):
            assert reader(pictures())[:, patch].max() < 1e-3


@pytest.mark.parametrize("queries", ["summary", "all"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "SiglipVisionModel"])
def test_one_layer_by_hand(name: str, queries: str) -> None:
    """The last layer's output, from its input and projections, for every query."""
    model = tower(name)
    attention: Any = model.get_submodule(attention_paths(model, [-1])[2])
    front = {"DeiTModel": 2, "Dinov2WithRegistersModel": 5}.get(name, 1)
    seen: list[Tensor] = []
    handle = attention.register_forward_hook(
        lambda m, args, kw, out: seen.extend([args[0] if args else kw["hidden_states"], out[0]]), with_kwargs=True
    )
    with biased_attention(model, BIAS, [-1], queries):  # type: ignore[arg-type]
        model(pictures())
    handle.remove()
    states, output = seen
    q, k, v = (
        layer(states).view(2, -1, HEADS, 8).transpose(1, 2)
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    weights = (q @ k.transpose(2, 3) / 8**0.5).exp()
    times = torch.ones(2, 1, weights.shape[2], weights.shape[3])
    times[:, :, : 1 if queries == "summary" else None, front:] = BIAS.exp()[:, None, None]
    weights = weights * times
    weights = weights / weights.sum(-1, keepdim=True)
    last = attention.out_proj if name == "CLIPVisionModel" else attention.o_proj
    expected = last((weights @ v).transpose(1, 2).reshape(states.shape))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_siglip_pooling_head_by_hand() -> None:
    model = tower("SiglipVisionModel")
    plain = AttentionReader(model, reduce="per_head")(pictures())
    seen: list[Tensor] = []
    handle = model.head.attention.register_forward_hook(lambda m, args, out: seen.append(out[1]))
    with biased_attention(model, BIAS):
        model(pictures())
    handle.remove()
    weighted = plain * BIAS.exp()[:, None]
    expected = weighted / weighted.sum(-1, keepdim=True)
    torch.testing.assert_close(seen[0][:, 0], expected.mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_biases_add_up_and_take_gradients(name: str) -> None:
    model = tower(name)
    reader = AttentionReader(model)
    with biased_attention(model, BIAS), biased_attention(model, 2 * BIAS):
        nested = reader(pictures()), pooled(model)
    with biased_attention(model, 3 * BIAS):
        torch.testing.assert_close((reader(pictures()), pooled(model)), nested, rtol=1e-4, atol=1e-5)
    bias = torch.zeros(PATCHES, requires_grad=True)
    with biased_attention(model, bias):
        loss = pooled(model)[:, 0].sum()
    (gradient,) = torch.autograd.grad(loss, bias)
    step = 1e-2 * F.one_hot(torch.tensor(6), PATCHES).float()
    sides = []
    for shift in (step, -step):
        with biased_attention(model, shift):
            sides.append(pooled(model)[:, 0].sum())
    torch.testing.assert_close(gradient[6], (sides[0] - sides[1]) / 0.02, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["SiglipVisionModel", "Dinov2Model"])
def test_half_precision(name: str) -> None:
    model, bias = tower(name), torch.full((PATCHES,), -15.0)
    bias[4] = 0
    for queries in ("summary", "all"):
        with torch.autocast("cpu", torch.bfloat16), biased_attention(model, bias, queries=queries):  # type: ignore[arg-type]
            found, output = AttentionReader(model).forward(pictures())
        assert found.dtype == torch.float32
        assert output.last_hidden_state.isfinite().all()
        assert (found[:, 4] > 0.99 * found.sum(1)).all()
    half = tower(name).to(torch.bfloat16)
    with biased_attention(half, bias):
        found = AttentionReader(half)(pictures().to(torch.bfloat16))
    assert (found[:, 4] > 0.99 * found.sum(1)).all()


def test_what_cannot_be_steered() -> None:
    model = tower("ViTModel")
    for bias, told in ((torch.zeros(9), r"\(9,\)"), (BIAS[:1].expand(3, -1), r"\(3, 16\)")):
        message = rf"bias: {told} for 2 pictures with 16 patches each in ViTModel"
        with pytest.raises(SafelightError, match=message), biased_attention(model, bias):
            model(pictures())
    with pytest.raises(SafelightError, match=r"expected \(N,\) or \(B, N\), got \(4, 4, 1\)"):
        biased_attention(model, torch.zeros(4, 4, 1)).__enter__()
    with pytest.raises(SafelightError, match="queries='cls' is none of summary, all"):
        biased_attention(model, BIAS, queries="cls").__enter__()  # type: ignore[arg-type]
    with pytest.raises(SafelightError, match="layers"):
        biased_attention(model, BIAS, [7]).__enter__()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(SafelightError, match=r"ViTModel \(flash_attention_2\) takes no bias; load it .*eager or sdpa"):
        biased_attention(model, BIAS).__enter__()
