"""SafetyDPO: what it trains, on which rows, what it measures, and what it leaves behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ecodiff_toys import trainer
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from safelight.datamodules.copro_v2_categories import expert_names
from safelight.errors import SafelightError
from safelight.generators import generator_for
from safelight.generators.lora import active_adapter
from safelight.lightning_modules import SafetyDPO
from safelight.lightning_modules.safety_dpo.adapters import LowRank, fuse, fused, load_adapter, save_adapter, unfuse
from safelight.lightning_modules.safety_dpo.batches import foreign_rows, read_batch
from safelight.lightning_modules.safety_dpo.merging import BASELINES
from safelight.lightning_modules.safety_dpo.names import CONTROL, ONLY
from safelight.lightning_modules.safety_dpo.pairs import noise_pairs, pair_errors
from safelight.metrics import ClipJudge
from safelight.testing.contracts import MethodContract
from safelight.testing.pipelines import build_pipeline, pipeline_folder

TINY = [
    "method.rank=2", "method.beta=200", "method.lr=1e-2", "method.unsafe_words=[pistol,dagger]",
    "method.safe_words=[cat,dog]", "method.test_draws=1", "data.test_size=5",
]  # fmt: skip


class TestContract(MethodContract):
    method = "safety_dpo"
    opens_with = """
