"""What single neurons respond to, what they push for, and what happens without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.lightning_modules.moe_x.layer import MoEXMLP
from safelight.lightning_modules.moe_x.measuring import inputs_of
from safelight.lightning_modules.moe_x.modeling_moe_x import DenseMLP, MoEXForCausalLM


@dataclass(frozen=True)
class Context:
    """Where a neuron was strongest in one row.

    Attributes:
        tokens: (W,), those around the place, the place among them.
        values: (W,), the neuron's activations there.
    """

    tokens: list[int]
    values: list[float]


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
    tokens: list[Tensor] = field(default_factory=list)
    count: int = 0
    rows: int = 0
    rates: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    places: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def add(self, model: MoEXForCausalLM, tokens: Tensor, inputs: dict[int, Tensor]) -> None:
        """Take in a batch.

        Args:
            model: the language model.
            tokens: (B, T), its input.
            inputs: of its feed-forwards on it, (B, T, d) by block, see :func:`inputs_of`.
        """
        length = tokens.shape[1]
        for number, block in enumerate(model.blocks):
            for place, x in enumerate(inputs[number]):
                self._add_row(number, neurons(block.mlp, x), (self.rows + place) * length)
        self.tokens.append(tokens.cpu())
        self.rows, self.count = self.rows + len(tokens), self.count + tokens.numel()

    def _add_row(self, number: int, activations: Tensor, start: int) -> None:
        """One row's activations (T, F); ``start`` is the number of its first token among all."""
        value, at = activations.float().max(0)
        fired = (activations > 0).sum(0)
        if number not in self.values:
            self.rates[number] = torch.zeros_like(fired)
            self.values[number] = value.new_zeros(self.top, len(value))
            self.places[number] = at.new_zeros(self.top, len(value))
        self.rates[number] += fired
        # The strongest of the rows so far and of this one.
        values = torch.cat([self.values[number], value[None]])
        places = torch.cat([self.places[number], at[None] + start])
        self.values[number], order = values.topk(self.top, 0)
        self.places[number] = places.gather(0, order)

    def rate(self, number: int) -> Tensor:
        """(F,), shares of tokens at which a layer's neurons fire."""
        return self.rates[number] / max(self.count, 1)

    @torch.no_grad()
    def report(self, model: MoEXForCausalLM, chosen: Sequence[tuple[int, int]]) -> list[NeuronReport]:
        """Reports of neurons ``(layer, number)``; their contexts are computed once more, in whole rows."""
        tokens = torch.cat(self.tokens)
        length = tokens.shape[1]
        found = []
        for layer, neuron in chosen:
            values = self.values[layer][:, neuron]
            places = self.places[layer][values > 0, neuron].cpu()
            contexts = []
            if len(places):
                rows = tokens[places // length].to(model.device)
                with inputs_of(model) as seen:
                    model(rows)
                activations = neurons(model.blocks[layer].mlp, seen[layer])[..., neuron].float().cpu()
                for row, line, place in zip(rows.cpu(), activations, (places % length).tolist(), strict=True):
                    begin = max(min(place - self.width + self.width // 4, length - self.width), 0)
                    part = slice(begin, begin + self.width)
                    contexts.append(Context(row[part].tolist(), line[part].tolist()))
            found.append(
                NeuronReport(
                    layer, neuron, float(self.rate(layer)[neuron]), float(values.max()), contexts,
                    logit_lens(model, layer, neuron).topk(min(6, model.config.vocab_size)).indices.tolist(),
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
    direction = decoder_rows(model.blocks[layer].mlp)[neuron]
    direction = direction - direction.mean()  # the last norm takes the mean away
    return F.linear(direction * model.transformer.ln_f.weight, model.lm_head.weight)


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


def token_losses(model: MoEXForCausalLM, tokens: Tensor) -> Tensor:
    """(B, T), cross entropy of each token but the first, in nats."""
    logits = model(tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none").view(
        len(tokens), -1
    )


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


def matched(rates: Tensor, neuron: int, seed: int = 0) -> int:
    """A control for a neuron: one of the ten others whose firing rates come closest, drawn by ``seed``."""
    distance = (rates - rates[neuron]).abs().float()
    distance[neuron] = torch.inf
    near = distance.topk(min(10, len(rates) - 1), largest=False).indices
    return int(near[int(torch.randint(len(near), (1,), generator=torch.Generator().manual_seed(seed + neuron)))])
