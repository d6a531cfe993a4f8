"""Blocks that are right by themselves and wrong together, and what the messages say about an argument."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from safelight.cli import app, compose, validate
from safelight.cli.composing import compose_all, options
from safelight.cli.crosschecks import family_of, logged_names
from safelight.cli.signatures import NOT_LITERAL, argument_docs, class_attribute, signature_of
from safelight.cli.validation import BACKBONE, TARGET, first_sentence, targeted_blocks

PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
pytestmark = pytest.mark.usefixtures("clean_run_environment")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Lines of a refusal of exactly one mistake: what was typed, why, and the command to paste."""
    # Should it not be refused, nothing is run all the same.
    assert app.train_main(["--cfg=job", PLUGIN, *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "safelight: 1 problem, nothing was run"
    return [line.strip() for line in lines]


def pipeline(folder: Path, denoiser: str) -> Path:
    (folder / "export").mkdir(parents=True)
    index = {"transformer": ["diffusers", denoiser]}
    (folder / "export" / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def test_a_backbone_the_method_cannot_use(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "method=text_to_image", "backbone=sd35_large")
    assert lines[1] == "backbone=sd35_large"
    assert "TextToImage cannot use the family 'sd3', only flux, unet" in lines[2]
    assert lines[-1].endswith("method=text_to_image backbone=tiny_flux")
    assert validate(compose(["method=text_to_image", "backbone=sdxl"])) == []


def test_the_family_is_read_from_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sd3 = pipeline(tmp_path / "sd3", "SD3Transformer2DModel")
    assert family_of({"pretrained": str(sd3), "family": "flux"}) == ("sd3", sd3 / "export")
    assert "family 'sd3'" in refused(capsys, "method=text_to_image", f"backbone={sd3}")[2]
    flux = pipeline(tmp_path / "flux", "FluxTransformer2DModel")
    assert validate(compose(["method=text_to_image", f"backbone={flux}"])) == []
    assert (
        "'flux', these settings are for 'unet'"
        in refused(capsys, "method=ecodiff", "backbone=sdxl", f"backbone.pretrained={flux}")[2]
    )
    other = pipeline(tmp_path / "other", "MochiTransformer3DModel")
    assert "'MochiTransformer3DModel'" in refused(capsys, "method=ecodiff", f"backbone={other}")[2]


def test_words_are_looked_up_before_torch(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "method=toy", "data=concepts", "data.concept=[noto style,beeer]")
    assert lines[2] == "'beeer' is none of the words there are; did you mean 'beer'?"
    assert lines[-1].endswith("'data.concept=[noto style, beer]'")
    for fine in (["data.concept=[pistol,beer]"], ["data.anchor=' '"], ["data.concept=any", "data.source=templates"]):
        assert validate(compose(["method=toy", PLUGIN, "data=concepts", *fine])) == []


def test_only_a_function_of_the_same_package_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sneaky.py").write_text("class Data:\n    early_check = 'os.system'\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    config = compose(["method=toy", PLUGIN, "data=concepts"])
    assert validate(config | {"data": {TARGET: "sneaky.Data"}}) == []  # os.system(settings) would raise


def test_sharded_weights_for_a_method_that_names_none(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "method=toy", "trainer=fsdp2", "trainer.devices=4")
    assert lines[1] == "trainer=fsdp2"
    assert "Toy declares nothing that could be sharded over processes; trainer=ddp keeps a copy on each" in lines[2]
    assert lines[-1].endswith("method=toy trainer=ddp trainer.devices=4")
    assert refused(capsys, "method=ecodiff", "trainer=fsdp2_cpu")[-1].endswith("method=ecodiff trainer=ddp_cpu")
    for method in ("text_to_image", "heal"):
        assert validate(compose([f"method={method}", "trainer=fsdp2_cpu"])) == []


def test_a_backbone_for_a_method_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "method=clip", "backbone=sdxl")
    assert "Clip has no backbone" in lines[2]
    assert lines[-1].endswith("method=clip")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("backbone.dtype=int8", "one of float32, bfloat16, float16, float64"),
        ("backbone.height=big", "a whole number >= 8"),
        ("backbone.num_inference_steps=0", "a whole number >= 1"),
        ("backbone.guidance_scale=-1", "a number >= 0"),
        ("backbone.heigth=64", "did you mean 'height'?"),
    ],
)
def test_backbone_values_are_checked(capsys: pytest.CaptureFixture[str], override: str, words: str) -> None:
    assert words in refused(capsys, "method=ecodiff", override)[2]


def test_a_backbone_setting_that_no_file_lists_can_be_set() -> None:
    config = compose(["method=ecodiff", "backbone.device=cpu"])
    assert config["method"]["backbone"]["device"] == "cpu"
    assert validate(config) == []


def test_a_monitor_that_is_never_logged(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "method=toy", "callbacks.checkpoints.monitor=val/mae")
    assert "never logs while training; did you mean 'val/mse'?" in lines[2]
    assert lines[-1].endswith("callbacks.checkpoints.monitor=val/mse")
    for name in ("val/mse", "train/loss"):
        assert validate(compose([PLUGIN, "method=toy", f"callbacks.checkpoints.monitor={name}"])) == []
    # Only testing logs it: too late to choose weights by.
    assert "'test/mse'" in refused(capsys, "method=toy", "callbacks.checkpoints.monitor=test/mse")[2]


