"""Every example runs, small, the way its reader would run it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
SMALL = ("trainer=cpu", "trainer.max_steps=20", "data.test_size=40", "data.batch_size=32", "callbacks=quiet")


def run(folder: Path, *command: str, **variables: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    environment.pop("SAFELIGHT_RUN_DIR", None)
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def with_path(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])


def test_all_examples_are_tested_here_and_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    here = Path(__file__).read_text()
    for entry in EXAMPLES.iterdir():
        if entry.name not in ("README.md", "__pycache__"):
            assert f"]({entry.name}" in listed
            assert f'"{entry.name}"' in here


def test_own_trainer_and_tensors_without_hydra(tmp_path: Path) -> None:
    source = (EXAMPLES / "own_trainer.py").read_text()
    lines = [line for line in source.splitlines() if line and not line.startswith(('"""', "import", "from"))]
    assert len(lines) <= 15
    script = tmp_path / "own_trainer.py"
    script.write_text(source + "\nimport sys\nassert not {'hydra', 'omegaconf'} & set(sys.modules)\n")
    output = run(tmp_path, str(script), MAX_STEPS="25")
    found = re.search(r"mean absolute error ([\d.]+) -> ([\d.]+)", output)
    assert found is not None
    before, after = map(float, found.groups())
    assert after < 0.6 * before
    assert [entry.name for entry in tmp_path.iterdir()] == ["own_trainer.py"]


def test_another_loss_is_the_one_that_is_trained(tmp_path: Path) -> None:
    few, many = (
        float(run(tmp_path, str(EXAMPLES / "another_loss.py"), MAX_STEPS=steps).split("charbonnier ")[-1])
        for steps in ("1", "20")
    )
    assert many < 0.8 * few


def test_notebook(tmp_path: Path) -> None:
    small = {"trainer.max_steps": 2, "data": {"size": 4, "test_size": 4, "batch_size": 4}, "callbacks": "quiet"}
    small |= {"method.correction_samples": 4, "method.random_masks": 1, "trainer.accelerator": "cpu"}
    output = run(tmp_path, str(EXAMPLES / "notebook.py"), SETTINGS=json.dumps(small))
    assert "pruned       latent error" in output
    assert "open runs/notebook/export with diffusers" in output
    assert "numbers equal the training run's" in output
    assert (tmp_path / "runs" / "notebook" / "report" / "index.html").is_file()


def test_merged_erasures_switch_off_what_either_does(tmp_path: Path) -> None:
    from safelight.generators import load_generator
    from safelight.masking import choose_groups, load_masks, save_masks

    generator = load_generator("tiny_flux")
    specs = choose_groups("flux", ["ff"])["ff"].find(generator.denoiser)
    for concept, first in (("pistol", 0), ("panda", 200)):
        masks = {spec.name: torch.ones(spec.n_units, dtype=torch.bool) for spec in specs}
        for mask in masks.values():
            mask[first : first + 300] = False
        save_masks(tmp_path / concept / "masks", masks, specs, {"backbone": "tiny_flux"})
        (tmp_path / concept / "units.json").write_text(json.dumps({"concept": concept}), encoding="utf-8")
    output = run(tmp_path, str(EXAMPLES / "merge_erasures.py"), "pistol", "panda", "--out", "both", "--test-size", "2")
    layers = len(specs)
    assert f"{300 * layers} and {300 * layers} units off, {100 * layers} of them shared" in output
    rows = {line[:24].strip(): line[24:].split() for line in output.splitlines() if " off  " in line}
    assert [rows[name][0].replace(",", "") for name in ("dense", "without panda", "without all of them")] == [
        "0", str(300 * layers), str(500 * layers)
    ]  # fmt: skip
    assert {"pistol", "panda", "neighbours", "retains"} < set(rows["dense"])
    merged = load_generator(str(tmp_path / "both"))
    weight = merged.denoiser.get_submodule(f"{specs[0].name}.net.2").weight
    assert not weight[:, :500].any()
    assert weight[:, 500:].any()
    assert load_masks(tmp_path / "panda" / "masks")[1] == {"backbone": "tiny_flux"}


