"""The language model in transformers' form: ``from_pretrained``, ``generate``, tied weights. Travels when exported."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_moe_x import MoEXConfig
from .dispatch import activate
from .layer import MoEXMLP
from .pruned import PrunedMoEXMLP


class DenseMLP(nn.Module):
    """The baseline feed-forward: an expert's activation, ``geglu``, or ``solu`` (h softmax(h), then a layer norm)."""

    def __init__(self, config: MoEXConfig) -> None:
        super().__init__()
        hidden, self.act = config.dense_hidden(), config.act
        if self.act not in ("gelu", "gelu_tanh", "relu", "geglu", "solu"):
            raise ValueError(f"act={self.act!r}: a dense layer has gelu, gelu_tanh, relu, geglu or solu")
        self.c_fc = nn.Linear(config.d_model, hidden * (2 if self.act == "geglu" else 1), bias=config.bias)
        self.c_proj = _into_residual(hidden, config)
        self.norm = nn.LayerNorm(hidden, bias=config.bias) if self.act == "solu" else None

    def neurons(self, x: Tensor) -> Tensor:
        """Hidden activations (..., D), as they enter the second layer."""
        hidden = self.c_fc(x)
        if self.act == "geglu":
            gate, value = hidden.chunk(2, -1)
            return torch.mul(F.gelu(gate), value)
        if self.norm is not None:
            normed: Tensor = self.norm(hidden * hidden.softmax(-1))
            return normed
        return activate(hidden, self.act)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        out: Tensor = self.c_proj(self.neurons(x))
        return out


def _into_residual(width: int, config: MoEXConfig) -> nn.Linear:
    """A layer whose output is added to the residual stream, for which it starts smaller."""
    layer = nn.Linear(width, config.d_model, bias=config.bias)
    layer.ends_in_residual = True  # type: ignore[assignment]
    return layer


class Attention(nn.Module):
    """Causal self-attention; GPT-2's names."""

    def __init__(self, config: MoEXConfig, layer: int) -> None:
        super().__init__()
        if config.d_model % config.n_head:
            raise ValueError(f"d_model={config.d_model} cannot be cut into n_head={config.n_head} heads")
        self.n_head, self.layer, self.dropout = config.n_head, layer, config.dropout
        self.c_attn = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.c_proj = _into_residual(config.d_model, config)

    def forward(self, x: Tensor, cache: DynamicCache | None, mask: Tensor | None) -> Tensor:
        """(B, T, d) to (B, T, d); the cache gains T positions."""
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(width, 2)
        )
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        # Without a mask the last T of all positions look back; torch's own flag counts from the first.
        whole = key.shape[2] == length
        if mask is None and not whole:
            mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=x.device).tril(key.shape[2] - length)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None and whole,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        mixed: Tensor = self.c_proj(out.transpose(1, 2).reshape(batch, length, width))
        return mixed


def _feed_forward(config: MoEXConfig, layer: int) -> nn.Module:
    """The feed-forward of a block: experts, what pruning left of them, or a dense layer."""
    settings: Any = {"act": config.act, "bias": config.bias}
    if not config.has_experts(layer):
        return DenseMLP(config)
    if config.pruned and (widths := config.pruned[layer]) is not None:
        return PrunedMoEXMLP(
            config.d_model, widths, config.experts_per_token, linear=config.router == "linear",
            temperature=config.router_temperature, **settings,
        )  # fmt: skip
    return MoEXMLP(
        config.d_model, n_experts=config.n_experts, top_k=config.experts_per_token, expert_hidden=config.expert_hidden,
        router=config.router, router_temperature=config.router_temperature,  # type: ignore[arg-type]
        router_variance=config.router_variance, detach_stats=config.detach_stats, **settings,  # type: ignore[arg-type]
    )  # fmt: skip


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: MoEXConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.d_model, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.d_model, bias=config.bias)
        self.mlp = _feed_forward(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: DynamicCache | None, mask: Tensor | None) -> Tensor:
        """(B, T, d) to (B, T, d)."""
        x = x + self.dropout(self.attn(self.ln_1(x), cache, mask))
        out: Tensor = x + self.dropout(self.mlp(self.ln_2(x)))
        return out


