"""What single neurons respond to, what they push for, and what happens without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safelight.lightning_modules.moe_x.layer import MoEXMLP
from safelight.lightning_modules.moe_x.measuring import inputs_of
from safelight.lightning_modules.moe_x.modeling_moe_x import DenseMLP, MoEXForCausalLM
from safelight.probing.contexts import Context, StrongestRows
from safelight.probing.language import logit_lens as logits_of
from safelight.probing.language import token_losses


@dataclass(frozen=True)
class NeuronReport:
    """One neuron.

    Attributes:
        layer: number of the block.
        neuron: its number in the layer; expert times ``expert_hidden`` plus its place there.
        rate: share of all tokens at which it fires.
        largest: activation.
        contexts: the strongest first, one of each row.
        pushes: tokens whose logits its decoder row raises most, past the last norm (logit lens).
    """

    layer: int
    neuron: int
    rate: float
    largest: float
    contexts: list[Context]
    pushes: list[int]


@dataclass
class NeuronReader:
    """Goes through rows of text and remembers for every neuron of every layer where it is strongest.

    Args:
        top: contexts for each neuron.
        width: tokens of a context.
    """

    top: int = 6
    width: int = 32
    layers: dict[int, StrongestRows] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, model: MoEXForCausalLM, tokens: Tensor, inputs: dict[int, Tensor]) -> None:
        """Take in a batch.

        Args:
            model: the language model.
            tokens: (B, T), its input.
            inputs: of its feed-forwards on it, (B, T, d) by block, see :func:`inputs_of`.
        """
        for number, block in enumerate(model.blocks):
            rows = self.layers.setdefault(number, StrongestRows(self.top, self.width))
            rows.add(tokens, (neurons(block.mlp, x) for x in inputs[number]))

    def rate(self, number: int) -> Tensor:
        """(F,), shares of tokens at which a layer's neurons fire."""
        return self.layers[number].rate()

    def rows(self) -> Tensor:
        """(R, T), all tokens."""
        return torch.cat(next(iter(self.layers.values())).tokens)

    @torch.no_grad()
    def report(self, model: MoEXForCausalLM, chosen: Sequence[tuple[int, int]]) -> list[NeuronReport]:
        """Reports of neurons ``(layer, number)``; their contexts are computed once more, in whole rows."""
        found = []
        for layer, neuron in chosen:

            def recompute(tokens: Tensor, layer: int = layer, neuron: int = neuron) -> Tensor:
                with inputs_of(model) as seen:
                    model(tokens.to(model.device))
                return neurons(model.blocks[layer].mlp, seen[layer])[..., neuron]

            rows = self.layers[layer]
            pushes = logit_lens(model, layer, neuron).topk(min(6, model.config.vocab_size)).indices.tolist()
            found.append(
                NeuronReport(
                    layer, neuron, float(rows.rate()[neuron]), rows.largest(neuron), rows.contexts(neuron, recompute),
                    pushes,
                )
            )  # fmt: skip
        return found


def neurons(mlp: object, x: Tensor) -> Tensor:
    """Activations of a feed-forward's neurons, (..., F)."""
    assert isinstance(mlp, (MoEXMLP, DenseMLP))
    return mlp.neurons(x)


@torch.no_grad()
def logit_lens(model: MoEXForCausalLM, layer: int, neuron: int) -> Tensor:
    """(V,), what a neuron's decoder row adds to the logits if nothing followed but the scale of the last norm."""
    return logits_of(model, decoder_rows(model.blocks[layer].mlp)[neuron])


def decoder_rows(mlp: object) -> Tensor:
    """(F, d), what each neuron of a feed-forward writes."""
    assert isinstance(mlp, (MoEXMLP, DenseMLP))
    return mlp.as_wide_mlp()[1].T if isinstance(mlp, MoEXMLP) else mlp.c_proj.weight.T


@contextmanager
def ablated(mlp: object, numbers: Tensor) -> Iterator[None]:
    """A feed-forward without some of its neurons, by number; routing stays as it is."""
    assert isinstance(mlp, (MoEXMLP, DenseMLP))
    weight = mlp.w_dec if isinstance(mlp, MoEXMLP) else mlp.c_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        if isinstance(mlp, MoEXMLP):
            weight[numbers // mlp.expert_hidden, :, numbers % mlp.expert_hidden] = 0
        else:
            weight[:, numbers] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@dataclass(frozen=True)
class Effect:
    """What is lost without some neurons.

    Attributes:
        everywhere: rise of the cross entropy, nats a token.
        firing: the same where they fire.
        silent: the same where they do not (what attention carries on).
        rate: share of tokens at which they fire.
    """

    everywhere: float
    firing: float
    silent: float
    rate: float


@torch.no_grad()
def effect_of(model: MoEXForCausalLM, layer: int, numbers: Tensor, tokens: Tensor, before: Tensor) -> Effect:
    """Cut out neurons of one layer and measure the loss.

    Args:
        model: the language model.
        layer: number of the block.
        numbers: neurons of the layer.
        tokens: (B, T + 1) rows.
        before: (B, T), see :func:`token_losses`.
    """
    mlp = model.blocks[layer].mlp
    with inputs_of(model) as seen:
        model(tokens[:, :-1])
    fires = torch.stack([(neurons(mlp, row)[:, numbers] != 0).any(-1) for row in seen[layer]])
    with ablated(mlp, numbers):
        rise = token_losses(model, tokens) - before

    def mean(where: Tensor) -> float:
        return float(rise[where].mean()) if where.any() else 0.0

    return Effect(float(rise.mean()), mean(fires), mean(~fires), float(fires.float().mean()))
