"""The language model: sizes of the paper's configurations, causality, caches, and files that transformers opens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from safelight.lightning_modules.moe_x.configuration_moe_x import MoEXConfig
from safelight.lightning_modules.moe_x.layer import MoEXMLP
from safelight.lightning_modules.moe_x.modeling_moe_x import (
    DenseMLP,
    MoEXForCausalLM,
    count_parameters,
    flops_per_token,
)

SMALL = {"block_size": 24, "n_layer": 2, "n_head": 4, "d_model": 32, "expert_hidden": 48, "n_experts": 4}
GPT2 = {"vocab_size": 50257, "block_size": 1024}
GPT2_SMALL = GPT2 | {"n_layer": 12, "n_head": 12, "d_model": 768}


def model(**settings: Any) -> MoEXForCausalLM:
    torch.manual_seed(0)
    return MoEXForCausalLM(MoEXConfig(**SMALL | settings)).eval()


def text(*shape: int) -> torch.Tensor:
    return torch.randint(0, 32, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("settings", "total", "active"),
    [
        ({}, 143.1, 42.5),  # the paper's chess model
        ({"mlp": "dense", "act": "gelu"}, 42.5, 42.5),  # and the dense one of the same active size
        ({"mlp": "dense", "act": "gelu", "mlp_hidden": 2048}, 25.7, 25.7),
        (GPT2_SMALL, 520.7, 181.0),
        (GPT2 | {"n_layer": 24, "n_head": 16, "d_model": 1024}, 1763.8, 555.9),
        (GPT2_SMALL | {"mlp": "dense", "act": "gelu", "mlp_hidden": 3072}, 124.4, 124.4),
    ],
)  # fmt: skip
def test_sizes_are_the_papers(settings: dict[str, Any], total: float, active: float) -> None:
    found = count_parameters(MoEXConfig(**settings))
    assert found["total"] / 1e6 == pytest.approx(total, abs=0.07)
    assert found["active"] / 1e6 == pytest.approx(active, abs=0.07)
    assert found["total"] - found["non_embedding"] == found["active"] - found["active_non_embedding"] > 0


@pytest.mark.parametrize("settings", [{}, {"router": "linear", "act": "gelu"}, {"mlp": "dense", "act": "geglu"}])
def test_no_token_sees_a_later_one(settings: dict[str, Any]) -> None:
    found, tokens = model(**settings), text(2, 12)
    before = found(tokens).logits
    tokens[:, 8:] = (tokens[:, 8:] + 1) % 32
    after = found(tokens).logits
    assert torch.allclose(before[:, :8], after[:, :8], atol=1e-6)
    assert not torch.allclose(before[:, 8:], after[:, 8:], atol=1e-3)


def test_tokens_meet_in_attention_only() -> None:
    """With nothing to attend to, each position knows its own token; the halves of a block have norms of their own."""
    found, tokens = model(), text(1, 8)
    with torch.no_grad():
        for block in found.blocks:
            block.ln_1.weight.zero_()
    before = found(tokens).logits
    tokens[:, 2] = (tokens[:, 2] + 1) % 32
    after = found(tokens).logits
    changed = (before - after).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [place == 2 for place in range(8)]


def test_a_cache_changes_no_logit() -> None:
    found, tokens = model(), text(2, 12)
    whole = found(tokens).logits
    first = found(tokens[:, :5], use_cache=True)
    second = found(tokens[:, 5:9], past_key_values=first.past_key_values, use_cache=True)
    third = found(tokens[:, 9:], past_key_values=second.past_key_values, use_cache=True)
    assert torch.allclose(torch.cat([first.logits, second.logits, third.logits], 1), whole, atol=1e-5)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        found.generate(tokens, use_cache=True, **settings), found.generate(tokens, use_cache=False, **settings)
    )


def test_padding_on_the_left_is_not_looked_at() -> None:
    found, tokens = model(), text(1, 6)
    padded = torch.cat([text(1, 3), tokens], 1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    other = torch.cat([(text(1, 3) + 5) % 32, tokens], 1)
    first, second = (found(ids, attention_mask=mask).logits[:, 3:] for ids in (padded, other))
    assert torch.allclose(first, second, atol=1e-5)
    assert not torch.allclose(found(padded).logits[:, 3:], found(other).logits[:, 3:], atol=1e-3)


def test_the_loss_is_that_of_the_next_token() -> None:
    found, tokens = model(), text(3, 10)
    output = found(tokens, labels=tokens)
    by_hand = [-output.logits[b, t].log_softmax(-1)[tokens[b, t + 1]] for b in range(3) for t in range(9)]
    assert float(output.loss) == pytest.approx(float(torch.stack(by_hand).mean()), rel=1e-5)


def test_it_starts_as_gpt2_does() -> None:
    found = model(d_model=128, expert_hidden=256, n_layer=4)
    for name, value in found.named_parameters():
        spread = float(value.std())
        if "ln_" in name:
            assert spread == 0
        else:
            expected = 0.02 / 8**0.5 if name.endswith(("c_proj.weight", "w_dec")) else 0.02
            assert spread == pytest.approx(expected, rel=0.08), name
    assert found.lm_head.weight is found.transformer.wte.weight


@pytest.mark.parametrize("act", ["gelu", "relu", "geglu", "solu"])
def test_dense_layers(act: str) -> None:
    config = MoEXConfig(**SMALL | {"mlp": "dense", "act": act})
    torch.manual_seed(0)
    layer = DenseMLP(config)
    x = torch.randn(5, 32)
    hidden = x @ layer.c_fc.weight.T
    neurons = {
        "gelu": lambda: F.gelu(hidden),
        "relu": lambda: hidden.clamp(min=0),
        # Three matrices instead of two: two thirds of the width.
        "geglu": lambda: F.gelu(hidden[:, :64]) * hidden[:, 64:],
        "solu": lambda: F.layer_norm(hidden * hidden.softmax(-1), (96,)),
    }[act]()
    assert torch.allclose(layer(x), neurons @ layer.c_proj.weight.T, atol=1e-5)
    assert layer.c_proj.weight.shape == (32, 64 if act == "geglu" else 96), "as wide as the two experts of a token"


def test_some_blocks_may_stay_dense() -> None:
    found = model(n_layer=4, moe_every=2, act="gelu")
    assert [isinstance(block.mlp, MoEXMLP) for block in found.blocks] == [False, True, False, True]
    assert list(found.expert_layers()) == [1, 3]


def test_a_saved_model_is_the_same_model(tmp_path: Path) -> None:
    found, tokens = model(bias=True, router_variance="full"), text(2, 9)
    found.save_pretrained(tmp_path)
    again = MoEXForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, found(tokens).logits)
    assert again.config.to_dict() | {"_name_or_path": ""} == found.config.to_dict() | {"_name_or_path": ""}
    assert (tmp_path / "model.safetensors").is_file()


def test_what_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="n_head=3"):
        model(n_head=3)
    with pytest.raises(ValueError, match="act='tanh'"):
        model(mlp="dense", act="tanh")
    with pytest.raises(ValueError, match="25 tokens are more than the model's context of 24"):
        model()(text(1, 25))


def test_flops_of_the_papers_chess_model() -> None:
    """28.3 TFLOP for a step of 100 x 1023 tokens, 2.6 of them causal attention (one half of the full product)."""
    config = MoEXConfig(vocab_size=32, block_size=1023, n_layer=8, n_head=8, d_model=512, expert_hidden=2048)
    step = 100 * 1023 * flops_per_token(config, 1023)
    assert step == pytest.approx(28.3e12, rel=0.01)
    attention = step - 100 * 1023 * flops_per_token(config, 0)
    assert attention == pytest.approx(2.6e12, rel=0.02)


@pytest.mark.parametrize("settings", [{}, {"router": "linear"}, {"bias": True}])
def test_checkpointed_activations_give_the_same_gradients(settings: dict[str, Any]) -> None:
    plain, again = model(**settings).train(), model(**settings).train()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, 20, (3, 10), generator=torch.Generator().manual_seed(0))
    for found in (plain, again):
        loss = found(tokens, labels=tokens).loss
        for layer in found.expert_layers().values():
            assert layer.routing is not None
            loss = loss + layer.routing.balance_loss()
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in again.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradients[name]), name