import torch
from diffusers import StableDiffusionXLPipeline
pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline")
assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())
pipeline.load_lora_weights(folder)
assert pipeline.get_list_adapters() == {"unet": ["default_0"]}
assert any("lora_A" in name and value.std() > 0 for name, value in pipeline.unet.named_parameters())
"""
    equivalence_precision = "64-true"
    # One noise and one time for each row, so that there is something to fit.
    overfit_changes: ClassVar[dict[str, Any]] = {"noise_draws": 1, "prompt_dropout": 0.0}

    def overrides(self) -> list[str]:
        folder = pipeline_folder("unet_sdxl")
        return [f"backbone={folder}", "data.image_size=16", *TINY]


def tiny(family: str = "unet_sd", **changes: Any) -> SafetyDPO:
    pipeline = build_pipeline(family)
    denoiser = pipeline.unet if "unet" in family else pipeline.transformer
    size = {} if "unet" in family else {"height": 16, "width": 16}
    generator = generator_for(denoiser)(pipeline, num_inference_steps=2, guidance_scale=1.0, **size)
    settings: dict[str, Any] = {"rank": 2, "beta": 200.0, "lr": 1e-2, "unsafe_words": ["pistol"], "safe_words": ["cat"]}
    return SafetyDPO(backbone=generator, **settings | changes)


def rows(count: int = 4, experts: list[str] | None = None, drawn: bool = False) -> list[dict[str, Any]]:
    """Rows in pairs, with a picture for each prompt."""
    found = []
    for number in range(count):
        draw = torch.Generator().manual_seed(number // 2)
        row: dict[str, Any] = {
            "caption": f"a thing {number}", "caption_kind": ("unsafe", "safe")[number % 2], "index": number,
            "prompt_w": f"a cat {number // 2}", "prompt_l": f"a pistol {number // 2}", "seed": 7 + number // 2,
        }  # fmt: skip
        if not drawn:
            # Safe pictures are bright above, unsafe ones below.
            light = torch.linspace(0.8, -0.8, 16).view(1, 16, 1)
            noise = 0.2 * torch.rand(3, 16, 16, generator=draw)
            row["pixel_w"], row["pixel_l"] = noise + light, noise - light
        found += [row | {"expert": name} for name in experts] if experts else [row]
    return found


def loader(*args: Any, batch_size: int = 4, **keywords: Any) -> DataLoader[Any]:
    return DataLoader(rows(*args, **keywords), batch_size=batch_size)  # type: ignore[arg-type]


def held_out(count: int = 6) -> list[DataLoader[Any]]:
    prompts = [
        {"prompt": f"a pistol {n}", "category": ("violence", "illegal")[n % 2], "seed": n, "index": n, "leaked": n == 0}
        for n in range(count)
    ]
    return [DataLoader(prompts, batch_size=4), loader()]  # type: ignore[arg-type]


def fit(module: SafetyDPO, steps: int = 3, data: Any = None, **settings: Any) -> dict[str, Any]:
    runner = trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=1, **settings)
    runner.fit(module, data or loader())
    return {key: float(value) for key, value in runner.logged_metrics.items()}


@pytest.fixture(scope="module")
def trained() -> SafetyDPO:
    module = tiny(control=False)
    fit(module, 6)
    return module


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["unet_sd", "unet_sdxl", "flux", "sd3"])
def test_before_the_first_step_the_margin_is_zero(family: str) -> None:
    logged = fit(tiny(family), 1)
    assert logged["train/loss"] == pytest.approx(math.log(2), abs=1e-4)
    for name in ("", f"{CONTROL}/"):
        assert logged[f"train/{name}implicit_acc"] == 0.5
        for value in ("rewards/chosen", "rewards/rejected", "rewards/margins", "delta_w", "delta_l"):
            assert logged[f"train/{name}{value}"] == pytest.approx(0, abs=1e-4)
        assert logged[f"train/{name}mse/model_w"] == pytest.approx(logged[f"train/{name}mse/ref_w"])
        assert logged[f"train/{name}mse/model_l"] > 0


def test_the_first_step_moves_b_only_and_then_a() -> None:
    module = tiny(control=False)
    before = {name: value.detach().clone() for name, value in module.lora.items()}
    gradients: dict[str, float] = {}

    class Watch(Callback):
        def on_before_optimizer_step(self, runner: Any, watched: Any, optimizer: Any) -> None:
            gradients.update({name: float(value.grad.abs().sum()) for name, value in watched.lora.items()})

    fit(module, 1, callbacks=[Watch()])
    # Weight decay moves A a little, the loss not at all, because B was zero.
    assert all((size == 0) == ("lora_A" in name) for name, size in gradients.items())
    assert all(not torch.equal(value, before[name]) for name, value in module.lora.items() if "lora_B" in name)
    assert {value.requires_grad for value in module.lora.values()} == {True}
    own = {id(value) for value in module.lora.values()}
    assert all(not value.requires_grad for value in module.parameters() if id(value) not in own)


def test_all_adapters_start_from_the_same_a() -> None:
    module = tiny(experts=["violence", "illegal"], control=False)
    first, second = (module.adapter_of(name) for name in ("violence", "illegal"))
    assert all(torch.equal(pair.a, second[path].a) for path, pair in first.items())
    other = tiny(experts=["violence", "illegal"], control=False, lora_seed=1).adapter_of("violence")
    assert not any(torch.equal(pair.a, other[path].a) for path, pair in first.items())


def test_the_reference_is_the_network_as_it_was(trained: SafetyDPO) -> None:
    plain = tiny(control=False).generator
    generator = trained.generator
    noise, cond = plain.noise([1, 2]), plain.encode(["a cat", "a dog"])
    with torch.no_grad():
        wanted = plain.denoise(noise, torch.tensor([400.0, 800.0]), cond)
        with active_adapter(trained.peft_model, None):
            assert torch.equal(generator.denoise(noise, torch.tensor([400.0, 800.0]), cond), wanted)
        with active_adapter(trained.peft_model, ONLY):
            assert not torch.allclose(generator.denoise(noise, torch.tensor([400.0, 800.0]), cond), wanted)


def test_the_safe_picture_is_the_winner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured without any of the method's own code: the error on unsafe pictures grows more than that on safe ones."""
    module = tiny(control=False, guard=None, prompt_dropout=0.0)
    generator, scheduler = module.generator, module.generator.scheduler
    # A random autoencoder tells no pictures apart, so their latents are given.
    ones = torch.ones(4, *generator.latent_shape)
    monkeypatch.setattr(module, "latents", lambda rows: (ones, -ones))
    cond = generator.encode([row["caption"] for row in rows()])

    def error(clean: Tensor) -> float:
        total = 0.0
        for draw in range(8):
            noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(draw))
            signal = scheduler.alphas_cumprod[100 * draw + 50]
            noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
            with torch.no_grad():
                guess = generator.denoise(noisy, torch.full((len(clean),), 100.0 * draw + 50), cond)
            total += float((guess - noise).square().mean())
        return total / 8

    before = [error(clean) for clean in (ones, -ones)]
    logged = fit(module, 60)
    with active_adapter(module.peft_model, ONLY):
        after = [error(clean) for clean in (ones, -ones)]
    safe, unsafe = (after[side] - before[side] for side in (0, 1))
    assert unsafe - safe > 0.01, "unsafe pictures have become less likely than safe ones"
    assert logged["train/rewards/margins"] > 0
    assert logged["train/rewards/chosen"] - logged["train/rewards/rejected"] == pytest.approx(
        logged["train/rewards/margins"], rel=1e-4
    )


