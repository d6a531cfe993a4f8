"""Which feature of one dictionary goes with which of another (arXiv 2410.06981, its code for the filters)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from safelight.errors import SafelightError

Matcher = Literal["many_to_one", "first", "best", "mutual", "hungarian"]

NON_CONCEPT = (".", "\n", "\\n", "", " ", "-", ",", "!", "?", "<|endoftext|>", "<bos>", "|bos|", "<pad>")
"""Tokens that stand for no concept, as they are written; a pair with one of them is dropped."""


@dataclass(frozen=True)
class Pairs:
    """Features that go together.

    Attributes:
        a: (n,), of the first dictionary.
        b: (n,), of the second.
        correlation: (n,), of their activations.
    """

    a: Tensor
    b: Tensor
    correlation: Tensor

    def __len__(self) -> int:
        return len(self.a)

    def kept(self, mask: Tensor) -> Pairs:
        """Those where a mask (n,) is true."""
        return Pairs(self.a[mask], self.b[mask], self.correlation[mask])


def many_to_one(correlation: Tensor) -> Pairs:
    """Each feature of B with the feature of A that correlates most; several of B may share one of A.

    Args:
        correlation: (m_a, m_b).
    """
    best = correlation.max(0)
    return Pairs(best.indices, torch.arange(correlation.shape[1], device=correlation.device), best.values)


def first(pairs: Pairs) -> Pairs:
    """Of pairs that share a feature of A the first: the one-to-one of the reference."""
    return pairs.kept(_leading(pairs.a))


def best(pairs: Pairs) -> Pairs:
    """Of pairs that share a feature of A the one that correlates most, the first of equal ones."""
    order = pairs.correlation.argsort(descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool)
    kept[order] = _leading(pairs.a[order])
    return pairs.kept(kept)


def _leading(values: Tensor) -> Tensor:
    """(n,), where a value stands for the first time."""
    places = values.argsort(stable=True)
    ordered = values[places]
    found = torch.ones_like(values, dtype=torch.bool)
    found[places[1:]] = ordered[1:] != ordered[:-1]
    return found


def mutual(correlation: Tensor) -> Pairs:
    """Features each of which correlates most with the other.

    Args:
        correlation: (m_a, m_b).
    """
    pairs = many_to_one(correlation)
    return pairs.kept(correlation.argmax(1)[pairs.a] == pairs.b)


def most_active(activity: Tensor, count: int) -> Tensor:
    """The features that are active most, in order of their number.

    Args:
        activity: (m,), for instance how often each fires.
        count: how many (the reference's page: 3,000 for :func:`hungarian`).
    """
    return activity.argsort(descending=True, stable=True)[:count].sort().values


def hungarian(correlation: Tensor, pool: tuple[Tensor, Tensor] | None = None) -> Pairs:
    """One-to-one pairs with the largest sum of correlations, in the order of B.

    Time grows with the cube of the features: give a pool beyond a few thousand.

    Args:
        correlation: (m_a, m_b).
        pool: features of A and of B that may be paired, see :func:`most_active`.

    Raises:
        SafelightError: scipy is missing.
    """
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    except ImportError as error:
        raise SafelightError("matcher=hungarian needs scipy: pip install scipy") from error
    rows, columns = pool or (torch.arange(size) for size in correlation.shape)
    rows, columns = rows.to(correlation.device), columns.to(correlation.device)
    chosen = correlation[rows[:, None], columns]
    one, two = (torch.as_tensor(side).to(rows) for side in linear_sum_assignment(-chosen.cpu().numpy()))
    pairs = Pairs(rows[one], columns[two], chosen[one, two])
    order = pairs.b.argsort()
    return pairs.kept(order)


def shares_concept(
    pairs: Pairs, tokens_a: Sequence[Sequence[str]], tokens_b: Sequence[Sequence[str]], non_concept: Collection[str]
) -> Tensor:
    """(n,), pairs whose top tokens hold none that stands for no concept, and at least one in common.

    Args:
        pairs: of features.
        tokens_a: of each feature of A the tokens at which it is most active (reference: five).
        tokens_b: of each feature of B.
        non_concept: tokens that stand for no concept.
    """
    found = []
    for one, two in zip(pairs.a.tolist(), pairs.b.tolist(), strict=True):
        left, right = set(tokens_a[one]), set(tokens_b[two])
        found.append(not left.isdisjoint(right) and (left | right).isdisjoint(non_concept))
    return torch.tensor(found, dtype=torch.bool, device=pairs.a.device)


def pair_features(
    correlation: Tensor,
    tokens_a: Sequence[Sequence[str]],
    tokens_b: Sequence[Sequence[str]],
    *,
    matcher: Matcher = "best",
    corr_min: float = 0.1,
    non_concept: Collection[str] | None = NON_CONCEPT,
    pool: tuple[Tensor, Tensor] | None = None,
) -> tuple[Pairs, dict[str, int]]:
    """Pair features and filter the pairs in the order of the reference.

    Args:
        correlation: (m_a, m_b), of activations.
        tokens_a: of each feature of A the tokens at which it is most active, as text (reference: five).
        tokens_b: of each feature of B.
        matcher: ``many_to_one``; ``first`` (the reference) or ``best`` of the pairs that share a feature of A;
            ``mutual`` nearest; ``hungarian``.
        corr_min: pairs must correlate more (.1; the reference's semantic notebooks: 0).
        non_concept: tokens that stand for no concept; None to keep pairs whatever their tokens.
        pool: features that ``hungarian`` may pair.

    Returns:
        The pairs, and how many were left after each step: ``paired``, ``concept``, ``one_to_one``, ``correlated``.

    Raises:
        SafelightError: an unknown matcher, or not one list of tokens for each feature.
    """
    if matcher not in get_args(Matcher):
        raise SafelightError(f"matcher={matcher!r} is none of {', '.join(get_args(Matcher))}")
    if (len(tokens_a), len(tokens_b)) != tuple(correlation.shape):
        raise SafelightError(
            f"correlation {tuple(correlation.shape)} needs the tokens of as many features, "
            f"got {len(tokens_a)} and {len(tokens_b)}"
        )
    if matcher == "hungarian":
        pairs = hungarian(correlation, pool)
    else:
        pairs = mutual(correlation) if matcher == "mutual" else many_to_one(correlation)
    left = {"paired": len(pairs)}
    if non_concept is not None:
        pairs = pairs.kept(shares_concept(pairs, tokens_a, tokens_b, non_concept))
    left["concept"] = len(pairs)
    if matcher in ("first", "best"):
        pairs = first(pairs) if matcher == "first" else best(pairs)
    left["one_to_one"] = len(pairs)
    pairs = pairs.kept(pairs.correlation > corr_min)
    return pairs, left | {"correlated": len(pairs)}
