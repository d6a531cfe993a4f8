"""The usual way to read a dense model, for comparison: a sparse autoencoder (sae-lens) on its residual stream."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM

LABEL = "dense_sae"
"""Name of the baseline among the models."""
DEAD_AFTER = 200
"""Steps without firing after which a feature gets sae-lens' auxiliary loss."""


class SparseBaseline(nn.Module):
    """A TopK autoencoder of sae-lens on what a dense model's block puts out.

    Args:
        d_model: width of the residual stream.
        hidden: features (paper's baseline: 4096).
        k: of them active for each token.
        layer: number of the block.
        seed: of the initial weights.

    Raises:
        SafelightError: sae-lens is not installed.
    """

    seen: Tensor
    idle: Tensor
    scale: Tensor

    def __init__(self, d_model: int, *, hidden: int, k: int, layer: int, seed: int) -> None:
        super().__init__()
        try:
            lens: Any = importlib.import_module("sae_lens")  # seconds, so only where it is wanted
            steps: Any = importlib.import_module("sae_lens.saes.sae")
        except ImportError as error:
            raise SafelightError("sae_steps: sae-lens is not installed; pip install 'safelight[sae]'") from error
        self.layer, self.hidden, self.k, self._step_input = layer, hidden, k, steps.TrainStepInput
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = lens.TopKTrainingSAEConfig(d_in=d_model, d_sae=hidden, k=k, dtype="float32", device="cpu")
            self.sae: Any = lens.TopKTrainingSAE(config)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("idle", torch.zeros(hidden, dtype=torch.long))
        self.register_buffer("scale", torch.ones(()))

    def loss(self, x: Tensor) -> Tensor:
        """Reconstruction (and auxiliary) loss of residual streams (N, d); counts which features fire."""
        if not self.seen:  # to the norm that sae-lens' settings are made for: the root of the width
            self.scale.copy_(x.shape[1] ** 0.5 / x.norm(dim=1).mean())
            with torch.no_grad():
                self.sae.b_dec.copy_((x * self.scale).mean(0))
        step = self._step_input(
            sae_in=x * self.scale, coefficients={}, dead_neuron_mask=self.idle > DEAD_AFTER,
            n_training_steps=int(self.seen), is_logging_step=False,
        )  # fmt: skip
        out = self.sae.training_forward_pass(step)
        with torch.no_grad():
            fired = (out.feature_acts != 0).any(0)
            self.idle.copy_(torch.where(fired, 0, self.idle + 1))
            self.seen += 1
        loss: Tensor = out.loss
        return loss

    def neurons(self, x: Tensor) -> Tensor:
        """Features (..., hidden) of residual streams (..., d)."""
        features: Tensor = self.sae.encode(x * self.scale)
        return features.to_dense() if features.is_sparse else features

    def forward(self, x: Tensor) -> Tensor:
        """Residual streams (..., d) as they are put together again from their features."""
        made: Tensor = self.sae.decode(self.neurons(x)) / self.scale
        return made

    def active_fraction(self) -> float:
        """Share of the features that are active for a token."""
        return self.k / self.hidden

    @contextmanager
    def tapped(self, model: MoEXForCausalLM, replace: bool = False) -> Iterator[list[Tensor]]:
        """What the block puts out in forward passes inside, perhaps replaced by its reconstruction."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            seen.append(output.detach())
            return self(output) if replace else None

        hook = model.blocks[self.layer].register_forward_hook(keep)
        try:
            yield seen
        finally:
            hook.remove()

    def spliced(self, model: MoEXForCausalLM) -> Any:
        """:meth:`tapped`, with the reconstruction going on."""
        return self.tapped(model, replace=True)
