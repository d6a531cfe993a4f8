"""Co-Merge: who owns which row, what the merged adapter then is, and what a change of basis may not do to it."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

import pytest
import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.generators.lora import add_lora, lora_parameters
from safelight.lightning_modules.safety_dpo.adapters import Adapter, LowRank, fused, read_adapter
from safelight.lightning_modules.safety_dpo.merging import (
    BASELINES,
    PEFT_MERGES,
    CoMergeStatistics,
    Listener,
    Mode,
    co_merge,
    compress,
    peft_merge,
    random_owners,
    rows_of_owners,
    shares,
    weighted_sum,
)

RANK, WIDTHS = 3, {"first": (6, 8), "second": (8, 5)}


class Net(nn.Module):
    """Two linear layers, the second on what the first gives."""

    config: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = (nn.Linear(*WIDTHS[name]).double() for name in ("first", "second"))

    def forward(self, x: Tensor) -> Tensor:
        second: Tensor = self.second(torch.tanh(self.first(x)))
        return second


def expert(seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {path: LowRank(draw(RANK, wide), draw(out, RANK)) for path, (wide, out) in WIDTHS.items()}


def inputs(seed: int = 9, rows: int = 40) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counted(experts: dict[str, Adapter], *batches: Tensor, score: Any = "wins") -> CoMergeStatistics:
    statistics, net = CoMergeStatistics(experts, score), Net()
    with torch.no_grad(), Listener(net, statistics):
        for batch in batches or (inputs(),):
            net(batch)
    return statistics


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    return {path: pair.delta for path, pair in adapter.items()}


def same(a: Adapter, b: Adapter, tolerance: float = 1e-10) -> bool:
    return all(torch.allclose(x, deltas(b)[path], atol=tolerance) for path, x in deltas(a).items())


THREE = {name: expert(seed) for seed, name in enumerate(("hate", "gore", "theft"))}


@pytest.mark.parametrize("mode", get_args(Mode))
def test_copies_of_one_expert_merge_into_it(mode: Mode) -> None:
    experts = {"a": expert(0), "b": expert(0), "c": expert(0)}
    statistics = counted(experts)
    assert all((owner == 0).all() for owner in statistics.owners().values()), "ties go to the first"
    assert same(co_merge(experts, statistics, mode), expert(0))


def test_points_are_counts_of_the_largest_activation() -> None:
    """By hand: for each token and row, the expert whose answer is the largest in absolute value."""
    statistics = counted(THREE)
    hidden = torch.tanh(Net().first(inputs())).detach()
    for path, tokens in (("first", inputs()), ("second", hidden)):
        inner, outer = statistics.compute()[path]
        for side, size, answer in (
            (inner, RANK, lambda pair, h: pair.a @ h),
            (outer, WIDTHS[path][1], lambda pair, h: pair.b @ pair.a @ h),
        ):
            wanted = torch.zeros(3, size, dtype=torch.long)
            for h in tokens:
                winner = torch.stack([answer(adapter[path], h).abs() for adapter in THREE.values()]).argmax(dim=0)
                wanted[winner, torch.arange(size)] += 1
            assert torch.equal(side, wanted)
            assert (side.sum(dim=0) == len(tokens)).all()


def test_counts_of_parts_add_up() -> None:
    whole, parts = counted(THREE), counted(THREE, *inputs().split(7))
    other = CoMergeStatistics(THREE)
    for path, pair in whole.compute().items():
        assert all(torch.equal(x, y) for x, y in zip(pair, parts.compute()[path], strict=True))
    # Two processes: torchmetrics adds up states that are declared as sums.
    assert set(other._reductions) == {"a0", "b0", "a1", "b1"}
    assert all(
        reduction is torch.sum or reduction.__name__ == "dim_zero_sum" for reduction in other._reductions.values()
    )


def test_the_order_of_experts_only_renames_owners() -> None:
    turned = {name: THREE[name] for name in ("theft", "hate", "gore")}
    names, other_names = list(THREE), list(turned)
    owners, others = counted(THREE).owners(), counted(turned).owners()
    for path, owner in owners.items():
        assert [names[i] for i in owner.tolist()] == [other_names[i] for i in others[path].tolist()]
    assert same(co_merge(THREE, counted(THREE)), co_merge(turned, counted(turned)))


def test_delta_rows_are_the_owners_rows_and_one_lora() -> None:
    statistics = counted(THREE)
    merged = co_merge(THREE, statistics)
    owners = statistics.owners()
    assert sum(len(set(owner.tolist())) > 1 for owner in owners.values()), "the test needs more than one owner"
    for path, pair in merged.items():
        assert pair.a.shape[0] == 3 * RANK
        for row, owner in enumerate(owners[path].tolist()):
            own = list(THREE.values())[owner][path].delta[row]
            assert torch.allclose(pair.delta[row], own, atol=1e-12)
    plain, with_merge = Net(), Net()
    with fused(with_merge, merged):
        first = with_merge.first(inputs())
        wanted = plain.first(inputs())
        for number, adapter in enumerate(THREE.values()):
            own = inputs() @ adapter["first"].delta.T
            wanted = wanted + own * (owners["first"] == number)
        assert torch.allclose(first, wanted, atol=1e-10)


def test_an_expert_without_effect_owns_nothing() -> None:
    still = {path: LowRank(pair.a, torch.zeros_like(pair.b)) for path, pair in expert(5).items()}
    owners = counted({"still": still, "a": expert(0)}).owners()
    assert all((owner == 1).all() for owner in owners.values())
    nobody = counted({"still": still, "quiet": still})
    assert all((owner == -1).all() for owner in nobody.owners().values())
    assert same(co_merge({"still": still, "quiet": still}, nobody), still)


def test_rows_that_nobody_owns_are_the_mean() -> None:
    owners = {path: torch.full((out,), -1) for path, (_, out) in WIDTHS.items()}
    assert same(rows_of_owners(THREE, owners), weighted_sum(THREE, 1 / 3))


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_change_of_basis_matters_to_rows_of_a_and_b_only(mode: Mode) -> None:
    """(G A, B G^-1) is the same expert."""
    turn = torch.linalg.qr(torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    turned = {
        **THREE, "gore": {path: LowRank(turn @ pair.a, pair.b @ turn.T) for path, pair in THREE["gore"].items()}
    }  # fmt: skip
    assert same(turned["gore"], THREE["gore"])
    equal = same(co_merge(THREE, counted(THREE), mode), co_merge(turned, counted(turned), mode), 1e-9)
    assert equal is (mode == "delta_rows")


def test_mean_activation_as_score() -> None:
    loud = {path: LowRank(pair.a, 100 * pair.b) for path, pair in THREE["theft"].items()}
    owners = counted({**THREE, "theft": loud}, score="mean_abs").owners()
    assert all((owner == 2).all() for owner in owners.values())


def test_sums_means_and_lots() -> None:
    for path, delta in deltas(weighted_sum(THREE, 0.5)).items():
        assert torch.allclose(delta, 0.5 * sum(adapter[path].delta for adapter in THREE.values()))
    owners = random_owners(THREE, 1)
    assert {int(o) for owner in owners.values() for o in owner} == {0, 1, 2}
    assert all(torch.equal(a, b) for a, b in zip(owners.values(), random_owners(THREE, 1).values(), strict=True))
    assert shares({"x": torch.tensor([0, 0, 2, -1])}, 3) == {"x": [0.5, 0.0, 0.25]}


def test_compressing_is_the_truncated_svd_with_its_error() -> None:
    merged = co_merge(THREE, counted(THREE))
    cut, error = compress(merged, 2)
    lost = total = 0.0
    for path, pair in merged.items():
        u, s, v = torch.linalg.svd(pair.delta)
        assert torch.allclose(cut[path].delta, (u[:, :2] * s[:2]) @ v[:2], atol=1e-10)
        lost, total = lost + float(s[2:].square().sum()), total + float(s.square().sum())
    assert error == pytest.approx((lost / total) ** 0.5)
    assert compress(merged, 3 * RANK)[1] == pytest.approx(0, abs=1e-7)


@pytest.fixture
def in_peft() -> Any:
    """The three experts inside one peft model."""
    model = add_lora(Net(), list(WIDTHS), RANK, None, 0, list(THREE))
    with torch.no_grad():
        for name, adapter in THREE.items():
            for path, pair in adapter.items():
                layer: Any = model.base_model.model.get_submodule(path)
                layer.lora_A[name].weight.data = pair.a.clone()
                layer.lora_B[name].weight.data = pair.b.clone()
    return model


def test_peft_merges_compute_what_the_table_says(in_peft: Any) -> None:
    names = list(THREE)
    before = {key: value.clone() for key, value in lora_parameters(in_peft).items()}
    merges = {kind: peft_merge(in_peft, names, kind) for kind in PEFT_MERGES}
    after = lora_parameters(in_peft)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) and after[key].requires_grad for key, value in before.items())
    for path, delta in deltas(merges["linear"]).items():
        # sqrt(1/3) on both factors: the product of means of A and of B has cross terms, and is K times the mean's size.
        a = sum(adapter[path].a for adapter in THREE.values())
        b = sum(adapter[path].b for adapter in THREE.values())
        assert torch.allclose(delta, (b / 3**0.5) @ (a / 3**0.5), atol=1e-6)
    for path, delta in deltas(merges["svd"]).items():
        mean = weighted_sum(THREE, 1 / 3)[path].delta
        u, s, v = torch.linalg.svd(mean)
        assert torch.allclose(delta, (u[:, :RANK] * s[:RANK]) @ v[:RANK], atol=1e-6)
    sizes = {kind: float(torch.cat([d.flatten() for d in deltas(m).values()]).norm()) for kind, m in merges.items()}
    assert all(size > 0 for size in sizes.values())
    assert not same(peft_merge(in_peft, names, "dare_ties", seed=1), merges["dare_ties"])
    assert same(peft_merge(in_peft, names, "dare_ties", seed=0), merges["dare_ties"])


def test_reading_an_adapter_folds_its_scale() -> None:
    model = add_lora(Net(), ["first"], RANK, 6, 0, ["x"])
    layer: Any = model.base_model.model.get_submodule("first")
    nn.init.normal_(layer.lora_B["x"].weight)
    x = inputs().to(layer.lora_A["x"].weight.dtype)
    pair = read_adapter(model.base_model.model, "x")["first"]
    wanted = layer.lora_B["x"](layer.lora_A["x"](x)) * 2
    assert torch.allclose(x @ pair.delta.T, wanted, atol=1e-5)
    with pytest.raises(SafelightError, match="none called 'y'"):
        read_adapter(model.base_model.model, "y")


def test_experts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SafelightError, match="1 expert"):
        CoMergeStatistics({"a": expert(0)})
    with pytest.raises(SafelightError, match="only one of a and b adapts second"):
        CoMergeStatistics({"a": expert(0), "b": {"first": expert(1)["first"]}})
    other = {path: LowRank(pair.a[:2], pair.b[:, :2]) for path, pair in expert(1).items()}
    with pytest.raises(SafelightError, match="differ in rank or width at first"):
        CoMergeStatistics({"a": expert(0), "b": other})


def test_every_baseline_has_a_name_of_its_own() -> None:
    assert len(set(BASELINES)) == len(BASELINES) == 3 + len(PEFT_MERGES)
