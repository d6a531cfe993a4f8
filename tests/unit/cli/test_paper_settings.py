"""Files of ``tuned/`` and ``experiment/`` against what was published: EcoDiff, arXiv 2412.02852, and its settings.

The tables are written as the sources have them, one column or row each, not as our files are: a line that is lost or a
digit that is swapped in a file fails here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from safelight.cli import compose
from safelight.cli.composing import options
from safelight.cli.validation import validate
from shipped import chosen, flat, read

pytestmark = pytest.mark.usefixtures("clean_run_environment")
REPOSITORY = Path(__file__).parents[3]


# -- the papers' settings ----------------------------------------------------------------------------------------------

# The published YAML files of EcoDiff, one column each: beta; learning rates of heads, neurons, modulation; initial
# logit; delta; regulariser. A rate of 0 (or none, SD3.5 and DiT) leaves modulation alone; DiT gives one global rate and
# no delta, for which the published gate function has 1e-8.
GATES: dict[str, tuple[float, float, float, float, float, float, str]] = {
    "sdxl": (0.5, 0.1, 0.1, 0.0, 3.0, 0.5, "l1"),
    "flux_dev": (0.01, 0.5, 0.1, 0.5, 3.0, 0.1, "l1_sigmoid"),
    "flux_schnell": (0.01, 0.5, 0.1, 0.5, 3.0, 0.1, "l1_sigmoid"),
    "sd35_large": (0.5, 0.2, 0.2, 0.0, 4.0, 1.0, "l1"),
    "sd2": (1.0, 0.2, 0.2, 0.0, 2.5, 0.5, "l1"),
    "dit_xl2": (1.0, 0.5, 0.5, 0.0, 10.0, 1e-8, "l2"),
}
# Healing with LoRA: rank, learning rate, batch, accumulated batches, steps.
LORA: dict[str, tuple[int, float, int, int, int]] = {
    "sdxl": (16, 1e-6, 32, 1, 10_000),
    "flux_dev": (256, 1e-6, 2, 2, 40_000),
}
# Concept erasure: the YAML of the authors' FLUX.1-schnell run, "man with a gun", and ours for the small models, found
# by trial. The authors take one sample at a time, erase and retain in turn, and step after four.
ERASURE: dict[str, dict[str, Any]] = {
    "flux_schnell": {
        "method.lr": 0.5,
        "method.init": 3.0,
        "method.eps": 0.5,
        "method.beta": 0.1,
        "method.weight_decay": 0.01,
        "method.minimality": "none",
        "backbone.num_inference_steps": 5,
        "data.pairs": 40,
        "data.groups": None,
        "data.filter_ratio": 0.9,
        "data.filter_parity": True,
        "data.retain_per_erase": 1,
        "data.batch_size": 1,
        "trainer.max_steps": 100,
        "trainer.accumulate_grad_batches": 2,
    },
}
_SMALL = {"method.lr": 0.1, "method.init": 2.0, "method.beta": 1.0}
_SMALL |= {"method.grad_mode": "none", "method.finetune_steps": 80, "method.finetune_lr": 3e-4}
ERASURE["tiny_sdxl"] = _SMALL | {
    "method.groups": ["linear", "pooled"], "method.beta": 0.5, "method.refine_steps": 60, "method.refine_beta": 10.0,
    "method.refine_share": 0.48, "method.refine_off_weight": 6.0, "backbone.num_inference_steps": 4,
    "trainer.max_steps": 120,
}  # fmt: skip
ERASURE["tiny_flux"] = _SMALL | {"method.groups": ["ff", "norm", "norm1", "single_mlp"]}
# SafetyDPO: the authors' two launchers. The guard and its control are ours, and so is tiny_sdxl.
_LAUNCHER = {"method.guard": None, "method.control": False, "method.lr": 1e-5}
_LAUNCHER |= {"data.batch_size": 4, "trainer.accumulate_grad_batches": 4}
PREFERENCE: dict[str, dict[str, Any]] = {
    "sd15": _LAUNCHER | {"method.scale_lr": True, "method.warmup_steps": 500, "data.image_size": 512},
    "sdxl": _LAUNCHER | {"method.optimizer": "adafactor", "data.image_size": 1024, "trainer.gradient_clip_val": None},
    "tiny_sdxl": {
        "method.beta": 100.0, "method.guard": 0.9, "method.lr": 1e-2, "data.held_out": 0.08, "data.shared_flip": False,
        "data.test_size": 78, "trainer.max_steps": 100,
    },
}  # fmt: skip


def tuned(name: str) -> dict[str, Any]:
    """What a file of ``tuned/`` must say."""
    method, _, backbone = name.partition("-")
    if method == "concept_erasure":
        return ERASURE[backbone]
    if method == "safety_dpo":
        return PREFERENCE[backbone]
    if method == "heal":
        rank, lr, batch, accumulated, steps = LORA[backbone]
        expected = {
            "method.teacher": backbone,
            "method.objective": "denoise",  # the ordinary loss on the dense model's images
            "method.rank": rank,
            "method.lr": lr,
            "data.batch_size": batch,
            "trainer.max_steps": steps,
        }
        return expected | ({"trainer.accumulate_grad_batches": accumulated} if accumulated > 1 else {})
    beta, head, neuron, modulation, init, delta, regulariser = GATES[backbone]
    return {
        "method.beta": beta,
        "method.head_lr": head,
        "method.neuron_lr": neuron,
        "method.modulation_lr": modulation,
        "method.init": init,
        "method.delta": delta,
        "method.regulariser": regulariser,
        "method.kinds": ["head", "neuron", "modulation"] if modulation else ["head", "neuron"],
        "method.target_strength": 0.0,  # the authors reach their sparsity by beta alone
        "method.correction": "after",  # ours: `joint` would not fit at these sizes
    }


@pytest.mark.parametrize("name", options("tuned"))
def test_tuned_settings_are_the_published_ones(name: str) -> None:
    method, _, backbone = name.partition("-")
    assert flat(read(f"tuned/{name}")) == tuned(name)
    config = compose([f"method={method}", f"backbone={backbone}"])
    assert config["choices"]["tuned"] == name
    assert tuned(name).items() <= flat(config).items()
    assert validate(config) == []


def test_every_published_pair_is_tuned() -> None:
    tables = {"ecodiff": GATES, "heal": LORA, "concept_erasure": ERASURE, "safety_dpo": PREFERENCE}
    assert set(options("tuned")) == {f"{method}-{name}" for method, table in tables.items() for name in table}


# -- experiments -------------------------------------------------------------------------------------------------------

# Main table: FID and CLIP score on COCO, FID on Flickr30k; share of the prunable parameters that stays, published seed,
# objective.
MAIN = {
    "ecodiff_main_sdxl": ("sdxl", (32.19, 0.33, 40.91), 0.781, 44, None),
    "ecodiff_main_sdxl_per_step": ("sdxl", (97.36, 0.22, 110.53), 0.781, 44, "per_step"),
    "ecodiff_main_flux_dev": ("flux_dev", (30.81, 0.32, 42.58), 0.8, 48, None),
    "ecodiff_main_flux_schnell": ("flux_schnell", (31.76, 0.30, 43.25), 0.8, 48, None),
}
# Sparsity and healing on SDXL, 50 steps of mask learning, not healed: FID and CLIP score on COCO.
UNHEALED = {25: (34.61, 0.32), 40: (43.19, 0.30), 50: (81.76, 0.26)}
# Latent Guard, AUC with CLIP-L: known and new concepts, explicit, by synonym, adversarial.
GUARD = (0.985, 0.944, 0.914, 0.913, 0.908, 0.915)
FIGURES = ("coco_fid", "coco_clip_score", "flickr_fid")


def pruning(backbone: str, keep: float, seed: int, steps: int, objective: str | None = None) -> dict[str, Any]:
    """The authors' mask learning: 100 prompts, batches of 1, 4 accumulated, decay of the logits, no correction."""
    expected = {
        "seed": seed,
        "method.keep": keep,
        "method.correction": "none",
        "method.weight_decay": 0.01,
        "method.judge": None,
        "data.size": 100,
        "data.batch_size": 1,
        "trainer.max_steps": steps,
        "trainer.accumulate_grad_batches": 4,
    }
    return expected | ({"method.objective": objective} if objective else {})