def test_a_monitor_of_a_validation_that_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    monitor = "callbacks.checkpoints.monitor=val/psnr"
    assert "switches validation off" in refused(capsys, "method=autoencoder", monitor)[2]
    assert validate(compose(["method=autoencoder", monitor, "trainer.limit_val_batches=1.0"])) == []


def test_logged_names_come_from_the_source() -> None:
    assert set(logged_names("toy_plugin.toy.Toy")) == {"train/loss", "val/mse"}
    assert "val/*" in logged_names("safelight.lightning_modules.Autoencoder")  # logged as f"val/{name}"


@pytest.mark.parametrize("method", options("method"))
def test_declared_monitors_are_logged(method: str) -> None:
    target = compose([f"method={method}"])["method"][TARGET]
    monitor = class_attribute(target, "monitor")
    assert monitor is None or monitor in logged_names(target)


def test_a_global_batch_is_shared_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    shared = ("method=toy", "trainer.devices=2", "trainer.accumulate_grad_batches=3")
    composed = compose_all([PLUGIN, *shared, "global_batch_size=24"])
    assert composed.config["data"]["batch_size"] == composed.template["data"]["batch_size"] == 4
    assert composed.template["data"]["seed"] == "${seed}"
    lines = refused(capsys, *shared, "global_batch_size=20")
    assert "20 samples do not divide over 6" in lines[2]
    assert "nearest: 18, 24" in lines[2]
    assert "known only on the machine" in refused(capsys, "method=toy", "trainer=ddp", "global_batch_size=8")[2]
    assert "whole number >= 1" in refused(capsys, "method=toy", "global_batch_size=0")[2]


def test_the_docstring_says_what_a_refused_argument_is(capsys: pytest.CaptureFixture[str]) -> None:
    lines = refused(capsys, "method=ecodiff", "method.keep=2")
    assert lines[2] == "is 2; must be a number > 0 and <= 1 [share of the prunable parameters that stays]"
    # Classes of other packages explain themselves in the same way.
    assert "[Stop training after this number of steps]" in refused(capsys, "method=toy", "trainer.max_steps=x")[2]


def test_descriptions_are_read_from_google_docstrings() -> None:
    docs = argument_docs(
        "What.\n\nArgs:\n    a: first\n        line. More.\n    **b (int): second.\n\nReturns:\n    c: no."
    )
    assert docs == {"a": "first line. More.", "b": "second."}
    assert first_sentence("keep rate, e.g. ``0.8``; more. And more.") == "keep rate, e.g. 0.8"


def test_defaults_are_read_from_the_source() -> None:
    parameters = signature_of("safelight.lightning_modules.EcoDiff").parameters
    assert parameters["keep"].default == 0.8
    assert parameters["kinds"].default == ("head", "neuron")
    assert signature_of(BACKBONE).parameters["pretrained"].default is NOT_LITERAL


def test_every_backbone_says_its_family_and_loads_by_the_same_keys() -> None:
    for option in options("backbone"):
        config = compose(["method=ecodiff", f"backbone={option}"])
        assert config["backbone"]["family"] in ("flux", "sd3", "unet", "dit"), option
        assert validate(config) == [], option


def test_every_tuned_and_experiment_file_composes_and_validates() -> None:
    for option in options("tuned"):
        method, _, backbone = option.partition("-")
        config = compose([f"method={method}", f"backbone={backbone}"])
        assert config["choices"]["tuned"] == option
        assert validate(config) == [], option
    for option in options("experiment"):
        assert validate(compose([f"experiment={option}"])) == [], option


def test_a_tuned_file_with_a_slip_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "ecodiff-tiny_sdxl.yaml").write_text("# @package _global_\nmethod:\n  keeep: 0.5\n")
    config = compose([f"hydra.searchpath=[{tmp_path}]", "method=ecodiff", "backbone=tiny_sdxl"])
    (problem,) = validate(config)
    assert problem.where == "method.keeep"
    assert "'keep'" in problem.text


@pytest.mark.parametrize("method", options("method"))
def test_yaml_keys_are_constructor_arguments_and_the_other_way_round(method: str) -> None:
    """Every key of a block is an argument of its class, and every argument can be set under its name."""
    config = compose([f"method={method}"])
    for where, block in targeted_blocks(config):
        signature = signature_of(block[TARGET])
        assert set(block) - {TARGET} <= set(signature.parameters), where
    defaults = {}
    for name, parameter in signature_of(config["method"][TARGET]).parameters.items():
        if name not in config["method"] and parameter.default is not NOT_LITERAL:
            defaults[name] = parameter.default
    written = [f"method.{name}={yaml_value(value)}" for name, value in defaults.items()]
    composed = compose_all([f"method={method}", *written])
    assert composed.problems == []
    assert validate(composed.config) == []
    assert {name: as_written(composed.config["method"][name]) for name in defaults} == {
        name: as_written(value) for name, value in defaults.items()
    }


def yaml_value(value: object) -> str:
    if isinstance(value, tuple | list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value)


def as_written(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def test_backbone_files_and_the_loader_agree() -> None:
    keys = set(signature_of(BACKBONE).parameters)
    for file in files("safelight.configs").joinpath("backbone").iterdir():
        assert set(yaml.safe_load(file.read_text(encoding="utf-8"))) <= keys, file.name
