"""The helpers of the ``safelight`` command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from safelight.cli import app, compose
from safelight.cli.composing import options
from safelight.cli.schema import schema_of

jsonschema = pytest.importorskip("jsonschema")
PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
pytestmark = pytest.mark.usefixtures("clean_run_environment")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert app.main(words) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert app.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_the_command_lists_its_verbs_and_corrects_them(capsys: pytest.CaptureFixture[str]) -> None:
    page = said(capsys, "--help")
    for verb in ("train", "eval", "list", "validate", "show", "copy", "export", "schema"):
        assert f"  {verb} " in page
    assert "did you mean 'validate'?" in refused(capsys, "validte", "method=ecodiff")
    assert said(capsys, "copy", "--help").startswith("usage: safelight copy group/name")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    page = said(capsys, "list", "method", "backbone")
    assert "EcoDiff: learn which heads" in page
    assert "tiny_flux" in page
    assert "ddp_cpu" not in page
    assert "optuna" in said(capsys, "list")
    assert refused(capsys, "list", "methd").splitlines()[-1] == "  safelight list method"


def test_validate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert said(capsys, "validate", PLUGIN, "method=toy") == "valid: method=toy data=points trainer=auto\n"
    message = refused(capsys, "validate", PLUGIN, "method=toy", "method.keep=2", "seeed=1")
    assert "2 problems" in message
    assert message.splitlines()[-1].strip().startswith("safelight validate ")
    file = tmp_path / "config.yaml"
    config = compose([PLUGIN, "method=toy"])
    file.write_text(yaml.safe_dump(config | {"run_dir": str(tmp_path)}), encoding="utf-8")
    assert said(capsys, "validate", str(file)).startswith("valid: method=toy")
    config["method"]["keep"] = 2
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert "method.keep" in refused(capsys, "validate", str(file))
    assert "no file" in refused(capsys, "validate", str(tmp_path / "absent.yaml"))


def test_show_has_every_argument_and_stays_the_same_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    page = said(capsys, "show", "method", PLUGIN, "method=toy", "method.lr=0.5")
    assert page.splitlines()[0] == "method:"
    assert "  lr: 0.5  # a number > 0" in page
    assert "  # keep: 0.8  # default; a number >= 0 and <= 1" in page
    page = said(capsys, "show", "method=ecodiff")
    assert "# keep: 0.8  # default; share of the prunable parameters that stays; a number > 0 and <= 1" in page
    assert yaml.safe_load(page) == compose(["method=ecodiff"])
    assert "did you mean 'method'?" in refused(capsys, "show", "methd", "method=ecodiff")


def test_copy_makes_a_file_that_can_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = said(capsys, "copy", "method/ecodiff").splitlines()[-1].strip()
    file = tmp_path / "my_configs" / "method" / "my_ecodiff.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("max_steps: 100", "max_steps: 7"), encoding="utf-8")
    words = [word.strip("'") for word in command.split()[2:]]
    assert compose(words)["trainer"]["max_steps"] == 7
    assert compose(["method=ecodiff"])["trainer"]["max_steps"] == 100
    assert "exists already" in refused(capsys, "copy", "method/ecodiff")
    assert "'method/ecodiff'" in refused(capsys, "copy", "method/ecodif")
    assert "which would win" in refused(capsys, "copy", "data/emoji", "mine/data/emoji.yaml")
    assert "lie in a folder 'data'" in refused(capsys, "copy", "data/emoji", "mine/other.yaml")


@pytest.mark.parametrize("method", options("method"))
def test_the_schema_accepts_what_is_valid(method: str) -> None:
    config = compose([f"method={method}"])
    schema = schema_of(config)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(config, schema)


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"seed": 3}, True),
        ({"method": {"keep": "${seed}"}}, True),
        ({"method": {"kinds": ["head"]}}, True),
        ({"trainer": {"strategy": {"_target_": "lightning.pytorch.strategies.DDPStrategy"}}}, True),
        ({"trainer": {"devices": "auto"}}, True),
        ({"seeed": 3}, False),
        ({"seed": -1}, False),
        ({"method": {"keeep": 0.5}}, False),
        ({"method": {"keep": 2}}, False),
        ({"method": {"kinds": ["hed"]}}, False),
        ({"backbone": {"dtype": "int8"}}, False),
        ({"trainer": {"max_steps": "many"}}, False),
    ],
)
def test_the_schema_refuses_what_is_not(change: dict[str, Any], accepted: bool) -> None:
    validator = jsonschema.Draft202012Validator(schema_of(compose(["method=ecodiff"])))
    assert validator.is_valid(change) is accepted


def test_the_schema_explains(capsys: pytest.CaptureFixture[str]) -> None:
    keep = json.loads(said(capsys, "schema", "method=ecodiff"))["properties"]["method"]["anyOf"][0]["properties"][
        "keep"
    ]
    assert keep["default"] == 0.8
    assert keep["description"].startswith("share of the prunable parameters that stays")


def test_nothing_heavy_is_imported() -> None:
    """Help, a dump of the configuration and refusals must not wait for torch."""
    code = (
        "import sys, contextlib, io\n"
        "from safelight.cli import app\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "    codes = [app.main(words) for words in (['--help'], ['train', '--help'], ['train', '--cfg', 'job'],\n"
        "             ['train', 'method=ecodif', 'backbone.dtype=x', 'method.keep=2'], ['train', 'backbone=sd15',\n"
        "             'method=text_to_image', 'callbacks.checkpoints.monitor=x'], ['list'], ['validate', 'seed=1'],\n"
        "             ['show'], ['schema'], ['train', '-m', 'seed=1,2', 'method.keep=3'], ['export'])]\n"
        "assert codes == [0, 0, 0, 2, 2, 0, 0, 0, 0, 2, 2], codes\n"
        "heavy = {'torch', 'lightning', 'diffusers', 'transformers', 'optuna', 'submitit'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
