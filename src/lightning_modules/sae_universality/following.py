"""Do features that go together also do the same? Take both out of their models and compare what is lost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.lightning_modules.sae_universality.matching import Pairs
from safelight.lightning_modules.sae_universality.significance import Tested, against_null, permutations
from safelight.lightning_modules.sae_universality.similarity import average_ranks
from safelight.probing.surgery import Surgery


@dataclass(frozen=True)
class Followed:
    """Pairs whose features were taken out.

    Attributes:
        pairs: of features.
        lost_a: (n,), rise of the cross entropy where A's feature is active, in nats a token.
        lost_b: (n,), the same in B.
        alike: Spearman correlation of the two, against shuffled pairs.
    """

    pairs: Pairs
    lost_a: Tensor
    lost_b: Tensor
    alike: Tested


@torch.no_grad()
def follow(pairs: Pairs, a: Surgery, b: Surgery, *, count: int, shuffles: int, seed: int) -> Followed | None:
    """Take features of some pairs out of their models, one by one.

    Args:
        pairs: to draw from.
        a: the first model on some rows.
        b: the second on the same.
        count: pairs at most.
        shuffles: of the test.
        seed: of draws and shuffles.

    Returns:
        None for fewer than three pairs.
    """
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
    chosen = Pairs(pairs.a[order], pairs.b[order], pairs.correlation[order])
    if len(chosen) < 3:
        return None
    lost_a = torch.tensor([a.without(number) for number in chosen.a.tolist()], dtype=torch.float64)
    lost_b = torch.tensor([b.without(number) for number in chosen.b.tolist()], dtype=torch.float64)
    one, two = (average_ranks(lost) - (len(chosen) + 1) / 2 for lost in (lost_a, lost_b))
    size = float(one.norm() * two.norm())
    if not size:
        return None
    null = [float(one @ two[shuffled]) / size for shuffled in permutations(len(chosen), shuffles, seed)]
    return Followed(chosen, lost_a, lost_b, against_null(float(one @ two) / size, null, len(chosen)))
