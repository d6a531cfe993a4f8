"""The embedding mapping layer: prompts and concepts meet in a small latent space (arXiv 2404.08031, section 3.2).

The scores of all prompts with all concepts are computed from keys and values of the prompts and queries of the
concepts, each projected once. The authors' code projects every prompt again for every concept, to the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError

CHUNK_VALUES = 2**24
"""Attention outputs held at once without gradients, over all prompts, concepts and heads (64 MiB in fp32)."""


@dataclass(frozen=True)
class ConceptVectors:
    """What the head knows of a list of concepts.

    Attributes:
        query: (C, heads, head_dim), what is asked of the tokens of a prompt.
        latent: (C, d), where the concept lies in the latent space, not normalised.
    """

    query: Tensor
    latent: Tensor

    def __len__(self) -> int:
        return len(self.query)

    def rows(self, places: list[int] | slice) -> ConceptVectors:
        """Some of the concepts."""
        return ConceptVectors(self.query[places], self.latent[places])


class EmbeddingMappingLayer(nn.Module):
    """Five linear layers and a scale; 1,312,513 parameters at ``dim=768``. Names are those of the released weights.

    ``q = W_q z_c``, ``A = softmax(q K^T / sqrt(head_dim))`` per head over the tokens of the prompt,
    ``h_p|c = W_p concat(A V)``, ``h_c = W_c q``, ``score = T cos(h_p|c, h_c)``.

    Args:
        dim: width D of the text features.
        num_heads: attention heads (paper's best: 16).
        head_dim: width of each (paper's best: 32).
        dim_out: width d of the latent space (paper's best: 128).
        init_scale: what the learned scale T starts from (authors' code: 1 / 0.07).
        cross_attention: False leaves the concept out of the prompt's latent, which is then that of its pooled features
            (the paper's ablation).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        head_dim: int = 32,
        dim_out: int = 128,
        init_scale: float = 14.285714,
        cross_attention: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim, self.dim_out = dim, num_heads, head_dim, dim_out
        self.cross_attention = cross_attention
        inner = num_heads * head_dim
        if cross_attention:
            self.x1_to_key = nn.Linear(dim, inner)
        self.x1_to_value = nn.Linear(dim, inner)
        self.x2_to_query = nn.Linear(dim, inner)
        self.final_mlp = nn.Linear(inner, dim_out)
        self.mlp_query1 = nn.Linear(inner, dim_out)
        self.tempr = nn.Parameter(torch.tensor(float(init_scale)))

    def settings(self) -> dict[str, int | bool]:
        """Constructor arguments that make a layer of the same shapes."""
        return {
            "dim": self.dim, "num_heads": self.num_heads, "head_dim": self.head_dim, "dim_out": self.dim_out,
            "cross_attention": self.cross_attention,
        }  # fmt: skip

    def concepts(self, pooled: Tensor) -> ConceptVectors:
        """Queries and latents of concepts, from their pooled features (C, D)."""
        query = self.x2_to_query(pooled)
        return ConceptVectors(query.unflatten(-1, (self.num_heads, self.head_dim)), self.mlp_query1(query))

    def forward(self, tokens: Tensor, concepts: ConceptVectors, mask: Tensor | None = None) -> Tensor:
        """Scores of every prompt with every concept, (P, C): ``tempr`` times a cosine.

        Args:
            tokens: (P, L, D) features; the first row is the pooled one.
            concepts: see :meth:`concepts`.
            mask: (P, L), False where attention must not look.
        """
        return self.tempr * self.cosines(tokens, concepts, mask)

    def cosines(self, tokens: Tensor, concepts: ConceptVectors, mask: Tensor | None = None) -> Tensor:
        """Cosines of ``h_p|c`` and ``h_c``, (P, C). Concepts are taken in chunks where no gradient is asked for."""
        if tokens.ndim != 3 or tokens.shape[-1] != self.dim:
            raise SafelightError(
                f"tokens: expected (prompts, tokens, {self.dim}), got {tuple(tokens.shape)}; "
                "were the features made by the encoder that the head was trained on?"
            )
        values = self.x1_to_value(tokens)
        if not self.cross_attention:
            latents = F.normalize(self.final_mlp(values[:, 0]), dim=-1)
            return latents @ F.normalize(concepts.latent, dim=-1).T
        keys = self.x1_to_key(tokens).unflatten(-1, (self.num_heads, self.head_dim))
        values = values.unflatten(-1, (self.num_heads, self.head_dim))
        size = len(concepts)
        if not torch.is_grad_enabled():
            size = max(1, CHUNK_VALUES // max(keys[:, 0].numel(), 1))
        parts = [
            self._cosines(keys, values, concepts.rows(slice(start, start + size)), mask)
            for start in range(0, len(concepts), max(size, 1))
        ]
        return torch.cat(parts, 1) if parts else tokens.new_zeros(len(tokens), 0)

    def latents(self, tokens: Tensor, concepts: ConceptVectors, mask: Tensor | None = None) -> Tensor:
        """Latents of prompts, each under its own concept: ``h_p|c``, (P, d), for as many concepts as prompts."""
        values = self.x1_to_value(tokens)
        if not self.cross_attention:
            return self._projected(values[:, 0])
        keys = self.x1_to_key(tokens).unflatten(-1, (self.num_heads, self.head_dim))
        logits = torch.einsum("phe,plhe->phl", concepts.query, keys) * self.head_dim**-0.5
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], float("-inf"))
        values = values.unflatten(-1, (self.num_heads, self.head_dim))
        return self._projected(torch.einsum("phl,plhe->phe", logits.softmax(-1), values).flatten(-2))

    def _projected(self, mixed: Tensor) -> Tensor:
        projected: Tensor = self.final_mlp(mixed)
        return projected

    def _cosines(self, keys: Tensor, values: Tensor, concepts: ConceptVectors, mask: Tensor | None) -> Tensor:
        # (P, heads, C, head_dim): the concepts are the queries, the same for every prompt.
        query = concepts.query.transpose(0, 1).expand(len(keys), -1, -1, -1)
        allowed = None if mask is None else mask[:, None, None]
        mixed = F.scaled_dot_product_attention(query, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=allowed)
        latents = F.normalize(self.final_mlp(mixed.transpose(1, 2).flatten(-2)), dim=-1)
        return torch.einsum("pcd,cd->pc", latents, F.normalize(concepts.latent, dim=-1))


def load_head(head: EmbeddingMappingLayer, file: Path) -> None:
    """Read weights under the authors' names, strictly; nothing in the file is executed.

    Args:
        head: of the same shapes; changed in place.
        file: the authors' ``model_parameters.pth``, or a safetensors file such as an exported ``head.safetensors``.

    Raises:
        SafelightError: the file is missing, damaged or for a head of other shapes.
    """
    file = file.expanduser()
    if not file.is_file():
        raise SafelightError(f"pretrained: there is no file {str(file)!r}")
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        head.load_state_dict(state, strict=True)
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError, SafetensorError, UnpicklingError) as error:
        raise SafelightError(
            f"pretrained={str(file)!r} does not fit a head on features of width {head.dim} "
            f"({str(error).strip().splitlines()[0]})"
        ) from error