class Transformer(nn.Module):
    """Embeddings, blocks and the last norm; GPT-2's names."""

    def __init__(self, config: MoEXConfig) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.block_size, config.d_model)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.d_model, bias=config.bias)


class MoEXForCausalLM(PreTrainedModel, GenerationMixin):
    """A GPT whose feed-forwards are MoE-X layers, or dense ones."""

    config_class = MoEXConfig
    config: MoEXConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: MoEXConfig) -> None:
        super().__init__(config)
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's: N(0, .02), what is added to the residual stream smaller by sqrt(2 n_layer)."""
        small = 0.02 / math.sqrt(2 * self.config.n_layer)
        if isinstance(module, MoEXMLP):
            module.reset_parameters(0.02, self.config.n_layer)
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=small if getattr(module, "ends_in_residual", False) else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """Token embedding."""
        return self.transformer.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.transformer.wte = value  # type: ignore[assignment]

    @property
    def blocks(self) -> list[Block]:
        """The transformer blocks."""
        return [block for block in self.transformer.h if isinstance(block, Block)]

    def expert_layers(self) -> dict[int, MoEXMLP]:
        """Number of the block to its MoE-X layer."""
        return {number: block.mlp for number, block in enumerate(self.blocks) if isinstance(block.mlp, MoEXMLP)}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **further: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T + cached), 0 for padding.
            past_key_values: keys and values of earlier positions.
            labels: (B, T), the same tokens; the loss is that of predicting each from those before it.
            use_cache: return keys and values for further tokens.
            further: what transformers passes along and this model has no use for.
        """
        assert input_ids is not None
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        length = input_ids.shape[1]
        if seen + length > self.config.block_size:
            raise ValueError(f"{seen + length} tokens are more than the model's context of {self.config.block_size}")
        positions = torch.arange(seen, seen + length, device=input_ids.device)
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            causal = torch.ones(length, seen + length, dtype=torch.bool, device=input_ids.device).tril(seen)
            mask = causal & attention_mask[:, None, None].bool()
            mask = mask | ~mask.any(-1, keepdim=True)  # a row of padding looks at anything rather than at nothing
        x = self.transformer.drop(self.transformer.wte(input_ids) + self.transformer.wpe(positions))
        again = self.transformer.gradient_checkpointing and self.training and past_key_values is None
        for block in self.blocks:
            if again:  # routing has no noise, so the recomputed tokens go where they went
                x = self.transformer._gradient_checkpointing_func(block.__call__, x, None, mask)  # type: ignore[operator]
            else:
                x = block(x, past_key_values, mask)
        logits = self.lm_head(self.transformer.ln_f(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)


def flops_per_token(config: MoEXConfig, length: int) -> int:
    """Of a training step: 6 for each active weight of a product, and half of attention over ``length`` tokens (causal).

    nanoGPT's count, with the k experts of a token instead of all M.
    """
    active = count_parameters(config)["active_non_embedding"]
    # A head of its own counts among the weights, one that is tied does not.
    head = config.d_model * config.vocab_size if config.tie_word_embeddings else 0
    return 6 * (active + head) + 6 * config.n_layer * config.d_model * length


def count_parameters(config: MoEXConfig) -> dict[str, int]:
    """Parameters of a configuration, counted on the meta device.

    Returns:
        ``total``, ``active`` (a token's: k of M experts), ``non_embedding`` and ``active_non_embedding``.
    """
    with torch.device("meta"):
        model = MoEXForCausalLM(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(
        parameter.numel() // config.n_experts * (config.n_experts - config.experts_per_token)
        for layer in model.expert_layers().values()
        for parameter in (layer.w_enc, layer.w_dec, layer.b_enc, layer.b_dec)
        if parameter is not None
    )
    embedding = model.transformer.wte.weight.numel() + model.transformer.wpe.weight.numel()
    return {
        "total": total, "active": total - idle, "non_embedding": total - embedding,
        "active_non_embedding": total - idle - embedding,
    }  # fmt: skip