TEXT = ("moe_x_text", "tiny_lm", "sae_pythia160m", "sae_universality_pythia")
"""Files that choose the data ``text``."""
MOE_X_TABLES = {
    "moe_x_table3": ["router_linear", "relu_experts", "gelu_experts"],
    "moe_x_table4": ["source", "dense_continued", "scratch"],
}
"""Files that change the models of ``moe_x_table1``."""


# The notebooks' first pair of models: 100 documents of 300 tokens, pre-activations of the block before, one-to-one
# pairs by order.
# Sizes and steps are ours: what we know of the paper does not state them.
VISUAL_PROMPTS = {
    "visual_prompt_dinov2": {
        "method.vision_model": "dinov2", "method.prompt_size": 28, "method.sigma_scale": 1.0, "method.positions": 1,
        "method.test_positions": 2, "method.schedule": "constant", "method.label": None, "data.image_size": 112,
        "data.batch_size": 8, "trainer.max_steps": 120,
    },
    "visual_prompt_clip_l14": {
        "method.vision_model": "openai/clip-vit-large-patch14", "method.prompt_size": 42, "method.sigma_scale": 1.0,
        "method.positions": 2, "method.test_positions": 2, "method.label": None, "data.image_size": 224,
        "data.crops": 10_000, "data.test_crops": 500, "data.batch_size": 16, "trainer.max_steps": 1000,
    },
}  # fmt: skip
UNIVERSALITY = {
    "method.model_a": "EleutherAI/pythia-70m-deduped", "method.model_b": "EleutherAI/pythia-160m-deduped",
    "method.sites_a": [f"resid_post.{layer}" for layer in range(1, 6)], "method.sites_b": ["resid_post.5"],
    "method.headline_a": "resid_post.2", "method.headline_b": "resid_post.5", "method.controls": ["token_shuffled"],
    **{f"method.saes_a.resid_post.{layer}": f"sae-pythia-70m-32k/layers.{layer}" for layer in range(1, 6)},
    "method.saes_b.resid_post.5": "sae-pythia-160m-32k/layers.5", "method.matcher": "first",
    "method.svcca_share": None, "method.keywords": None, "method.use_preacts": True, "method.keep_first": True,
    "method.subspaces": [
        "time", "calendar", "people", "nature", "emotions", "month_names", "countries", "biology"
    ],
    "method.legacy_offset": True, "data.path": "hf:Skylion007/openwebtext", "data.documents": 1000,
    "data.held_out": 0.1, "data.block_size": 300, "data.test_size": 100, "trainer.max_steps": 0,
}  # fmt: skip


