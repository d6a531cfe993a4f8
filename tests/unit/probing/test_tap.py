"""Activations are read and written where their names say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.probing.tap import ActivationTap, Site, blocks_of, find_site

IDS = torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(0))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return _made(GPT2LMHeadModel, GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=3, n_head=2))


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = Gemma2Config(vocab_size=20, num_key_value_heads=1, head_dim=8, **sizes)
    return _made(Gemma2ForCausalLM, config)


def pythia() -> nn.Module:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    return _made(GPTNeoXForCausalLM, GPTNeoXConfig(vocab_size=20, **sizes))


def _made(kind: Any, config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config).eval().requires_grad_(False)
    return model


@pytest.mark.parametrize("family", [gpt2, gemma2, pythia])
def test_a_layer_puts_out_what_the_next_one_gets(family: Any) -> None:
    model = family()
    names = ["resid_pre.0", *(f"resid_post.{layer}" for layer in range(3)), "resid_pre.2"]
    seen = ActivationTap(model, names)(IDS)
    states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(seen["resid_pre.0"], states[0])
    assert torch.equal(seen["resid_post.0"], states[1]), "not the layer's input: that is off by one"
    assert torch.equal(seen["resid_post.1"], states[2])
    assert torch.equal(seen["resid_pre.2"], states[2])
    # transformers gives the last state past the final norm; the residual stream is before it.
    assert not torch.allclose(seen["resid_post.2"], states[3], atol=1e-3)


@pytest.mark.parametrize("family", [gpt2, pythia])
def test_parts_of_a_layer_add_up(family: Any) -> None:
    model = family()
    seen = ActivationTap(model, ["resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.-2"])(IDS)
    total = seen["resid_pre.1"] + seen["attn_out.1"] + seen["mlp_out.1"]
    assert torch.allclose(total, seen["resid_post.-2"], atol=1e-5)


@pytest.mark.parametrize("family", [gpt2, gemma2, pythia])
def test_writing_back_what_was_read_changes_nothing(family: Any) -> None:
    model = family()
    tap = ActivationTap(model, ["resid_pre.0", "resid_post.1"])
    plain = model(IDS).logits
    with tap.reading() as seen:
        model(IDS)
    with tap.writing({name: lambda x, kept=kept: kept for name, kept in seen.items()}):
        assert torch.equal(model(IDS).logits, plain)
    other = torch.flip(IDS, [1])
    with tap.writing({"resid_pre.0": lambda x: seen["resid_pre.0"]}):
        swapped = model(other).logits
    assert torch.equal(swapped, plain), "all that layers know of the tokens comes through here"
    assert torch.equal(model(IDS).logits, plain), "no hook is left behind"


def test_a_written_place_is_seen_only_from_itself_on() -> None:
    model = gpt2()

    def third(x: Tensor) -> Tensor:
        changed = x.clone()
        changed[:, 3] += 1.0 + torch.arange(16.0)
        return changed

    plain = model(IDS).logits
    with ActivationTap(model, ["resid_pre.0"]).writing({"resid_pre.0": third}):
        after = model(IDS).logits
    assert torch.equal(after[:, :3], plain[:, :3])
    assert all(not torch.allclose(after[:, place], plain[:, place], atol=1e-4) for place in range(3, 7))


def test_gradients_pass_through_what_is_written() -> None:
    model = gpt2()
    tokens = torch.zeros(2, 7, 16, requires_grad=True)
    tap = ActivationTap(model, ["resid_pre.0", "resid_post.1"])
    with tap.writing({"resid_pre.0": lambda x: x + tokens}), tap.reading(keep_graph=True) as seen:
        model(IDS)
    seen["resid_post.1"].sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.abs().min() > 0


def test_reading_stops_behind_the_last_site() -> None:
    model, passed = gpt2(), []
    for number, block in enumerate(blocks_of(model)[1]):
        block.register_forward_hook(lambda *_, number=number: passed.append(number))
    ActivationTap(model, ["resid_post.0", "resid_pre.1"])(IDS)
    assert passed == [0]


def test_where_sites_are() -> None:
    model = gpt2()
    assert find_site(model, "resid_post.1") == Site("transformer.h.1")
    assert find_site(model, "resid_pre.-1") == Site("transformer.h.2", "input")
    assert find_site(model, "mlp_out.0") == Site("transformer.h.0.mlp")
    assert find_site(model, "transformer.h.1.mlp.c_fc") == Site("transformer.h.1.mlp.c_fc")
    assert find_site(model, "transformer.h.1.mlp.c_fc:input") == Site("transformer.h.1.mlp.c_fc", "input")
    assert find_site(model, "transformer.h.1.attn:1") == Site("transformer.h.1.attn", "output", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resid_post.3", "has layers 0 to 2"),
        ("transformer.h.1.mlpp", "did you mean 'transformer.h.1.mlp'"),
        ("resid.1", "places of layers are resid_pre, resid_post, attn_out, mlp_out"),
        ("transformer.h.1:first", "write <path>, <path>:input"),
    ],
)
def test_names_that_mean_nothing(name: str, message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        ActivationTap(gpt2(), [name])


def test_what_cannot_be_read_or_written() -> None:
    model = gpt2()
    with (
        ActivationTap(model, ["resid_pre.0"]).writing({"resid_pre.0": lambda x: x[:, 1:]}),
        pytest.raises(SafelightError, match=r"resid_pre.0: \(2, 6, 16\) cannot replace activations of \(2, 7, 16\)"),
    ):
        model(IDS)
    with pytest.raises(SafelightError, match="blocks of Linear are at no known place"):
        ActivationTap(nn.Linear(2, 2), ["resid_post.0"])
    with pytest.raises(SafelightError, match="did not come through it"):
        ActivationTap(model, ["transformer.wte", "lm_head"])(inputs_embeds=torch.zeros(1, 2, 16))


def test_vision_transformers_and_denoisers() -> None:
    from transformers import CLIPModel

    from safelight import zoo
    from safelight.testing.denoisers import build_denoiser

    clip = CLIPModel.from_pretrained(zoo.path("tiny_clip")).eval()
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    seen = ActivationTap(clip, ["vision_model.encoder.layers.1"])
    with torch.no_grad(), seen.reading() as found:
        states = clip.vision_model(pictures, output_hidden_states=True).hidden_states
    assert torch.equal(found["vision_model.encoder.layers.1"], states[2])
    assert find_site(clip.vision_model, "resid_post.1") == Site("encoder.layers.1")
    flux = build_denoiser("flux")
    assert blocks_of(flux)[0] == "transformer_blocks"
