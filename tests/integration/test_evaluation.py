"""``eval.py`` stands by the numbers of training, and the plain dict that a notebook passes to ``cli.train``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from safelight import cli
from safelight.cli.evaluating import compare_with_training
from safelight.cli.problems import ConfigError
from safelight.errors import SafelightError
from safelight.reporting import read_summary, write_summary

PLUGIN = "pkg://toy_plugin.configs"
SETTINGS: dict[str, Any] = {
    "hydra.searchpath": [PLUGIN],
    "method": "toy",
    "method.dropout": 0.1,
    "data": {"batch_size": 5},
    "trainer": {"max_steps": 4, "accelerator": "cpu"},
    "callbacks.progress": None,
    "name": 'it\'s a "name", 100 %',
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run, trained in this process from a plain dict."""
    here = Path.cwd()
    folder = tmp_path_factory.mktemp("run")
    os.environ.pop("SAFELIGHT_RUN_DIR", None)
    os.chdir(folder)
    try:
        summary = cli.train(SETTINGS | {"run_dir": str(folder / "one")})
    finally:
        os.chdir(here)
        os.environ.pop("SAFELIGHT_RUN_DIR", None)
    assert summary is not None
    assert summary.metrics == read_summary(folder / "one").metrics
    return folder / "one"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def tamper(folder: Path, change: float, control: bool = False) -> None:
    summary = read_summary(folder)
    numbers = summary.controls["zero"] if control else summary.metrics
    numbers["mse"] += change
    write_summary(folder, summary)


def test_a_plain_dict_means_what_the_command_line_means(run: Path) -> None:
    import yaml

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"]["batch_size"] == 5
    assert config["method"]["dropout"] == 0.1
    assert config["trainer"]["max_steps"] == 4
    assert config["callbacks"]["progress"] is None
    assert config["name"] == SETTINGS["name"]
    assert config["choices"]["method"] == "toy"


def test_a_plain_dict_with_mistakes_lists_them_all() -> None:
    with pytest.raises(ConfigError) as caught:
        cli.train(SETTINGS | {"method.keep": 2, "method.lrr": 1, "data": {"batch_size": "many"}})
    assert len(caught.value.problems) == 3
    with pytest.raises(ConfigError, match="'toi'"):
        cli.train(SETTINGS | {"method": "toi"})


def test_a_checkpoint_alone_rebuilds_everything(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Everything but the checkpoint and the numbers to compare with may be gone.
    (copy / "config.yaml").unlink()
    shutil.rmtree(copy / "export")
    summary = cli.evaluate(copy / "checkpoints" / "best.ckpt", [f"eval_dir={copy / 'new'}"])
    assert summary.metrics == read_summary(copy).metrics
    assert "all 2 numbers equal the training run's" in capsys.readouterr().out
    assert (copy / "new" / "report" / "index.html").is_file()


@pytest.mark.parametrize("control", [False, True])
def test_other_numbers_are_refused_and_nothing_is_written(copy: Path, control: bool) -> None:
    tamper(copy, 5e-6, control)
    before = sorted(copy.rglob("*"))
    with pytest.raises(SafelightError) as caught:
        cli.evaluate(copy / "checkpoints" / "best.ckpt")
    text = str(caught.value)
    assert "1 of 2 numbers are not those of the training run" in text
    assert ("zero/mse is" if control else "  mse is") in text
    assert "allow_difference=true" in text
    assert sorted(copy.rglob("*")) == before


def test_a_difference_within_the_tolerance_passes(copy: Path) -> None:
    tamper(copy, 5e-7)
    cli.evaluate(copy / "checkpoints" / "best.ckpt", [f"eval_dir={copy / 'new'}"])


def test_other_numbers_are_written_when_told_or_asked_for(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tamper(copy, 0.25)
    checkpoint = copy / "checkpoints" / "best.ckpt"
    cli.evaluate(checkpoint, [f"eval_dir={copy / 'told'}", "allow_difference=true"])
    assert "1 of 2 numbers differ" in capsys.readouterr().out
    cli.evaluate(checkpoint, [f"eval_dir={copy / 'other'}", "seed=5"])
    assert "with seed=5" in capsys.readouterr().out
    assert json.loads((copy / "other" / "summary.json").read_text())["seed"] == 5
    with pytest.raises(ConfigError, match="true or false"):
        cli.evaluate(checkpoint, ["allow_difference=yes"])


def test_what_can_and_cannot_be_compared(copy: Path) -> None:
    summary, checkpoint = read_summary(copy), copy / "checkpoints" / "best.ckpt"
    summary.metrics["latency_ratio"] = 3.0
    assert compare_with_training(checkpoint, summary).differences == ()
    summary.metrics["extra"] = 1.0  # measured now, not then: no contradiction
    assert compare_with_training(checkpoint, summary).differences == ()
    lacking = read_summary(copy)
    value = lacking.metrics.pop("mse")
    assert compare_with_training(checkpoint, lacking).differences == (f"mse is missing, was {value:.9g}",)
    lacking.versions["torch"] = "0.1"
    assert "→ 0.1" in compare_with_training(checkpoint, lacking).refusal()
    other = copy / "checkpoints" / "other.ckpt"
    other.write_bytes(b"x")
    assert "not this checkpoint" in compare_with_training(other, summary).sentence()
    (copy / "summary.json").unlink()
    assert "no summary.json" in compare_with_training(checkpoint, summary).sentence()
