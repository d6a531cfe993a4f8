"""LoRA healing: its losses against formulas, what is trained and stored, what it mends, and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from zoo_toys import Losses

from safelight.errors import SafelightError
from safelight.generators import Generator, generator_for
from safelight.generators.lora import lora_targets
from safelight.lightning_modules import Heal
from safelight.lightning_modules.heal.objective import denoising_loss, step_loss
from safelight.lightning_modules.randomness import row_generator, step_generator, step_seed
from safelight.masking import find_units, remove
from safelight.testing.contracts import MethodContract
from safelight.testing.denoisers import build_denoiser
from safelight.testing.pipelines import build_pipeline, pipeline_folder

PROMPTS = ["a cat", "a red dog", "two birds", "an old tree"]


class TestContract(MethodContract):
    method = "heal"
    opens_with = """
import sys, torch
from diffusers import FluxPipeline
from peft import PeftModel
sys.path.insert(0, str(folder / "pruned"))
from load import load_pruned
adapted = PeftModel.from_pretrained(load_pruned(folder / "pruned"), folder / "adapter")
assert any("lora_A" in name and value.std() > 0 for name, value in adapted.named_parameters())
"""
    # Some gradients are zero but for rounding (the bias of keys, for one), and Adam divides by their size.
    equivalence_precision = "64-true"

    def overrides(self) -> list[str]:
        return [
            f"backbone={pipeline_folder('flux')}", "method.rank=2", "method.keep=0.6", "method.lr=1e-2",
            "method.warmup_steps=2", "data.size=16", "data.test_size=5",
        ]  # fmt: skip


def tiny(family: str = "flux", **overrides: Any) -> Generator:
    pipeline = build_pipeline(family)
    size = {"height": 16, "width": 16} if family == "flux" else {}
    settings = {"num_inference_steps": 3, "guidance_scale": 1.0, **size, **overrides}
    return generator_for(pipeline.transformer if family != "unet_sdxl" else pipeline.unet)(pipeline, **settings)


def loader(first_seed: int, samples: int = 4) -> DataLoader[Any]:
    rows = [{"prompt": PROMPTS[i % 4], "seed": first_seed + i, "index": i} for i in range(samples)]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


def trainer(steps: int) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(module: Heal, steps: int, samples: int = 4) -> Trainer:
    runner = trainer(steps)
    runner.fit(module, loader(0, samples))
    return runner


def test_targets_are_the_published_layers() -> None:
    flux = set(lora_targets(build_denoiser("flux")))
    double, single = "transformer_blocks.0.", "single_transformer_blocks.1."
    attention = {f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")}
    attention |= {"attn.to_out.0", "attn.to_add_out"}
    feed_forward = {f"{name}.net.{part}" for name in ("ff", "ff_context") for part in ("0.proj", "2")}
    assert {name.removeprefix(double) for name in flux if name.startswith(double)} == attention | feed_forward
    own = {name.removeprefix(single) for name in flux if name.startswith(single)}
    assert own == {"attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out"}
    assert "proj_out" not in flux
    unet = lora_targets(build_denoiser("unet_sdxl"))
    assert not [name for name in unet if name.endswith(("proj_in", "attentions.0.proj_out", "time_emb_proj"))]
    assert set(lora_targets(build_denoiser("flux"), ["attn.to_q"])) == {name for name in flux if "to_q" in name}


def test_layers_without_width_get_no_adapter() -> None:
    denoiser = build_denoiser("flux")
    specs = find_units(denoiser)
    emptied = next(spec for spec in specs if spec.kind == "head")
    remove(denoiser, {emptied.name: torch.zeros(emptied.n_units, dtype=torch.bool)})
    found = lora_targets(denoiser)
    assert not [name for name in found if name.startswith(f"{emptied.name}.")]
    assert [name for name in found if name.startswith("single_transformer_blocks.0.attn.")]
    with pytest.raises(SafelightError, match=r"targets: no Linear of FluxTransformer2DModel .*to_nothing"):
        lora_targets(denoiser, ["to_nothing"])


def test_flow_loss_is_velocity_regression() -> None:
    generator = tiny()
    seen = {}
    answer = torch.full((2, *generator.latent_shape), 0.25)

    def denoise(z: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        seen.update(z=z, timestep=timestep)
        return answer

    generator.denoise = denoise  # type: ignore[method-assign]
    clean, noise = torch.ones_like(answer) * 2, torch.ones_like(answer) * 3
    loss = denoising_loss(generator, {}, clean, noise, torch.tensor([0.25, 0.5]))
    assert torch.allclose(loss, torch.tensor((1 - 0.25) ** 2))  # the velocity is noise - clean = 1
    assert torch.allclose(seen["z"][:, 0, 0], torch.tensor([0.75 * 2 + 0.25 * 3, 0.5 * 2 + 0.5 * 3]))
    assert seen["timestep"].tolist() == [250.0, 500.0]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_diffusion_loss_follows_the_prediction_type(kind: str) -> None:
    generator = tiny("unet_sdxl")
    generator.scheduler.register_to_config(prediction_type=kind)
    seen = {}

    def denoise(z: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        seen.update(z=z, timestep=timestep)
        return torch.zeros_like(z)

    generator.denoise = denoise  # type: ignore[method-assign]
    shape = (1, *generator.latent_shape)
    loss = denoising_loss(generator, {}, torch.full(shape, 2.0), torch.full(shape, 3.0), torch.tensor([0.4]))
    a = float(generator.scheduler.alphas_cumprod[400])
    assert seen["timestep"].tolist() == [400.0]
    assert torch.allclose(seen["z"], torch.full(shape, a**0.5 * 2 + (1 - a) ** 0.5 * 3))
    target = 3.0 if kind == "epsilon" else a**0.5 * 3 - (1 - a) ** 0.5 * 2
    assert float(loss) == pytest.approx(target**2, rel=1e-5)


def test_step_loss_is_zero_for_the_dense_model_and_one_for_standing_still() -> None:
    generator = tiny()
    cond, noise = generator.encode(PROMPTS[:2]), generator.noise([0, 1])
    with torch.no_grad():
        latents = generator.rollout(noise, cond, trajectory=True)
    assert float(step_loss(generator, cond, latents[1], latents[2], 1)) == 0.0
    generator.step = lambda z, i, cond: z  # type: ignore[method-assign]
    assert float(step_loss(generator, cond, latents[1], latents[2], 1)) == 1.0
    # Where the dense model stands still as well there is nothing to divide by.
    assert float(step_loss(generator, cond, latents[1], latents[1], 1)) == 0.0


def test_the_model_is_told_positive_rows_in_its_own_type() -> None:
    generator, seen = tiny(), {}
    generator.denoiser.to(torch.bfloat16)

    def denoise(z: Tensor, timestep: Tensor, cond: Any) -> Tensor:
        seen.update(cond, z=z)
        return torch.zeros_like(z)

    generator.denoise = denoise  # type: ignore[method-assign]
    cond = {"text": torch.ones(2, 3), "mask": torch.ones(2, dtype=torch.long), "negative_text": torch.zeros(2, 3)}
    clean = torch.ones(2, *generator.latent_shape)
    loss = denoising_loss(generator, cond, clean, clean * 3, torch.tensor([0.25, 0.5]))
    types = {"text": torch.bfloat16, "mask": torch.long, "z": torch.bfloat16}
    assert {name: value.dtype for name, value in seen.items()} == types
    assert (loss.dtype, loss.item()) == (torch.float32, 4.0)


def test_noise_of_a_sample_depends_on_step_and_sample_only() -> None:
    first, again = torch.rand(3, generator=row_generator(7, 5)), torch.rand(3, generator=row_generator(7, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.rand(3, generator=row_generator(8, 5)))
    assert not torch.equal(first, torch.rand(3, generator=row_generator(7, 6)))


@pytest.mark.parametrize("objective", ["step", "final", "denoise"])
def test_losses_of_two_steps_are_the_objectives(objective: Any) -> None:
    module, losses = Heal(backbone=tiny(), keep=0.6, objective=objective, rank=2, lr=1e-9, seed=4), Losses()
    runner = trainer(2)
    runner.callbacks.append(losses)
    runner.fit(module, loader(0))
    teacher, student = module.teacher, module.student
    cond, noise = teacher.encode(PROMPTS), teacher.noise([0, 1, 2, 3])
    with torch.no_grad():
        path = teacher.rollout(noise, cond, trajectory=True)
        for step, found in enumerate(losses.values):
            if objective == "step":
                i = int(torch.randint(len(path) - 1, (), generator=step_generator(4, step)))
                error, size = (
                    (latent - path[i + 1]).square().flatten(1).mean(1)
                    for latent in (student.step(path[i], i, cond), path[i])
                )
                wanted = (error / size).mean()
            elif objective == "final":
                wanted = (student.rollout(noise, cond) - path[-1]).square().mean()
            else:
                rows = [row_generator(step_seed(4, step), seed) for seed in range(4)]
                fresh = torch.stack([torch.randn(noise.shape[1:], generator=row) for row in rows])
                level = torch.cat([torch.rand(1, generator=row) for row in rows])
                part = level.view(-1, 1, 1)
                told = {key: value for key, value in cond.items() if not key.startswith("negative_")}
                velocity = student.denoise((1 - part) * path[-1] + part * fresh, 1000 * level, told)
                wanted = (velocity - (fresh - path[-1])).square().mean()
            assert found == pytest.approx(wanted.item(), rel=1e-4)
            assert found > 1e-4


@pytest.mark.parametrize("objective", ["step", "final", "denoise"])
def test_training_changes_the_adapters_only(objective: Any) -> None:
    module = Heal(backbone=tiny(), keep=0.6, objective=objective, rank=2, lr=1e-2)
    before = {name: value.clone() for name, value in module.peft_model.state_dict().items()}
    dense = {name: value.clone() for name, value in module.teacher_denoiser.state_dict().items()}
    fit(module, 3)
    after = module.peft_model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    assert all(torch.equal(value, dense[name]) for name, value in module.teacher_denoiser.state_dict().items())
    assert not module.peft_model.training


def test_checkpoint_holds_adapters_only_and_restores_them() -> None:
    module = Heal(backbone=tiny(), keep=0.6, rank=2, lr=1e-2)
    fit(module, 2)
    state = module.state_dict()
    assert state
    assert all(name.startswith("lora.") and "lora_" in name for name in state)
    assert sum(value.numel() for value in state.values()) == sum(p.numel() for p in module.lora.parameters())
    other = Heal(backbone=tiny(), keep=0.6, rank=2, seed=1)
    other.load_state_dict(state)
    cond, noise = module.teacher.encode(PROMPTS), module.teacher.noise([5, 6, 7, 8])
    with torch.no_grad():
        assert torch.equal(other.student.rollout(noise, cond), module.student.rollout(noise, cond))
    with pytest.raises(SafelightError, match="missing"):
        other.load_state_dict({name: value for name, value in state.items() if "to_q" not in name})


def test_same_seed_same_adapters() -> None:
    runs = []
    for _ in range(2):
        module = Heal(backbone=tiny(), keep=0.6, rank=2, objective="denoise", seed=3)
        fit(module, 2)
        runs.append(module.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize(("family", "keep", "share"), [("flux", 0.5, 0.5), ("unet_sdxl", 0.2, 0.7)])
def test_healing_lowers_the_error_on_noises_it_never_saw(family: str, keep: float, share: float) -> None:
    # Of a random U-Net most is convolution, which adapters do not touch, so less can be mended there.
    module = Heal(backbone=tiny(family), keep=keep, rank=8, lr=3e-3)
    runner = fit(module, 60, samples=32)
    runner.test(module, loader(1000), verbose=False)
    logged = {name: float(value) for name, value in runner.callback_metrics.items()}
    assert 0 < logged["test/latent_mse_median"] < share * logged["test/unhealed/latent_mse_median"]
    assert logged["test/ssim"] > logged["test/unhealed/ssim"]
    table = module.summary_table()
    assert table is not None
    assert [row["model"] for row in table] == ["dense", "pruned, unhealed", "pruned and healed"]
    assert table[2]["latent MSE (median)"] == logged["test/latent_mse_median"]
    assert table[1]["parameters"] == table[2]["parameters"] < table[0]["parameters"]


def test_export_opens_with_peft_and_diffusers_alone(tmp_path: Path) -> None:
    module = Heal(backbone=tiny(), keep=0.6, rank=2, lr=1e-2)
    fit(module, 3)
    module.export(tmp_path)
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (adapter["peft_type"], adapter["r"], adapter["lora_alpha"]) == ("LORA", 2, 2)
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    inputs = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.save(inputs, tmp_path / "z.pt")
    # Without safelight: the adapter on the pruned denoiser, and the merged pipeline, must agree.
    code = f"""
