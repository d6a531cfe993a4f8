"""What a command line means, and everything that can be wrong with one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from safelight.cli import app, compose
from safelight.cli.composing import compose_all, resolve
from safelight.cli.evaluating import evaluation_config
from safelight.cli.problems import ConfigError, nearest

PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
pytestmark = pytest.mark.usefixtures("clean_run_environment")


def suggestion(message: str) -> str:
    return message.splitlines()[-1].strip()


def test_a_method_brings_its_data_and_its_trainer_settings() -> None:
    config = compose([PLUGIN, "method=toy", "seed=3", "trainer.max_steps=5"])
    assert config["data"] == {"_target_": "toy_plugin.toy.Points", "batch_size": 4, "seed": 3}
    assert config["method"]["seed"] == 3
    assert config["trainer"]["max_steps"] == 5
    assert config["choices"]["method"] == "toy"
    assert "hydra" not in config


def test_a_mapping_takes_the_place_of_a_list() -> None:
    typed = ["method=concept_erasure", "backbone=tiny_flux", "method.groups={ff: {lr: 0.2}}"]
    assert isinstance(compose(typed[:2])["method"]["groups"], list)
    assert compose(typed)["method"]["groups"] == {"ff": {"lr": 0.2}}
    # Into a mapping it is merged, as Hydra does.
    assert compose([*typed, "method.groups={ff: {init: 1}}"])["method"]["groups"] == {"ff": {"lr": 0.2, "init": 1}}


def test_a_parameter_that_no_file_lists_can_be_set() -> None:
    assert compose([PLUGIN, "method=toy", "method.keep=0.5"])["method"]["keep"] == 0.5
    assert compose([PLUGIN, "method=toy", "+method.keep=0.5"])["method"]["keep"] == 0.5
    assert compose([PLUGIN, "method=toy", "trainer.gradient_clip_val=1.0"])["trainer"]["gradient_clip_val"] == 1.0


def test_a_callback_of_ones_own_joins_with_a_plus(refused: Callable[..., str]) -> None:
    target = "safelight.callbacks.DataWait"
    config = compose([PLUGIN, "method=toy", f"+callbacks.mine._target_={target}"])
    assert config["callbacks"]["mine"] == {"_target_": target}
    assert "checkpoints" in config["callbacks"]
    refused("method=toy", f"callbacks.mine._target_={target}", words=("callbacks has no 'mine'",))
    refused("method=toy", "+callbacks.mine.x=1", words=("callbacks.mine._target_",))
    words = ("method=toy", f"+callbacks.mine._target_={target}", "+callbacks.mine.x=1")
    refused(*words, words=("has no argument 'x'",))


def test_template_keeps_references() -> None:
    template = compose_all([PLUGIN, "method=toy"]).template
    assert template["data"]["seed"] == "${seed}"
    assert resolve(template, {"seed": 9})["data"]["seed"] == 9


def test_compose_raises_all_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        compose([PLUGIN, "method=toi", "method.lrr=1", "seeed=1"])
    assert [problem.typed for problem in caught.value.problems] == ["method=toi", "method.lrr=1", "seeed=1"]


@pytest.mark.parametrize(
    ("arguments", "words", "fixed"),
    [
        (["method=toi"], ["no method 'toi'", "'toy'"], "method=toy"),
        (["method=toy", "method.lrr=1"], ["no 'lrr'", "'lr'", "keep"], "method.lr=1"),
        (["method=toy", "+method.lrr=1"], ["no 'lrr'", "'lr'"], "+method.lr=1"),
        (["method=toy", "trainer=ddpp"], ["no trainer 'ddpp'", "'ddp'"], "trainer=ddp"),
        (["method=toy", "method.keep=2"], ["is 2", ">= 0 and <= 1"], "method=toy"),
        (["method=toy", "method.lr=abc"], ["is 'abc'", "a number > 0"], "method.lr=0.01"),
        (["method=toy", "method.mode=nosy"], ["one of plain, noisy"], "method.mode=noisy"),
        (["method=toy", "trainer.max_steps=1e3"], ["a whole number"], "trainer.max_steps=1000"),
        (["method=toy", "trainer.max_step=4"], ["'max_steps'"], "trainer.max_steps=4"),
        (["method=toy", "trainer.precision=bf16-mix"], ["'bf16-mix'", "bf16-mixed"], "trainer.precision=bf16-mixed"),
        (["method=toy", "data.data_folder=/nowhere/at/all"], ["'/nowhere/at/all'"], "method=toy"),
        (
            ["method=ecodiff", "backbone=tiny_flux", "backbone.pretrained=/nowhere"],
            ["no folder '/nowhere'"],
            "zoo:tiny_flux",
        ),
        (["method=toy", "backbone=./nowhere"], ["no folder './nowhere'"], "method=toy"),
        (["method=toy", "sed=1"], ["no key 'sed'", "'seed'"], "seed=1"),
        (["method=toy", "lr=1"], ["'method.lr=1'"], "method.lr=1"),
        (["method=toy", "seed=-1"], ["whole number >= 0"], "seed=0"),
        (["method=toy", "method.lr=[1"], ["cannot be read"], "method=toy"),
        (["method=toy", "fast"], ["not of the form key=value"], "method=toy"),
        (["method=toy", "--lr=3"], ["without dashes", "lr=3"], "lr=3"),
        (["method=toy", "method.lr=${learning_rate}"], ["learning_rate"], "method=toy"),
        (["method=toy", "resume=nowhere"], ["no run folder or checkpoint 'nowhere'"], "method=toy"),
        (["method=toy", "seed=1,2"], ["add -m"], "seed=1,2"),
    ],
)
def test_one_mistake(refused: Callable[..., str], arguments: list[str], words: list[str], fixed: str) -> None:
    message = refused(*arguments, words=("1 problem,", *words))
    assert fixed in suggestion(message)


def test_several_mistakes_are_shown_together_with_a_command_that_works(refused: Callable[..., str]) -> None:
    message = refused("method=toi", "method.lrr=0.1", "method.keep=2", "data.batch_size=x", "trainer.max_step=3")
    assert "5 problems" in message
    command = suggestion(message)
    assert command.startswith("python train.py ")
    arguments = [word.strip("'") for word in command.split()[2:]]
    assert arguments == [PLUGIN, "method=toy", "method.lr=0.1", "data.batch_size=4", "trainer.max_steps=3"]
    assert app.train_main([*arguments, "--cfg", "job"]) == 0


def test_fifteen_lines_however_many_mistakes(refused: Callable[..., str]) -> None:
    message = refused("method=toy", *[f"method.wrong{i}=1" for i in range(20)])
    assert "20 problems" in message
    assert "and 15 more" in message


def test_a_value_that_spreads_is_reported_where_it_was_set(refused: Callable[..., str]) -> None:
    message = refused("method=toy", "seed=abc")
    assert "1 problem," in message
    assert "seed=abc" in message


def test_used_run_folder_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    message = refused("method=toy", f"run_dir={tmp_path}")
    assert "holds an earlier run" in message
    assert "overwrite=true" in message
    assert (tmp_path / "summary.json").read_text() == "{}"


def test_a_folder_as_backbone_brings_its_settings(tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    (export / "safelight.json").write_text(json.dumps({"num_inference_steps": 7}))
    config = compose([PLUGIN, "method=toy", f"backbone={tmp_path}", "seed=1"])
    assert config["backbone"]["pretrained"] == str(export)
    assert config["backbone"]["num_inference_steps"] == 7


def test_cfg_job_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.train_main([PLUGIN, "method=toy", "seed=4", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == compose([PLUGIN, "method=toy", "seed=4"])


def test_help_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.train_main(["--help"]) == 0
    page = capsys.readouterr().out
    for word in ("ecodiff", "EcoDiff:", "tiny_flux", "ddp_cpu", "resume=auto"):
        assert word in page
    assert sum(line.startswith("  python train.py ") for line in page.splitlines()) == 3


def test_evaluation_uses_one_device_and_follows_overrides() -> None:
    template = compose_all([PLUGIN, "method=toy", "trainer=ddp_cpu", "seed=5"]).template
    config = evaluation_config(template, ["data.batch_size=2", "trainer.accelerator=cpu"])
    assert config["trainer"]["devices"] == 1
    assert config["trainer"]["strategy"] == "auto"
    assert config["data"] == {"_target_": "toy_plugin.toy.Points", "batch_size": 2, "seed": 5}
    with pytest.raises(ConfigError) as caught:
        evaluation_config(template, ["data.batch_sise=2", "method.lr=-1"])
    assert [problem.typed for problem in caught.value.problems] == ["data.batch_sise=2", "method.lr=-1"]


@pytest.mark.parametrize(
    ("word", "options", "expected"),
    [
        ("lrr", ["lr", "keep"], "lr"),
        ("LR", ["lr", "keep"], "lr"),
        ("bat", ["batch_size", "seed"], "batch_size"),
        ("zzz", ["lr", "keep"], None),
    ],
)
def test_nearest(word: str, options: list[str], expected: str | None) -> None:
    assert nearest(word, options) == expected


def test_every_shipped_option_composes() -> None:
    from safelight.cli.composing import options
    from safelight.cli.validation import validate

    for group in ("trainer", "callbacks", "logger", "debug"):
        for option in options(group):
            # Only some methods have weights worth cutting over processes.
            method = "text_to_image" if option.startswith("fsdp2") else "toy"
            words = [PLUGIN, f"method={method}", f"{group}={option}"]
            if option in ("activation_cache", "sae_probe"):  # nobody can guess where these are to look
                asked = [problem.where for problem in validate(compose(words))]
                assert asked == [f"callbacks.{option}.site"]
                words.append(f"callbacks.{option}.site=layer")
            assert validate(compose(words)) == [], (group, option)


def test_every_shipped_method_is_valid() -> None:
    from safelight.cli.composing import options
    from safelight.cli.validation import validate

    for method in options("method"):
        problems = validate(compose([f"method={method}"]))
        # A backbone that is still being trained for the zoo is the backbone's business, not the method's.
        assert [p for p in problems if not p.where.endswith("pretrained")] == [], method


def test_a_run_that_never_started_does_not_occupy_its_folder(tmp_path: Path) -> None:
    from safelight.cli.folders import is_used, make_run_folder

    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "command.txt").write_text("python train.py")
    assert not is_used(tmp_path)
    assert make_run_folder({"run_dir": str(tmp_path)}) == tmp_path
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").write_text("mine")
    assert is_used(tmp_path)
    make_run_folder({"run_dir": str(tmp_path), "overwrite": True})
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_as_backbone_is_tuned_as_the_model_it_was_made_from(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    words = ["method=concept_erasure", f"backbone={tmp_path}"]
    assert compose(words)["choices"].get("tuned") is None, "it is not the default backbone"
    (tmp_path / "safelight.json").write_text('{"name": "tiny_sdxl"}')
    assert compose(words)["choices"]["tuned"] == "concept_erasure-tiny_sdxl"
    assert compose([*words, "tuned=concept_erasure-tiny_flux"])["choices"]["tuned"] == "concept_erasure-tiny_flux"
