"""What a sweep consists of, what it refuses, what it remembers, and what it would submit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from safelight.cli import app
from safelight.cli.ledger import Ledger, same_plan, varied_settings
from safelight.cli.problems import ConfigError
from safelight.cli.sweeping import expand
from safelight.errors import SafelightError

PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
SLURM = ("-m", PLUGIN, "method=toy", "trainer=cpu", "seed=range(1,4)", "sweep=slurm", "sweep.partition=long")
pytestmark = pytest.mark.usefixtures("clean_run_environment")


def test_lists_ranges_and_globs_are_multiplied() -> None:
    assert expand(["seed=1,2", "a=x"]) == [["seed=1", "a=x"], ["seed=2", "a=x"]]
    assert [job[0] for job in expand(["seed=range(1,5)"])] == ["seed=1", "seed=2", "seed=3", "seed=4"]
    assert [job[0] for job in expand(["k=range(0.5,1,0.25)"])] == ["k=0.5", "k=0.75"]
    assert [job[0] for job in expand(["name='a, b','c'"])] == ["name='a, b'", "name='c'"]
    assert expand(["trainer=glob(*ddp*)"]) == [["trainer=ddp"], ["trainer=ddp_cpu"]]
    assert len(expand(["seed=1,2,3", "lr=0.1,0.2"])) == 6


def test_a_glob_sees_plugins() -> None:
    methods = [job[1] for job in expand([PLUGIN, "method=glob(*)"])]
    assert "method=toy" in methods
    assert "method=ecodiff" in methods
    assert [job[0] for job in expand(["method=glob(*, exclude=[c*,a*])"])] == [
        "method=ecodiff",
        "method=heal",
        "method=illusion_probe",
        "method=latent_guard",
        "method=moe_x",
        "method=sae",
        "method=sae_universality",
        "method=safety_dpo",
        "method=text_to_image",
        "method=vision_mapping",
        "method=visual_prompt",
    ]


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("method=glob(zz*)", "matches no method"),
        ("method.lr=glob(*)", "is none"),
        ("method.lr=interval(0.1,1)", "add sweep=optuna"),
        ("method.lr=1,2)", "cannot be read"),
    ],
)
def test_what_cannot_be_expanded(word: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        expand([word])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["method.keep=0.5,2"], "method.keep=2"),
        (["seed=1,2", "run_dir=here"], "sweep_dir=<folder>"),
        (["seed=1,2", "resume=somewhere"], "resume=auto or sweep_dir="),
        (["seed=1,2", "sweep=locl"], "did you mean 'local'?"),
        (["seed=1,2", "sweep.retri=true"], "did you mean 'retry'?"),
        (["seed=1,2", "sweep=slurm", "sweep.timeout_min=0"], "whole number >= 1"),
        (["seed=1,2", "sweep=optuna"], "must be text"),
        (["seed=1,2", "sweep=optuna", "sweep.metric=msee"], "did you mean 'mse'?"),
        (["sweep=optuna", "sweep.metric=mse"], "nothing to search"),
        (["method.keep=interval(2,3)", "sweep=optuna", "sweep.metric=mse"], ">= 0 and <= 1"),
    ],
)
def test_a_sweep_that_is_refused_runs_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.train_main(["-m", PLUGIN, "method=toy", *words]) == 2
    captured = capsys.readouterr()
    assert text in captured.err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_block_alone_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.train_main([PLUGIN, "method=toy", "sweep=local"]) == 2
    assert "add -m" in capsys.readouterr().err


def test_a_rank_does_not_start_a_sweep(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert app.train_main(["-m", PLUGIN, "method=toy", "seed=1,2"]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_the_ledger_survives_a_crash(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.state(0) == "new"
    ledger.record(0, "started", ["seed=1"])
    ledger.record(1, "started", ["seed=2"])
    ledger.record(1, "failed", ["seed=2"], exit_code=1)
    ledger.record(2, "done", ["seed=3"], exit_code=0)
    with ledger.file.open("a", encoding="utf-8") as file:
        file.write('{"run": "001", "sta')  # The machine lost power here.
    assert [ledger.state(n) for n in range(4)] == ["started", "failed", "done", "new"]
    assert [ledger.is_due(n, retry=False) for n in range(4)] == [True, False, False, True]
    assert [ledger.is_due(n, retry=True) for n in range(4)] == [True, True, False, True]
    # It ended between its summary and the line in the ledger.
    ledger.run_folder(0).mkdir()
    (ledger.run_folder(0) / "summary.json").write_text("{}", encoding="utf-8")
    assert ledger.state(0) == "done"


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safelight.cli.ledger._WAIT_SECONDS", 0.0)
    with Ledger(tmp_path).locked(), pytest.raises(SafelightError, match="still running"), Ledger(tmp_path).locked():
        pass
    with Ledger(tmp_path).locked():
        pass


def test_another_sweep_may_not_use_the_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = {"jobs": [["seed=1"], ["seed=2"]], "search": None}
    assert same_plan(plan, {"jobs": [["seed=2"], ["seed=1"]], "search": None})
    assert not same_plan(plan, {"jobs": [["seed=2"], ["seed=3"]], "search": None})
    (tmp_path / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    assert app.train_main(["-m", PLUGIN, "method=toy", "seed=1,2", f"sweep_dir={tmp_path}"]) == 2
    assert "belongs to another sweep" in capsys.readouterr().err


def test_varied_settings() -> None:
    jobs = [["method=toy", "seed=1", "+lr=0.1"], ["method=toy", "seed=1", "+lr=0.2"]]
    assert varied_settings(jobs) == [{"lr": "0.1"}, {"lr": "0.2"}]


def parameters(batch_file: str) -> dict[str, str]:
    """What a batch file asks SLURM for."""
    lines = [line.removeprefix("#SBATCH --") for line in batch_file.splitlines() if line.startswith("#SBATCH --")]
    return dict(line.split("=", 1) for line in lines)


def dry(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    assert app.train_main([*SLURM, "sweep.dry_run=true", f"sweep_dir={folder}", *words]) == 0
    return capsys.readouterr().out


def test_slurm_dry_run_shows_what_would_be_submitted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    text = dry(capsys, tmp_path, "sweep.mem_gb=16", "sweep.setup=[module load cuda]", "sweep.timeout_min=90")
    asked = parameters(text)
    assert asked["array"] == "0-2%3"
    assert asked["partition"] == "long"
    assert asked["time"] == "90"
    assert asked["mem"] == "16GB"
    assert (asked["nodes"], asked["ntasks-per-node"], asked["cpus-per-task"]) == ("1", "1", "4")
    assert "gpus-per-node" not in asked
    assert "\nmodule load cuda\n" in text
    commands = [line for line in text.splitlines() if "run_dir=" in line]
    assert [f"seed={n} run_dir={tmp_path / f'{n - 1:03d}'} resume=auto" in commands[n - 1] for n in (1, 2, 3)] == [
        True
    ] * 3
    assert Ledger(tmp_path).last_lines() == {}, "nothing was submitted"


def test_slurm_asks_for_what_the_trainer_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    asked = parameters(dry(capsys, tmp_path / "a", "trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2"))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "4", "4")
    assert app.train_main([*SLURM, "trainer=ddp", "sweep.dry_run=true", f"sweep_dir={tmp_path / 'b'}"]) == 2
    assert "trainer.devices=8" in capsys.readouterr().err
    words = [word for word in SLURM if not word.startswith("seed")]
    varied = ["trainer.devices=1,2", "sweep.dry_run=true", f"sweep_dir={tmp_path / 'c'}"]
    assert app.train_main([*words, *varied]) == 2
    assert "separate sweeps" in capsys.readouterr().err


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with commands of SLURM's names that keep what they are given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "srun": "exit 0",
        "sbatch": f'cp "$1" {tmp_path}/submitted.sh; echo Submitted batch job 42',
        "sacct": 'echo "JobID|State|NodeList"; echo "42_0|COMPLETED|n"; echo "42_1|FAILED|n"; echo "42_2|TIMEOUT|n"',
    }
    for name, body in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return tmp_path


def test_slurm_submits_what_the_dry_run_showed(capsys: pytest.CaptureFixture[str], cluster: Path) -> None:
    submitit = pytest.importorskip("submitit")
    folder = cluster / "sweep"
    shown = dry(capsys, folder)
    assert app.train_main([*SLURM, f"sweep_dir={folder}"]) == 0
    output = capsys.readouterr().out
    assert "submitted as job 42" in output
    assert "3 of 3 runs are submitted" in output
    submitted = (cluster / "submitted.sh").read_text(encoding="utf-8")
    assert submitted in shown
    lines = Ledger(folder).last_lines()
    assert [(line["state"], line["job_id"]) for line in lines.values()] == [
        ("submitted", "42_0"),
        ("submitted", "42_1"),
        ("submitted", "42_2"),
    ]
    pickled = submitit.core.utils.DelayedSubmission.load(folder / "slurm" / "42_1_submitted.pkl")
    assert pickled.function.command[-3:] == ["seed=2", f"run_dir={folder / '001'}", "resume=auto"]

    # Later: one is through, one failed, one ran out of time; only the last is submitted again.
    (cluster / "submitted.sh").unlink()
    assert app.train_main([*SLURM, f"sweep_dir={folder}"]) == 1
    states = [Ledger(folder).state(number) for number in range(3)]
    assert states == ["done", "failed", "submitted"]
    assert "array" not in parameters((cluster / "submitted.sh").read_text(encoding="utf-8"))


def test_a_slurm_job_waits_for_its_run_and_is_requeued(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    from safelight.cli.submitting import RunJob

    assert RunJob([sys.executable, "-c", "pass"])() == 0
    with pytest.raises(RuntimeError, match="exit code 3"):
        RunJob([sys.executable, "-c", "raise SystemExit(3)"])()
    job = RunJob([sys.executable, "-c", "pass"])
    saved = tmp_path / "saved"
    code = f"import time, pathlib; time.sleep(0.5); pathlib.Path({str(saved)!r}).touch()"
    job._process = subprocess.Popen([sys.executable, "-c", code])
    again = job.checkpoint()
    assert saved.exists()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function.command == job.command


@pytest.mark.parametrize(("choice", "package"), [("optuna", "optuna"), ("slurm", "submitit")])
def test_an_extra_that_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, choice: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    metric = ["sweep.metric=mse"] if choice == "optuna" else []
    assert app.train_main(["-m", PLUGIN, "method=toy", "seed=1,2", f"sweep={choice}", *metric]) == 2
    assert f"pip install 'safelight[{choice}]'" in capsys.readouterr().err