def test_merged_experts_own_all_rows_between_them(tmp_path: Path) -> None:
    from safelight.generators import load_generator
    from safelight.generators.lora import lora_targets
    from safelight.lightning_modules.safety_dpo.adapters import LowRank, load_adapter, save_adapter

    denoiser = load_generator("tiny_sdxl").denoiser
    paths = lora_targets(denoiser, ["to_q", "to_out.0"])
    draw = torch.Generator().manual_seed(0)
    experts = {}
    for number, name in enumerate(("loud", "quiet")):
        experts[name] = {}
        for path in paths:
            out, wide = denoiser.get_submodule(path).weight.shape
            b = torch.randn(out, 2, generator=draw) / 100 ** (1 + number)
            experts[name][path] = LowRank(torch.randn(2, wide, generator=draw), b)
        save_adapter(tmp_path / name / "export", experts[name], "unet", {"lora_seed": number})
    output = run(
        tmp_path, str(EXAMPLES / "merge_experts.py"), "loud/export", "quiet/export", "--rows", "2", "--out", "both"
    )
    assert "started from different seeds (0, 1)" in output
    shares = {line.split()[0]: int(line.split()[2].rstrip("%")) for line in output.splitlines() if " owns " in line}
    assert shares["loud"] > 90
    assert sum(shares.values()) == 100
    merged, about = load_adapter(tmp_path / "both")
    assert about["experts"] == ["loud", "quiet"]
    delta, own = merged[paths[0]].delta, torch.stack([experts[name][paths[0]].delta for name in experts])
    assert all(any(torch.allclose(row, mine, atol=1e-6) for mine in own[:, i]) for i, row in enumerate(delta))


def test_a_guarded_pipeline_draws_what_passes(tmp_path: Path) -> None:
    from safelight.lightning_modules.latent_guard.encoders import load_text_encoder
    from safelight.lightning_modules.latent_guard.guard import PromptGuard
    from safelight.lightning_modules.latent_guard.head import EmbeddingMappingLayer

    encoder = load_text_encoder("zoo:tiny_sdxl")
    torch.manual_seed(0)
    guard = PromptGuard(encoder, EmbeddingMappingLayer(encoder.dim, 2, 8, 8), threshold=0.0)
    guard.add(["pistol"])
    prompts = ["a small cat", "a small pistol"]
    scores = guard.scores(prompts)[:, 0].tolist()
    guard.threshold = sum(scores) / 2
    guard.save_pretrained(tmp_path / "export")
    output = run(tmp_path, str(EXAMPLES / "guard_pipeline.py"), "export", *prompts, "--out", "drawn").splitlines()
    blocked = int(scores[1] > scores[0])
    assert "blocked, 'pistol'" in output[blocked]
    assert "drawn to" in output[1 - blocked]
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == [f"{1 - blocked}.png"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in as an installer leaves it."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path_factory.mktemp("source") / "plugin"
    site = tmp_path_factory.mktemp("site")
    # Building writes into the source folder: build a copy.
    import shutil

    shutil.copytree(EXAMPLES / "plugin", source)
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    run(source, "-m", "pip", "install", *offline, "--target", str(site), str(source))
    return site


def test_plugin_is_found_by_its_entry_point(installed: Path, tmp_path: Path) -> None:
    train = (str(REPOSITORY / "train.py"),)
    where = with_path(installed)
    assert "is the colour behind a thing written in the judge's features?" in run(
        tmp_path, *train, "--help", PYTHONPATH=where
    )
    wrong = subprocess.run(
        [sys.executable, *train, "method=background_prob", "method.lr=-1"], cwd=tmp_path, capture_output=True,
        text=True, env=os.environ | {"PYTHONPATH": where}, check=False, timeout=100,
    )  # fmt: skip
    assert wrong.returncode == 2
    assert "'background_probe'" in wrong.stderr
    assert "a number > 0" in wrong.stderr


def test_steering_hidden_shapes(tmp_path: Path) -> None:
    words = ("--scenes", "Cloud", "Ocean", "--shapes", "Cat", "Airplane", "--placements", "2", "--seeds", "2")
    output = run(tmp_path, str(EXAMPLES / "steering_hidden_shapes.py"), *words, "--steps", "60", "--bias", "6")
    assert "36 pictures to train on, 36 to test on, chance 50.0 %" in output
    rows = {line[:32].strip(): line[32:].split(" %") for line in output.splitlines()[2:]}
    assert list(rows) == [
        "plain", "bias to the shape", "bias, nothing hidden", "bias, of another picture", "low-pass",
    ]  # fmt: skip
    shares = {name: float(row[-1].split()[0]) for name, row in rows.items()}
    assert shares["bias to the shape"] > 55, "of two shapes"
    assert shares["bias to the shape"] >= shares["bias, of another picture"]


def test_transfer_matrix(tmp_path: Path) -> None:
    from safelight.lightning_modules.visual_prompt.deploy import write_prompt

    for number in range(3):
        colour = (60 * number, 120, 200 - 40 * number)
        Image.linear_gradient("L").resize((120, 90)).convert("RGB").point(lambda value: value // 3).save(
            tmp_path / f"{number}.png"
        )
        Image.new("RGB", (120, 90), colour).save(tmp_path / f"plain_{number}.png")
    (tmp_path / "mine").mkdir()
    red = torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1).expand(3, 16, 16)
    write_prompt(tmp_path / "mine", red, torch.ones(1, 16, 16), {"prompt_size": 16, "image_size": 64})
    words = ("--path", str(tmp_path), "--crops", "6", "--encoders", "zoo:tiny_clip:64", "zoo:tiny_clip:96")
    output = run(tmp_path, str(EXAMPLES / "transfer_matrix.py"), str(tmp_path / "mine"), *words)
    rows = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in output.splitlines()[1:]}
    assert list(rows) == ["mine", "none", "red_circle", "checkerboard"]
    assert all(len(row) == 2 for row in rows.values())
    assert rows["mine"][0] > 1.25 * rows["none"][0], "red draws tiny_clip's attention"


