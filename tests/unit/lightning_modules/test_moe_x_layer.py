"""The MoE-X layer: the closed-form router against what fires, and the ways to compute experts against each other."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from safelight.lightning_modules.moe_x.dispatch import best_backend, mix_experts
from safelight.lightning_modules.moe_x.layer import MoEXMLP
from safelight.lightning_modules.moe_x.router import (
    balance_loss,
    expert_statistics,
    firing_probability,
    mean_and_variance,
    sparsity_scores,
    top_gates,
    z_loss,
)

N, D_MODEL, EXPERTS, HIDDEN = 96, 16, 6, 512


def experts(seed: int = 0, hidden: int = HIDDEN) -> tuple[Tensor, Tensor]:
    """Encoder weights whose experts have means of their own, and tokens."""
    draw = torch.Generator().manual_seed(seed)
    centre = torch.randn(EXPERTS, 1, D_MODEL, generator=draw) * 0.3
    return centre + torch.randn(EXPERTS, hidden, D_MODEL, generator=draw), torch.randn(N, D_MODEL, generator=draw)


def fired(w_enc: Tensor, x: Tensor, b_enc: Tensor | None = None) -> Tensor:
    """Share of each expert's neurons that fire, (N, M), counted."""
    hidden = torch.einsum("nd,mkd->nmk", x, w_enc) + (0 if b_enc is None else b_enc)
    return (hidden > 0).double().mean(-1)


def layer(**settings: Any) -> MoEXMLP:
    torch.manual_seed(0)
    found = MoEXMLP(D_MODEL, n_experts=4, top_k=2, expert_hidden=24, **settings)
    found.reset_parameters(std=0.5)
    if found.b_enc is not None and found.b_dec is not None:
        nn.init.normal_(found.b_enc), nn.init.normal_(found.b_dec)
    return found


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, D_MODEL, generator=torch.Generator().manual_seed(seed))


# -- the router --------------------------------------------------------------------------------------------------------


def test_scores_are_the_formula_written_out() -> None:
    w_enc, x = experts(hidden=5)
    scores = sparsity_scores(x[:3].double(), expert_statistics(w_enc.double()))
    for n in range(3):
        for j in range(EXPERTS):
            m, s2 = 0.0, 0.0
            for i in range(D_MODEL):
                column = w_enc[j, :, i].double()
                mean = float(column.sum()) / 5
                m += mean * float(x[n, i])
                s2 += float(((column - mean) ** 2).sum()) / 5 * float(x[n, i]) ** 2
            assert float(scores[n, j]) == pytest.approx(-math.erf(m / math.sqrt(2 * (s2 + 1e-8))), abs=1e-6)


@pytest.mark.parametrize("variance", ["diag", "full"])
@pytest.mark.parametrize("bias", [False, True])
def test_scores_predict_what_fires(variance: Any, bias: bool) -> None:
    w_enc, x = experts()
    b_enc = torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(2)) if bias else None
    scores = sparsity_scores(x, expert_statistics(w_enc, b_enc, variance))
    true = fired(w_enc, x, b_enc)
    assert float((firing_probability(scores).double() - true).abs().mean()) < 0.02
    assert float(torch.corrcoef(torch.stack([scores.double().flatten(), true.flatten()]))[0, 1]) < -0.9


