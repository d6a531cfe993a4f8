"""Looking at single neurons, cutting them out, and taking dead ones away."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.lightning_modules.moe_x.board_reading import BoardReader, BoardResult
from safelight.lightning_modules.moe_x.configuration_moe_x import MoEXConfig
from safelight.lightning_modules.moe_x.layer import MoEXMLP
from safelight.lightning_modules.moe_x.measuring import inputs_of
from safelight.lightning_modules.moe_x.modeling_moe_x import MoEXForCausalLM
from safelight.lightning_modules.moe_x.neurons import (
    NeuronReader,
    ablated,
    decoder_rows,
    effect_of,
    logit_lens,
)
from safelight.lightning_modules.moe_x.pages import calibrated
from safelight.lightning_modules.moe_x.pruning import largest_activations, prune_dead
from safelight.lightning_modules.moe_x.reading import choose, principal, read_closely
from safelight.lightning_modules.moe_x.sampling import sample
from safelight.probing.contexts import StrongestRows, matched
from safelight.probing.language import token_losses

ROWS = torch.randint(0, 20, (7, 12), generator=torch.Generator().manual_seed(0))


def model(**settings: Any) -> MoEXForCausalLM:
    torch.manual_seed(0)
    config = {
        "vocab_size": 20, "block_size": 16, "n_layer": 2, "n_head": 2, "d_model": 16, "n_experts": 4,
        "expert_hidden": 10,
    }  # fmt: skip
    found = MoEXForCausalLM(MoEXConfig(**config | settings))
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.4)
    return found.eval()


def activations(found: MoEXForCausalLM, layer: int) -> Tensor:
    with inputs_of(found) as seen, torch.no_grad():
        found(ROWS)
    values: Tensor = found.blocks[layer].mlp.neurons(seen[layer])  # type: ignore[operator]
    return values.detach()


def read(found: MoEXForCausalLM, **settings: int) -> NeuronReader:
    reader = NeuronReader(**settings)
    for part in ROWS.split(3):
        with inputs_of(found) as seen, torch.no_grad():
            found(part)
        reader.add(found, part, seen)
    return reader


@pytest.mark.parametrize("mlp", ["moe", "dense"])
def test_contexts_are_the_strongest_of_each_row(mlp: str) -> None:
    found = model(mlp=mlp)
    reader = read(found, top=3, width=5)
    values = activations(found, 1)
    assert torch.allclose(reader.rate(1), (values > 0).float().mean((0, 1)))
    neuron = int(reader.rate(1).argmax())
    (report,) = reader.report(found, [(1, neuron)])
    by_row = values[..., neuron].max(1)
    order = by_row.values.argsort(descending=True)[:3]
    assert report.largest == pytest.approx(float(by_row.values.max()), rel=1e-5)
    for context, row in zip(report.contexts, order, strict=True):
        place = int(by_row.indices[row])
        assert len(context.tokens) == 5
        assert max(context.values) == pytest.approx(float(values[row, place, neuron]), rel=1e-4)
        assert context.tokens[int(torch.tensor(context.values).argmax())] == int(ROWS[row, place])
    assert report.pushes == logit_lens(found, 1, neuron).topk(6).indices.tolist()


def test_the_logit_lens_is_the_heads_view_of_a_decoder_row() -> None:
    found = model()
    row = decoder_rows(found.blocks[0].mlp)[23]
    assert torch.equal(row, found.expert_layers()[0].w_dec[2, :, 3])
    normed = F.layer_norm(row, (16,)) * found.transformer.ln_f.weight
    expected = found.lm_head.weight @ normed
    lens = logit_lens(found, 0, 23)
    assert torch.allclose(lens / lens.norm(), expected / expected.norm(), atol=1e-4)


@pytest.mark.parametrize("mlp", ["moe", "dense"])
def test_neurons_are_cut_out_and_come_back(mlp: str) -> None:
    found = model(mlp=mlp)
    before = {name: value.clone() for name, value in found.state_dict().items()}
    values = activations(found, 1)
    neuron = int((values > 0).float().mean((0, 1)).argmax())
    with inputs_of(found) as seen, torch.no_grad():
        found(ROWS)
        layer: Any = found.blocks[1].mlp
        whole = layer(seen[1])
        with ablated(layer, torch.tensor([neuron])):
            without = layer(seen[1])
    expected = whole - values[..., neuron, None] * decoder_rows(layer)[neuron]
    assert torch.allclose(without, expected, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in found.state_dict().items())
    with pytest.raises(RuntimeError), ablated(layer, torch.tensor([neuron])):
        raise RuntimeError
    assert all(torch.equal(value, before[name]) for name, value in found.state_dict().items())


def test_the_effect_of_the_last_layer_is_where_the_neuron_fires() -> None:
    found = model()
    losses = token_losses(found, ROWS)
    with torch.no_grad():
        logits = found(ROWS[:, :-1]).logits
    assert torch.allclose(losses, -logits.log_softmax(-1).gather(-1, ROWS[:, 1:, None])[..., 0], atol=1e-5)
    fires = (activations(found, 1) != 0)[:, :-1]
    neuron = int(fires.float().mean((0, 1)).argmax())
    effect = effect_of(found, 1, torch.tensor([neuron]), ROWS, losses)
    with ablated(found.blocks[1].mlp, torch.tensor([neuron])):
        rise = token_losses(found, ROWS) - losses
    assert effect.everywhere == pytest.approx(float(rise.mean()), rel=1e-4)
    assert effect.firing == pytest.approx(float(rise[fires[..., neuron]].mean()), rel=1e-4)
    assert effect.rate == pytest.approx(float(fires[..., neuron].float().mean()))
    assert effect.silent == pytest.approx(0, abs=1e-6), "nothing comes after the last layer"


def test_a_control_fires_about_as_often() -> None:
    rates = torch.linspace(0, 1, 101)
    for neuron in (0, 50, 100):
        other = matched(rates, neuron)
        assert other != neuron
        assert abs(float(rates[other] - rates[neuron])) <= 0.101
    assert matched(rates, 50) == matched(rates, 50)


def board(best: list[int], f1: list[float], present: list[int]) -> BoardResult:
    return BoardResult(0.1, 0.5, 0.01, 0.2, torch.tensor(best), torch.tensor(f1), torch.tensor(present))


def test_half_of_the_neurons_know_the_board_the_others_are_drawn() -> None:
    reader = NeuronReader()
    fired = {0: torch.tensor([0, 5, 50, 500, 100]), 1: torch.tensor([0, 900, 20, 30, 40])}
    reader.layers = {layer: StrongestRows(count=1000, fired=counts) for layer, counts in fired.items()}
    boards = {0: board([1, 1, 3], [0.5, 0.9, 1.0], [50, 50, 3]), 1: board([4, 2, 0], [0.7, 0.6, 0.1], [50, 50, 50])}
    chosen, known = choose(reader, boards, 4, seed=0)
    assert chosen[:2] == [(0, 1), (1, 4)]
    assert known[:2] == [(1, pytest.approx(0.9)), (0, pytest.approx(0.7))]
    assert known[2:] == [None, None]
    # Those that nearly never or nearly always fire are not drawn, those shown already neither.
    assert set(chosen[2:]) <= {(0, 2), (0, 4), (1, 2), (1, 3)}
    assert choose(reader, {}, 3, seed=1)[1] == [None] * 3


def test_reading_closely() -> None:
    found = model()
    reading = read_closely(found, read(found), {}, 3, seed=0)
    assert len(reading.reports) == len(reading.effects) == len(reading.controls) <= 3
    assert set(reading.experts) == {(layer, expert) for layer in range(2) for expert in range(4)}
    losses = token_losses(found, ROWS)
    with torch.no_grad():
        found.expert_layers()[1].w_dec[2] = 0
    expected = float((token_losses(found, ROWS) - losses).mean())
    assert reading.experts[1, 2].everywhere == pytest.approx(expected, rel=1e-3)


def test_principal_directions_keep_the_spread() -> None:
    rows = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 16)
    places = principal(rows)
    assert torch.allclose(torch.cdist(places, places), torch.cdist(rows, rows), atol=0.02)


@pytest.mark.parametrize("settings", [{}, {"bias": True}, {"router": "linear"}, {"moe_every": 2}])
def test_pruned_models_compute_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    found = model(**settings)
    for layer in found.expert_layers().values():
        with torch.no_grad():
            layer.w_enc[:, ::3] = 0  # never fire, unless they have a bias
    highest = largest_activations(found, ROWS.split(3))
    pruned = prune_dead(found, ROWS.split(3))
    for number, values in highest.items():
        neurons = activations(found, number).flatten(0, 1).amax(0).view_as(values)
        assert torch.equal(values > 0, neurons > 0)
        widths = pruned.config.pruned[number]
        assert widths == (values > 0).sum(1).tolist()
        assert sum(widths) < 40
    with torch.no_grad():
        assert torch.allclose(pruned(ROWS).logits, found(ROWS).logits, atol=1e-5)
        other = torch.randint(0, 20, (5, 16), generator=torch.Generator().manual_seed(9))
        layer: Any = pruned.blocks[1].mlp
        whole: Any = found.blocks[1].mlp
        x = torch.randn(30, 16)
        assert torch.allclose(layer.scores(x), whole.route(x).scores, atol=1e-6), "routing is that of the whole layer"
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in found.parameters())
    pruned.save_pretrained(tmp_path)
    again = MoEXForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.allclose(again(other).logits, pruned(other).logits, atol=1e-5)


def test_what_cannot_be_pruned() -> None:
    with pytest.raises(SafelightError, match="no neuron is ever silent"):
        prune_dead(model(act="gelu"), [ROWS])
    with pytest.raises(SafelightError, match="router_variance=full"):
        prune_dead(model(router_variance="full"), [ROWS])
    with pytest.raises(SafelightError, match="no batch of tokens"):
        prune_dead(model(), [])


def test_sampled_texts_are_drawn_from_the_model() -> None:
    found = model()
    start = torch.zeros(4000, 1, dtype=torch.long)
    texts = sample(found, start, 3, seed=1)
    assert texts.shape == (4000, 3)
    assert torch.equal(texts, sample(found, start, 3, seed=1))
    assert not torch.equal(texts, sample(found, start, 3, seed=2))
    with torch.no_grad():
        first = found(start[:1]).logits[0, -1].softmax(-1)
        likely = int(first.argmax())
        second = found(torch.tensor([[0, likely]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(texts[:, 1], minlength=20) / 4000
    assert (counts - first).abs().max() < 4 * math.sqrt(0.25 / 4000)
    after = texts[texts[:, 1] == likely, 2]
    assert (torch.bincount(after, minlength=20) / len(after) - second).abs().max() < 4 * math.sqrt(0.25 / len(after))
    cold = sample(found, start[:2], 2, temperature=1e-4)
    assert cold[0, 1] == likely


def test_every_row_of_boards_counts_once_over_processes() -> None:
    layer = MoEXMLP(8, n_experts=2, top_k=1, expert_hidden=6)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, 8, generator=draw)
    at = torch.tensor([[0, 3], [1, -1], [2, 4], [0, 1], [3, -1], [1, 2]])
    labels = {"all": (torch.rand(6, 2, 64, generator=draw) < 0.3).to(torch.uint8)}

    def reader(rows: list[int]) -> BoardReader:
        found = BoardReader()
        index = torch.tensor(rows)
        found.note(at[index], {"all": labels["all"][index]}, index)
        found.add(("", 0), layer, x[index], at[index], index)
        return found

    whole = reader([0, 1, 2, 3, 4, 5]).results()["", 0]["all"]
    assert len(reader([0, 1, 2]).labels[0]["all"]) == 5
    # A second process repeats rows 0 and 1; in one process of its own what it adds must be nothing.
    other = reader([4, 5, 0, 1])
    flags = {0: torch.tensor([1, 1, 1, 1, 0, 0]), 1: torch.tensor([1, 1, 0, 0, 1, 1])}
    mine = BoardReader._mine(
        torch.cat(other.rows),
        lambda value: torch.stack([flags[0], flags[1]]) if value.ndim else torch.tensor([3, 5]),
        1,
    )
    assert torch.cat(other.rows)[mine].unique().tolist() == [4, 5]
    assert 0 < whole.coverage <= whole.ceiling


def test_calibration_is_the_mean_of_each_tenth() -> None:
    scores = torch.tensor([0.9, 0.86, 0.0, -0.02, -1.0])  # expected .05, .07, .5, .51, 1
    shares = torch.tensor([0.1, 0.3, 0.6, 0.4, 0.9])
    found = calibrated(scores, shares)
    assert found == [
        (pytest.approx(0.06), pytest.approx(0.2)),
        (pytest.approx(0.505), pytest.approx(0.5)),
        (pytest.approx(1.0), pytest.approx(0.9)),
    ]