def test_the_guard_is_given_the_residuals_of_safe_and_unsafe_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    import safelight.lightning_modules.safety_dpo.module as home

    given: list[tuple[Tensor, Tensor, float]] = []

    def remember(winner: Tensor, loser: Tensor, mu: float) -> Tensor:
        given.append((winner, loser, mu))
        return torch.ones(len(winner))

    monkeypatch.setattr(home, "guard_factor", remember)
    logged = fit(tiny(control=False, guard=0.3), 1)
    ((winner, loser, mu),) = given
    assert float(winner.square().mean()) == pytest.approx(logged["train/mse/model_w"], rel=1e-5)
    assert float(loser.square().mean()) == pytest.approx(logged["train/mse/model_l"], rel=1e-5)
    assert winner.square().mean() != pytest.approx(float(loser.square().mean()), rel=1e-3)
    assert mu == 0.3


@pytest.mark.parametrize("family", ["unet_sd", "flux"])
def test_both_pictures_are_noised_alike(family: str) -> None:
    generator = tiny(family, control=False).generator
    winner, loser = (
        torch.randn(6, *generator.latent_shape, generator=torch.Generator().manual_seed(n)) for n in (0, 1)
    )
    streams = [torch.Generator().manual_seed(row) for row in range(6)]
    pairs = noise_pairs(generator, winner, loser, list("abcdef"), streams, 0.0)
    again = [torch.Generator().manual_seed(row) for row in range(6)]
    noise = torch.stack([torch.randn(generator.latent_shape, generator=stream) for stream in again])
    time = torch.cat([torch.rand(1, generator=stream) for stream in again])
    rows = (-1, *[1] * (winner.ndim - 1))
    for clean, noisy, target, at in zip(
        (winner, loser), pairs.noisy.chunk(2), pairs.target.chunk(2), pairs.timestep.chunk(2), strict=True
    ):
        if family == "flux":
            level = time.view(rows)
            assert torch.allclose(noisy, (1 - level) * clean + level * noise, atol=1e-6)
            assert torch.allclose(target, noise - clean)
            assert torch.allclose(at, 1000 * time)
        else:
            steps = (1000 * time).long()
            signal = generator.scheduler.alphas_cumprod[steps].view(rows)
            assert torch.allclose(noisy, signal.sqrt() * clean + (1 - signal).sqrt() * noise, atol=1e-6)
            assert torch.allclose(target, noise)
            assert torch.equal(at, steps.float())
    assert pairs.captions == list("abcdef")
    some = pairs.rows([4, 1])
    assert torch.equal(some.noisy, pairs.noisy[[4, 1, 10, 7]])
    assert some.captions == ["e", "b"]


def test_captions_are_dropped_at_the_asked_rate() -> None:
    generator = tiny(control=False).generator
    latents = torch.zeros(400, *generator.latent_shape)
    streams = [torch.Generator().manual_seed(row) for row in range(400)]
    pairs = noise_pairs(generator, latents, latents, ["x"] * 400, streams, 0.2)
    assert pairs.captions.count("") / 400 == pytest.approx(0.2, abs=0.06)
    assert set(pairs.captions) == {"", "x"}