def test_full_variance_sees_correlated_inputs() -> None:
    """Rows that move together along one direction: the diagonal misses it, the covariance does not."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(EXPERTS, HIDDEN, 1, generator=draw)
    w_enc = 0.3 + shared + 0.1 * torch.randn(EXPERTS, HIDDEN, D_MODEL, generator=draw)
    x = 1 + 0.1 * tokens(N)
    true, gaps = fired(w_enc, x), []
    for kind in ("diag", "full"):
        scores = sparsity_scores(x, expert_statistics(w_enc, None, kind))  # type: ignore[arg-type]
        gaps.append(float((firing_probability(scores) - true).abs().mean()))
    assert gaps[1] < 0.03 < 3 * gaps[1] + 0.1 < gaps[0]


def test_the_chosen_experts_fire_least() -> None:
    w_enc, x = experts()
    _, index = top_gates(sparsity_scores(x, expert_statistics(w_enc)), 2)
    true = fired(w_enc, x)
    chosen = true.gather(1, index).mean()
    assert float(chosen - true.topk(2, largest=False).values.mean()) < 0.01
    assert float(true.mean() - chosen) > 0.1


def test_the_score_has_the_gradient_of_the_formula() -> None:
    w_enc, x = (part.double().requires_grad_() for part in experts(hidden=4))
    assert torch.autograd.gradcheck(
        lambda w, t: sparsity_scores(t, expert_statistics(w)), (w_enc[:2, :, :3], x[:2, :3])
    )


def test_gates_are_a_softmax_over_the_chosen() -> None:
    scores = torch.tensor([[0.9, -0.9, 0.1, 0.5]])
    gates, index = top_gates(scores, 2)
    assert index.tolist() == [[0, 3]]
    first = math.exp(0.9) / (math.exp(0.9) + math.exp(0.5))
    assert gates[0].tolist() == pytest.approx([first, 1 - first])
    assert float(top_gates(scores, 2, temperature=0.1)[0][0, 0]) > 0.95
    extreme = top_gates(torch.tensor([[1.0, -1.0]]), 2)[0]
    assert 0.11 < float(extreme.min()) < float(extreme.max()) < 0.89


def test_balance_is_one_when_even_and_larger_when_not() -> None:
    even = torch.arange(4).repeat(6).view(12, 2)
    assert float(balance_loss(torch.zeros(12, 4), even)) == pytest.approx(1)
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(12, 4)
    index = torch.tensor([[0, 1]]).expand(12, 2)
    shares = scores[0].softmax(-1)
    assert float(balance_loss(scores, index)) == pytest.approx(float(4 * (0.5 * shares[0] + 0.5 * shares[1])))
    assert float(z_loss(scores)) == pytest.approx(float(scores[0].logsumexp(0) ** 2))


# -- computing experts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_backends_agree_with_one_token_at_a_time(bias: bool, activation: Any) -> None:
    found = layer(bias=bias, act=activation)
    x = tokens(50)
    routing = found.route(x)
    act = F.relu if activation == "relu" else F.gelu
    slow = []
    for token, gates, chosen in zip(x, routing.gates, routing.index, strict=True):
        total = torch.zeros(D_MODEL)
        for gate, j in zip(gates, chosen.tolist(), strict=True):
            hidden = found.w_enc[j] @ token + (0 if found.b_enc is None else found.b_enc[j])
            total = total + gate * (found.w_dec[j] @ act(hidden) + (0 if found.b_dec is None else found.b_dec[j]))
        slow.append(total)
    expected = torch.stack(slow)
    weight = tokens(50, seed=3)
    wanted = torch.autograd.grad((expected * weight).sum(), list(found.parameters()), retain_graph=True)
    for backend in ("grouped", "loop", "wide"):
        found.dispatch = backend  # type: ignore[assignment]
        out = found(x)
        assert torch.allclose(out, expected, atol=1e-4), backend
        gradients = torch.autograd.grad((out * weight).sum(), list(found.parameters()))
        assert all(torch.allclose(a, b, atol=1e-3, rtol=1e-4) for a, b in zip(gradients, wanted, strict=True)), backend


def test_experts_without_tokens_are_no_trouble() -> None:
    found = layer()
    index, gates = torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1)
    x = tokens(5)
    alone = F.relu(x @ found.w_enc[0].T) @ found.w_dec[0].T
    for backend in ("grouped", "loop", "wide"):
        out = mix_experts(x, gates, index, found.w_enc, found.w_dec, backend=backend)  # type: ignore[arg-type]
        assert torch.allclose(out, alone, atol=1e-4)


def test_the_layer_is_a_wide_mlp_with_blocks_switched_off() -> None:
    found = layer()
    x = tokens(3, 7)
    encoder, decoder = found.as_wide_mlp()
    routing = found.route(x.view(-1, D_MODEL))
    omega = torch.zeros(21, 4).scatter(1, routing.index, routing.gates).repeat_interleave(24, 1)
    hidden = omega * F.relu(x.view(-1, D_MODEL) @ encoder.T)
    assert torch.allclose(found(x), (hidden @ decoder.T).view(3, 7, D_MODEL), atol=1e-5)
    assert torch.allclose(found.neurons(x), hidden.view(3, 7, -1), atol=1e-6)
    raw = found.neurons(x, gated=False).view(21, 4, 24)
    fires = raw > 0
    assert torch.equal(fires.any(-1), fires.any(-1) & (omega.view(21, 4, 24)[..., 0] > 0))
    assert torch.allclose(raw * omega.view(21, 4, 24), hidden.view(21, 4, 24), atol=1e-6)


def test_the_router_trains_the_encoder_through_the_gates() -> None:
    found, cut = layer(), layer(detach_stats=True)
    x = tokens(64)
    for module in (found, cut):
        module(x).square().sum().backward()
    assert found.w_enc.grad is not None
    assert cut.w_enc.grad is not None
    assert torch.allclose(found.w_dec.grad, cut.w_dec.grad, atol=1e-4)  # type: ignore[arg-type]
    assert float((found.w_enc.grad - cut.w_enc.grad).abs().max()) > 1e-3
    # Also the rows of neurons that did not fire: the mean belongs to all of them.
    other = layer()
    (gradient,) = torch.autograd.grad(other.route(x).gates[:, 0].sum(), [other.w_enc])
    assert bool((gradient.abs().sum(-1) > 0).all())


def test_statistics_are_kept_until_the_weights_change() -> None:
    found = layer().eval()
    x = tokens(8)
    with torch.no_grad():
        first = found.route(x)
        kept = found.statistics()
        assert found.statistics() is kept
        found.w_enc.add_(0.1)
        assert found.statistics() is not kept
        assert not torch.equal(found.route(x).scores, first.scores)
        other = layer()
        found.load_state_dict(other.state_dict())
        assert torch.equal(found.route(x).scores, other.route(x).scores)
    assert found.train().route(x).scores.requires_grad
    optimizer = torch.optim.SGD(found.parameters(), lr=0.1)
    with torch.no_grad():
        before = found.route(x).scores
    found(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert not torch.equal(found.route(x).scores, before)


def test_a_learned_router_is_a_linear_layer() -> None:
    found = layer(router="linear")
    assert found.gate is not None
    x = tokens(5)
    assert torch.allclose(found.route(x).scores, x @ found.gate.weight.T)
    found(x).sum().backward()
    assert float(found.gate.weight.grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert layer().gate is None


def test_identical_experts_share_all_scores() -> None:
    """Why copies of a dense layer need noise: every token would go to the same experts."""
    found = layer()
    with torch.no_grad():
        found.w_enc.copy_(found.w_enc[:1].expand_as(found.w_enc).clone())
        assert float(found.route(tokens(200)).load().max()) == 0.5
        found.w_enc.add_(1e-2 * found.w_enc.std() * torch.randn(found.w_enc.shape))
        assert float(found.route(tokens(200)).load().max()) < 0.45


def test_bf16_routes_in_single_precision() -> None:
    found = layer()
    x = tokens(40)
    with torch.autocast("cpu", torch.bfloat16):
        out = found(x)
    assert out.dtype == torch.bfloat16
    assert found.routing is not None
    assert found.routing.scores.dtype == torch.float32
    assert torch.equal(found.routing.index, found.route(x).index)
    assert torch.allclose(out.float(), found(x), atol=0.1, rtol=0.05)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_leave_the_last_pass_behind(how: Any) -> None:
    found = layer()
    x = tokens(4)
    expected = found(x)
    other = how(found)
    assert other.routing is None
    assert torch.equal(other(x), expected)


def test_what_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="top_k=5"):
        MoEXMLP(8, n_experts=4, top_k=5)


def test_the_backend_fits_type_and_alignment() -> None:
    assert best_backend(torch.zeros(1), 16, 64) == "grouped"
    assert best_backend(torch.zeros(1, dtype=torch.float64), 16, 64) == "loop"
    assert best_backend(torch.zeros(1), 15, 64) == "loop"
    assert best_backend(torch.zeros(1, dtype=torch.bfloat16), 12, 64) == "loop"


def test_mean_and_variance_over_neurons() -> None:
    w = (torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2).requires_grad_()
    variance, mean = torch.var_mean(w, 1, correction=0)
    found = mean_and_variance(w)
    assert torch.allclose(found[0], mean)
    assert torch.allclose(found[1], variance)
    assert torch.autograd.gradcheck(mean_and_variance, (w,))
    assert torch.autograd.gradgradcheck(mean_and_variance, (w,))
    near = torch.full((1, 9, 4), 1e3) + 1e-3 * torch.randn(1, 9, 4)
    assert torch.allclose(mean_and_variance(near)[1], torch.var(near, 1, correction=0), rtol=1e-2), "no cancellation"
