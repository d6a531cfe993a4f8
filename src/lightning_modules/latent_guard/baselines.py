"""What the guard is compared with, all over the same prompts and the same list of concepts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.lightning_modules.latent_guard.features import FeatureStore
from safelight.lightning_modules.latent_guard.head import ConceptVectors, EmbeddingMappingLayer
from safelight.lightning_modules.latent_guard.wording import normalise


class Scorer(Protocol):
    """Anything that scores prompts by concepts."""

    def __call__(self, texts: Sequence[str], concepts: Sequence[str]) -> Tensor:
        """(P, C) on the CPU, larger where a concept is more likely there; (P, 1) where concepts play no part."""


class HeadScorer:
    """The embedding mapping layer, trained or not.

    Args:
        head: the layer.
        store: features of texts.
    """

    def __init__(self, head: EmbeddingMappingLayer, store: FeatureStore) -> None:
        self.head, self.store = head, store
        self._banks: dict[tuple[str, ...], ConceptVectors] = {}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], concepts: Sequence[str]) -> Tensor:
        """Scores: ``tempr`` times a cosine."""
        device, dtype = self.head.tempr.device, self.head.tempr.dtype
        key = tuple(concepts)
        if key not in self._banks:
            self._banks[key] = self.head.concepts(self.store.pooled(concepts, device).to(dtype))
        features = self.store(texts, device)
        scores: Tensor = self.head(features.tokens.to(dtype), self._banks[key], features.mask)
        return scores.float().cpu()


class RawCosine:
    """Cosine of the encoder's pooled vectors (the paper's CLIPScore).

    Args:
        store: features of texts.
    """

    def __init__(self, store: FeatureStore) -> None:
        self.store = store

    def __call__(self, texts: Sequence[str], concepts: Sequence[str]) -> Tensor:
        """Cosines."""
        prompts, words = (F.normalize(self.store.pooled(part), dim=-1) for part in (texts, concepts))
        return (prompts @ words.T).cpu()


class Blacklist:
    """Whether the concept stands in the prompt, in any case: 1 or 0.

    Args:
        whole_words: ``False`` finds it inside words, too (the paper's text blacklist).
    """

    def __init__(self, whole_words: bool) -> None:
        self.whole_words = whole_words

    def __call__(self, texts: Sequence[str], concepts: Sequence[str]) -> Tensor:
        """1 where it stands."""
        plain = [normalise(text) for text in texts]
        found: list[Callable[[str], bool]] = [self._finder(normalise(concept)) for concept in concepts]
        return torch.tensor([[float(finds(text)) for finds in found] for text in plain]).view(len(plain), len(found))

    def _finder(self, concept: str) -> Callable[[str], bool]:
        if not self.whole_words:
            return lambda text: concept in text
        pattern = re.compile(rf"(?<!\w){re.escape(concept)}(?!\w)")
        return lambda text: pattern.search(text) is not None


class Probe(nn.Sequential):
    """A classifier of safe and unsafe prompts on pooled features, without any list.

    Args:
        dim: width of the features.
        hidden: width of the hidden layer; None for logistic regression.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        layers: list[nn.Module] = [nn.LayerNorm(dim, elementwise_affine=False)]
        if hidden is not None:
            layers += [nn.Linear(dim, hidden), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden or dim, 1))


class ProbeScorer:
    """A trained probe.

    Args:
        probe: the classifier.
        store: features of texts.
    """

    def __init__(self, probe: Probe, store: FeatureStore) -> None:
        self.probe, self.store = probe, store

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], concepts: Sequence[str]) -> Tensor:
        """Logits of "unsafe", (P, 1)."""
        weight = next(self.probe.parameters())
        logits: Tensor = self.probe(self.store.pooled(texts, weight.device).to(weight.dtype))
        return logits.float().cpu()