def test_the_guard_spares_the_winner() -> None:
    changes: dict[str, Any] = {"noise_draws": 1, "prompt_dropout": 0.0, "beta": 2000.0}
    module = tiny(guard=0.5, **changes)
    logged = fit(module, 40)
    assert logged["train/delta_w"] < logged[f"train/{CONTROL}/delta_w"]
    assert logged["train/delta_w"] <= 1e-4


def test_the_control_is_an_adapter_of_its_own() -> None:
    """Clipped by itself and on its own loss: the guarded adapter is the same with and without it."""
    beside, alone = tiny(), tiny(control=False)
    for module in (beside, alone):
        fit(module, 3, gradient_clip_val=0.05)
    assert list(beside.guards.items()) == [(ONLY, 0.5), (CONTROL, None)]
    mine, other = beside.adapter_of(ONLY), alone.adapter_of(ONLY)
    assert all(torch.allclose(pair.delta, other[path].delta, atol=1e-7) for path, pair in mine.items())
    control = beside.adapter_of(CONTROL)
    assert not all(torch.allclose(pair.delta, control[path].delta) for path, pair in mine.items())


def test_all_experts_are_those_of_the_data() -> None:
    module = tiny(experts="all", control=False)
    assert list(module.guards) == expert_names("all") == list(module.experts())
    assert module.merging


def test_an_expert_learns_from_its_rows_only() -> None:
    names = ["violence", "illegal"]
    both = tiny(experts=names, control=False)
    mixed = [row for row in rows(4, names) if row["expert"] != "violence" or row["index"] < 2]
    fit(both, 3, DataLoader(mixed, batch_size=len(mixed)))  # type: ignore[arg-type]
    changed = [
        row | {key: -row[key] for key in ("pixel_w", "pixel_l")} | {"index": row["index"] + 100}
        if row["expert"] == "illegal" else row
        for row in mixed
    ]  # fmt: skip
    other = tiny(experts=names, control=False)
    fit(other, 3, DataLoader(changed, batch_size=len(changed)))  # type: ignore[arg-type]
    for name, equal in (("violence", True), ("illegal", False)):
        pairs = both.adapter_of(name), other.adapter_of(name)
        assert all(torch.allclose(p.delta, pairs[1][path].delta, atol=1e-7) for path, p in pairs[0].items()) is equal


def test_foreign_rows_are_of_the_same_group_and_of_no_own_category() -> None:
    names = ["violence", "illegal", "shocking", "all"]
    module = tiny(experts=names, control=False, preserve=1.0)
    batch = DataLoader(rows(3, names), batch_size=12)  # type: ignore[arg-type]
    found = read_batch(next(iter(batch)))
    own = module._own_rows(found, "illegal")
    assert own == [1, 5, 9]
    # Violence, shocking and all by turns of the row's number; without categories the row's expert is what it is of.
    assert foreign_rows(found, "illegal", own, 4) == [0, 6, 11]
    # The row of the shocking expert and that for all are of illegal things, too.
    found.categories = [{"violence"}, {"illegal"}, {"illegal", "shocking"}, {"illegal"}] * 3
    assert foreign_rows(found, "illegal", own, 4) == [0, 4, 8]
    second = read_batch({key: value[4:8] for key, value in next(iter(batch)).items()})
    second.categories = found.categories[4:8]
    assert foreign_rows(second, "illegal", [1], 4) == [0], "the same when the batch is cut"
    second.categories = [{"illegal"}] * 4
    assert foreign_rows(second, "illegal", [1], 4) == []


def moved(module: SafetyDPO, name: str, expert: str) -> float:
    """By how much an expert has changed what is predicted for the rows of another one."""
    batch = read_batch(next(iter(loader(4, ["violence", "illegal"], batch_size=8))))
    chosen = module._own_rows(batch, expert)
    streams = [torch.Generator().manual_seed(5 + row) for row in chosen]
    latents = [side[chosen] for side in module.latents(batch)]
    pairs = noise_pairs(module.generator, *latents, [batch.captions[row] for row in chosen], streams, 0.0)
    cond = module.prompts.conditioning(pairs.captions)
    residuals = []
    for adapter in (None, name):
        with torch.no_grad(), active_adapter(module.peft_model, adapter):
            residuals.append(pair_errors(module.generator, pairs, cond)[1])
    return float((residuals[0] - residuals[1]).square().mean())


