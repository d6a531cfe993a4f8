"""Two dictionaries beside each other: which features go together, how alike they are arranged, what chance gives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.sae_universality.matching import (
    NON_CONCEPT,
    Matcher,
    Pairs,
    many_to_one,
    pair_features,
)
from safelight.lightning_modules.sae_universality.matching import first as first_of
from safelight.lightning_modules.sae_universality.significance import (
    Tested,
    benjamini_hochberg,
    pc1_test,
    rsa_test,
    svcca_test,
)
from safelight.lightning_modules.sae_universality.similarity import linear_cka, procrustes_error, svcca_excess
from safelight.lightning_modules.sae_universality.subspaces import KEYWORDS, features_of_concept
from safelight.probing.dictionary import SparseDictionary


@dataclass(frozen=True)
class Words:
    """The tokens at which each feature of a dictionary is most active, as text.

    Attributes:
        tokens: of each feature.
        windows: the text around each of them.
    """

    tokens: list[list[str]]
    windows: list[list[str]]


@dataclass(frozen=True)
class Side:
    """A dictionary and the words of its features."""

    dictionary: SparseDictionary
    words: Words

    def rows(self, numbers: Tensor) -> Tensor:
        """(n, d), what these features write."""
        return self.dictionary.decoder[numbers.to(self.dictionary.decoder.device)].float().cpu()


@dataclass(frozen=True)
class Settings:
    """How features are paired and tested; see :class:`SAEUniversality`."""

    matcher: Matcher
    corr_min: float
    keep_non_concept: bool
    shuffles: int
    svcca_share: float | None
    seed: int


@dataclass(frozen=True)
class Comparison:
    """Of two dictionaries.

    Attributes:
        pairs: features that go together.
        left: how many pairs each filter left.
        mean_correlation: mean over the features of B of the largest correlation with one of A, before any filter.
        rsa: of the paired decoder rows.
        svcca: the definition's, with 99 % of the variance.
        pc1: the published one, of first principal scores.
        cka: linear, of the decoder rows.
        procrustes: relative error of the best rotation.
    """

    pairs: Pairs
    left: dict[str, int]
    mean_correlation: float
    rsa: Tested
    svcca: Tested
    pc1: Tested
    cka: float
    procrustes: float

    def figures(self) -> dict[str, float]:
        """By the names that are logged; what says nothing is left out."""
        found = {"mean_correlation": self.mean_correlation, "pairs": float(len(self.pairs))}
        for name in ("rsa", "svcca", "pc1"):
            tested: Tested = getattr(self, name)
            found |= {name: tested.score, f"{name}_null": tested.null_mean, f"{name}_p": tested.p}
        found |= {
            "svcca_excess": svcca_excess(self.svcca.score, self.svcca.null_mean),
            "cka": self.cka, "procrustes": self.procrustes,
        }  # fmt: skip
        return {name: value for name, value in found.items() if not math.isnan(value)}


def compare(correlation: Tensor, a: Side, b: Side, settings: Settings) -> Comparison:
    """Pair the features of two dictionaries and test how alike their decoders are.

    Args:
        correlation: (m_a, m_b), of their codes on the same tokens.
        a: the first.
        b: the second.
        settings: of pairing and tests.
    """
    correlation = correlation.cpu()
    pairs, left = pair_features(
        correlation, a.words.tokens, b.words.tokens, matcher=settings.matcher, corr_min=settings.corr_min,
        non_concept=None if settings.keep_non_concept else NON_CONCEPT,
    )  # fmt: skip
    best = many_to_one(correlation).correlation
    x, y = a.rows(pairs.a), b.rows(pairs.b)
    rsa, svcca, pc1 = tests(x, y, settings, settings.shuffles)
    few = len(pairs) < 3
    return Comparison(
        pairs=pairs, left=left, mean_correlation=float(best.mean()), rsa=rsa, svcca=svcca, pc1=pc1,
        cka=math.nan if few else linear_cka(x, y), procrustes=math.nan if few else procrustes_error(x, y),
    )  # fmt: skip


def tests(x: Tensor, y: Tensor, settings: Settings, shuffles: int) -> tuple[Tested, Tested, Tested]:
    """RSA, SVCCA and the correlation of first principal scores of paired rows (n, d_a) and (n, d_b)."""
    cap = None if settings.svcca_share is None else max(int(settings.svcca_share * len(x)), 1)
    return (
        rsa_test(x, y, shuffles=shuffles, seed=settings.seed),
        svcca_test(x, y, shuffles=shuffles, seed=settings.seed, directions=cap),
        pc1_test(x, y, shuffles=shuffles, seed=settings.seed),
    )


@dataclass(frozen=True)
class Subspace:
    """Features of one concept.

    Attributes:
        name: of the concept.
        pairs: features.
        rsa: of their decoder rows.
        svcca: the definition's.
        pc1: the published one.
        adjusted: p values of the three over all concepts (Benjamini-Hochberg).
    """

    name: str
    pairs: Pairs
    rsa: Tested
    svcca: Tested
    pc1: Tested
    adjusted: tuple[float, float, float] = (math.nan, math.nan, math.nan)


def compare_subspaces(
    correlation: Tensor, a: Side, b: Side, concepts: Mapping[str, Sequence[str]], settings: Settings, shuffles: int
) -> list[Subspace]:
    """Compare features of one concept at a time (paper: Semantic subspaces).

    Features of a concept are collected on either side, then paired inside: each of B with the one of A that correlates
    most, the first of those that share one. A concept with fewer than three pairs is left out.

    Args:
        correlation: (m_a, m_b).
        a: the first dictionary.
        b: the second.
        concepts: name to keywords.
        settings: of the tests.
        shuffles: of each (paper: 1,000).
    """
    found = []
    for name, keywords in concepts.items():
        known = {word.lower() for word in keywords}
        one, two = (torch.tensor(features_of_concept(side.words.tokens, side.words.windows, known), dtype=torch.long)
                    for side in (a, b))  # fmt: skip
        if min(len(one), len(two)) < 3:
            continue
        inside = first_of(many_to_one(correlation.cpu()[one][:, two]))
        pairs = Pairs(one[inside.a], two[inside.b], inside.correlation)
        if len(pairs) >= 3:
            found.append(Subspace(name, pairs, *tests(a.rows(pairs.a), b.rows(pairs.b), settings, shuffles)))
    adjusted = benjamini_hochberg([test.p for one in found for test in (one.rsa, one.svcca, one.pc1)])
    return [
        Subspace(one.name, one.pairs, one.rsa, one.svcca, one.pc1, tuple(adjusted[3 * place : 3 * place + 3]))  # type: ignore[arg-type]
        for place, one in enumerate(found)
    ]


def concepts_named(names: Sequence[str], own: Mapping[str, Sequence[str]]) -> dict[str, Sequence[str]]:
    """Keyword lists by name, the paper's or one's own.

    Raises:
        SafelightError: there is none of a name.
    """
    unknown = [name for name in names if name not in KEYWORDS]
    if unknown:
        raise SafelightError(f"subspaces={unknown}: there are {', '.join(KEYWORDS)}; give other words in keywords")
    return {name: KEYWORDS[name] for name in names} | dict(own)