def experiment(name: str) -> tuple[str, str, dict[str, Any], dict[str, tuple[float, bool]]]:
    """Method, backbone, settings and figures (value, measured by us) of a file of ``experiment/``."""
    if name in MAIN:
        backbone, numbers, keep, seed, objective = MAIN[name]
        quoted = dict(zip(FIGURES, numbers, strict=True))
        settings = pruning(backbone, keep, seed, 100, objective)
    elif name == "ecodiff_healing_sdxl_50_lora":
        settings = {"seed": 44, "method.teacher": "sdxl", "method.keep": None, "data.size": 100}
        return "heal", "sdxl", settings, {"coco_fid": (53.89, False), "coco_clip_score": (0.28, False)}
    elif name.startswith("ecodiff_healing_sdxl_"):
        percent = int(name.rpartition("_")[2])
        backbone, keep, quoted = "sdxl", 1 - percent / 100, dict(zip(FIGURES, UNHEALED[percent], strict=False))
        settings = pruning(backbone, keep, 44, 50)
    elif name == "safety_dpo_merge":
        kinds = ["violence", "illegal", "shocking"]
        names = {"method.experts": [*kinds, "all"], "data.categories": kinds}
        return (
            "safety_dpo",
            "tiny_sdxl",
            {"method.control": False, "method.preserve": 0.2, "data.held_out": 0.15, **names},
            {},
        )
    elif name == "moe_x_chess":
        # Table 6, and Table 1's loss.
        settings = {
            "method.block_size": 1023, "method.n_layer": 8, "method.n_head": 8, "method.d_model": 512,
            "method.expert_hidden": 2048, "method.lr": 3e-4, "method.warmup_steps": 2000, "data.batch_size": 100,
            "trainer.max_steps": 60_000, "method.controls": None,
        }  # fmt: skip
        return "moe_x", "", settings, {"val_ce": (0.211, True)}
    elif name == "moe_x_table1":
        controls = ["dense", "dense_relu", "dense_geglu", "dense_solu", "router_linear"]
        settings = {
            "method.block_size": 127, "method.n_layer": 3, "method.d_model": 128, "method.expert_hidden": 256,
            "method.lr": 2e-3, "method.warmup_steps": 50, "method.dense_steps": 620, "method.controls": controls,
            "data.batch_size": 32, "data.test_size": 2000, "trainer.max_steps": 1240,
            "data.board_sets": ["piece_masked_blank_initial"],
        }  # fmt: skip
        figures = {"val_ce": 0.211, "coverage": 0.428, "reconstruction": 0.840}
        return "moe_x", "", settings, {metric: (value, True) for metric, value in figures.items()}
    elif name == "moe_x_text":
        settings = {
            "method.vocab_size": 1024, "method.vocabulary": None, "method.block_size": 128, "method.n_layer": 3,
            "method.d_model": 128, "method.expert_hidden": 256, "method.dense_steps": 300, "method.lr": 2e-3,
            "method.sampled_games": 0, "method.detection_features": 100, "data.tokenizer": "bpe:1024",
            "method.controls": ["dense", "router_linear", "source", "untrained"], "trainer.max_steps": 600,
        }  # fmt: skip
        return "moe_x", "", settings, {}
    elif name == "vision_mapping_gemma":
        # Stage 1: batch 8 and one step each, because accumulation is not in effect in the published code.
        settings = {
            "method.vision_model": "openai/clip-vit-large-patch14", "method.llm": "google/gemma-2-2b-it",
            "method.drop_cls": True, "method.pool": 1, "method.max_length": 512, "method.lr": 1e-3,
            "method.adapter": "linear", "method.init_gain": 1.0, "method.weight_decay": 0.01,
            "method.llm_dtype": "bfloat16", "method.activation_checkpointing": True, "method.cache_features": False,
            "method.saes": "sae-lens:gemma-scope-2b-pt-res-canonical/layer_{layer}/width_16k/canonical",
            "method.text_surrogate": "Consider the following information: {caption} ",
            "method.surrogate_place": "question", "method.label": "caption", "method.freq_max": 0.05,
            "method.pool_size": 256, "data.image_size": 224, "data.questions": None, "data.batch_size": 8,
            "data.keep_image_tag": True, "data.test_size": 1000, "trainer.max_steps": -1, "trainer.max_epochs": 1,
        }  # fmt: skip
        return "vision_mapping", "", settings, {"match_rate": (0.491, True)}
    elif name == "illusion_dg":
        settings = {
            "method.vision_model": "openai/clip-vit-base-patch32", "method.tune": "text_proj",
            "method.template": "a photo of a {}", "method.scene_weight": 0, "method.encoder_lr": 5e-5,
            "method.schedule": "constant", "method.controls": ["colour", "zero_shot", "zero_shot_joint"],
            "method.low_pass": None, "data.split": "scenes", "data.image_size": 224,
            "data.placements": 1, "data.batch_size": 160, "trainer.max_steps": 1000,
        }  # fmt: skip
        return "illusion_probe", "", settings, {}
    elif name in VISUAL_PROMPTS:
        return "visual_prompt", "", VISUAL_PROMPTS[name], {}
    elif name == "tiny_lm":
        settings = {
            "method.mlp": "dense", "method.act": "gelu_tanh", "method.bias": True, "method.vocab_size": 1536,
            "method.vocabulary": None, "method.block_size": 128, "method.n_layer": 4, "method.d_model": 96,
            "method.mlp_hidden": 384, "method.warmup_steps": 100, "method.weight_decay": 0.05,
            "method.sampled_games": 0, "method.reported_neurons": 0, "method.controls": [],
            "data.path": ["zoo:text", "zoo:captions"], "data.tokenizer": "bpe:1536", "data.test_size": 128,
            "trainer.max_steps": 6000,
        }  # fmt: skip
        return "moe_x", "", settings, {}
    elif name == "sae_pythia160m":
        settings = {
            "method.model": "EleutherAI/pythia-160m-deduped", "method.d_sae": 16384, "method.k": 32,
            "method.sites": [f"resid_post.{layer}" for layer in (2, 5, 8)], "method.lr": 3e-4,
            "method.warmup_steps": 1000, "data.path": "hf:monology/pile-uncopyrighted", "data.documents": 400_000,
            "data.block_size": 512, "data.batch_size": 8, "data.test_size": 256, "trainer.max_steps": 50_000,
        }  # fmt: skip
        return "sae", "", settings, {}
    elif name == "sae_universality_pythia":
        return (
            "sae_universality",
            "",
            UNIVERSALITY,
            {key: (value, True) for key, value in {"pc1": 0.678, "rsa": 0.207, "mean_correlation": 0.698}.items()},
        )
    elif name in MOE_X_TABLES:
        return "moe_x", "", {"method.controls": MOE_X_TABLES[name]}, {}
    elif name == "latent_guard_minilm":
        names = [f"auroc_{split}{kind}" for kind in ("", "_synonym", "_adversarial") for split in ("id", "ood")]
        figures = {key: (value, True) for key, value in zip(names, GUARD, strict=True)}
        settings = {"method.encoder": "minilm", "data.batch_size": 256, "trainer.max_steps": 300}
        return "latent_guard", "", settings, figures
    else:
        backbone = name.removeprefix("ecodiff_readme_")
        settings = {"seed": 0, "method.keep": 0.8, "data.size": 120, "data.test_size": 96, "data.batch_size": 8}
        figures = {metric: (value, True) for metric, value in readme_row(backbone).items()}
        return "ecodiff", backbone, settings | {"trainer.max_steps": 100}, figures
    figures = {metric: (value, False) for metric, value in quoted.items()}
    return "ecodiff", backbone, settings, figures | {"keep_params": (keep, True)}


