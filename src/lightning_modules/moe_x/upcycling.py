"""Begin a mixture of experts as copies of a trained dense model (sparse up-cycling; paper, Table 4)."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules.moe_x.configuration_moe_x import MoEXConfig
from safelight.lightning_modules.moe_x.layer import MoEXMLP
from safelight.lightning_modules.moe_x.modeling_moe_x import DenseMLP, MoEXForCausalLM

Upcycling = Literal["noise", "drop", "split"]
DEFAULT_AMOUNT: dict[Upcycling, float] = {"noise": 1e-2, "drop": 0.5, "split": 0.0}
SAME = ("vocab_size", "block_size", "n_layer", "n_head", "d_model", "bias")
"""What a mixture takes over from the dense model as it is."""


def upcycle(
    dense: MoEXForCausalLM,
    config: MoEXConfig,
    how: Upcycling = "noise",
    *,
    amount: float | None = None,
    seed: int = 0,
) -> MoEXForCausalLM:
    """A model of ``config`` that begins where a dense model stands; embeddings, attention and norms are copied.

    With ``noise`` 0 and the dense model's activation it computes what the dense model does: k equal experts whose gates
    add up to 1.

    Args:
        dense: the dense model.
        config: of the mixture; ``expert_hidden`` is the dense layer's width for ``noise`` and ``drop``.
        how: every expert is the dense layer with Gaussian noise on the encoder (``noise``: equal experts are scored
            alike, and all tokens would get the same ones), or with a share of its neurons drawn anew from a
            Gaussian of the weights' mean and spread (``drop``, arXiv 2502.19261), or the dense layer's neurons are
            dealt out to the experts, several times if these hold more in all (``split``; the decoder is times k, so
            that all experts together compute the dense layer).
        amount: ``noise``: in standard deviations of the weights (.01); ``drop``: the share (.5); ``split``: unused.
        seed: of what is drawn.

    Raises:
        SafelightError: shapes do not fit.
    """
    wrong = [
        f"{name} is {getattr(dense.config, name)} in the dense model and {getattr(config, name)} here"
        for name in SAME
        if getattr(dense.config, name) != getattr(config, name)
    ]
    if wrong:
        raise SafelightError("upcycle_from: " + "; ".join(wrong))
    with torch.random.fork_rng(devices=[]):  # its first weights are all written over
        model = MoEXForCausalLM(config)
    amount = DEFAULT_AMOUNT[how] if amount is None else amount
    if how == "noise" and not amount and model.expert_layers() and config.experts_per_token < config.n_experts:
        warnings.warn("upcycling_amount=0: equal experts are scored alike, all tokens go to the same", stacklevel=2)
    generator = torch.Generator().manual_seed(seed)
    shared = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(shared, strict=False)
    for number, (old, new) in enumerate(zip(dense.blocks, model.blocks, strict=True)):
        if not isinstance(old.mlp, DenseMLP) or old.mlp.act == "geglu":
            raise SafelightError(f"upcycle_from: block {number} is no dense layer of one encoder and one decoder")
        if isinstance(new.mlp, MoEXMLP):
            with torch.no_grad():
                _fill(new.mlp, old.mlp, how, amount, generator)
        else:
            new.mlp.load_state_dict(old.mlp.state_dict())
    return model


def _fill(layer: MoEXMLP, dense: DenseMLP, how: Upcycling, amount: float, generator: torch.Generator) -> None:
    """Write an expert layer's weights from a dense one's."""
    encoder, decoder = dense.c_fc.weight.detach().cpu(), dense.c_proj.weight.detach().cpu()
    hidden, (experts, width) = len(encoder), (layer.n_experts, layer.expert_hidden)
    if how == "split":
        copies, left = divmod(experts * width, hidden)
        if left or not copies:
            raise SafelightError(
                f"expert_hidden={width}: {experts} experts hold {experts * width} neurons, no multiple of the dense "
                f"layer's {hidden}"
            )
        order = [torch.arange(hidden), *(torch.randperm(hidden, generator=generator) for _ in range(copies - 1))]
        dealt = torch.cat(order).view(experts, width)
        w_enc, w_dec = encoder[dealt], decoder.T[dealt].transpose(1, 2) * layer.top_k
        b_enc = None if layer.b_enc is None else dense.c_fc.bias.detach().cpu()[dealt]
    else:
        if width != hidden:
            raise SafelightError(
                f"expert_hidden={width}: with upcycling={how} an expert is the dense layer, of {hidden} neurons"
            )
        w_enc, w_dec = encoder.repeat(experts, 1, 1), decoder.repeat(experts, 1, 1)
        b_enc = None if layer.b_enc is None else dense.c_fc.bias.detach().cpu().repeat(experts, 1)
        if how == "noise":
            w_enc = w_enc + amount * encoder.std() * torch.randn(w_enc.shape, generator=generator)
        else:
            anew = torch.stack([torch.rand(hidden, generator=generator) < amount for _ in range(experts)])
            w_enc = torch.where(anew[:, :, None], _like(encoder, w_enc.shape, generator), w_enc)
            w_dec = torch.where(anew[:, None], _like(decoder, w_dec.shape, generator), w_dec)
    layer.w_enc.copy_(w_enc)
    layer.w_dec.copy_(w_dec)
    if layer.b_enc is not None and layer.b_dec is not None and b_enc is not None:
        layer.b_enc.copy_(b_enc)
        layer.b_dec.copy_(dense.c_proj.bias.detach())


def _like(weights: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Gaussian weights of the same mean and spread."""
    return weights.mean() + weights.std() * torch.randn(shape, generator=generator)


