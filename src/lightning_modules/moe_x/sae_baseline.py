"""The usual way to read a dense model, for comparison: a sparse autoencoder (sae-lens) on its residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM
from safelight.probing.dictionary import SparseDictionary
from safelight.probing.tap import ActivationTap

LABEL = "dense_sae"
"""Name of the baseline among the models."""
DEAD_AFTER = 200
"""Steps without firing after which a feature gets sae-lens' auxiliary loss."""


class SparseBaseline(SparseDictionary):
    """A TopK autoencoder of sae-lens on what a dense model's block puts out.

    Args:
        d_model: width of the residual stream.
        hidden: features (paper's baseline: 4096).
        k: of them active for each token.
        layer: number of the block.
        seed: of the initial weights.
    """

    def __init__(self, d_model: int, *, hidden: int, k: int, layer: int, seed: int) -> None:
        super().__init__(d_model, hidden, k=k, dead_after=DEAD_AFTER, seed=seed)
        self.layer, self.k = layer, k

    def neurons(self, x: Tensor) -> Tensor:
        """Features (..., hidden) of residual streams (..., d)."""
        return self.encode(x)

    def active_fraction(self) -> float:
        """Share of the features that are active for a token."""
        return self.k / self.d_sae

    @contextmanager
    def tapped(self, model: MoEXForCausalLM, replace: bool = False) -> Iterator[dict[str, Tensor]]:
        """What the block puts out in forward passes inside, under :attr:`site`; perhaps its reconstruction goes on."""
        tap = ActivationTap(model, [self.site])
        with tap.reading() as seen, tap.writing({self.site: self} if replace else {}):
            yield seen

    @property
    def site(self) -> str:
        """Where it reads."""
        return f"resid_post.{self.layer}"