def readme_row(backbone: str) -> dict[str, float]:
    """Our own number, read from where it is published."""
    if backbone == "tiny_flux":
        text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
        (row,) = re.findall(r"^pruned \(ours\) +(.*)$", text, re.MULTILINE)
        names = ("keep_params", "latent_mse_median", "ssim", "clip_accuracy", "flops_ratio")
        return dict(zip(names, map(float, row.split()[:-1]), strict=True))  # the last column is a clock's
    text = (REPOSITORY / "src/lightning_modules/ecodiff/README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| {backbone} | 80% | 3 |")).split("|")
    return {"latent_mse_median": float(row[4].split()[0]), "clip_accuracy": float(row[-2].split()[0]) / 100}


@pytest.mark.parametrize("name", options("experiment"))
def test_an_experiment_is_what_was_published(name: str) -> None:
    method, backbone, settings, figures = experiment(name)
    content = read(f"experiment/{name}")
    paper = content.pop("paper", {})
    picks = {"method": method} | ({"backbone": backbone} if backbone else {})
    picks = {} if name in MOE_X_TABLES else picks | ({"data": "text"} if name in TEXT else {})
    picks |= {"data": "llava"} if name == "vision_mapping_gemma" else {}
    picks |= {"data": "photos"} if name in VISUAL_PROMPTS else {}
    picks |= {"data": "prompts"} if method in ("ecodiff", "heal") else {}
    assert chosen(f"experiment/{name}") == picks
    assert flat(content) == settings
    assert {key: (entry["value"], entry.get("measured", True)) for key, entry in paper.items()} == {
        key: (pytest.approx(value), measured) for key, (value, measured) in figures.items()
    }
    for entry in paper.values():
        assert re.search(r"[Tt]able|README|masks|row", entry["source"])
    config = compose([f"experiment={name}"])
    assert validate(config) == []
    assert config["choices"]["method"] == method
    assert (config.get("backbone") or {"name": ""})["name"] == backbone
    # The published settings of the pair come along.
    published = tuned(f"{method}-{backbone}") if f"{method}-{backbone}" in options("tuned") else {}
    assert (published | settings).items() <= flat(config).items()
    # What is typed wins.
    typed = {"safety_dpo": "rank", "ecodiff": "keep", "heal": "keep"}.get(method, "lr")
    assert compose([f"experiment={name}", f"method.{typed}=0.9"])["method"][typed] == 0.9


