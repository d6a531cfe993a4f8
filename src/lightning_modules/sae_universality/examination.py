"""One pass over a test set: sums of correlations, the tokens at which features fire, then every comparison."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from safelight.lightning_modules.sae_universality.comparison import (
    Comparison,
    Side,
    Subspace,
    Words,
    compare,
    compare_subspaces,
)
from safelight.lightning_modules.sae_universality.following import Followed, follow
from safelight.lightning_modules.sae_universality.subspaces import window_text
from safelight.metrics import FeatureCorrelation, SampleRows, TopTokens
from safelight.probing.dictionary import SparseDictionary
from safelight.probing.surgery import Surgery

if TYPE_CHECKING:
    from safelight.lightning_modules.sae_universality.module import SAEUniversality

TOP = 5
"""Tokens of a feature (paper)."""
ROWS = 32
"""Of text, on which paired features are taken out."""
SHUFFLED_TOKENS = 4096
"""Tokens of the control in which B reads them in another order."""
AGAIN, RERANDOMISED, SHUFFLED = "same_model", "rerandomised", "token_shuffled"


@dataclass(frozen=True)
class Coder:
    """A dictionary and where it reads.

    Attributes:
        name: ``a``, ``b`` or that of a control.
        model: name of the model it reads.
        site: of that model.
        dictionary: of its vectors.
        learns: whether it is trained in this run.
    """

    name: str
    model: str
    site: str
    dictionary: SparseDictionary
    learns: bool


@dataclass
class Findings:
    """What a test found.

    Attributes:
        measured: figures of the headline pair of sites, which has the empty name, and of the controls.
        comparisons: of every site of A with every site of B.
        controls: comparisons by the name of the control.
        subspaces: of the headline pair.
        words: of the headline's dictionaries, A's and B's.
        followed: pairs that were taken out of both models.
    """

    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    comparisons: dict[tuple[str, str], Comparison] = field(default_factory=dict)
    controls: dict[str, Comparison] = field(default_factory=dict)
    subspaces: list[Subspace] = field(default_factory=list)
    words: tuple[Words, Words] | None = None
    followed: Followed | None = None


class Examination:
    """A test of all dictionaries.

    Args:
        module: being tested.
    """

    def __init__(self, module: SAEUniversality) -> None:
        self.module = module
        self.coders = {(coder.name, coder.site): coder for coder in module.coders}
        a, b = ("a", module.headline["a"]), ("b", module.headline["b"])
        self.main = (a, b)
        # Controls: which dictionaries stand in for A's and B's.
        stand_ins = {
            AGAIN: (a, (AGAIN, module.headline["a"])),
            RERANDOMISED: ((RERANDOMISED, module.headline["a"]), b),
        }
        self.stand_ins = {name: pair for name, pair in stand_ins.items() if name in module.control_names}
        pairs = [(("a", one), ("b", two)) for one in module.sites["a"] for two in module.sites["b"]]
        self.correlations = {pair: self._correlation(pair) for pair in pairs}
        self.of_controls = {name: self._correlation(pair) for name, pair in self.stand_ins.items()}
        self.tops = {
            place: TopTokens(coder.dictionary.d_sae, top=TOP).to(module.device) for place, coder in self.coders.items()
        }
        self.rows = SampleRows().to(module.device)
        self.numbers: dict[int, int] = {}
        self.newest = -1

    def _correlation(self, pair: tuple[tuple[str, str], tuple[str, str]]) -> FeatureCorrelation:
        one, two = (self.coders[place].dictionary.d_sae for place in pair)
        return FeatureCorrelation(one, two).to(self.module.device)

    # -- batch by batch ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, tokens: Tensor, index: Tensor) -> None:
        """Take in input tokens (B, T) of rows ``index`` (B,)."""
        fresh = self._fresh(index)
        tokens, index = tokens[fresh], index[fresh].to(tokens.device)
        if not len(tokens):
            return
        self.rows.update(torch.cat([index[:, None], tokens], 1), index)
        keep = self.module.mask(tokens)
        where = (index[:, None] * tokens.shape[1] + torch.arange(tokens.shape[1], device=tokens.device))[keep]
        codes = {}
        for (place, coder), x in zip(self.coders.items(), self.module.vectors(tokens), strict=True):
            codes[place] = self._codes(coder.dictionary, x)
            self.tops[place].update(codes[place], tokens[keep], where)
        for (one, two), correlation in self.correlations.items():
            correlation.update(codes[one], codes[two])
        for name, correlation in self.of_controls.items():
            one, two = self.stand_ins[name]
            correlation.update(codes[one], codes[two])

    def _fresh(self, index: Tensor) -> Tensor:
        """(B,), rows that this process has not seen.

        Processes repeat early rows at the end so that all have equally many; sums cannot be told apart later.
        """
        keep = torch.ones(len(index), dtype=torch.bool)
        if self.module.trainer.world_size > 1:
            for place, number in enumerate(index.tolist()):
                keep[place] = number > self.newest
                self.newest = max(self.newest, number)
        return keep.to(index.device)

    def _codes(self, dictionary: SparseDictionary, x: Tensor) -> Tensor:
        if self.module.hparams.use_preacts:
            return dictionary.preactivations(x)
        with dictionary.at_inference():
            return dictionary.encode(x)

    # -- at the end --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self) -> Findings:
        """Every comparison; all processes compute the same."""
        found, module = Findings(), self.module
        kept = self.rows.compute().long()
        rows, self.numbers = kept[:, 1:], {number: place for place, number in enumerate(kept[:, 0].tolist())}
        sides = {place: Side(coder.dictionary, self._words(place, rows)) for place, coder in self.coders.items()}
        settings = module.settings()
        for (one, two), correlation in self.correlations.items():
            matrix = correlation.compute()
            found.comparisons[one[1], two[1]] = compare(matrix, sides[one], sides[two], settings)
            if (one, two) == self.main:
                found.subspaces = compare_subspaces(
                    matrix, sides[one], sides[two], module.concepts, settings, module.hparams.subspace_shuffles
                )
        a, b = self.main
        for name, correlation in self.of_controls.items():
            here, there = (sides[place] for place in self.stand_ins[name])
            found.controls[name] = compare(correlation.compute(), here, there, settings)
        if SHUFFLED in module.control_names:
            found.controls[SHUFFLED] = compare(self._shuffled(rows), sides[a], sides[b], settings)
        found.words = (sides[a].words, sides[b].words)
        headline = found.comparisons[a[1], b[1]]
        found.measured = {"": headline.figures(), **{name: one.figures() for name, one in found.controls.items()}}
        if module.hparams.followed:
            first, second = (self._surgery(place, rows[:ROWS]) for place in self.main)
            found.followed = follow(
                headline.pairs, first, second, count=module.hparams.followed, shuffles=module.hparams.subspace_shuffles,
                seed=module.hparams.seed,
            )  # fmt: skip
        return found

    def _shuffled(self, rows: Tensor) -> Tensor:
        """(m_a, m_b), correlations when B reads other tokens than A, the same ones in every process."""
        tokens = rows[: max(SHUFFLED_TOKENS // rows.shape[1], 1)].to(self.module.device)
        codes = {
            place: self._codes(coder.dictionary, x)
            for (place, coder), x in zip(self.coders.items(), self.module.vectors(tokens), strict=True)
            if place in self.main
        }
        a, b = (codes[place] for place in self.main)
        order = torch.randperm(len(b), generator=torch.Generator().manual_seed(self.module.hparams.seed))
        correlation = FeatureCorrelation(a.shape[1], b.shape[1], sync_on_compute=False).to(self.module.device)
        correlation.update(a, b[order.to(b.device)])
        return correlation.compute()

    def _surgery(self, place: tuple[str, str], rows: Tensor) -> Surgery:
        coder = self.coders[place]
        tap = self.module.taps[coder.model]
        site = self.module.read_site(coder)
        return Surgery(self.module.models[coder.model], tap, site, coder.dictionary, rows.to(self.module.device))

    def _words(self, place: tuple[str, str], rows: Tensor) -> Words:
        """Tokens at which features are strongest, and the text around them."""
        _, tokens, where = self.tops[place].compute()
        texts: dict[int, str] = {}

        def text(token: int) -> str:
            if token not in texts:
                texts[token] = self.module.token_text(token)
            return texts[token]

        length = rows.shape[1]
        lists = rows.tolist()
        indices = {}
        names, windows = [], []
        for line, places in zip(tokens.tolist(), where.tolist(), strict=True):
            names.append([text(token) for token in line if token >= 0])
            around = []
            for position in places:
                if position < 0:
                    continue
                number, at = divmod(position, length)
                if number not in indices:
                    indices[number] = [text(token) for token in lists[self.numbers[number]]]
                around.append(window_text(indices[number], at))
            windows.append(around)
        return Words(names, windows)