def test_preserving_leaves_the_rows_of_other_experts_alone() -> None:
    names = ["violence", "illegal", "all"]
    # Pictures of illegal things are dark where those of violence are bright.
    mixed = [
        row | {key: -row[key] for key in ("pixel_w", "pixel_l")} | {"index": row["index"] + 100, "caption": "crime"}
        if row["expert"] == "illegal" else row
        for row in rows(4, names)
    ]  # fmt: skip
    found = {}
    for preserve in (0.0, 30.0):
        module = tiny(experts=names, control=False, preserve=preserve, prompt_dropout=0.0)
        logged = fit(module, 30, DataLoader(mixed, batch_size=12))  # type: ignore[arg-type]
        found[preserve] = moved(module, "violence", "illegal")
        assert ("train/violence/preserve" in logged) is (preserve > 0)
        assert "train/all/preserve" not in logged, "nothing is foreign to the adapter that learns from everything"
    assert found[30.0] < 0.2 * found[0.0]


def test_kept_residuals_of_the_reference_are_those_of_their_rows() -> None:
    module = tiny(control=False, noise_draws=2, preserve=1.0)
    batch = read_batch(next(iter(loader())))
    draws, streams = [0, 1, 1, 0], [torch.Generator().manual_seed(row) for row in range(4)]
    pairs = noise_pairs(module.generator, *module.latents(batch), batch.captions, streams, 0.0)
    cond = module.prompts.conditioning(pairs.captions)
    with torch.no_grad(), active_adapter(module.peft_model, None):
        errors, residual = pair_errors(module.generator, pairs, cond)
    for _ in range(2):  # computed, then remembered
        kept_errors, kept_residual = module._reference_errors(pairs, cond, batch, draws)
        assert torch.allclose(kept_residual, residual, atol=1e-5)
        assert torch.allclose(kept_errors.loser, errors.loser, atol=1e-5)
    module.hparams.preserve = 0.0
    module._reference.clear()
    module._reference_errors(pairs, cond, batch, draws)
    assert not any(residual.numel() for _, residual in module._reference.values()), "nobody asks for them"


def test_fixed_draws_ask_the_reference_once() -> None:
    module = tiny(control=False, noise_draws=2)
    calls: list[int] = []
    module.generator.denoiser.register_forward_hook(lambda *_: calls.append(1))
    fit(module, 12)
    assert len(module._reference) == 4 * 2, "four rows, two draws each"
    # Twelve steps of the policy and one row at a time for the reference.
    assert len(calls) == 12 + 8


def test_pictures_may_be_drawn_by_the_backbone(tmp_path: Path) -> None:
    module = tiny(control=False, targets_folder=str(tmp_path))
    fit(module, 2, loader(drawn=True))
    generator = tiny(control=False).generator
    with torch.no_grad():
        wanted = generator.rollout(generator.noise([7]), generator.encode(["a cat 0"]))
    found = module.latents(read_batch(next(iter(loader(drawn=True)))))[0][:1]
    assert torch.equal(found, wanted)
    assert len(list(tmp_path.iterdir())) == 4, "two pairs, two pictures each"


def test_a_winner_that_gets_worse_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import safelight.lightning_modules.safety_dpo.module as home

    monkeypatch.setattr(home, "PATIENCE", 2)
    module = tiny(control=False)
    fit(module, 1)
    module.history[ONLY] = [(step, torch.tensor(0.5), torch.tensor(0.01), torch.tensor(0.2)) for step in range(2)]
    module.trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = 2
    with pytest.warns(UserWarning, match=r"delta_w: over the last 2 steps .* 0\.01 above"):
        module.on_train_batch_end()


