import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from safelight.errors import SafelightError
from safelight.masking import gates as formulas
from safelight.masking.bank import MaskBank
from safelight.masking.units import KINDS, find_units
from safelight.testing.denoisers import FAMILIES, build_denoiser, example_inputs


def run(denoiser, inputs):
    return denoiser(**inputs)[0]


@pytest.fixture
def flux():
    return build_denoiser("flux")


@pytest.mark.parametrize("family", FAMILIES)
def test_ones_are_the_dense_model_and_detach_leaves_nothing(family):
    denoiser = build_denoiser(family)
    inputs, specs = example_inputs(denoiser), find_units(denoiser, KINDS)
    dense = run(denoiser, inputs)
    bank = MaskBank(specs)
    with bank.attached(denoiser):
        assert torch.equal(run(denoiser, inputs), dense)  # nothing drawn yet
        bank.set_gates({spec.name: torch.ones(spec.n_units) for spec in specs})
        torch.testing.assert_close(run(denoiser, inputs), dense, atol=1e-6, rtol=0)
        bank.sample(0)
        assert not torch.allclose(run(denoiser, inputs), dense, atol=1e-4)
    assert torch.equal(run(denoiser, inputs), dense)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in denoiser.modules())


def test_gates_equal_the_formula_with_one_draw_per_unit(flux):
    specs = find_units(flux, KINDS)
    init = {s.name: torch.randn(s.n_units) for s in specs}
    bank = MaskBank(specs, init=init, delta=0.5)
    gates = bank.sample(7)
    u = torch.rand(sum(s.n_units for s in specs), generator=torch.Generator().manual_seed(7))
    at = 0
    for spec in specs:
        expected = formulas.hard_concrete(init[spec.name], u[at : at + spec.n_units], delta=0.5)
        torch.testing.assert_close(gates[spec.name], expected)
        at += spec.n_units
    again, other = bank.sample(7), bank.sample(8)
    assert all(torch.equal(again[name], gates[name]) for name in gates)
    assert any(not torch.equal(other[name], gates[name]) for name in gates)


