"""Real ``train.py`` and ``eval.py`` processes with the toy plug-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safelight.callbacks.checkpointing import read_checkpoint
from safelight.testing import signals

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
TRAIN = ("train.py", PLUGIN, "method=toy", "trainer=cpu", "callbacks.checkpoints.every_n_train_steps=3")
CONTENTS = {
    "config.yaml",
    "command.txt",
    "versions.json",
    "metrics.jsonl",
    "tensorboard",
    "checkpoints",
    "export",
    "report",
    "summary.json",
}


def run(folder: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository from another folder."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment.pop("SAFELIGHT_RUN_DIR", None)
    start = ["-m", script] if script.startswith("safelight") else [str(REPOSITORY / script)]
    command = [sys.executable, *start, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(run_folder / "checkpoints" / "last.ckpt")["state_dict"])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with one run in ``runs/``, and what it printed."""
    folder = tmp_path_factory.mktemp("runs")
    done = run(folder, *TRAIN, "name=first")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def run_folder_of(folder: Path) -> Path:
    (found,) = (folder / "runs" / "toy").iterdir()
    return found


def test_run_folder_has_exactly_this(finished: tuple[Path, str]) -> None:
    folder = run_folder_of(finished[0])
    assert folder.name.endswith("-first")
    assert {entry.name for entry in folder.iterdir()} == CONTENTS
    assert {entry.name for entry in (folder / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert (folder / "report" / "index.html").is_file()
    assert (folder / "export" / "plane.json").is_file()
    assert (folder / "command.txt").read_text().startswith("python train.py ")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == "toy"
    assert summary["metrics"]["mse"] < summary["controls"]["zero"]["mse"]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_last_lines_tell_what_to_do_next(finished: tuple[Path, str]) -> None:
    _, output = finished
    run_folder = run_folder_of(finished[0]).relative_to(finished[0])
    assert f"python eval.py ckpt_path={run_folder}/checkpoints/best.ckpt" in output
    assert f"{run_folder}/export" in output
    assert "python train.py method=toy data.batch_size=10" in output
    assert "12/12" in output


def test_evaluation_from_the_checkpoint_alone_repeats_the_numbers(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    run_folder = run_folder_of(folder)
    checkpoint = run_folder / "checkpoints" / "best.ckpt"
    done = run(folder, "eval.py", f"ckpt_path={checkpoint}", "eval_dir=results")
    assert done.returncode == 0, done.stderr
    assert "all 2 numbers equal the training run's" in done.stdout
    before, after = (json.loads((p / "summary.json").read_text()) for p in (run_folder, folder / "results"))
    for part in ("metrics", "controls", "method", "data", "seed"):
        assert after[part] == before[part]
    assert (folder / "results" / "report" / "index.html").is_file()


def test_killed_in_mid_epoch_and_resumed_is_the_same_run(finished: tuple[Path, str], tmp_path: Path) -> None:
    killed = run(tmp_path, *TRAIN, **signals.when(8))
    assert killed.returncode == -signal.SIGKILL
    crashed = run_folder_of(tmp_path)
    assert read_checkpoint(crashed / "checkpoints" / "last.ckpt")["global_step"] == 6
    done = run(tmp_path, *TRAIN, "resume=auto", "data.batch_size=2", "trainer.log_every_n_steps=5")
    assert done.returncode == 0, done.stderr
    assert "last.ckpt at step 6" in done.stdout
    assert "data.batch_size: 4 from the checkpoint wins over 2" in done.stdout
    assert "trainer.log_every_n_steps: 5 from the command line" in done.stdout
    assert run_folder_of(tmp_path) == crashed
    assert {entry.name for entry in crashed.iterdir()} == CONTENTS
    assert same(weights(crashed), weights(run_folder_of(finished[0])))
    numbers = [json.loads((p / "summary.json").read_text()) for p in (crashed, run_folder_of(finished[0]))]
    assert numbers[0]["metrics"] == numbers[1]["metrics"]
    logged = [json.loads(line) for line in (crashed / "metrics.jsonl").read_text().splitlines()]
    validated = [line["step"] for line in logged if "val/mse" in line]
    assert validated == sorted(set(validated))


def test_terminated_saves_says_how_to_go_on_and_does(finished: tuple[Path, str], tmp_path: Path) -> None:
    stopped = run(tmp_path, *TRAIN, "run_dir=here", **signals.when(7, signal.SIGTERM))
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopped at step 8; saved here/checkpoints/last.ckpt" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "resume=here" in stopped.stderr.splitlines()[-1]
    done = run(tmp_path, *TRAIN, "resume=here")
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "here"), weights(run_folder_of(finished[0])))


@pytest.mark.ddp
def test_two_processes_are_one_process_with_twice_the_batch(tmp_path: Path) -> None:
    plain = ("method.dropout=0.0", "method.mode=plain", "trainer.max_steps=7", "test=false")
    one = run(tmp_path, *TRAIN, *plain, "run_dir=one")
    assert one.returncode == 0, one.stderr
    two = run(tmp_path, *TRAIN, *plain, "trainer=ddp_cpu", "data.batch_size=2")
    assert two.returncode == 0, two.stderr
    folder = run_folder_of(tmp_path)
    assert {entry.name for entry in folder.iterdir()} == CONTENTS
    assert {entry.name for entry in tmp_path.iterdir()} == {"one", "runs"}
    a, b = weights(tmp_path / "one"), weights(folder)
    assert max(float((a[key] - b[key]).abs().max()) for key in a) <= 1e-6


def test_the_artefact_can_be_exported_again(finished: tuple[Path, str]) -> None:
    folder = finished[0]
    run_folder = run_folder_of(folder).relative_to(folder)
    command = ("safelight.cli", "export", str(run_folder), "again", "eval_dir=numbers")
    done = run(folder, *command)
    assert done.returncode == 0, done.stderr
    first, second = folder / run_folder / "export" / "plane.json", folder / "again" / "plane.json"
    assert second.read_bytes() == first.read_bytes()
    assert "all 2 numbers equal the training run's" in done.stdout
    assert "artefact     again" in done.stdout
    refused = run(folder, *command[:-1])
    assert refused.returncode == 2
    assert "'again' is not empty" in refused.stderr
    assert second.read_bytes() == first.read_bytes()
