"""TextToImage: its loss against the formula, its running average, its checkpoints and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecodiff_toys import trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from zoo_toys import Losses, load, pictures

from safelight.generators import Generator, generator_for
from safelight.generators.noising import denoising_loss, diffusion_target
from safelight.lightning_modules import TextToImage
from safelight.lightning_modules.randomness import row_generator, step_seed
from safelight.testing.contracts import MethodContract
from safelight.testing.pipelines import build_pipeline, pipeline_folder


class TestContract(MethodContract):
    method = "text_to_image"
    family = "flux"
    opens_with = """
import torch
from diffusers import FluxPipeline
pipeline = FluxPipeline.from_pretrained(folder)
picture = pipeline("a cat", height=16, width=16, num_inference_steps=2, max_sequence_length=16, output_type="pt",
                   generator=torch.Generator().manual_seed(0)).images
assert picture.shape == (1, 3, 16, 16) and picture.std() > 0
"""
    # The running average of the weights is saved beside them.
    state_ratio = 2.0
    # Some gradients are zero but for rounding (the bias of keys, for one), and Adam divides by their size.
    equivalence_precision = "64-true"

    def overrides(self) -> list[str]:
        return [
            f"backbone={pipeline_folder(self.family)}", "method.warmup_steps=2", "method.lr=1e-2",
            "data.image_size=16", "data.test_size=5",
        ]  # fmt: skip


def generator(family: str, seed: int = 0) -> Generator:
    pipeline = build_pipeline(family, seed)
    denoiser = pipeline.unet if "unet" in family else pipeline.transformer
    return generator_for(denoiser)(pipeline, num_inference_steps=2, height=16, width=16, guidance_scale=1.0)


@pytest.mark.parametrize("family", ["flux", "unet_sdxl", "unet_sd"])
def test_first_loss_is_the_formula(family: str) -> None:
    module = TextToImage(backbone=generator(family), lr=1e-9, empty_caption=0.5, seed=5)
    batch = next(iter(load(pictures())))
    losses = Losses()
    trainer(max_steps=1, callbacks=[losses]).fit(module, load(pictures()))

    other, pipeline = generator(family), module.generator.pipeline
    vae = pipeline.vae
    with torch.no_grad():
        clean = vae.encode(batch["image"]).latent_dist.mean
    clean = (clean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    rows = [row_generator(step_seed(5, 0), row) for row in range(4)]
    clean = other._pack(clean)
    noise = torch.stack([torch.randn(clean.shape[1:], generator=row) for row in rows])
    dropped = torch.cat([torch.rand(1, generator=row) for row in rows]) < 0.5
    assert 0 < dropped.sum() < 4
    captions = ["" if drop else caption for drop, caption in zip(dropped, batch["caption"], strict=True)]
    cond = {key: value for key, value in other.encode(captions).items() if not key.startswith("negative")}
    if family == "unet_sdxl":  # SDXL's unconditional rows are zeros
        for key in ("prompt_embeds", "pooled_prompt_embeds"):
            cond[key][dropped] = 0
    wide = (-1, *[1] * (clean.ndim - 1))
    if family == "flux":
        level = torch.sigmoid(0.5 + 1.2 * torch.cat([torch.randn(1, generator=row) for row in rows]))
        noisy = clean + level.view(wide) * (noise - clean)
        target, timestep = noise - clean, 1000 * level
    else:
        steps = torch.cat([1000 * torch.rand(1, generator=row) for row in rows]).long()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        kept = torch.cumprod(1 - betas, 0)[steps].view(wide)
        noisy, target, timestep = kept.sqrt() * clean + (1 - kept).sqrt() * noise, noise, steps.float()
    with torch.no_grad():
        squares = (other.denoise(noisy, timestep, cond) - target).square()
    if family != "flux":
        squares = squares / kept  # the velocity's error
    wanted = squares.mean().item()
    assert losses.values[0] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("weighting", ["velocity", "uniform"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_weightings_mean_the_same_for_all_kinds_of_unet(kind: str, weighting: Any) -> None:
    """SD 2 predicts velocities: its loss is the velocity's error or, uniformly weighted, the noise's."""
    module = TextToImage(backbone=generator("unet_sd"), weighting=weighting)
    clean, noise = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    signal = torch.tensor([0.8, 0.3]).double()
    a, b = signal.sqrt().view(2, 1, 1, 1), (1 - signal).sqrt().view(2, 1, 1, 1)
    noisy, velocity = a * clean + b * noise, a * noise - b * clean
    guess = torch.randn(2, 3, 4, 4).double()  # of the noise, and the velocity that it implies
    implied = (guess - b * noisy) / a
    right, prediction = {
        "epsilon": (noise, guess), "v_prediction": (velocity, implied), "sample": (clean, (noisy - b * guess) / a)
    }[kind]  # fmt: skip
    target = diffusion_target(kind, clean, noise, signal)
    assert torch.allclose(target, right)
    loss = denoising_loss(prediction, target, module._weight(kind, signal))
    wanted = (implied - velocity).square().mean() if weighting == "velocity" else (guess - noise).square().mean()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-9)


@pytest.mark.parametrize("family", ["flux", "unet_sdxl", "unet_sd"])
def test_all_that_is_trained_gets_a_gradient(family: str) -> None:
    """DDP waits for every one of them."""
    module = TextToImage(backbone=generator(family))
    latent = torch.randn(2, *module.generator.latent_shape)
    prediction = module.generator.denoise(latent, torch.tensor([10.0, 500.0]), module.condition(["a cat", ""]))
    prediction.square().sum().backward()
    idle = {name for name, value in module.trained.named_parameters() if value.grad is None}
    frozen = {name for name, value in module.trained.named_parameters() if not value.requires_grad}
    assert idle == frozen
    last = ("text_encoder.encoder.layers.1.", "text_encoder.final_layer_norm.")
    assert all(name.startswith(last) for name in frozen)
    assert bool(frozen) == (family == "unet_sdxl")


@pytest.mark.parametrize("family", ["flux", "unet_sdxl", "unet_sd"])
def test_a_few_steps_learn_the_pictures(family: str) -> None:
    settings: dict[str, Any] = {"warmup_steps": 2, "empty_caption": 0.0}
    module = TextToImage(backbone=generator(family), lr=1e-2, **settings)
    frozen = {key: value.clone() for key, value in module.vae.state_dict().items()}
    text = {key: value.clone() for key, value in module.trained["text_encoder"].state_dict().items()}
    losses, without = Losses(), Losses()
    trainer(max_steps=15, callbacks=[losses]).fit(module, load(pictures(), 8))
    # The same noises and noise levels meet the untrained model.
    idle = TextToImage(backbone=generator(family), lr=1e-12, **settings)
    trainer(max_steps=15, callbacks=[without]).fit(idle, load(pictures(), 8))
    assert sum(losses.values[-4:]) < 0.95 * sum(without.values[-4:])
    assert all(torch.equal(value, frozen[key]) for key, value in module.vae.state_dict().items())
    moved = module.trained["text_encoder"].state_dict()
    assert any(not torch.equal(value, text[key]) for key, value in moved.items())


class Weights(Callback):
    """One weight before training and after each step."""

    def __init__(self, key: str) -> None:
        self.key, self.values = key, []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.values.append(pl_module.trained.state_dict()[self.key].clone())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.on_train_start(trainer, pl_module)


@pytest.mark.parametrize("ema_decay", [0.22, 0.999])
def test_average_follows_the_weights(ema_decay: float) -> None:
    """Quickly at first: the decay is (1 + n) / (10 + n) after n steps until that exceeds the wanted one."""
    module = TextToImage(backbone=generator("flux"), lr=1e-2, warmup_steps=1, ema_decay=ema_decay)
    before = {key: value.clone() for key, value in module.trained.state_dict().items()}
    assert all(torch.equal(value, before[key]) for key, value in module.ema.state_dict().items())
    key = "denoiser.transformer_blocks.0.ff.net.2.weight"
    seen = Weights(key)
    trainer(max_steps=2, callbacks=[seen]).fit(module, load(pictures()))
    start, first, second = seen.values
    after = module.trained.state_dict()
    assert torch.equal(after[key], second)
    assert not torch.equal(first, start)
    assert not torch.equal(second, first)
    average = 2 / 11 * start + 9 / 11 * first
    decay = min(ema_decay, 3 / 12)
    assert torch.allclose(module.ema.state_dict()[key], decay * average + (1 - decay) * second, atol=1e-7)
    with module.averaged():
        assert torch.equal(module.trained.state_dict()[key], module.ema.state_dict()[key])
    assert torch.equal(module.trained.state_dict()[key], after[key])
    assert module.trained["denoiser"].training


def test_pictures_are_encoded_once() -> None:
    module = TextToImage(backbone=generator("flux"))
    seen: list[int] = []
    module.vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    batch = next(iter(load(pictures(), 8)))
    first = module.latents(batch["image"], batch["index"])
    again = module.latents(batch["image"][[1, 0]], batch["index"][[1, 0]])
    assert seen == [1] * 8
    assert torch.equal(again, first[[1, 0]])
    # A resumed run starts with an empty cache, so it meets a picture in other company: not one bit may differ.
    other = TextToImage(backbone=generator("flux"))
    assert torch.equal(other.latents(batch["image"][2:5], batch["index"][2:5]), first[2:5])
    assert first.shape == (8, *module.generator.latent_shape)
    back = module.generator.decode(first)
    wanted = module.vae.decode(module.vae.encode(batch["image"]).latent_dist.mode()).sample
    assert torch.allclose(back, (wanted / 2 + 0.5).clamp(0, 1), atol=1e-4)


def test_conditioning_in_training_is_that_of_sampling() -> None:
    for family in ("flux", "unet_sdxl", "unet_sd"):
        module = TextToImage(backbone=generator(family))
        module.eval()
        captions = ["a cat", "a dog 1"]
        trained, sampled = module.condition(captions), module.generator.encode(captions)
        assert trained.keys() == sampled.keys()
        for key, value in trained.items():
            # Single precision: the order of sums differs between processors by a little more than 1e-5.
            assert torch.allclose(value.float(), sampled[key].float(), atol=1e-4), (family, key)
        if family == "unet_sdxl":
            empty = module.condition(["", "a cat"])["prompt_embeds"]
            assert empty[0].abs().max() == 0
            assert torch.allclose(empty[1], trained["prompt_embeds"][0], atol=1e-5)
        loss = sum(value.square().sum() for key, value in trained.items() if key != "time_ids")
        loss.backward()  # type: ignore[union-attr]
        assert any(p.grad is not None and p.grad.norm() > 0 for p in module.trained["text_encoder"].parameters())


@pytest.mark.parametrize("family", ["flux", "unet_sdxl", "unet_sd"])
def test_drawing_is_the_generators_own_sampling_with_guidance(family: str) -> None:
    module = TextToImage(backbone=generator(family))
    source = module.generator
    source.configure(guidance_scale=3.0)
    captions, seeds = ["a cat", "a cat", "a dog 1"], [1, 2, 3]
    with torch.no_grad(), module.averaged():
        wanted = source.decode(source.rollout(source.noise(seeds), source.encode(captions)))
    drawn = module.draw(captions, seeds)
    assert torch.allclose(drawn, wanted, atol=1e-4)
    source.configure(guidance_scale=1.0)
    assert not torch.allclose(module.draw(captions, seeds), wanted, atol=1e-3)


def test_checkpoint_resumes_exactly_and_leaves_the_autoencoder_out(tmp_path: Path) -> None:
    saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    whole = TextToImage(backbone=generator("flux"), lr=1e-2)
    whole.trained.eval()
    trainer(max_steps=4, callbacks=[saver], enable_checkpointing=True).fit(whole, load(pictures()))
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert {key.split(".")[0] for key in checkpoint["state_dict"]} == {"trained", "ema"}
    resumed = TextToImage(backbone=generator("flux", seed=5), lr=1e-2)
    resumed.vae.load_state_dict(whole.vae.state_dict())
    resumed.trained.eval()
    trainer(max_steps=4).fit(resumed, load(pictures()), ckpt_path=tmp_path / "step=2.ckpt", weights_only=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_export_is_the_averaged_pipeline(tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    module = TextToImage(backbone=generator("flux"), lr=1e-2, warmup_steps=1, ema_decay=0.9)
    trainer(max_steps=3).fit(module, load(pictures()))
    folder = module.export(tmp_path)
    pipeline = FluxPipeline.from_pretrained(folder)
    key = "transformer_blocks.0.ff.net.2.weight"
    average = module.ema.state_dict()[f"denoiser.{key}"]
    assert torch.equal(pipeline.transformer.state_dict()[key], average.half().float())
    assert not torch.equal(average, module.trained.state_dict()[f"denoiser.{key}"])
    text = pipeline.text_encoder.state_dict()
    assert all(torch.equal(value, text[key]) for key, value in module.ema["text_encoder"].state_dict().items())
    assert next(iter(text.values())).dtype == torch.float32
    assert "from_pretrained" in (tmp_path / "README.md").read_text()


def test_reset_forgets_the_weights() -> None:
    old = generator("flux")
    key = "transformer_blocks.0.ff.net.2.weight"
    before = old.denoiser.state_dict()[key].clone()
    kept = TextToImage(backbone=old)
    assert torch.equal(kept.trained["denoiser"].state_dict()[key], before)
    torch.manual_seed(9)
    fresh = TextToImage(backbone=old, reset=True)
    assert not torch.equal(fresh.trained["denoiser"].state_dict()[key], before)


def test_text_to_image_is_judged_twice_with_the_same_result(clip_folder: Path) -> None:
    module = TextToImage(backbone=generator("flux"), judge=str(clip_folder))
    loaders = [load(pictures()), load(pictures())]
    results: list[dict[str, Tensor]] = []
    for _ in range(2):
        numbers = trainer().test(module, loaders, verbose=False)
        results.append({key.split("/dataloader")[0]: value for part in numbers for key, value in part.items()})
        assert not [key for key in module.state_dict() if not key.startswith(("trained", "ema"))]
    assert results[0] == results[1]
    names = {f"test/{prefix}{name}" for prefix in ("", "shuffled_captions/") for name in module.metric_names}
    assert set(results[0]) == names
