from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.metrics.cost import (
    cost_report,
    cost_rows,
    count_flops,
    count_parameters,
    parameter_bytes,
    peak_activation_bytes,
    time_calls,
)


def test_flops_of_a_linear_layer_are_2mnk() -> None:
    layer, x = nn.Linear(32, 48), torch.randn(7, 32)
    assert count_flops(lambda: layer(x)) == 2 * 7 * 48 * 32


def test_flops_of_attention_are_counted_on_the_cpu() -> None:
    q, k, v = (torch.randn(2, 4, n, 8) for n in (10, 12, 12))
    # Two products per head: q k^T and its product with v.
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == 2 * 4 * (2 * 10 * 12 * 8) * 2


def test_flops_of_a_convolution() -> None:
    layer, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(2, 3, 8, 8)
    assert count_flops(lambda: layer(x)) == 2 * 2 * 8 * 8 * 5 * 3 * 9


def test_parameters_and_bytes_count_shared_weights_once_and_follow_dtype() -> None:
    first = nn.Linear(4, 4)
    tied = nn.Sequential(first, first)
    assert count_parameters(tied) == 20
    assert parameter_bytes(tied) == 80
    assert parameter_bytes(tied.half()) == 40


def test_peak_bytes_of_a_chain_is_two_tensors_not_their_sum() -> None:
    x = torch.zeros(1000)

    def chain() -> torch.Tensor:
        y = x + 1
        for _ in range(5):
            y = y + 1
        return y

    # While the next tensor is made the last one still lives; everything before is gone.
    assert peak_activation_bytes(chain) == 2 * 4000


def test_peak_bytes_ignore_weights_inputs_and_views() -> None:
    x, weight = torch.zeros(10, 100), torch.zeros(100, 100)
    assert peak_activation_bytes(lambda: x.view(1000)[:10]) == 0
    assert peak_activation_bytes(lambda: x @ weight) == 4000


def test_peak_bytes_of_kept_tensors_add_up() -> None:
    x = torch.zeros(1000)
    assert peak_activation_bytes(lambda: [x + i for i in range(4)]) == 4 * 4000


def test_calls_are_interleaved_and_warmed_up() -> None:
    seen: list[str] = []
    calls = [lambda: seen.append("a"), lambda: seen.append("b")]
    seconds = time_calls(calls, warmup=1, repeats=3)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"
    assert [len(row) for row in seconds] == [3, 3]
    with pytest.raises(SafelightError, match="repeats=0"):
        time_calls(calls, repeats=0)


def test_cost_report_puts_dense_next_to_pruned() -> None:
    torch.manual_seed(0)
    dense, pruned = nn.Linear(64, 64), nn.Linear(64, 16)
    x = torch.randn(8, 64)
    report = cost_report(
        lambda: dense(x), lambda: pruned(x), dense, pruned, prunable={"neuron": (4096, 1024)}, warmup=1, repeats=4
    )
    assert report["dense"]["parameters"] == 64 * 64 + 64
    assert report["pruned"]["prunable_neuron"] == 1024
    assert report["ratio"]["flops"] == 0.25
    assert report["ratio"]["prunable"] == 0.25
    assert report["dense"]["activation_bytes"] == 8 * 64 * 4
    assert report["dense"]["memory_bytes"] == 8 * 64 * 4 + (64 * 64 + 64) * 4
    assert report["ratio"]["latency"] > 0
    rows = cost_rows(report)
    assert [row[0] for row in rows][:3] == ["parameters (M)", "prunable parameters (M)", "of which neuron (M)"]
    assert rows[1][1:] == pytest.approx([0.004096, 0.001024, 0.25])


def test_leaves_gradients_and_random_state_alone() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    state = torch.get_rng_state()
    cost_report(lambda: layer(x), lambda: layer(x), layer, layer, warmup=1, repeats=2)
    assert torch.equal(state, torch.get_rng_state())
    assert layer.weight.grad is None