_MATRICES = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
"""Weights that GPT-2's ``Conv1D`` keeps as (in, out)."""
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
"""Ours to transformers'."""


def is_gpt2(config: MoEXConfig) -> bool:
    """Whether a model of ours is a GPT-2 but for its name: dense, with biases, one encoder and one decoder."""
    return config.mlp == "dense" and config.bias and config.act in _ACTIVATIONS


def gpt2_from_dense(dense: MoEXForCausalLM) -> Any:
    """A dense model of ours as a transformers ``GPT2LMHeadModel``, with the same logits; see :func:`is_gpt2`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = dense.config
    assert is_gpt2(ours)
    with torch.random.fork_rng(devices=[]):  # its first weights are all written over
        settings: dict[str, Any] = {
            "vocab_size": ours.vocab_size, "n_positions": ours.block_size, "n_embd": ours.d_model,
            "n_layer": ours.n_layer, "n_head": ours.n_head, "n_inner": ours.dense_hidden(),
            "activation_function": _ACTIVATIONS[ours.act], "bos_token_id": None, "eos_token_id": None,
        }  # fmt: skip
        model = GPT2LMHeadModel(GPT2Config(**settings))
    state = {name: value.T if name.endswith(_MATRICES) else value for name, value in dense.state_dict().items()}
    model.load_state_dict(state)
    return model.eval()


def dense_from_gpt2(gpt2: nn.Module) -> MoEXForCausalLM:
    """A transformers ``GPT2LMHeadModel`` as a dense model of ours, with the same logits."""
    theirs: Any = gpt2.config
    act = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}.get(
        theirs.activation_function, theirs.activation_function
    )
    config = MoEXConfig(
        vocab_size=theirs.vocab_size, block_size=theirs.n_positions, n_layer=theirs.n_layer, n_head=theirs.n_head,
        d_model=theirs.n_embd, mlp="dense", act=act, mlp_hidden=theirs.n_inner or 4 * theirs.n_embd, bias=True,
    )  # fmt: skip
    if not math.isclose(theirs.layer_norm_epsilon, 1e-5):
        raise SafelightError(f"upcycle_from: layer_norm_epsilon is {theirs.layer_norm_epsilon}, ours 1e-5")
    model = MoEXForCausalLM(config)
    state = {
        name: value.T if name.endswith(_MATRICES) else value
        for name, value in gpt2.state_dict().items()
        if not name.endswith((".attn.bias", ".attn.masked_bias"))  # the causal mask of older files
    }
    model.load_state_dict(state)
    return model


def load_dense(source: str) -> MoEXForCausalLM:
    """The dense model in a folder: an export of ours (or the run's folder), or GPT-2, also by its name on the hub.

    Raises:
        SafelightError: it is neither.
    """
    folder = Path(source).expanduser()
    if (folder / "export" / "config.json").is_file():
        folder = folder / "export"
    file = folder / "config.json"
    kind = json.loads(file.read_text()).get("model_type") if file.is_file() else "gpt2"
    if kind == "moe_x":
        return MoEXForCausalLM.from_pretrained(folder)
    if kind != "gpt2":
        raise SafelightError(
            f"upcycle_from: {file} is a {kind} model; GPT-2 and dense models of method=moe_x can be used"
        )
    from transformers import GPT2LMHeadModel

    try:
        return dense_from_gpt2(GPT2LMHeadModel.from_pretrained(folder if file.is_file() else source))
    except OSError as error:
        raise SafelightError(f"upcycle_from={source}: no folder with a config.json, nor a model of the hub") from error
