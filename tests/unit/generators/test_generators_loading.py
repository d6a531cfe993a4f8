"""Names, folders and mappings become generators; what cannot be loaded is refused in plain words."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from safelight.errors import SafelightError
from safelight.generators import Generator, build_denoiser_on_meta, generator_for, load_generator
from safelight.generators.architectures import ARCHITECTURES
from safelight.generators.loading import KEYS, backbone_names
from safelight.testing.pipelines import build_pipeline, pipeline_folder

CONFIGS = Path(__file__).parents[3] / "configs"


def make(family: str, **settings: Any) -> Generator:
    pipeline = build_pipeline(family)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    settings = {"num_inference_steps": 3, "guidance_scale": 2.0, "height": 16, "width": 16} | settings
    return generator_for(denoiser)(pipeline, **settings)


def draw(generator: Generator) -> torch.Tensor:
    prompts = ["umbrella", "2"] if generator.family == "dit" else ["a cat", "dog"]
    with torch.no_grad():
        return generator.rollout(generator.noise([1, 2]), generator.encode(prompts))


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo") / "flux"
    make("flux", max_sequence_length=10).save(folder)
    return folder


@pytest.mark.parametrize("family", ["flux", "sd3", "unet_sdxl", "unet_sd", "dit"])
def test_saved_folder_draws_the_same(family: str, tmp_path: Path) -> None:
    generator = make(family, max_sequence_length=10)
    generator.save(tmp_path)
    again = load_generator(tmp_path)
    assert type(again) is type(generator)
    assert again.settings | {"name": ""} == generator.settings | {"name": ""}
    assert torch.equal(draw(again), draw(generator))
    assert not list(tmp_path.rglob("*.bin"))
    assert not any(p.requires_grad for p in again.denoiser.parameters())
    assert not again.denoiser.training


def test_dropped_encoders_come_back(flux_folder: Path, tmp_path: Path) -> None:
    generator = load_generator(flux_folder)
    before = draw(generator)
    generator.drop_encoders()
    assert generator.pipeline.text_encoder is None
    assert generator.pipeline.text_encoder_2 is None
    generator.save(tmp_path / "copy")
    assert not [file for file in (tmp_path / "copy").rglob("*.json") if str(flux_folder) in file.read_text("utf-8")]
    generator.drop_encoders()
    assert torch.equal(draw(generator), before)
    assert torch.equal(draw(load_generator(tmp_path / "copy")), before)
    with pytest.raises(SafelightError, match="built in memory"):
        make("flux").drop_encoders()


def test_mapping_overrides_and_stored_settings(flux_folder: Path, tmp_path: Path) -> None:
    assert load_generator(str(flux_folder)).num_inference_steps == 3
    spec = {"pretrained": str(flux_folder), "num_inference_steps": 6, "guidance_scale": None, "name": "mine"}
    generator = load_generator(spec, guidance_scale=1.5, dtype="bfloat16")
    assert (generator.num_inference_steps, generator.guidance_scale, generator.name) == (6, 1.5, "mine")
    assert generator.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in generator.pipeline.text_encoder.parameters())
    assert load_generator(generator, num_inference_steps=2) is generator
    assert generator.timesteps.shape == (2,)
    # The run folder of a method is a backbone too.
    (tmp_path / "run" / "export").mkdir(parents=True)
    make("flux", max_sequence_length=10).save(tmp_path / "run" / "export")
    assert torch.equal(draw(load_generator(tmp_path / "run")), draw(load_generator(flux_folder)))


def test_saving_another_denoiser_leaves_the_own_one(flux_folder: Path, tmp_path: Path) -> None:
    generator = load_generator(flux_folder)
    before = generator.denoiser
    other = make("flux").denoiser
    with torch.no_grad():
        nn.init.zeros_(other.proj_out.weight)  # type: ignore[union-attr, arg-type]
    generator.save(tmp_path, denoiser=other)
    assert generator.pipeline.transformer is before
    assert not load_generator(tmp_path).denoiser.proj_out.weight.any()  # type: ignore[union-attr]


def test_physically_pruned_denoiser_round_trip(tmp_path: Path) -> None:
    from safelight.masking import find_units, remove

    generator = make("unet_sdxl")
    masks = {spec.name: torch.ones(spec.n_units, dtype=torch.bool) for spec in find_units(generator.denoiser)}
    for mask in masks.values():
        mask[0] = False
    remove(generator.denoiser, masks)
    expected = draw(generator)
    generator.save(tmp_path / "once")
    once = load_generator(tmp_path / "once")
    assert (draw(once) - expected).abs().max() <= 1e-5
    once.save(tmp_path / "twice")
    twice = load_generator(tmp_path / "twice")
    assert torch.equal(draw(twice), draw(once))
    count = sum(p.numel() for p in make("unet_sdxl").denoiser.parameters())
    assert sum(p.numel() for p in twice.denoiser.parameters()) < count


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("tinyflux", "did you mean 'tiny_flux'"),
        ("./no/such/folder", "does not exist"),
        ({"pretraned": "x"}, "did you mean 'pretrained'"),
        ({"name": "x"}, "pretrained: missing"),
        ({"pretrained": "zoo:tiny_flix"}, "tiny_flix"),
        ({"pretrained": "nobody-at-all/nothing-here"}, "backbone=tiny_flux"),
    ],
)
def test_bad_spec_is_explained(spec: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SafelightError, match=words):
        load_generator(spec)


def test_neighbour_and_empty_folder(flux_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SafelightError, match=f"did you mean {flux_folder}"):
        load_generator(str(flux_folder) + "x")
    with pytest.raises(SafelightError, match=r"model_index\.json"):
        load_generator(tmp_path)
    with pytest.raises(SafelightError, match="dtype='float12'"):
        load_generator(flux_folder, dtype="float12")
    with pytest.raises(SafelightError, match="height=17"):
        load_generator(flux_folder, height=17)


def test_pickled_weights_are_refused_by_name(flux_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    make("flux").save(folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(SafelightError, match=r"diffusion_pytorch_model\.bin: pickled"):
        load_generator(folder)


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_damaged_weights_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    make("flux").save(tmp_path)
    file = next((tmp_path / "vae").glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[:-10] if damage == "cut" else b"\xff" * 16 + content[16:])
    with pytest.raises(SafelightError, match=r"vae.*\.safetensors: damaged"):
        load_generator(tmp_path)


def test_damaged_settings_are_refused_by_name(tmp_path: Path) -> None:
    make("flux").save(tmp_path)
    (tmp_path / "safelight.json").write_text("{")
    with pytest.raises(SafelightError, match=r"safelight\.json"):
        load_generator(tmp_path)


def test_unsupported_denoiser_is_named() -> None:
    with pytest.raises(SafelightError, match=r"Linear is not supported.*VelocityGenerator"):
        generator_for(nn.Linear(2, 2))


def test_dit_prompts_are_names_or_numbers() -> None:
    generator = make("dit")
    cond = generator.encode(["tench", "white shark", "999"])
    assert cond["class_labels"].tolist() == [0, 3, 999]
    assert cond["negative_class_labels"].tolist() == [1000] * 3
    with pytest.raises(SafelightError, match="did you mean 'white shark'"):
        generator.encode(["white shak"])
    with pytest.raises(SafelightError, match="0 to 999"):
        generator.encode(["1000"])
    with pytest.raises(SafelightError, match="16x16"):
        generator.configure(height=32)


# Parameter counts of the published checkpoints. DiT differs from the original's 675 M because diffusers gives each of
# the 28 blocks its own time and label embedding.
COUNTS = {
    "flux_dev": 11_901_408_320,
    "flux_schnell": 11_891_178_560,
    "sdxl": 2_567_463_684,
    "sd15": 859_520_964,
    "sd2": 865_910_724,
    "sd35_large": 8_056_627_520,
}


@pytest.mark.parametrize("name", COUNTS)
def test_full_size_parameter_count(name: str) -> None:
    denoiser = build_denoiser_on_meta(name)
    assert sum(p.numel() for p in denoiser.parameters()) == COUNTS[name]
    assert {p.device.type for p in denoiser.parameters()} == {"meta"}
    generator = generator_for(denoiser)(denoiser=denoiser)
    assert generator.height == (512 if name in ("sd15", "sd2") else 1024)


def test_dit_parameter_count() -> None:
    dim, hidden = 1152, 4608
    embedding = 1001 * dim + (256 * dim + dim) + (dim * dim + dim)  # labels, time MLP
    block = (
        embedding + (dim * 6 * dim + 6 * dim) + 4 * (dim * dim + dim) + (dim * hidden + hidden) + (hidden * dim + dim)
    )
    ends = (4 * 4 * dim + dim) + (dim * 2 * dim + 2 * dim) + (dim * 32 + 32)  # patches in, last modulation, out
    denoiser = build_denoiser_on_meta("dit_xl2")
    assert sum(p.numel() for p in denoiser.parameters()) == 28 * block + ends == 749_826_464


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(SafelightError, match="sdxxl"):
        build_denoiser_on_meta("sdxxl")


def test_backbone_files() -> None:
    assert {"tiny_flux", "tiny_sdxl", *ARCHITECTURES} <= set(backbone_names())
    for name in ("tiny_flux", "tiny_sdxl", *ARCHITECTURES):
        text = (CONFIGS / "backbone" / f"{name}.yaml").read_text()
        config = yaml.safe_load(text)
        assert text.startswith("# ")
        assert text.splitlines()[0].endswith(".")
        assert list(config) == [key for key in KEYS if key != "device"]
        assert config["name"] == name
        assert (name.startswith("tiny")) == config["pretrained"].startswith("zoo:")


def test_full_size_settings_are_the_published_ones() -> None:
    published = {
        "sdxl": (50, 5.0, 1024), "flux_dev": (50, 3.5, 1024), "flux_schnell": (5, 0.0, 1024),
        "sd35_large": (40, 7.0, 512), "sd2": (50, 7.5, 512), "dit_xl2": (50, 4.0, 256),
    }  # fmt: skip
    for name, (steps, guidance, size) in published.items():
        config = yaml.safe_load((CONFIGS / "backbone" / f"{name}.yaml").read_text())
        assert (config["num_inference_steps"], config["guidance_scale"], config["height"]) == (steps, guidance, size)
        denoiser = build_denoiser_on_meta(name)
        keys = ("num_inference_steps", "guidance_scale", "height", "width", "max_sequence_length")
        generator = generator_for(denoiser)(denoiser=denoiser, **{key: config[key] for key in keys})
        rows = steps if name.startswith("flux") else 2 * steps
        assert generator.denoiser_calls == rows
    tuned = {path.stem for path in (CONFIGS / "tuned").glob("ecodiff-*.yaml")}
    assert {f"ecodiff-{name}" for name in published} <= tuned
    for path in (CONFIGS / "tuned").glob("ecodiff-*.yaml"):
        assert path.read_text().startswith("# @package _global_\n# ")
        keys = "beta head_lr neuron_lr modulation_lr init delta regulariser kinds target_strength correction"
        settings = yaml.safe_load(path.read_text())["method"]
        assert list(settings) == keys.split()
        # The authors reach their sparsity by beta alone.
        assert settings["target_strength"] == 0 < settings["beta"]


def test_import_is_light() -> None:
    code = "import sys, safelight.generators; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(output.replace("'", '"')) == []


def test_a_loaded_model_computes_what_its_copy_computes() -> None:
    """To the last bit: weights of memory-mapped files may lie where matrix products take another path."""
    generator = load_generator(pipeline_folder("flux"))
    other = copy.deepcopy(generator)
    noise, cond = generator.noise([3]), generator.encode(["a cat"])
    assert torch.equal(generator.rollout(noise, cond), other.rollout(noise, cond))
    assert all(p.data_ptr() % 64 == 0 for p in generator.denoiser.parameters())
