"""The wheel alone: what is in it, and a training from an empty folder by the console script."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves a ``build`` folder in its source."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("src", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(REPOSITORY / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", target, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"safelight"}
    tracked = {p.relative_to(REPOSITORY / "configs") for p in (REPOSITORY / "configs").rglob("*.yaml")}
    assert {f"safelight/configs/{path}" for path in tracked} == {n for n in names if n.endswith(".yaml")}
    for part in ("emoji/images.zip", "tiny_clip/model.safetensors", "tiny_flux/model_index.json"):
        assert f"safelight/zoo/{part}" in names
    assert not [name for name in names if name.startswith(("safelight/tests", "safelight/runs")) or ".pyc" in name]


def test_it_trains_from_an_empty_folder_by_the_console_script(wheel: Path, tmp_path: Path) -> None:
    installed, here = tmp_path / "installed", tmp_path / "here"
    here.mkdir()
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", installed, wheel]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    # Found before the checkout that the tests run from.
    environment = os.environ | {"PYTHONPATH": str(installed)}
    environment.pop("SAFELIGHT_RUN_DIR", None)

    def run(*words: str) -> str:
        script = [sys.executable, str(installed / "bin" / "safelight"), *words]
        done = subprocess.run(
            script, cwd=here, env=environment, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [sys.executable, "-c", "import safelight; print(safelight.__file__)"]
    found = subprocess.run(where, cwd=here, env=environment, capture_output=True, text=True, check=True).stdout
    assert Path(found.strip()).is_relative_to(installed)
    printed = run(
        "train", "method=autoencoder", "method.block_out_channels=[8,16]", "data.image_size=16", "data.test_size=4",
        "trainer.max_steps=2", "trainer=cpu", "run_dir=here",
    )  # fmt: skip
    assert (here / "here" / "export" / "config.json").is_file()
    (line,) = [line for line in printed.splitlines() if line.startswith("evaluate ")]
    # Somebody who has only the wheel has no eval.py.
    assert line.split(maxsplit=1)[1] == "safelight eval ckpt_path=here/checkpoints/best.ckpt"
    assert "numbers equal" in run("eval", "ckpt_path=here/checkpoints/best.ckpt")