import sys, torch
sys.modules["safelight"] = None
sys.path.insert(0, r"{tmp_path / "pruned"}")
from load import load_pruned, load_pipeline
from peft import PeftModel
bare = load_pruned(r"{tmp_path / "pruned"}")
def call(model):
    z = torch.load(r"{tmp_path / "z.pt"}", weights_only=True)
    text, pooled = torch.ones(1, 5, 32), torch.ones(1, 32)
    with torch.no_grad():
        return model(hidden_states=z, timestep=torch.tensor([0.5]), encoder_hidden_states=text,
            pooled_projections=pooled, img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3), return_dict=False)[0]
unhealed = call(bare)
adapted = call(PeftModel.from_pretrained(bare, r"{tmp_path / "adapter"}").eval())
merged = call(load_pipeline(r"{tmp_path}").transformer)
print(float((adapted - merged).abs().max()), float((adapted - unhealed).abs().max()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    apart, moved = map(float, done.stdout.split())
    assert apart < 1e-5
    assert moved > 1e-3


def test_a_pruned_backbone_is_healed_as_it_is(tmp_path: Path) -> None:
    first = Heal(backbone=tiny(), keep=0.6, rank=2)
    first.export(tmp_path)
    dense = tiny()
    second = Heal(backbone=str(tmp_path), teacher=dense, keep=0.3, rank=2)
    assert not second.pruned_here
    cond, noise = dense.encode(PROMPTS), dense.noise([1, 2, 3, 4])
    with torch.no_grad():
        # No adapter was trained yet: both are the pruned model, and B = 0 adds nothing.
        assert torch.allclose(second.student.rollout(noise, cond), first.student.rollout(noise, cond), atol=1e-6)
    with pytest.raises(SafelightError, match="teacher: name the dense model"):
        Heal(backbone=str(tmp_path), rank=2)
    with pytest.raises(SafelightError, match="is not the dense model"):
        Heal(backbone=str(tmp_path), teacher=tiny("unet_sdxl"), rank=2)


def test_a_dense_model_is_not_healed_towards_itself() -> None:
    with pytest.raises(SafelightError, match="tiny_flux is the dense teacher itself"):
        Heal(backbone="tiny_flux", teacher="tiny_flux", keep=None)


def test_the_users_generator_keeps_its_weights() -> None:
    generator = tiny()
    before = {name: value.clone() for name, value in generator.denoiser.state_dict().items()}
    fit(Heal(backbone=generator, keep=0.5, rank=2), 2)
    after = generator.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
