"""Every line of every ``bash`` block that we print is run, or as much of it as a test can run; ``RULES`` says how much.

A line that no rule covers fails. Rules are tried from the top; long runs are made small by ``SMALL``, and names that a
reader has to fill in become what ``stand_ins`` says.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from safelight import cli, zoo
from safelight.cli import composing
from safelight.cli.sweeping import expand

REPOSITORY = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "src/**/README.md", "examples/**/*.md", "benchmarks/*.md")
    for path in REPOSITORY.glob(pattern)
)
# What makes a run small: two steps on a few samples.
SMALL = {
    "": ["trainer=cpu", "trainer.max_steps=2", "data.batch_size=2", "callbacks=quiet", "trainer.precision=32-true"],
    "prompts": ["data.size=2", "data.test_size=2"],
    "emoji": ["data.test_size=2"],
    "llava": ["data.test_size=2"],
    "ecodiff": ["method.correction_samples=2", "method.random_masks=1"],
}
NOT_MEASURED = ["test=false", "export=false", "report=false"]


def lines() -> Iterator[tuple[str, str]]:
    """``(page, command)`` for every command; ``a && b`` are two, comments are dropped, continued lines are joined."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"\s+#.*$|^#.*$", "", line).strip()
                for command in text.split(" && ") if text else ():
                    yield str(page.relative_to(REPOSITORY)), command


ALL = sorted({command for _, command in lines()})
WHERE = {command: page for page, command in lines()}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``python train.py method=ecodiff``, small but whole: what later lines evaluate and go on from."""
    folder = tmp_path_factory.mktemp("blocks") / "runs" / "ecodiff" / "one"
    words = ["method=ecodiff", *SMALL[""], *SMALL["prompts"], *SMALL["ecodiff"], f"run_dir={folder}"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "SAFELIGHT_RUN_DIR"} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def filled(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What stands in for the names a reader fills in, and for files that only a full-size run has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAFELIGHT_RUN_DIR", raising=False)
    captions = tmp_path / "captions.tsv"
    captions.write_text("a cat\thttp://example.org/1\na dog\thttp://example.org/2\n")
    mini = zoo.path("copro_mini")
    for name, source in (
        ("mine.csv", "CoProv2_train.csv"), ("CoProv2_train.csv", "CoProv2_train.csv"),
        ("CoProv2_test.csv", "CoProv2_test.csv"), ("pictures.zip", "images.zip"),
        ("CoPro_v1.0.json", "CoPro_v1.0.json"),
    ):  # fmt: skip
        (tmp_path / name).symlink_to(mini / source)
    (tmp_path / "CoProv2-SD15").mkdir()
    for folder in ("images", "pictures", "IllusionBench"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blip_laion_cc_sbu_558k.json").write_text("[]")
    (tmp_path / "games.pgn").write_text('[Event "one"]\n\n1. e4 e5 2. Nf3 Nc6 1-0\n')
    (tmp_path / "PartiPrompts.tsv").write_text("Prompt\tCategory\na quiet lake\tOutdoor\n")
    yield {
        "runs/ecodiff/<run>": str(run_folder),
        "<folder of the pruning run>": str(run_folder),
        "<run folder>": str(run_folder),
        "Validation_GCC-1.1.0-Validation.tsv": str(captions),
        "skeletons/": f"{zoo.path('tiny_flux').parent}/",
        "zoo_runs/vae/export": str(zoo.path("tiny_flux") / "vae"),
        "/data/my_run": str(tmp_path / "my_run"),
        "eval_dir=runs/": f"eval_dir={tmp_path}/",
        "sweep_dir=runs/": f"sweep_dir={tmp_path}/",
        "run_dir=zoo_runs/": f"run_dir={tmp_path}/",
        "your_package.configs": "toy_plugin.configs",
        "method=yours": "method=toy",
    }
    os.environ.pop("SAFELIGHT_RUN_DIR", None)


def run(*command: str, cwd: Path = REPOSITORY) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False, env=environment())
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def train(words: list[str]) -> None:
    """Compose and validate; run two steps when everything is at hand, once for each method and backbone."""
    composed = composing.compose_valid(words)
    choices = composed.config["choices"]
    pretrained = str((composed.config.get("backbone") or {}).get("pretrained", "zoo:"))
    teacher = str(composed.config["method"].get("teacher") or "zoo:")
    encoder = str(composed.config["method"].get("encoder") or "zoo:")
    named = ("model", "model_a", "model_b", "llm", "vision_model")
    models = [str(composed.config["method"].get(name) or "zoo:") for name in named]
    used = (pretrained, teacher, encoder, *models)
    at_hand = all(m.startswith("zoo:") or m in zoo.names() or Path(m).is_dir() for m in used)
    place = (choices["method"], pretrained, encoder)
    strategy = str(composed.config["trainer"].get("strategy", "auto"))
    if not at_hand or place in DONE or strategy.startswith("ddp") or choices["method"] == "toy":
        return
    DONE.add(place)
    data = str(choices.get("data"))
    skipped = (
        "trainer=",
        "trainer.max_steps=",
        "trainer.precision=",
        "data.",
        "run_dir=",
        "resume=",
        "method.pretrained=",
    )
    kept = [word for word in words if not word.startswith(skipped)]
    small = [*SMALL[""], *SMALL.get(data, []), *SMALL.get(choices["method"], [])]
    assert cli.train_main([*kept, *small, *NOT_MEASURED, f"run_dir={Path.cwd() / 'run'}"]) == 0
    assert (Path.cwd() / "run" / "checkpoints" / "last.ckpt").is_file()


DONE: set[tuple[str, str, str]] = set()


def rule_train(words: list[str]) -> None:
    """``python train.py``: help and ``--cfg`` are run, sweeps are expanded, every run is composed and validated."""
    words = words[words.index("train.py") + 1 :] if "train.py" in words else words
    if "--help" in words or "--cfg" in words:
        assert cli.train_main(words) == 0
    elif "-m" in words:
        own = ("sweep_dir=", "sweep=", "sweep.")
        searched = "sweep=optuna" in words
        # An interval means something to a search only; each end of it stands for a job here.
        words = [re.sub(r"=(tag\(log,)?interval\(([^,]+),([^)]+)\)\)?", r"=\2,\3", word) for word in words]
        jobs = expand([word for word in words if word != "-m" and not word.startswith(own)])
        assert len(jobs) > 1 or searched
        for job in jobs:
            composing.compose_valid(job)
    else:
        train(words)


def rule_eval(words: list[str]) -> None:
    """``python eval.py``: run."""
    assert cli.eval_main([*words[2:], "callbacks=quiet"]) == 0


def rule_install(words: list[str]) -> None:
    """Installation: .ci/run executes README's line itself; here every extra and file must exist."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert words[words.index("-c") + 1] == "constraints.txt" if "-c" in words else True
    extras = {name for word in words for name in re.findall(r"\.\[(.*)\]", word)}
    assert extras <= set(project["optional-dependencies"])