def test_every_published_row_has_its_file() -> None:
    rows = {*MAIN, *(f"ecodiff_healing_sdxl_{percent}" for percent in UNHEALED), "ecodiff_healing_sdxl_50_lora"}
    assert set(options("experiment")) == rows | {
        "ecodiff_readme_tiny_flux", "ecodiff_readme_tiny_sdxl", "safety_dpo_merge", "latent_guard_minilm",
        "moe_x_chess", "moe_x_table1", *TEXT, *MOE_X_TABLES, "vision_mapping_gemma",
        *VISUAL_PROMPTS, "illusion_dg",
    }  # fmt: skip


def test_the_size_of_the_published_masks_is_ours() -> None:
    """2 088 752 388 of SDXL's 2 567 463 684 parameters are left; the rest were prunable ones."""
    from safelight.generators import build_denoiser_on_meta
    from safelight.masking import find_units, prunable_params

    denoiser = build_denoiser_on_meta("sdxl")
    whole = sum(parameter.numel() for parameter in denoiser.parameters())
    assert whole == 2_567_463_684
    left = 1 - (whole - 2_088_752_388) / prunable_params(find_units(denoiser))
    assert read("experiment/ecodiff_main_sdxl")["method"]["keep"] == pytest.approx(left, abs=5e-4)