def test_one_draw_is_replayed_by_every_step_and_the_global_rng_is_untouched(flux, monkeypatch):
    inputs, bank = example_inputs(flux), MaskBank(find_units(flux, KINDS), init=0.0)
    draws, seen = [], []
    original = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: draws.append(a) or original(*a, **k))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with bank.attached(flux):
        gates = bank.sample(1)
        watch = flux.get_submodule("transformer_blocks.0.ff.net.2").register_forward_pre_hook(
            lambda m, args: seen.append(args[0])
        )
        outputs = [run(flux, inputs) for _ in range(3)]
        watch.remove()
    assert draws == [(sum(s.n_units for s in bank.specs.values()),)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(torch.get_rng_state(), state)
    dead = gates["transformer_blocks.0.ff"] == 0
    assert dead.any()
    assert all((x[..., dead] == 0).all() for x in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputation_sees_the_same_gates(family):
    """Gradients through step and block checkpointing equal the full graph (fp64)."""
    denoiser = build_denoiser(family, dtype=torch.float64)
    inputs = example_inputs(denoiser)
    key = "sample" if "sample" in inputs else "hidden_states"
    bank = MaskBank(find_units(denoiser, KINDS), init=0.5).double()

    def step(z):
        return z - 0.3 * denoiser(**(inputs | {key: z}))[0][:, : z.shape[1]]

    def gradients(wrap):
        bank.zero_grad()
        bank.sample(5)
        z = inputs[key]
        for _ in range(3):
            z = wrap(z)
        z.square().mean().backward()
        return [p.grad.clone() for p in bank.parameters()]

    with bank.attached(denoiser):
        full = gradients(step)
        chain = gradients(lambda z: checkpoint(step, z, use_reentrant=False))
        denoiser.enable_gradient_checkpointing()
        nested = gradients(lambda z: checkpoint(step, z, use_reentrant=False))
    assert any(g.abs().max() > 0 for g in full)
    for others in (chain, nested):
        for a, b in zip(full, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_gradient_with_respect_to_explicit_gates_can_be_taken_step_by_step(flux):
    inputs = example_inputs(flux)
    bank = MaskBank(find_units(flux, KINDS))
    gates = {s.name: torch.rand(s.n_units).requires_grad_() for s in bank.specs.values()}
    bank.set_gates(gates)
    with bank.attached(flux):
        first = torch.autograd.grad(run(flux, inputs).sum(), list(gates.values()))
        second = torch.autograd.grad(run(flux, inputs).sum(), list(gates.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gate_gradient_equals_a_finite_difference():
    denoiser = build_denoiser("unet_sd", dtype=torch.float64)
    inputs = example_inputs(denoiser)
    bank = MaskBank(find_units(denoiser)).double()
    name = next(s.name for s in bank.specs.values() if s.kind == "head")
    gate = torch.full((4,), 0.7, requires_grad=True)
    with bank.attached(denoiser):
        bank.set_gates({name: gate})
        (gradient,) = torch.autograd.grad(run(denoiser, inputs).sum(), gate)
        values = []
        for shift in (0.01, -0.01):
            bank.set_gates({name: gate.detach() + torch.tensor([0, shift, 0, 0])})
            values.append(run(denoiser, inputs).sum().item())
    assert gradient[1].item() == pytest.approx((values[0] - values[1]) / 0.02, rel=2e-3)


def test_two_banks_multiply_and_do_not_disturb_each_other(flux):
    inputs, specs = example_inputs(flux), find_units(flux)
    first, second, both = MaskBank(specs), MaskBank(specs), MaskBank(specs)
    g1 = {s.name: torch.rand(s.n_units) for s in specs}
    g2 = {s.name: torch.rand(s.n_units) for s in specs}
    both.set_gates({name: g1[name] * g2[name] for name in g1})
    with both.attached(flux):
        expected = run(flux, inputs)
    first.set_gates(g1)
    second.set_gates(g2)
    with first.attached(flux):
        alone = run(flux, inputs)
        with second.attached(flux):
            torch.testing.assert_close(run(flux, inputs), expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(run(flux, inputs), alone)
    other = build_denoiser("flux")
    with first.attached(flux):
        assert not torch.equal(run(other, inputs), alone)  # a second instance of the model stays dense


def test_one_kind_alone_on_a_shared_linear(flux):
    """FLUX single blocks: heads and neurons meet in proj_out; gating neurons must leave heads whole."""
    bank = MaskBank(find_units(flux, ("neuron",), pattern="proj_mlp"))
    seen = []
    linear = flux.get_submodule("single_transformer_blocks.0.proj_out")
    bank.set_gates({name: torch.zeros(s.n_units) for name, s in bank.specs.items()})
    with bank.attached(flux):
        handle = linear.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        run(flux, example_inputs(flux))
        handle.remove()
    assert (seen[0][..., 48:] == 0).all()
    assert (seen[0][..., :48] != 0).any()


def test_bf16_models_stay_bf16_with_fp32_logits():
    denoiser = build_denoiser("sd3", dtype=torch.bfloat16)
    bank = MaskBank(find_units(denoiser, KINDS), init=0.0)
    with bank.attached(denoiser):
        gates = bank.sample(0)
        output = run(denoiser, example_inputs(denoiser))
        output.float().square().mean().backward()
    assert output.dtype == torch.bfloat16
    assert {g.dtype for g in gates.values()} == {torch.float32}
    assert {p.grad.dtype for p in bank.parameters()} == {torch.float32}


def test_copies_of_a_masked_denoiser_are_dense_and_free(flux):
    inputs = example_inputs(flux)
    dense = run(flux, inputs)
    bank = MaskBank(find_units(flux), init=0.0)
    with bank.attached(flux):
        bank.sample(0)
        masked = run(flux, inputs)
        copied, pickled = copy.deepcopy(flux), pickle.loads(pickle.dumps(flux))
        bank_copy = copy.deepcopy(bank)
        assert torch.equal(run(copied, inputs), dense)
        assert torch.equal(run(pickled, inputs), dense)
        assert torch.equal(run(flux, inputs), masked)
    assert not bank_copy.current
    for a, b in zip(bank.parameters(), bank_copy.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a is not b
    with bank_copy.attached(flux):
        bank_copy.sample(0)
        assert torch.equal(run(flux, inputs), masked)


def test_other_modes(flux):
    specs = find_units(flux, ("head",))
    init = {s.name: torch.linspace(-1, 1, s.n_units) for s in specs}
    for mode, formula in {
        "sigmoid": torch.sigmoid,
        "threshold": lambda x: (x > 0).float(),
        "binary": lambda x: x,
        "off": torch.ones_like,
    }.items():
        for name, gate in MaskBank(specs, init=init, mode=mode).sample(0).items():
            torch.testing.assert_close(gate, formula(init[name]))
    median = MaskBank(specs, init=init).deterministic()
    expected = formulas.hard_concrete(init[specs[0].name], torch.full((3,), 0.5))
    torch.testing.assert_close(median[specs[0].name], expected)


def test_regulariser_follows_the_published_averages(flux):
    specs = find_units(flux, KINDS)
    init = {s.name: torch.randn(s.n_units) for s in specs}
    bank = MaskBank(specs, init=init)
    r = {name: formulas.penalty(value, "l0") for name, value in init.items()}
    by_kind = {kind: [r[s.name] for s in specs if s.kind == kind] for kind in KINDS}
    mean = sum(sum(v.mean() for v in values) / len(values) for values in by_kind.values())
    total = sum(sum(v.sum() for v in values) / len(values) for values in by_kind.values())
    torch.testing.assert_close(bank.regulariser("l0"), mean)
    torch.testing.assert_close(bank.regulariser("l0", reduction="sum"), total)
    priced = sum(s.params_per_unit * r[s.name].sum() for s in specs) / sum(s.params_per_unit * s.n_units for s in specs)
    torch.testing.assert_close(bank.regulariser("l0", price="params"), priced)
    bank.regulariser("l1").backward()
    modulation = next(s for s in specs if s.kind == "modulation")
    gradient = bank.named_logits()[modulation.name].grad  # the published code forgets this kind
    expected = init[modulation.name].sign() / (modulation.n_units * len(by_kind["modulation"]))
    torch.testing.assert_close(gradient, expected)


def test_expected_keep_is_exact_and_can_be_driven_to_a_target(flux):
    specs = find_units(flux)
    bank = MaskBank(specs, init={s.name: torch.randn(s.n_units) for s in specs}, delta=0.1)
    drawn = []
    prices = {s.name: s.params_per_unit for s in specs}
    total = sum(s.params_per_unit * s.n_units for s in specs)
    with torch.no_grad():
        for seed in range(300):
            gates = bank.sample(seed)
            drawn.append(sum(prices[name] * (g > 0).sum().item() for name, g in gates.items()) / total)
        exact = bank.expected_keep(smooth=False).item()
    assert exact == pytest.approx(sum(drawn) / len(drawn), abs=0.01)
    optimiser = torch.optim.Adam(bank.parameters(), lr=0.1)
    multiplier = 0.0
    for _ in range(300):
        gap = bank.expected_keep("params", above=0.5) - 0.6
        optimiser.zero_grad()
        (multiplier * gap + 5 * gap**2).backward()
        optimiser.step()
        multiplier += 0.1 * gap.item()
    assert bank.expected_keep("params", above=0.5).item() == pytest.approx(0.6, abs=0.01)


def test_state_dict_holds_only_logits_and_restores(flux):
    specs = find_units(flux)
    bank, other = MaskBank(specs, init=1.0), MaskBank(specs)
    state = bank.state_dict()
    assert len(state) == len(specs)
    assert "logits.transformer_blocks/0/attn" in state
    other.load_state_dict(state)
    assert all(torch.equal(value, torch.ones_like(value)) for value in other.scores().values())
    assert {kind: len(group) for kind, group in bank.parameters_by_kind().items()} == {"head": 3, "neuron": 4}


def test_mistakes_are_named(flux):
    specs = find_units(flux)
    bank = MaskBank(specs)
    with pytest.raises(SafelightError, match="mode='hard'"):
        MaskBank(specs, mode="hard")
    with pytest.raises(SafelightError, match="'nowhere'"):
        bank.set_gates({"nowhere": torch.ones(2)})
    with pytest.raises(SafelightError, match="shape"):
        bank.set_gates({specs[0].name: torch.ones(99)})
    with pytest.raises(SafelightError, match="has no Linear"):
        bank.attach(build_denoiser("dit"))
    assert not bank._handles
    with bank.attached(flux), pytest.raises(SafelightError, match="detach"):
        bank.attach(flux)
