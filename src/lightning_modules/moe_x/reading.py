"""Which neurons a report shows, and what their absence costs beside that of others which fire as often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from safelight.lightning_modules.moe_x.board_reading import BoardResult
from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM
from safelight.lightning_modules.moe_x.neurons import (
    Effect,
    NeuronReader,
    NeuronReport,
    effect_of,
)
from safelight.probing.contexts import matched
from safelight.probing.language import token_losses

SEEN = 20
"""Positions at which a class has to occur: the best of thousands of neurons fits a rare one by chance."""
ROWS = 64
"""Of text, on which neurons and experts are cut out."""
USUAL = (0.001, 0.2)
"""Firing rates of neurons that are drawn for the report: neither nearly dead nor always on."""


@dataclass(frozen=True)
class Reading:
    """What was looked at closely.

    Attributes:
        reports: of the chosen neurons.
        known: index of the class of the headline property set that each is best at, and its F1; None for a drawn one.
        effects: of cutting each out.
        controls: of cutting out another neuron instead that fires about as often.
        experts: layer and expert to the effect of cutting it out.
    """

    reports: list[NeuronReport]
    known: list[tuple[int, float] | None]
    effects: list[Effect]
    controls: list[Effect]
    experts: dict[tuple[int, int], Effect]


@torch.no_grad()
def read_closely(
    model: MoEXForCausalLM, reader: NeuronReader, boards: Mapping[int, BoardResult], count: int, seed: int
) -> Reading:
    """Choose neurons, half of them the best at a class of the board (if known), the others drawn; and cut them out.

    Args:
        model: the language model.
        reader: has gone through rows of text.
        boards: of the headline property set, by layer; empty where there are none.
        count: of neurons.
        seed: of the draws.
    """
    chosen, known = choose(reader, boards, count, seed)
    tokens = reader.rows()[:ROWS].to(model.device)
    before = token_losses(model, tokens)

    def cut(layer: int, *numbers: int) -> Effect:
        return effect_of(model, layer, torch.tensor(numbers, device=model.device), tokens, before)

    experts = {}
    for layer, mlp in model.expert_layers().items():
        width = mlp.expert_hidden
        for expert in range(mlp.n_experts):
            experts[layer, expert] = cut(layer, *range(expert * width, (expert + 1) * width))
    return Reading(
        reports=reader.report(model, chosen),
        known=known,
        effects=[cut(layer, neuron) for layer, neuron in chosen],
        controls=[cut(layer, matched(reader.rate(layer), neuron, seed)) for layer, neuron in chosen],
        experts=experts,
    )


def choose(
    reader: NeuronReader, boards: Mapping[int, BoardResult], count: int, seed: int
) -> tuple[list[tuple[int, int]], list[tuple[int, float] | None]]:
    """Neurons (layer, number), and what each is best at, see :class:`Reading`."""
    candidates = sorted(
        (
            (float(f1), layer, int(neuron), number)
            for layer, board in boards.items()
            for number, (neuron, f1, present) in enumerate(zip(board.best, board.best_f1, board.present, strict=True))
            if present >= SEEN
        ),
        reverse=True,
    )
    best: dict[tuple[int, int], tuple[int, float]] = {}
    for f1, layer, neuron, number in candidates:
        if len(best) < (count + 1) // 2:
            best.setdefault((layer, neuron), (number, f1))
    usual: list[tuple[int, int]] = []
    for layer in reader.layers:
        rate = reader.rate(layer)
        fit = ((rate >= USUAL[0]) & (rate <= USUAL[1])).nonzero().flatten().tolist()
        usual += [(layer, neuron) for neuron in fit if (layer, neuron) not in best]
    order = torch.randperm(len(usual), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = [usual[place] for place in order[: count - len(best)]]
    return [*best, *drawn], [*best.values(), *[None] * len(drawn)]


def mean_firing(effects: list[Effect], which: list[bool]) -> float:
    """Mean rise of the loss where the neurons fire, over some of them."""
    values = torch.tensor([effect.firing for effect, wanted in zip(effects, which, strict=True) if wanted])
    return float(values.mean()) if len(values) else 0.0


def principal(rows: Tensor) -> Tensor:
    """(N, d) to (N, 2): the two directions of the largest spread."""
    centred = rows.float() - rows.float().mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, directions = torch.pca_lowrank(centred, q=2, center=False)
    return centred @ directions