NETWORKS = [
    (method, backbone)
    for method, _, backbone in (name.partition("-") for name in options("tuned"))
    if not backbone.startswith("tiny_")
]


@pytest.mark.parametrize(("method", "backbone"), NETWORKS)
def test_full_size_networks_have_what_the_settings_ask_for(method: str, backbone: str) -> None:
    """On the meta device: units of each kind that is to be pruned, layers wide enough for the adapters."""
    from safelight.generators import build_denoiser_on_meta
    from safelight.generators.lora import lora_targets
    from safelight.masking import choose_groups, find_units

    settings, denoiser = (
        compose([f"method={method}", f"backbone={backbone}"])["method"],
        build_denoiser_on_meta(backbone),
    )
    if method == "heal":
        shapes = [denoiser.get_submodule(path).weight.shape for path in lora_targets(denoiser, None)]
        assert len(shapes) > 100
        assert settings["rank"] < min(map(min, shapes))
    elif method == "safety_dpo":
        paths = lora_targets(denoiser, ["to_q", "to_k", "to_v", "to_out.0"])
        sizes = [sum(denoiser.get_submodule(path).weight.shape) * 4 for path in paths]
        assert (len(paths), sum(sizes)) == {"sd15": (128, 797_184), "sdxl": (560, 5_806_080)}[backbone]
    elif method == "concept_erasure":
        groups = choose_groups("flux", settings.get("groups"))
        assert {name: len(group.find(denoiser, name)) for name, group in groups.items()} == {"ff": 38, "norm": 19}
    else:
        assert {spec.kind for spec in find_units(denoiser, settings["kinds"])} == set(settings["kinds"])
