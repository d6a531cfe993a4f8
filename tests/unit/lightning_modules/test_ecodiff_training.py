"""EcoDiff under a plain Trainer: draws, checkpoints, frozen weights, the user's own data and subclass."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ecodiff_toys import counted, loader, toy_ecodiff, toy_generator, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from zoo_toys import Losses

from safelight.datamodules.loading import ResumableLoader
from safelight.datamodules.prompts import PromptDataset
from safelight.errors import SafelightError
from safelight.generators import generator_for
from safelight.lightning_modules import EcoDiff
from safelight.lightning_modules.ecodiff.pruning import baseline_scores, prune
from safelight.lightning_modules.randomness import step_seed
from safelight.masking import Compensation, MaskBank, harden
from safelight.testing.pipelines import build_pipeline


def logits_of(module: EcoDiff) -> Tensor:
    return torch.cat(list(module.bank.scores().values()))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in module.modules())


class GateRecorder(Callback):
    """What the gates were in every masked forward of the network, and for which optimisation step."""

    def __init__(self, module: EcoDiff) -> None:
        self.gates: list[tuple[int, Tensor]] = []
        self.module = module
        module.denoiser.register_forward_pre_hook(self._record)

    def _record(self, *_: Any) -> None:
        current = self.module.bank.current
        if current:
            gates = torch.cat(list(current.values())).detach()
            self.gates.append((self.module.trainer.global_step, gates))


@pytest.mark.parametrize("grad_mode", ["checkpoint", "manual", "full"])
def test_gates_are_drawn_once_per_optimisation_step(grad_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = toy_ecodiff(toy_generator(steps=3), grad_mode=grad_mode)
    total = sum(spec.n_units for spec in module.specs)
    recorder = GateRecorder(module)
    draws: list[tuple[int, int]] = []
    install = MaskBank._install

    def counting(bank: MaskBank, u: Tensor) -> Any:
        draws.append((module.trainer.global_step, u.numel()))
        return install(bank, u)

    monkeypatch.setattr(MaskBank, "_install", counting)
    # Two steps of two micro-batches.
    trainer(max_steps=2, accumulate_grad_batches=2).fit(module, loader(16))
    assert [count for _, count in draws] == [total] * 4
    assert [step for step, _ in draws] == [0, 0, 1, 1]
    calls = {"full": 3, "checkpoint": 5, "manual": 6}[grad_mode]
    for step in (0, 1):
        seen = [gates for at, gates in recorder.gates if at == step]
        assert len(seen) == 2 * calls
        assert all(torch.equal(gates, seen[0]) for gates in seen)
    assert not torch.equal(recorder.gates[0][1], recorder.gates[-1][1])


def test_losses_are_reconstruction_regulariser_and_augmented_lagrangian() -> None:
    module, losses = toy_ecodiff(
        keep=0.6, init=1.0, beta=0.3, regulariser="l1", price="units", target_strength=3.0, target_anneal=0.5,
        correction="none", head_lr=1e-9, neuron_lr=1e-9, seed=3,
    ), Losses()  # fmt: skip
    trainer(max_steps=4, callbacks=[losses]).fit(module, loader(16))
    kept = torch.sigmoid(torch.tensor(1.0)).item()  # P(gate > 1/2) of a logit of 1
    wanted = [kept + (0.6 - kept) * share for share in (0.0, 0.5, 1.0, 1.0)]  # before each step
    later = [*wanted[1:], 0.6]  # and after it
    other, multiplier = toy_generator(), 0.0
    bank = MaskBank(module.specs, init=1.0, delta=0.1)
    for step, batch in enumerate(loader(16)):
        noise, cond = other.noise(batch["seed"].tolist()), other.encode(batch["prompt"])
        with torch.no_grad():
            dense = other.rollout(noise, cond)
            with bank.attached(other.denoiser):
                bank.sample(step_seed(3, step))
                error = (other.rollout(noise, cond) - dense).square().mean().item()
        excess = kept - wanted[step]
        # One mean of |logit| = 1 for the heads, one for the neurons.
        expected = error + 0.3 * (1 + 1) + multiplier * excess + 3.0 / 2 * excess**2
        assert losses.values[step] == pytest.approx(expected, rel=1e-5)
        at, reconstruction, share = module.history[step]
        assert (at, float(reconstruction), float(share)) == pytest.approx((step, error, kept), rel=1e-5)
        multiplier += 0.02 * 3.0 * (kept - later[step])
        assert error > 1e-3
    assert module.target.multiplier.item() == pytest.approx(multiplier, rel=1e-4)


def test_the_set_to_stay_is_looked_at_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    module, looks, refresh = toy_ecodiff(correction="joint", correction_every=2), [], Compensation.refresh

    def counting(compensation: Compensation, masks: dict[str, Tensor]) -> None:
        looks.append(module.trainer.global_step)
        refresh(compensation, masks)

    monkeypatch.setattr(Compensation, "refresh", counting)
    trainer(max_steps=5).fit(module, loader(20))
    assert looks == [0, 2, 4]


def test_each_unit_has_its_own_draw() -> None:
    module = toy_ecodiff()
    gates = torch.cat(list(module.bank.sample(0).values()))
    inside = gates[(gates > 0) & (gates < 1)]
    assert len(inside) > 10
    assert len(inside.unique()) == len(inside)


def test_accumulated_micro_batches_are_one_batch() -> None:
    whole, parts = toy_ecodiff(beta=0.01), toy_ecodiff(beta=0.01)
    trainer(max_steps=3).fit(whole, loader(24, batch_size=8))
    trainer(max_steps=3, accumulate_grad_batches=2).fit(parts, loader(24, batch_size=4))
    assert (logits_of(whole) - 3).abs().max() > 0.05
    assert torch.allclose(logits_of(whole), logits_of(parts), atol=1e-6, rtol=0)
    assert whole.target.multiplier.item() == pytest.approx(parts.target.multiplier.item(), abs=1e-7)
    assert whole.target.multiplier.item() != 0


def test_frozen_weights_stay_and_hooks_go() -> None:
    generator = toy_generator()
    module = toy_ecodiff(generator)
    before = weights(generator.denoiser)
    optimizers: list[Any] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            assert not pl_module.denoiser.training
            assert hooks(pl_module.denoiser) > 0
            optimizers.extend(trainer.optimizers)

    trainer(callbacks=[Look()]).fit(module, loader())
    trained = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.bank.parameters()}
    assert all(torch.equal(value, before[key]) for key, value in generator.denoiser.state_dict().items())
    assert not any(p.requires_grad for p in generator.denoiser.parameters())
    assert hooks(generator.denoiser) == 0


def test_hooks_go_when_training_breaks() -> None:
    class Breaks(EcoDiff):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            raise KeyError("planned")

    module = Breaks(backbone=toy_generator(), judge=None)
    with pytest.raises(KeyError, match="planned"):
        trainer().fit(module, loader())
    assert hooks(module.denoiser) == 0
    with pytest.raises(KeyError, match="planned"):
        trainer().fit(module, loader())


def test_learning_rates_by_kind() -> None:
    pipeline = build_pipeline("flux")
    generator = generator_for(pipeline.transformer)(pipeline, num_inference_steps=2)
    module = EcoDiff(
        backbone=generator,
        kinds=["head", "neuron", "modulation"],
        head_lr=0.5,
        neuron_lr=0.1,
        modulation_lr=0.2,
        judge=None,
    )
    optimizer: Any = module.configure_optimizers()
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "head": 0.5,
        "neuron": 0.1,
        "modulation": 0.2,
    }
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0] * 3
    by_kind = {group["name"]: sum(p.numel() for p in group["params"]) for group in optimizer.param_groups}
    units = {kind: sum(s.n_units for s in module.specs if s.kind == kind) for kind in by_kind}
    assert by_kind == units
    frozen_head: Any = toy_ecodiff(head_lr=0.0, target_strength=0.0, beta=1.0)
    trainer().fit(frozen_head, loader())
    for spec in frozen_head.specs:
        moved = (frozen_head.bank.scores()[spec.name] - 3).abs().max().item()
        assert moved == 0 if spec.kind == "head" else moved > 0.1


def test_checkpoint_holds_the_masks_and_nothing_else(tmp_path: Path) -> None:
    module = toy_ecodiff(beta=0.01)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    trainer(callbacks=[saver], enable_checkpointing=True).fit(module, loader())
    file = tmp_path / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    logits = {f"bank.logits.{spec.name.replace('.', '/')}" for spec in module.specs}
    assert set(checkpoint["state_dict"]) == logits | {"target.multiplier"}
    assert not [key for key in checkpoint["state_dict"] if key.startswith("denoiser")]
    assert file.stat().st_size < 100_000
    pairs = [(str(i), i) for i in range(8)]
    assert [tuple(pair) for pair in checkpoint["calibration_pairs"]] == pairs

    def primitive(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return all(map(primitive, value))
        return value is None or isinstance(value, bool | int | float | str)

    assert "backbone" not in checkpoint["hyper_parameters"]
    assert all(primitive(value) for value in checkpoint["hyper_parameters"].values())
    assert checkpoint["hyper_parameters"]["beta"] == 0.01

    again = EcoDiff.load_from_checkpoint(file, backbone=toy_generator(), weights_only=True)
    assert again.hparams["beta"] == 0.01
    assert again.calibration_pairs == pairs
    mine, theirs = module.masks(), again.masks()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(again.target.multiplier, module.target.multiplier)
    assert 0 < sum(int(mask.sum()) for mask in mine.values()) < sum(spec.n_units for spec in module.specs)


def test_a_checkpoint_of_something_else_is_refused() -> None:
    module = toy_ecodiff()
    state = module.state_dict()
    first = next(iter(state))
    with pytest.raises(SafelightError, match=r"does not fit this EcoDiff.*missing \['bank.logits.*another backbone"):
        module.load_state_dict({key: value for key, value in state.items() if key != first})
    with pytest.raises(SafelightError, match=r"unknown \['stray'\]"):
        module.load_state_dict(state | {"stray": torch.zeros(1)})
    with pytest.raises(SafelightError, match=r"\(3,\) instead of \(4,\)"):
        module.load_state_dict(state | {first: torch.zeros(3)})
    changed = {key: value + 1 for key, value in state.items()}
    module.load_state_dict(changed)
    assert all(torch.equal(value, changed[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (["a", "b"], r"expected a dict with 'prompt' \(B texts\) and 'seed' \(B integers\), got list"),
        ({"prompt": ["a"], "image": 1}, r"got \['image', 'prompt'\]"),
        ({"prompt": ["a", "b"], "seed": [1]}, "2 prompts but 1 seeds"),
    ],
)
def test_bad_batches_are_named(batch: Any, message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        trainer(max_steps=1).fit(toy_ecodiff(), DataLoader([batch], batch_size=None))


def test_a_subclass_may_change_the_loss_only() -> None:
    class NegativeLogits(EcoDiff):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            reconstruction = super().training_step(batch, batch_idx)
            return 0.0 * reconstruction + sum(p.sum() for p in self.bank.parameters())  # type: ignore[return-value]

    module = NegativeLogits(backbone=toy_generator(), judge=None)
    trainer(max_steps=2).fit(module, loader())
    # AdamW moves by its learning rate when all gradients are equal.
    assert torch.allclose(logits_of(module), torch.tensor(3 - 2 * 0.1), atol=1e-4)


def test_mappings_name_the_backbone_in_hyper_parameters() -> None:
    module = toy_ecodiff()
    assert "backbone" not in module.hparams
    assert module.hparams["kinds"] == ("head", "neuron")


def test_dense_targets_are_computed_once_per_pair() -> None:
    module = toy_ecodiff(toy_generator(steps=3), grad_mode="full", correction="after")
    with counted(module.denoiser) as forward:
        trainer(max_steps=2, max_epochs=-1).fit(module, loader(4))  # the same batch twice
    assert forward["calls"] == 4 * 3 + 2 * 3  # each sample's target by itself, then two whole batches


@pytest.mark.parametrize("objective", ["final", "per_step"])
def test_dense_target_is_free_of_gates(objective: str) -> None:
    """The first loss compares the masked model with the dense one, whatever gates were in force before."""
    module = toy_ecodiff(objective=objective, init=50.0)  # saturated: masked equals dense
    trainer(max_steps=1).fit(module, loader(4))
    assert float(module.history[0][1]) == pytest.approx(0.0, abs=1e-12)
    module = toy_ecodiff(objective=objective, init=0.0)
    trainer(max_steps=1).fit(module, loader(4))
    assert float(module.history[0][1]) > 1e-4


def test_resumed_training_is_the_same_training(tmp_path: Path) -> None:
    # The kept set is looked at in step 3 and not again before step 6, so the resumed run must know it.
    settings: dict[str, Any] = {"beta": 0.01, "keep": 0.5, "target_anneal": 0.2, "correction_every": 3}
    whole = toy_ecodiff(**settings)
    # Into the second epoch, where the batches mix the pairs anew.
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
    pairs = PromptDataset([str(i % 10) for i in range(16)])
    first, second = (ResumableLoader(pairs, batch_size=4, shuffle=True) for _ in range(2))
    trainer(max_steps=8, callbacks=[saver], enable_checkpointing=True).fit(whole, first)
    resumed = toy_ecodiff(**settings)
    trainer(max_steps=8).fit(resumed, second, ckpt_path=os.fspath(tmp_path / "step=5.ckpt"), weights_only=True)
    assert torch.equal(logits_of(whole), logits_of(resumed))
    assert torch.equal(whole.target.multiplier, resumed.target.multiplier)


def test_iterable_data_sets_are_refused_with_a_reason() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield {"prompt": "1", "seed": 0}

    with pytest.raises(SafelightError, match="no __getitem__ and __len__"):
        trainer(max_steps=1).fit(toy_ecodiff(), DataLoader(Stream()))


def test_logged_controls_are_means_over_their_masks() -> None:
    """Lightning averages a key that is logged twice in one hook, so several random masks are averaged before."""
    module = toy_ecodiff(random_masks=3, keep=0.6)
    run = trainer(max_steps=2)
    run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    for name, result in module.measured.items():
        for key, value in result.metrics.items():
            assert logged[f"test/{name}/{key}" if name else f"test/{key}"] == pytest.approx(value, rel=1e-6)
    medians = []
    for draw in range(3):
        scores = baseline_scores("random", module.generator, module.specs, module.calibration(), step_seed(0, draw))
        smaller = prune(module.generator, harden(scores, module.specs, keep=0.6, price="params"))
        errors = []
        for batch in loader():
            noise = module.generator.noise(batch["seed"])
            cond = module.generator.encode(batch["prompt"])
            with torch.no_grad():
                difference = smaller.rollout(noise, cond) - module.generator.rollout(noise, cond)
            errors.append(difference.square().flatten(1).mean(1))
        medians.append(torch.cat(errors).quantile(0.5).item())
    assert logged["test/random/latent_mse_median"] == pytest.approx(sum(medians) / 3, rel=1e-4)