def rule_module(words: list[str]) -> None:
    """Scripts that build something large: they start and explain themselves."""
    assert "usage" in run(sys.executable, *words[1 : 3 if words[1] == "-m" else 2], "--help").lower()


def rule_pytest(words: list[str]) -> None:
    """This is one of them; folders that are named must exist."""
    assert all((REPOSITORY / word).exists() for word in words[1:] if "/" in word)


def rule_elsewhere(words: list[str]) -> None:
    """Another test or the machine that runs CI does it; what is named must exist."""
    assert all((REPOSITORY / word).exists() for word in words if word.startswith(("examples/", "docs/", "benchmarks/")))


def rule_safelight(words: list[str]) -> None:
    """The commands around a run: test_commands runs each of them; here they must exist."""
    from safelight.cli.commands import COMMANDS

    assert words[1] in COMMANDS


RULES = (
    (r"python train\.py method=background_probe|cd examples/plugin$", rule_elsewhere),  # the plug-in: test_examples
    (r"(\.venv/bin/)?python train\.py( |$)", rule_train),
    (r"safelight ", rule_safelight),
    (r"torchrun .* train\.py |srun .* train\.py ", rule_train),
    (r"python eval\.py ", rule_eval),
    (r"(\.venv/bin/)?pip install |python3 -m venv \.venv$", rule_install),
    (r"python -m safelight\.(zoo|lightning_modules)\.|python benchmarks/", rule_module),
    (r"\.venv/bin/pytest", rule_pytest),
    (r"python examples/|python -m safelight\.cli train ", rule_elsewhere),  # test_examples
    (r"\.venv/bin/mkdocs |python docs/drawing\.py", rule_elsewhere),  # test_docs
    (r"npm pack |pip download ", rule_elsewhere),  # needs a network
    (
        r"mkdir |ln -sfn |cd \.cache/types|\.\./\.\./\.venv/bin/mypy |\.venv/bin/pre-commit ",
        rule_elsewhere,
    ),  # types, hooks: CI
)


def test_blocks_are_called_bash_and_there_are_many() -> None:
    for page in PAGES:
        assert not re.search(r"```(sh|shell|console|zsh)\b", page.read_text(encoding="utf-8")), page
    assert len(ALL) > 30


@pytest.mark.parametrize("command", ALL)
def test_line(command: str, filled: dict[str, str]) -> None:
    rule = next((rule for pattern, rule in RULES if re.match(pattern, command)), None)
    assert rule is not None, f"{WHERE[command]}: no rule says how this line is tested: {command}"
    for name, stand_in in filled.items():
        command = command.replace(name, stand_in)
    rule(shlex.split(command))
