"""Sweeps as real processes with the toy plug-in: what a kill leaves, what a second call does, what comes out."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from safelight.testing import signals

TESTS = Path(__file__).parents[1]
PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
TRAIN = (str(TESTS.parent / "train.py"), "-m", PLUGIN, "method=toy", "trainer=cpu", "logger=none", "callbacks=quiet")
QUICK = ("trainer.max_steps=2", "export=false", "report=false")


def start(folder: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])
    environment.pop("SAFELIGHT_RUN_DIR", None)
    command = [sys.executable, *TRAIN, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(folder: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    process = start(folder, *arguments, **variables)
    output, _ = process.communicate(timeout=500)
    return process.returncode, output


def events(sweep: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (sweep / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["run"], line["state"]) for line in lines]


def rows(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "summary.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_killed_at_job_three_only_the_missing_jobs_are_made(tmp_path: Path) -> None:
    arguments = ("seed=range(1,5)", *QUICK)
    process = start(tmp_path, *arguments)
    deadline = time.monotonic() + 400
    while not (found := list(tmp_path.glob("runs/sweep/*/002/config.yaml"))) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    sweep = found[0].parents[1]
    assert events(sweep)[-1] == ("002", "started")
    finished = {name: (sweep / name / "summary.json").stat().st_mtime_ns for name in ("000", "001")}

    code, output = run(tmp_path, *arguments, "resume=auto")
    assert code == 0, output
    assert list(tmp_path.glob("runs/sweep/*")) == [sweep]
    later = events(sweep)[5:]
    assert later == [("002", "started"), ("002", "done"), ("003", "started"), ("003", "done")]
    assert {name: (sweep / name / "summary.json").stat().st_mtime_ns for name in finished} == finished
    table = rows(sweep)
    assert [(row["run"], row["state"], row["seed"]) for row in table] == [
        ("000", "done", "1"),
        ("001", "done", "2"),
        ("002", "done", "3"),
        ("003", "done", "4"),
    ]
    for row in table:
        summary = json.loads((tmp_path / row["folder"] / "summary.json").read_text(encoding="utf-8"))
        assert float(row["mse"]) == summary["metrics"]["mse"]
        assert float(row["zero/mse"]) == summary["controls"]["zero"]["mse"]
        assert f"{summary['metrics']['mse']:.4g}" in output

    code, output = run(tmp_path, *arguments, f"sweep_dir={sweep}")
    assert code == 0, output
    assert events(sweep)[5:] == later, "a finished sweep has nothing to do"


def test_failed_jobs_are_left_alone_until_asked_for_and_a_signal_stops_the_sweep(tmp_path: Path) -> None:
    arguments = ("seed=1,2", *QUICK, "sweep_dir=here")
    code, output = run(tmp_path, *arguments, **signals.when(1))
    assert code == 1
    assert "2 of 2 runs failed; retry with" in output
    assert "sweep.retry=true" in output
    assert [state for _, state in events(tmp_path / "here")] == ["started", "failed"] * 2
    code, _ = run(tmp_path, *arguments)
    assert code == 1
    assert len(events(tmp_path / "here")) == 4
    # A run that is stopped by a signal is not a failed one: it goes on by itself.
    code, output = run(tmp_path, *arguments, "sweep.retry=true", **signals.when(1, signal.SIGTERM))
    assert [state for _, state in events(tmp_path / "here")][4:] == ["started", "stopped"] * 2
    assert (tmp_path / "here" / "000" / "checkpoints" / "last.ckpt").is_file()
    code, output = run(tmp_path, *arguments)
    assert code == 0, output
    assert "last.ckpt at step" in output
    assert [row["state"] for row in rows(tmp_path / "here")] == ["done", "done"]


def test_terminating_the_sweep_saves_the_run_and_starts_no_other(tmp_path: Path) -> None:
    arguments = ("seed=1,2", "trainer.max_steps=100000", "export=false", "report=false", "test=false", "sweep_dir=here")
    process = start(tmp_path, *arguments)
    log = tmp_path / "here" / "000" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (log.is_file() and log.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 128 + signal.SIGTERM
    assert events(tmp_path / "here") == [("000", "started"), ("000", "stopped")]
    assert (tmp_path / "here" / "000" / "checkpoints" / "last.ckpt").is_file()
    assert "stopped; go on with" in output
    assert output.splitlines()[-1].strip().endswith("sweep_dir=here")


@pytest.mark.ddp
def test_two_processes_per_job_make_exactly_one_folder_per_job(tmp_path: Path) -> None:
    code, output = run(tmp_path, "trainer=ddp_cpu", "data.batch_size=2,5", *QUICK)
    assert code == 0, output
    (sweep,) = (tmp_path / "runs" / "sweep").iterdir()
    assert [entry.name for entry in (tmp_path / "runs").iterdir()] == ["sweep"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"runs"}
    assert {entry.name for entry in sweep.iterdir() if entry.is_dir()} == {"000", "001"}
    expected = {"config.yaml", "command.txt", "versions.json", "metrics.jsonl", "checkpoints", "summary.json"}
    assert {entry.name for entry in (sweep / "000").iterdir()} == expected
    assert [row["data.batch_size"] for row in rows(sweep)] == ["2", "5"]


def test_optuna_goes_on_with_its_study(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = ("method.lr=tag(log,interval(1e-4,1e-1))", "method.mode=plain,noisy", *QUICK)
    search = ("sweep=optuna", "sweep.metric=mse", "sweep.sampler=random", "sweep_dir=here")
    code, output = run(tmp_path, *space, *search, "sweep.n_trials=2")
    assert code == 0, output
    code, output = run(tmp_path, *space, *search, "sweep.n_trials=3")
    assert code == 0, output
    assert [run for run, state in events(tmp_path / "here") if state == "started"] == ["000", "001", "002"]
    table = rows(tmp_path / "here")
    rates = [float(row["method.lr"]) for row in table]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert len(set(rates)) == 3
    assert {row["method.mode"] for row in table} <= {"plain", "noisy"}
    best = min(table, key=lambda row: float(row["mse"]))
    assert f"best: mse {best['mse']} in {best['run']}" in output
    assert (tmp_path / "here" / "study.journal").is_file()


def test_every_method_passes_one_batch_in_a_sweep(tmp_path: Path) -> None:
    """The line that a change to any method should survive."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, TRAIN[0], "-m", "method=glob(*)", "debug=fdr", "trainer=cpu", "sweep_dir=here"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(tmp_path / "here")
    assert {row["state"] for row in table} == {"done"}
    methods = {file.stem for file in (TESTS.parent / "configs" / "method").glob("*.yaml")}
    assert {row["method"] for row in table} == methods
