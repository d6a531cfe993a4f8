"""How well neurons of a layer can be told by the tokens at which they fire (paper, Figure 8, with a surrogate)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.lightning_modules.moe_x.measuring import inputs_of
from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM
from safelight.lightning_modules.moe_x.neurons import neurons
from safelight.metrics.neuron_detection import (
    Explainer,
    NeuronDetection,
    Scorer,
    TokenSet,
    detection_score,
    split_windows,
    windows_of,
)

WIDTH, SHOWN, TESTED = 32, 40, 100
"""Tokens of a window; windows that are explained; windows of each kind that are judged (delphi)."""
NEEDED = SHOWN + TESTED


@dataclass(frozen=True)
class Telling:
    """Means over neurons.

    Attributes:
        score: balanced accuracy by each neuron's own explanation; .5 is chance.
        swapped: by that of another neuron, the control.
        by_decile: accuracy on firing windows by decile of the activation, weakest first.
        silent: accuracy on windows without the neuron.
        count: neurons.
        fit: share of the layer's neurons that fire in enough windows, and are silent in enough.
    """

    score: float
    swapped: float
    by_decile: list[float]
    silent: float
    count: int
    fit: float


@torch.no_grad()
def tell(
    model: MoEXForCausalLM,
    layer: int,
    rows: Sequence[Tensor],
    texts: Sequence[str],
    *,
    count: int,
    seed: int = 0,
    explainer: Explainer | None = None,
    scorer: Scorer | None = None,
) -> Telling | None:
    """Draw neurons of a layer and explain and detect each; None where fewer than two fire often enough.

    Args:
        model: the language model.
        layer: number of the block.
        rows: batches (B, T) of tokens.
        texts: of every token number.
        count: neurons.
        seed: of draws.
        explainer: None for :class:`TokenSet`.
        scorer: None for :class:`TokenSet`.
    """
    surrogate = TokenSet()
    explainer, scorer = explainer or surrogate, scorer or surrogate
    activations = []
    for tokens in rows:
        with inputs_of(model) as seen:
            model(tokens.to(model.device))
        activations.append(torch.stack([neurons(model.blocks[layer].mlp, row).float().cpu() for row in seen[layer]]))
    values, tokens = torch.cat(activations), torch.cat(list(rows)).cpu()
    whole = tokens.shape[1] // WIDTH * WIDTH
    fires = (values[:, :whole] > 0).view(-1, WIDTH, values.shape[2]).any(1).sum(0)
    windows = len(tokens) * whole // WIDTH
    fit = ((fires >= NEEDED) & (windows - fires >= TESTED)).nonzero().flatten()
    order = torch.randperm(len(fit), generator=torch.Generator().manual_seed(seed))
    chosen = fit[order[:count]].tolist()
    if len(chosen) < 2:
        return None
    sides = [windows_of(tokens, values[..., neuron], texts, WIDTH) for neuron in chosen]
    told = [explainer.explain(split_windows(firing, shown=SHOWN, seed=seed)[0]) for firing, _ in sides]
    found: list[NeuronDetection] = []
    swapped: list[NeuronDetection] = []
    for place, (firing, silent) in enumerate(sides):
        for results, number in ((found, place), (swapped, place - 1)):
            explanation = told[number]
            results.append(
                detection_score(
                    firing, silent, explainer, scorer, shown=SHOWN, tested=TESTED, seed=seed, explanation=explanation
                )
            )
    mean = torch.tensor([result.by_decile for result in found]).mean(0)
    return Telling(
        score=sum(result.balanced for result in found) / len(found),
        swapped=sum(result.balanced for result in swapped) / len(swapped),
        by_decile=mean.tolist(),
        silent=sum(result.silent for result in found) / len(found),
        count=len(chosen),
        fit=len(fit) / values.shape[2],
    )
