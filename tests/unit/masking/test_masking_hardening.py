import pytest
import torch

from safelight.errors import SafelightError
from safelight.masking.hardening import harden, kept_fraction, removed_params
from safelight.masking.units import UnitSpec, find_units, prunable_params
from safelight.testing.denoisers import FAMILIES, build_denoiser


def layer(name, kind, n, params, flops=None):
    return UnitSpec(name, kind, n, 1, (), (), params, params if flops is None else flops)


SPECS = [layer("a", "head", 4, 100), layer("b", "head", 4, 100), layer("f", "neuron", 10, 3)]


def scores(seed=0, specs=SPECS):
    generator = torch.Generator().manual_seed(seed)
    return {spec.name: torch.randn(spec.n_units, generator=generator) for spec in specs}


def test_units_keep_the_top_of_each_kind():
    values = {"a": torch.tensor([4.0, 1, 3, 0]), "b": torch.tensor([2.0, 5, -1, 6]), "f": torch.arange(10.0)}
    masks = harden(values, SPECS, keep={"head": 0.5, "neuron": 0.29})
    assert masks["a"].tolist() == [True, False, True, False]
    assert masks["b"].tolist() == [False, True, False, True]
    assert masks["f"].tolist() == [False] * 8 + [True] * 2  # int(.29 * 10) = 2


def test_ties_are_broken_by_position_so_the_count_is_exact():
    values = {"a": torch.zeros(4), "b": torch.zeros(4), "f": torch.zeros(10)}
    masks = harden(values, SPECS, keep=0.75)
    assert masks["a"].tolist() == [True] * 4
    assert masks["b"].tolist() == [True, True, False, False]
    assert masks["f"].tolist() == [True] * 7 + [False] * 3


def test_top_k_equals_a_flat_stable_sort_with_coarse_scores():
    specs = [layer(str(i), "neuron", 37, 1) for i in range(9)]
    values = {name: value.mul(2).round() for name, value in scores(3, specs).items()}
    masks = harden(values, specs, keep=0.6)
    flat = torch.cat(list(values.values()))
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[torch.sort(flat, descending=True, stable=True).indices[: int(0.6 * len(flat))]] = True
    assert torch.equal(torch.cat(list(masks.values())), expected)


def test_local_scope_keeps_the_same_share_of_each_layer():
    values = {"a": torch.arange(4.0) + 100, "b": torch.arange(4.0), "f": torch.arange(10.0)}
    masks = harden(values, SPECS, keep=0.5, scope="local")
    assert [int(masks[name].sum()) for name in "abf"] == [2, 2, 5]
    priced = harden(values, SPECS, keep=0.6, scope="local", price="params")
    assert [int(priced[name].sum()) for name in "ab"] == [2, 2]
    assert int(priced["f"].sum()) == 10  # heads cannot be split, the neurons fill the rest
    portions = harden(values, SPECS, keep=0.5, scope="local", round_to=4)
    assert int(portions["f"].sum()) == 4  # never more than the share


def test_threshold():
    masks = harden({"a": torch.tensor([-1.0, 0, 1, 2])}, SPECS[:1], threshold=0.0)
    assert masks["a"].tolist() == [False, True, True, True]