@pytest.mark.parametrize(
    ("optimizer", "schedule", "kind"),
    [("adamw", "constant", "AdamW"), ("adamw", "cosine", "AdamW"), ("adafactor", "constant", "Adafactor")],
)
def test_optimisers_and_rates(optimizer: Any, schedule: Any, kind: str) -> None:
    module = tiny(control=False, optimizer=optimizer, schedule=schedule, warmup_steps=2, lr=1e-3, scale_lr=True)
    rates: list[float] = []

    class Rates(Callback):
        def on_before_optimizer_step(self, runner: Any, watched: Any, used: Any) -> None:
            assert type(used).__name__ == kind
            rates.append(used.param_groups[0]["lr"])

    fit(module, 6, accumulate_grad_batches=2, callbacks=[Rates()])
    peak = 1e-3 * 4 * 2
    assert rates[:2] == pytest.approx([peak / 2, peak])
    assert rates[-1] == pytest.approx(peak) if schedule == "constant" else rates[-1] < peak / 2


# -- what can be asked of the result -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["unet_sd", "unet_sdxl", "flux"])
def test_the_saved_adapter_gives_the_same_in_a_fresh_pipeline(family: str, tmp_path: Path) -> None:
    module = tiny(family, control=False, alpha=6)
    fit(module, 4)
    module.export(tmp_path)
    fresh = build_pipeline(family)
    fresh.load_lora_weights(str(tmp_path))
    denoiser = fresh.unet if "unet" in family else fresh.transformer
    size = {} if "unet" in family else {"height": 16, "width": 16}
    other = generator_for(denoiser)(fresh, num_inference_steps=2, guidance_scale=1.0, **size)
    noise, cond, time = other.noise([1, 2]), other.encode(["a cat", "a dog"]), torch.tensor([400.0, 800.0])
    with torch.no_grad():
        found = other.denoise(noise, time, cond)
        with active_adapter(module.peft_model, ONLY):
            assert (found - module.generator.denoise(noise, time, cond)).abs().max() < 1e-4
        with active_adapter(module.peft_model, None):
            assert (found - module.generator.denoise(noise, time, cond)).abs().max() > 1e-4
            with module.adapted():
                assert (found - module.generator.denoise(noise, time, cond)).abs().max() < 1e-4
    again, facts = load_adapter(tmp_path)
    mine = module.merged()
    assert all(torch.allclose(pair.delta, again[path].delta, atol=1e-6) for path, pair in mine.items())
    assert (facts["adapter"], facts["lora_seed"], facts["beta"]) == ("", 0, 200.0)


def test_fusing_is_undone_bit_for_bit(trained: SafetyDPO) -> None:
    denoiser = trained.generator.denoiser
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    weights = fuse(denoiser, trained.merged(), 0.7)
    moved = [name for name, value in denoiser.state_dict().items() if not torch.equal(value, before[name])]
    assert len(moved) == len(weights) == len(trained.merged())
    unfuse(denoiser, weights)
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())


def test_the_knob_scales_the_change(trained: SafetyDPO) -> None:
    path, pair = next(iter(trained.merged().items()))
    layer: Any = trained.generator.denoiser.get_submodule(path)
    weight = layer.base_layer.weight.detach().clone()
    with fused(trained.generator.denoiser, trained.merged(), 0.25):
        assert torch.allclose(layer.base_layer.weight, weight + 0.25 * pair.delta, atol=1e-7)


def test_adapters_that_do_not_fit_are_refused_and_change_nothing(trained: SafetyDPO, tmp_path: Path) -> None:
    denoiser, adapter = trained.generator.denoiser, trained.merged()
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    path, pair = next(iter(adapter.items()))
    with pytest.raises(SafelightError, match="has no layer nowhere"):
        fuse(denoiser, {**adapter, "nowhere": pair})
    with pytest.raises(SafelightError, match=f"{path} has a weight of"):
        fuse(denoiser, {path: LowRank(pair.a, pair.b[:3])})
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    with pytest.raises(SafelightError, match=r"holds no pytorch_lora_weights\.safetensors"):
        load_adapter(tmp_path)
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(SafelightError, match="cannot be read"):
        load_adapter(tmp_path)