def test_plugin_learns_and_its_control_does_not(installed: Path, tmp_path: Path) -> None:
    folder, where = tmp_path / "run", with_path(installed)
    train = (str(REPOSITORY / "train.py"), "method=background_probe", *SMALL, f"run_dir={folder}")
    run(tmp_path, *train, PYTHONPATH=where)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["accuracy"] > 0.9
    assert summary["controls"]["shuffled"]["accuracy"] < 0.4
    assert sorted(p.name for p in (folder / "export").iterdir()) == ["README.md", "probe.json", "probe.safetensors"]
    # The judge is frozen: a checkpoint of two small heads.
    assert (folder / "checkpoints" / "last.ckpt").stat().st_size < 100_000
    output = run(tmp_path, str(REPOSITORY / "eval.py"), f"ckpt_path={folder}/checkpoints/best.ckpt", PYTHONPATH=where)
    assert "all 2 numbers equal the training run's" in output


def test_plugin_is_under_the_contract() -> None:
    """A part of it that takes seconds; the names are those of the contract, so a class that pytest misses fails."""
    quick = "killed_and_resumed or one_step or declared_metrics or small_and_plain"
    words = ("-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", quick)
    output = run(EXAMPLES / "plugin", *words, PYTHONPATH=with_path(EXAMPLES / "plugin"))
    assert "4 passed" in output


def test_plugin_by_search_path_alone(tmp_path: Path) -> None:
    (command,) = re.findall(r"&& python (-m safelight.cli train .*)", (EXAMPLES / "plugin" / "README.md").read_text())
    import shlex

    words = shlex.split(command)
    output = run(EXAMPLES / "plugin", *words, "--cfg", "job", PYTHONPATH=with_path(EXAMPLES / "plugin"))
    assert "_target_: safelight_background_probe.method.BackgroundProbe" in output