@pytest.mark.parametrize("price", ["params", "flops"])
@pytest.mark.parametrize("keep", [0.8, 0.7, 0.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_budget_is_hit_within_the_cheapest_unit(family, keep, price):
    specs = find_units(build_denoiser(family, device="meta"))
    cheapest = min(spec.price(price) for spec in specs)
    total = sum(spec.n_units * spec.price(price) for spec in specs)
    for seed in range(5):
        reached = kept_fraction(harden(scores(seed, specs), specs, keep=keep, price=price), specs, price)
        assert keep - cheapest / total - 1e-9 <= reached <= keep + 1e-9
        assert reached == pytest.approx(keep, abs=0.005)


def test_budget_takes_the_best_first_across_kinds():
    values = {"a": torch.tensor([9.0, 0, 0, 0]), "b": torch.tensor([8.0, 0, 0, 0]), "f": torch.full((10,), 5.0)}
    masks = harden(values, SPECS, keep=230 / 830, price="params")
    assert [int(masks[name].sum()) for name in "abf"] == [1, 1, 10]
    assert kept_fraction(masks, SPECS) == pytest.approx(230 / 830)
    assert removed_params(masks, SPECS) == 600 == prunable_params(SPECS) - 230


def test_smaller_units_fill_the_rest_to_the_last_parameter():
    values = {"a": torch.tensor([9.0, 8, 0, 0]), "b": torch.zeros(4), "f": torch.full((10,), 5.0)}
    masks = harden(values, SPECS, keep=106 / 830, price="params")
    # The second head of 100 does not fit beside the first, two neurons of 3 do.
    assert [int(masks[name].sum()) for name in "abf"] == [1, 0, 2]


def test_a_fraction_that_binary_numbers_miss_is_not_rounded_down():
    assert int(0.29 * 100) == 28
    masks = harden({"f": torch.arange(100.0)}, [layer("f", "neuron", 100, 1)], keep=0.29)
    assert int(masks["f"].sum()) == 29


def test_the_last_portion_of_a_layer_is_smaller_and_ranked_by_its_mean():
    specs = [layer("f", "neuron", 12, 1), layer("g", "neuron", 8, 1)]
    values = {"f": torch.tensor([10.0] * 8 + [5.0] * 4), "g": torch.full((8,), 4.0)}
    whole = harden(values, specs, keep=1.0, round_to=8)
    assert [int(whole[name].sum()) for name in "fg"] == [12, 8]
    # Of 16 units the four of mean 5 come before the eight of mean 4, which then no longer fit.
    masks = harden(values, specs, keep=0.8, round_to=8)
    assert [int(masks[name].sum()) for name in "fg"] == [12, 0]


def test_threshold_leaves_every_layer_its_minimum():
    values = {"a": torch.tensor([-4.0, -1, -3, -2]), "b": torch.tensor([1.0, -1, 2, -2]), "f": torch.ones(10)}
    masks = harden(values, SPECS, threshold=0.0, min_per_layer=1)
    assert masks["a"].tolist() == [False, True, False, False]
    assert [int(masks[name].sum()) for name in "bf"] == [2, 10]


def test_mapping_with_a_price_gives_each_kind_its_own_budget():
    masks = harden(scores(), SPECS, keep={"head": 0.25, "neuron": 1.0}, price="params")
    assert int(masks["a"].sum() + masks["b"].sum()) == 2
    assert masks["f"].all()


def test_min_per_layer_and_round_to():
    specs = [layer("f", "neuron", 20, 2), layer("g", "neuron", 20, 2), layer("a", "head", 3, 10)]
    values = {"f": torch.arange(20.0) + 100, "g": torch.arange(20.0), "a": torch.tensor([-9.0, -8, -7])}
    masks = harden(values, specs, keep=0.5, price="params", min_per_layer=1, round_to=8)
    # Of a budget of 55 the minimum takes 16 + 16 + 10; no further 16 fit, one more head does.
    assert masks["f"].tolist() == masks["g"].tolist() == [False] * 12 + [True] * 8
    assert masks["a"].tolist() == [False, True, True]
    units = harden(values, specs, threshold=93.0, round_to=8)
    assert [int(units[name].sum()) for name in "fga"] == [20, 0, 0]
    with pytest.raises(SafelightError, match="min_per_layer=3"):
        harden(values, specs, keep=0.1, min_per_layer=3)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"keep": 2.0}, "keep=2.0"),
        ({"keep": 0.5, "threshold": 0.0}, "exactly one"),
        ({}, "exactly one"),
        ({"keep": 0.5, "scope": "globl"}, "scope='globl'"),
        ({"keep": 0.5, "price": "euro"}, "price='euro'"),
        ({"keep": 0.5, "round_to": 0}, "round_to=0"),
        ({"keep": {"head": 0.5}}, "neuron"),
    ],
)
def test_bad_arguments_are_named(wrong, word):
    with pytest.raises(SafelightError, match=word):
        harden(scores(), SPECS, **wrong)


def test_bad_scores_are_named():
    values = scores()
    with pytest.raises(SafelightError, match="lack 1 layers, the first is 'f'"):
        harden({name: values[name] for name in "ab"}, SPECS, keep=0.5)
    values["b"][1] = float("nan")
    with pytest.raises(SafelightError, match=r"scores\['b'\]"):
        harden(values, SPECS, keep=0.5)
