"""Take features out of a model's activations and put them in, and see what it predicts then."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.probing.dictionary import SparseDictionary
from safelight.probing.language import token_losses
from safelight.probing.tap import ActivationTap


class Surgery:
    """Takes features out of a model's activations and puts them in, on some rows of text.

    Args:
        model: the language model.
        tap: at the site.
        site: name of it.
        dictionary: of the site's vectors.
        tokens: (B, T + 1).
    """

    def __init__(
        self, model: nn.Module, tap: ActivationTap, site: str, dictionary: SparseDictionary, tokens: Tensor
    ) -> None:
        self.model, self.tap, self.site, self.dictionary, self.tokens = model, tap, site, dictionary, tokens
        with tap.reading() as seen, torch.no_grad():
            logits = model(tokens[:, :-1]).logits
        self.before = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(
            len(tokens), -1
        )
        self.mean_log_probability = F.log_softmax(logits.float(), -1).mean((0, 1))
        self.x = seen[site].float()
        self.codes = self.encoded(self.x)
        self.decoder = F.normalize(dictionary.decoder, dim=1)

    def encoded(self, x: Tensor) -> Tensor:
        """Codes (..., m) of vectors (..., d), as the exported dictionary computes them."""
        with self.dictionary.at_inference():
            return self.dictionary.encode(x)

    def parts(self, number: int) -> Tensor:
        """(B, T, d), what a feature adds to each vector, in the units of the data."""
        alone = torch.zeros_like(self.codes)
        alone[..., number] = self.codes[..., number]
        return self.dictionary.decode(alone) - self.dictionary.decode(torch.zeros_like(alone))

    def without(self, number: int) -> float:
        """Rise of the cross entropy where a feature is active when its part is taken out; the error stays in."""
        part, active = self.parts(number), self.codes[..., number] != 0
        if not active.any():
            return 0.0
        with self.tap.writing({self.site: lambda x: x - part.to(x.dtype)}):
            rise = token_losses(self.model, self.tokens) - self.before
        return float(rise[active].mean())

    def steered(self, number: int, token: int, strength: float) -> float:
        """Rise of a token's mean log-probability when a feature is added everywhere.

        Args:
            number: of the feature.
            token: whose log-probability.
            strength: length of what is added, in the units of the data.
        """
        with self.tap.writing({self.site: lambda x: x + (strength * self.decoder[number]).to(x.dtype)}):
            logits = self.model(self.tokens[:, :-1]).logits
        after = F.log_softmax(logits.float(), -1).mean((0, 1))
        return float(after[token] - self.mean_log_probability[token])
