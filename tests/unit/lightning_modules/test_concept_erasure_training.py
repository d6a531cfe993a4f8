"""The loss of a training step, put together again from gates, noises, targets and weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ecodiff_toys import trainer
from torch import Tensor
from zoo_toys import Losses, load

from safelight.generators import Generator, generator_for
from safelight.lightning_modules import ConceptErasure
from safelight.lightning_modules.concept_erasure.minimality import units_off
from safelight.lightning_modules.randomness import step_seed
from safelight.masking import MaskBank
from safelight.testing.pipelines import build_pipeline

PROMPTS, ANCHORS = ["a gun", "a cat", "two guns", "a dog"], ["a toy", "a cat", "two toys", "a dog"]
ERASE, SEEDS = [True, False, True, False], [5, 6, 7, 8]


def toy_generator() -> Generator:
    pipeline = build_pipeline("flux")
    return generator_for(pipeline.transformer)(pipeline, num_inference_steps=2, height=16, width=16)


@pytest.mark.parametrize(("target", "off_weight"), [("anchor", 0.07), ("file", 0.0)])
def test_losses_of_two_steps_are_the_formula(target: Any, off_weight: float) -> None:
    other = toy_generator()
    given = torch.randn(4, *other.latent_shape, generator=torch.Generator().manual_seed(3))
    items = [
        {"prompt": prompt, "anchor": anchor, "erase": erase, "seed": seed, "target": latent}
        for prompt, anchor, erase, seed, latent in zip(PROMPTS, ANCHORS, ERASE, SEEDS, given, strict=True)
    ]
    module = ConceptErasure(
        backbone=toy_generator(), target=target, noise="fresh", init=1.0, beta=0.3, sparsity_weight=0.2,
        off_weight=off_weight, lr=1e-9, seed=4, minimality="none",
    )  # fmt: skip
    for logits in module.bank.logits.values():
        logits.data[0] = -0.5
    scores, losses = {name: score.clone() for name, score in module.bank.scores().items()}, Losses()
    trainer(max_steps=2, callbacks=[losses]).fit(module, load(items * 2))

    bank = MaskBank(module.specs, delta=0.5)
    for name, logits in bank.named_logits().items():
        logits.data.copy_(scores[name])
    flat = torch.cat(list(scores.values()))
    # Every unit counts alike; the probability of a gate above 0 is that of the plain hard concrete.
    kept = torch.sigmoid(flat + 0.83 * math.log(11)).mean().item()
    for step in range(2):
        noise = other.noise([seed * 1_000_003 + step for seed in SEEDS])

        def made_of(texts: list[str], noise: Tensor = noise, **how: Any) -> Tensor:
            return other.rollout(noise, other.encode(texts), **how)

        with torch.no_grad():
            goal = made_of(ANCHORS)  # a retained row is its own anchor
            if target == "file":
                goal[[0, 2]] = given[[0, 2]]
            with bank.attached(other.denoiser):
                bank.sample_steps(step_seed(4, step), 2)
                drawn = made_of(PROMPTS, before_step=bank.use_step)
        squares = (drawn - goal).square().flatten(1).mean(1).tolist()
        erased, retained = (squares[0] + squares[2]) / 2, (squares[1] + squares[3]) / 2
        wanted = (erased + 0.3 * retained) / 2 + 0.2 * kept + off_weight * (1 - kept)
        assert losses.values[step] == pytest.approx(wanted, rel=1e-4)
        recorded, *values = module.history[step]
        assert recorded == step
        assert [float(value) for value in values] == pytest.approx(
            [erased, retained, len(scores) / len(flat)], rel=1e-4
        )


def refined(**settings: Any) -> tuple[ConceptErasure, Losses]:
    """Six steps, of which the last ``refine_steps`` refine."""
    items = [
        {"prompt": prompt, "anchor": anchor, "erase": erase, "seed": seed}
        for prompt, anchor, erase, seed in zip(PROMPTS, ANCHORS, ERASE, SEEDS, strict=True)
    ]
    module = ConceptErasure(backbone=toy_generator(), init=0.2, minimality="refine", seed=4, **settings)
    losses = Losses()
    trainer(max_steps=6, callbacks=[losses]).fit(module, load(items * 6))
    return module, losses


def test_refinement_is_the_formula_on_binary_gates() -> None:
    module, losses = refined(refine_steps=2, refine_beta=3.0, refine_share=0.0, refine_off_weight=0.4, lr=1e-9)
    other = toy_generator()
    for logits in module.bank.logits.values():
        assert (logits > 0).all()
    # All gates are open, so the masked model is the dense one: erased rows have all of their way before them.
    assert losses.values[4:] == pytest.approx([0.5, 0.5], rel=1e-5)

    module = ConceptErasure(
        backbone=other, minimality="refine", refine_steps=1, refine_beta=300.0, refine_share=0.25, refine_off_weight=0.4
    )
    for logits in module.bank.logits.values():
        logits.data[::3] = -0.5
    masks = {name: score > 0 for name, score in module.bank.scores().items()}
    batch = {"prompt": PROMPTS, "anchor": ANCHORS, "erase": ERASE, "seed": SEEDS}
    # Plain training had every second unit off; a quarter of that is free.
    module.plain_logits = {name: torch.arange(len(score)) % 2 - 0.5 for name, score in module.bank.scores().items()}
    module.trainer = trainer(max_steps=1)
    module._log_step = lambda *_: None  # type: ignore[method-assign, assignment]
    with module.bank.attached(other.denoiser):
        loss = module.training_step(batch, 0)
        (gradient,) = torch.autograd.grad(loss, [next(iter(module.bank.logits.values()))])
    clean = toy_generator()

    def made_of(texts: list[str]) -> Tensor:
        return clean.rollout(clean.noise(SEEDS), clean.encode(texts))

    with torch.no_grad():
        goal, dense = made_of(ANCHORS), made_of(PROMPTS)
        with MaskBank(module.specs).attached(clean.denoiser) as bank:
            bank.set_gates(masks)
            masked = made_of(PROMPTS)
    left = (masked - goal).square().flatten(1).mean(1)
    before = (dense - goal).square().flatten(1).mean(1)
    share_off = 1 - float(torch.cat(list(masks.values())).float().mean())
    rows = left[0] / before[0] + left[2] / before[2] + 300.0 * (left[1] + left[3])
    assert float(300.0 * (left[1] + left[3]) / 4) > 0.01
    assert float(loss.detach()) == pytest.approx(float(rows / 4) + 0.4 * (share_off - 0.25 * 0.5), rel=1e-4)
    assert gradient.ne(0).any()


def test_refinement_begins_once_and_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[tuple[int, float, bool, float]] = []
    plain = ConceptErasure.training_step

    def step(module: ConceptErasure, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = module.optimizers()
        group = optimizer.optimizer.param_groups[0]
        rates.append((len(optimizer.optimizer.state), group["lr"], module.refining, group["betas"][1]))
        return plain(module, batch, batch_idx)

    monkeypatch.setattr(ConceptErasure, "training_step", step)
    module, _ = refined(refine_steps=50, lr=0.1)  # never more than half of all steps
    layers = len(module.bank.logits)
    assert [state for state, *_ in rates] == [0, layers, layers, 0, layers, layers]
    assert [rate for _, rate, *_ in rates] == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.07, 0.04])
    assert [(refining, beta) for *_, refining, beta in rates] == [(False, 0.999)] * 3 + [(True, 0.99)] * 3
    assert any(not torch.equal(module.plain_logits[n], score) for n, score in module.bank.scores().items())
    assert all(torch.equal(m, module.plain_logits[n] > 0) for n, m in module.plain_masks().items())
    assert all(torch.equal(m, module.bank.scores()[n] > 0) for n, m in module.masks().items())


def test_masks_are_the_threshold_or_an_exact_number_of_units() -> None:
    module = ConceptErasure(backbone=toy_generator(), init=1.0)
    for position, logits in enumerate(module.bank.logits.values()):
        logits.data[:2] = torch.tensor([-0.5, -0.1 * position - 1.0])
    layers = len(module.bank.logits)
    assert units_off(module.plain_masks()) == 2 * layers
    module.hparams.max_units_off = 1
    off = {name: (~mask).nonzero().flatten().tolist() for name, mask in module.plain_masks().items() if not mask.all()}
    assert off == {list(module.bank.scores())[-1]: [1]}  # the lowest logit of all
