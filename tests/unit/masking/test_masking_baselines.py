import pytest
import torch

from safelight.masking.bank import MaskBank
from safelight.masking.baselines import (
    _per_price,
    activation_scores,
    magnitude_scores,
    random_scores,
    second_order_scores,
)
from safelight.masking.removal import fold
from safelight.masking.units import KINDS, UnitSpec, find_units
from safelight.testing.denoisers import build_denoiser, example_inputs


def run(denoiser, inputs):
    with torch.no_grad():
        return denoiser(**inputs)[0]


def test_random_scores_depend_on_the_seed_only():
    specs = find_units(build_denoiser("dit"), KINDS)
    first, again, other = (random_scores(specs, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[s.name], again[s.name]) for s in specs)
    assert not torch.equal(first[specs[0].name], other[specs[0].name])


def test_magnitude_is_the_root_mean_square_of_the_owned_weights():
    denoiser = build_denoiser("unet_sdxl")
    specs = find_units(denoiser)
    scores = magnitude_scores(denoiser, specs)
    ff = next(s for s in specs if s.kind == "neuron")
    up, down = denoiser.get_submodule(ff.name).net[0].proj.weight, denoiser.get_submodule(ff.name).net[2].weight
    own = torch.cat([up[7], up[7 + ff.n_units], down[:, 7]])
    assert scores[ff.name][7].item() == pytest.approx(own.square().mean().sqrt().item(), rel=1e-5)
    head = specs[0]
    attention = denoiser.get_submodule(head.name)
    rows = slice(head.group, 2 * head.group)
    own = [linear.weight[rows].flatten() for linear in (attention.to_q, attention.to_k, attention.to_v)]
    own = torch.cat([*own, attention.to_out[0].weight[:, rows].flatten()])
    assert scores[head.name][1].item() == pytest.approx(own.square().mean().sqrt().item(), rel=1e-5)


def test_activation_score_is_the_energy_lost_at_the_layers_output():
    """With one neuron removed, the expected squared change of net[2]'s output is exactly its score."""
    denoiser = build_denoiser("dit")
    inputs, specs = example_inputs(denoiser, batch=4), find_units(denoiser, KINDS)
    scores = activation_scores(denoiser, specs, lambda: run(denoiser, inputs))
    name, seen = "transformer_blocks.0.ff", []
    handle = denoiser.get_submodule(name).register_forward_hook(lambda m, a, out: seen.append(out))
    run(denoiser, inputs)
    mask = torch.ones(192, dtype=torch.bool)
    mask[11] = False
    fold(denoiser, {name: mask})
    run(denoiser, inputs)
    handle.remove()
    lost = (seen[0] - seen[1]).square().sum(-1).mean().item()
    assert scores[name][11].item() == pytest.approx(lost, rel=1e-3)
    assert set(scores) == {s.name for s in specs}


def test_activation_score_of_every_kind_over_several_calls():
    """Heads of both streams, neurons that share their Linear with heads, and modulation outputs, feature by feature."""
    denoiser = build_denoiser("flux")
    batches, specs = [example_inputs(denoiser, batch=size, seed=size) for size in (1, 3)], find_units(denoiser, KINDS)
    seen = {(site.module, site.side): [] for spec in specs for site in spec.sites}
    handles = []
    for path, side in seen:
        linear = denoiser.get_submodule(path)
        rows = seen[path, side]

        def keep(module, args, out, rows=rows, side=side):
            rows.append((out if side == "out" else args[0]).flatten(0, -2))

        handles.append(linear.register_forward_hook(keep))
    scores = activation_scores(denoiser, specs, lambda: [run(denoiser, inputs) for inputs in batches])
    for handle in handles:
        handle.remove()
    assert {spec.kind for spec in specs} == set(KINDS)
    assert max(len(spec.sites) for spec in specs) == 2
    for spec in specs:
        for unit in (0, spec.n_units - 1):
            wanted = 0.0
            for site in spec.sites:
                weight = denoiser.get_submodule(site.module).weight
                for feature in range(site.start + unit * spec.group, site.start + (unit + 1) * spec.group):
                    energy = torch.cat(seen[site.module, site.side])[:, feature].square().mean()
                    wanted += float(energy if site.side == "out" else energy * weight[:, feature].square().sum())
            assert scores[spec.name][unit].item() == pytest.approx(wanted, rel=1e-4)


def test_units_that_cost_nothing_keep_their_score():
    specs = [UnitSpec("f", "neuron", 2, 1, (), (), 4, 0)]
    scores = {"f": torch.tensor([1.0, 3.0])}
    assert _per_price(scores, specs, "flops")["f"].tolist() == [1.0, 3.0]
    assert _per_price(scores, specs, "params")["f"].tolist() == [0.25, 0.75]


def test_second_order_score_predicts_the_error_of_losing_a_little_of_a_unit():
    """Against finite differences: mean squared change of the output per squared change of the gate."""
    denoiser = build_denoiser("flux")
    inputs = example_inputs(denoiser)
    specs = find_units(denoiser, ("head",))
    bank = MaskBank(specs)
    dense, step, finite = run(denoiser, inputs), 1e-2, {}
    with bank.attached(denoiser):
        estimate = second_order_scores(bank, lambda k: denoiser(**inputs)[0], draws=400)
        for spec in specs:
            for unit in range(spec.n_units):
                gate = torch.ones(spec.n_units)
                gate[unit] -= step
                bank.set_gates({spec.name: gate})
                finite[spec.name, unit] = ((run(denoiser, inputs) - dense) / step).square().mean().item()
        bank.set_gates(None)
    for (name, unit), value in finite.items():
        assert estimate[name][unit].item() == pytest.approx(value, rel=0.4)
    ranks = [torch.tensor(v).argsort() for v in ([estimate[n][u].item() for n, u in finite], list(finite.values()))]
    assert (ranks[0][-3:].sort().values == ranks[1][-3:].sort().values).all()


def test_second_order_finds_planted_dead_units_and_leaves_the_bank_dense():
    denoiser = build_denoiser("dit")
    dead = torch.arange(192) % 5 == 0
    fold(denoiser, {"transformer_blocks.1.ff": ~dead})
    bank, inputs = MaskBank(find_units(denoiser)), example_inputs(denoiser)
    dense = run(denoiser, inputs)
    with bank.attached(denoiser):
        plain = second_order_scores(bank, lambda k: denoiser(**inputs)[0], draws=2)
        priced = second_order_scores(bank, lambda k: denoiser(**inputs)[0], draws=2, price="params")
        assert torch.equal(run(denoiser, inputs), dense)
    assert (plain["transformer_blocks.1.ff"][dead] == 0).all()
    assert (plain["transformer_blocks.1.ff"][~dead] > 0).all()
    head = bank.specs["transformer_blocks.0.attn1"]
    torch.testing.assert_close(priced[head.name], plain[head.name] / head.params_per_unit)
