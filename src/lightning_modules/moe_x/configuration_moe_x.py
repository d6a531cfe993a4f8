"""Configuration of the language model, in transformers' form. Travels with an exported model."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class MoEXConfig(PretrainedConfig):
    """GPT-2's decoder (pre-norm, learned positions) with MoE-X or dense feed-forwards.

    Args:
        vocab_size: tokens.
        block_size: longest context.
        n_layer: blocks.
        n_head: attention heads.
        d_model: width.
        mlp: ``moe``, or ``dense``, the baseline.
        act: ``relu``, ``gelu`` or ``gelu_tanh`` (GPT-2's) for experts; for dense layers ``geglu`` and ``solu``, too.
        n_experts: M (paper: 8).
        experts_per_token: k (paper: 2).
        expert_hidden: neurons of an expert; None for 4 d_model.
        mlp_hidden: neurons of a dense layer; None for the same active parameters as with experts (paper's baseline):
            as many as a token's experts have, with ``geglu``, which has three matrices, two thirds of that.
        router: ``sparsity`` (paper) or ``linear`` (Switch).
        router_temperature: of the gates' softmax.
        router_variance: ``diag`` (paper) or ``full``.
        detach_stats: keep the router's gradient off the encoder weights (ablation).
        moe_every: one block in so many has experts, the last of each group.
        bias: biases of linear layers and norms.
        dropout: after embedding, attention and feed-forward.
        pruned: of each block the widths that its experts are left with, or None for a whole block; None for a whole
            model.
        tie_word_embeddings: head and token embedding are one matrix.
    """

    model_type = "moe_x"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
        "max_position_embeddings": "block_size",
    }  # fmt: skip

    def __init__(
        self,
        vocab_size: int = 32,
        block_size: int = 1023,
        n_layer: int = 8,
        n_head: int = 8,
        d_model: int = 512,
        mlp: str = "moe",
        act: str = "relu",
        n_experts: int = 8,
        experts_per_token: int = 2,
        expert_hidden: int | None = None,
        mlp_hidden: int | None = None,
        router: str = "sparsity",
        router_temperature: float = 1.0,
        router_variance: str = "diag",
        detach_stats: bool = False,
        moe_every: int = 1,
        bias: bool = False,
        dropout: float = 0.0,
        pruned: list[list[int] | None] | None = None,
        tie_word_embeddings: bool = True,
        **further: Any,
    ) -> None:
        self.vocab_size, self.block_size = vocab_size, block_size
        self.n_layer, self.n_head, self.d_model = n_layer, n_head, d_model
        self.mlp, self.act, self.n_experts, self.experts_per_token = mlp, act, n_experts, experts_per_token
        self.expert_hidden, self.mlp_hidden = expert_hidden or 4 * d_model, mlp_hidden
        self.router, self.router_temperature, self.router_variance = router, router_temperature, router_variance
        self.detach_stats, self.moe_every, self.bias, self.dropout = detach_stats, moe_every, bias, dropout
        self.pruned = pruned
        super().__init__(**further)
        self.tie_word_embeddings = tie_word_embeddings

    def dense_hidden(self) -> int:
        """Neurons of a dense feed-forward."""
        active = self.experts_per_token * self.expert_hidden
        return int(self.mlp_hidden or (2 * active // 3 if self.act == "geglu" else active))

    def has_experts(self, block: int) -> bool:
        """Whether a block's feed-forward is an MoE-X layer."""
        return self.mlp == "moe" and block % self.moe_every == self.moe_every - 1
