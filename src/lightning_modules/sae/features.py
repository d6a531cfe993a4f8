"""Single features: where they fire, what they push for, and what happens without them or with more of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.probing.contexts import Context, StrongestRows, matched
from safelight.probing.language import logit_lens
from safelight.probing.surgery import Surgery

if TYPE_CHECKING:
    from safelight.lightning_modules.sae.module import SparseAutoencoders

ROWS = 64
"""Of text, on which features are cut out and added."""
USUAL = (1e-3, 0.1)
"""Firing rates of features that are drawn for the report: neither nearly dead nor always on."""


@dataclass(frozen=True)
class Feature:
    """One feature.

    Attributes:
        number: in the dictionary.
        rate: share of the tokens at which it is active.
        largest: activation, in scaled units.
        contexts: the strongest first, one of each row.
        pushes: tokens whose logits its decoder row raises most (logit lens).
        nearest: largest cosine of its decoder row with another's.
        encoder_cosine: of its encoder and decoder rows.
        without: rise of the cross entropy where it is active, in nats a token, when it is taken out.
        without_matched: the same for another feature that is active about as often, where that one is.
        steered: rise of the log-probability of the token it pushes most, over all positions, when its largest
            activation is added everywhere.
        steered_matched: the same token's when the other feature is added.
    """

    number: int
    rate: float
    largest: float
    contexts: list[Context]
    pushes: list[int]
    nearest: float
    encoder_cosine: float
    without: float
    without_matched: float
    steered: float
    steered_matched: float


@dataclass(frozen=True)
class Closely:
    """What was looked at closely.

    Attributes:
        name: of the autoencoder.
        features: that were drawn.
    """

    name: str
    features: list[Feature]


@torch.no_grad()
def read_closely(module: SparseAutoencoders, rows: StrongestRows) -> Closely:
    """Draw features of the first autoencoder among those with a usual firing rate, and look at each."""
    name, dictionary = next(iter(module.named().items()))
    site, tap = module.site_of(name), module.activations.tap
    assert tap is not None
    assert module.model is not None
    surgery = Surgery(module.model, tap, site, dictionary, torch.cat(rows.tokens)[:ROWS].to(module.device))
    rates = rows.rate()
    usual = ((rates >= USUAL[0]) & (rates <= USUAL[1])).nonzero().flatten()
    order = torch.randperm(len(usual), generator=torch.Generator().manual_seed(module.hparams.seed))
    chosen = usual.cpu()[order[: module.hparams.reported_features]].tolist()
    return Closely(
        name, [look(surgery, number, rows, matched(rates, number, module.hparams.seed)) for number in chosen]
    )


def look(surgery: Surgery, number: int, rows: StrongestRows, other: int) -> Feature:
    """Everything about one feature.

    Args:
        surgery: on rows of text.
        number: of it.
        rows: where features were strongest.
        other: a feature that is active about as often.
    """

    def recompute(tokens: Tensor) -> Tensor:
        x = surgery.tap(tokens.to(surgery.x.device))[surgery.site]
        return surgery.encoded(x.float())[..., number]

    pushed = logit_lens(surgery.model, surgery.decoder[number]).topk(6).indices.tolist()
    cosines = surgery.decoder @ surgery.decoder[number]
    cosines[number] = -1
    encoder = F.normalize(surgery.dictionary.encoder[number], dim=0)
    strength = float(surgery.parts(number).norm(dim=-1).amax())
    steered, steered_matched = (surgery.steered(which, pushed[0], strength) for which in (number, other))
    return Feature(
        number=number, rate=float(rows.rate()[number]), largest=rows.largest(number),
        contexts=rows.contexts(number, recompute), pushes=pushed, nearest=float(cosines.max()),
        encoder_cosine=float(encoder @ surgery.decoder[number]),
        without=surgery.without(number), without_matched=surgery.without(other),
        steered=steered, steered_matched=steered_matched,
    )  # fmt: skip