def test_alphas_of_other_programs_are_folded(trained: SafetyDPO, tmp_path: Path) -> None:
    file = save_adapter(tmp_path, trained.merged(), "unet", {})
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(".lora_A.weight")).removesuffix(".lora_A.weight")
    save_file(tensors | {f"{key}.alpha": torch.tensor(6.0)}, file)
    path = key.removeprefix("unet.")
    assert torch.allclose(load_adapter(tmp_path)[0][path].delta, 3 * trained.merged()[path].delta, atol=1e-6)


# -- testing -----------------------------------------------------------------------------------------------------------


def test_measures_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a judge that flags by brightness, and by hand."""
    module = tiny(control=False)
    fit(module, 8)

    generator = module.generator
    texts = [f"a pistol {n}" for n in range(6)]
    with torch.no_grad(), active_adapter(module.peft_model, ONLY):
        pictures = generator.decode(generator.rollout(generator.noise(range(6)), generator.encode(texts)))
    light = pictures.mean(dim=(1, 2, 3))
    bound = float(light.min() + light.max()) / 2

    class Bright:
        def flag(self, pictures: Tensor) -> Tensor:
            return pictures.mean(dim=(1, 2, 3)) > bound

        def score(self, pictures: Tensor) -> Tensor:
            return pictures.mean(dim=(1, 2, 3))

        def facts(self) -> dict[str, Any]:
            return {"judge": "bright"}

    monkeypatch.setattr(SafetyDPO, "safety_judge", lambda self: Bright())
    (first, second) = trainer().test(module, held_out(), verbose=False)
    found = {key.removeprefix("test/"): value for key, value in (first | second).items()}
    flagged = Bright().flag(pictures).float()
    assert found["ip"] == pytest.approx(float(flagged.mean()))
    assert found["ip_clean"] == pytest.approx(float(flagged[1:].mean())), "the first prompt is leaked"
    assert found["ip_clean"] != pytest.approx(found["ip"])
    counts = module.measured[""].categories
    assert counts == {"illegal": (int(flagged[1::2].sum()), 3), "violence": (int(flagged[::2].sum()), 3)}
    before = module.measured["before"].metrics
    assert (before["drift"], before["delta_w"], before["implicit_accuracy"]) == (0, 0, 0.5)
    assert found["ip_before"] == pytest.approx(before["ip"])
    safe = [f"a thing {n}" for n in (1, 3)]
    with torch.no_grad():
        noise, cond = generator.noise([1_500_000_000, 1_500_000_001]), generator.encode(safe)
        with active_adapter(module.peft_model, None):
            plain = generator.rollout(noise, cond)
        with active_adapter(module.peft_model, ONLY):
            moved = generator.rollout(noise, cond)
    assert found["drift"] == pytest.approx(float((plain - moved).square().mean()), rel=1e-3)


def test_content_is_the_own_caption_against_nine_others(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny(control=False)
    fit(module, 1)
    seen: list[list[str]] = []

    def classify(self: ClipJudge, pictures: Tensor, texts: list[str]) -> Tensor:
        if texts[0].startswith("a cat"):
            # Of the forty rows only the second, the first safe prompt, is recognised.
            row = len(seen) % 40
            seen.append(list(texts))
            return torch.tensor([0 if row == 1 else 1])
        return torch.zeros(len(pictures), dtype=torch.long)

    monkeypatch.setattr(ClipJudge, "classify", classify)
    pairs = loader(count=40, batch_size=8)
    trainer().test(module, [held_out()[0], pairs], verbose=False)
    assert all(len(set(texts)) == 10 for texts in seen)
    assert {texts[0] for texts in seen} == {f"a cat {n}" for n in range(20)}
    metrics = module.measured[""].metrics
    assert (metrics["content_accuracy"], metrics["counterpart_rate"]) == (1 / 20, 0)
    half = len(seen) // 2
    assert seen[:half] == seen[half:], "the same others for every model"


def test_merging_measures_every_merge(tmp_path: Path) -> None:
    names = ["violence", "illegal", "all"]
    module = tiny(experts=names, control=False, calibration_rows=3, test_draws=1)
    fit(module, 4, loader(experts=names, batch_size=12))
    with pytest.raises(SafelightError, match="call calibrate"):
        module.merged()
    statistics = module.calibrate(loader())
    assert statistics.names == ["violence", "illegal"], "all is what the merge is compared with"
    trainer().test(module, held_out(), verbose=False)
    merges = {"lora_rows", "rank1", "compressed", *BASELINES}
    assert set(module.control_names) == merges
    assert set(module.measured) == {"before", "", *merges, *names}
    module.export(tmp_path)
    merged, facts = load_adapter(tmp_path)
    assert (next(iter(merged.values())).a.shape[0], facts["merge"]) == (4, "delta_rows")
    experts = {name: load_adapter(tmp_path / "experts" / name)[0] for name in names[:2]}
    owners = statistics.owners()
    for path, pair in merged.items():
        own = torch.stack([adapter[path].delta for adapter in experts.values()])
        wanted = own[owners[path].clamp_min(0), torch.arange(own.shape[1])]
        assert torch.allclose(pair.delta[owners[path] >= 0], wanted[owners[path] >= 0], atol=1e-6)
    points = json.loads((tmp_path / "ownership.json").read_text())
    assert points["experts"] == names[:2]
    assert set(points["points"]) == set(merged)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["measured"]["dense model"]["categories"] == {"illegal": [0, 3], "violence": [0, 3]} or results


def test_calibration_counts_the_first_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["violence", "illegal"]
    module = tiny(experts=names, control=False, calibration_rows=3)
    fit(module, 3, loader(experts=names, batch_size=8))
    points = [module.calibrate(loader(batch_size=size)).compute() for size in (1, 4)]
    tokens = {path: int(pair[1][:, 0].sum()) for path, pair in points[0].items()}
    assert all(count % 3 == 0 for count in tokens.values())
    for path, pair in points[0].items():
        assert (pair[1].sum(dim=0) == tokens[path]).all() or (pair[1].sum(dim=0) <= tokens[path]).all()
        assert (pair[1] - points[1][path][1]).abs().max() <= 0.01 * tokens[path] + 1
    shape = (4, *module.generator.latent_shape)
    one, other = (torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in (1, 2))
    counted = []
    for pair in ((one, one), (other, one), (one, other)):
        monkeypatch.setattr(module, "latents", lambda rows, pair=pair: pair)
        counted.append(module.calibrate(loader()).compute())
    same = [
        all(torch.equal(x, y) for path, found in counted[0].items() for x, y in zip(found, case[path], strict=True))
        for case in counted[1:]
    ]
    assert same == [True, False], "the unsafe pictures are what is listened to"
    with pytest.raises(SafelightError, match="no rows to calibrate on"):
        module.calibrate([])


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": None}, "expected a dict with caption and index"),
        ({"pixel_l": None}, "or prompt_w, prompt_l and seed"),
        ({"pixel_w": torch.zeros(4, 3, 8, 8)}, "have the shapes"),
    ],
)
def test_bad_batches(change: dict[str, Any], message: str) -> None:
    batch = {**next(iter(loader())), **change}
    batch.pop("seed")
    with pytest.raises(SafelightError, match=message):
        read_batch({key: value for key, value in batch.items() if value is not None})


def test_bad_settings() -> None:
    with pytest.raises(SafelightError, match=r"'self\.harm' cannot be a name"):
        tiny(experts=["self.harm", "violence"])
    for names in (["hate", "all"], ["hate", "hate"]):
        with pytest.raises(SafelightError, match="merging needs two different ones beside 'all'"):
            tiny(experts=names)
    with pytest.raises(SafelightError, match="no row for the expert 'hate'"):
        fit(tiny(experts=["hate", "violence"]), 1, loader(experts=["violence"]))
    module = tiny(control=False)
    module.generator.configure(height=32)
    with pytest.raises(SafelightError, match=r"pictures of \(16, 16\) pixels for a backbone"):
        fit(module, 1)
    with pytest.raises(SafelightError, match="give two loaders"):
        trainer().test(tiny(control=False), held_out()[0], verbose=False)
