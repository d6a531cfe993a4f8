"""Everything a user can get wrong: one screen, exit code 2, the culprit by name, and nothing left behind.

Tables of cases that go through ``train_main`` in this process; the last tests run a few as a user would, and make sure
that a misspelt word never waits for torch. Damaged files are in ``test_bad_files.py``.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("clean_run_environment")


# -- what is typed: nothing heavy is imported for any of these ---------------------------------------------------------

TYPED: list[tuple[list[str], list[str]]] = [
    # groups
    (["method="], ["there is no method ''"]),
    (["method=null"], ["method=null", "name an option"]),
    (["method=[toy]"], ["method=[toy]", "not a list"]),
    (["method={a:1}"], ["method={a:1}"]),
    (["method=../method/toy"], ["there is no method '../method/toy'"]),
    (["Method=toy"], ["'Method'", "did you mean 'method'"]),
    (["method=toy", "trainer=null"], ["trainer=null"]),
    (["method=toy", "trainer=3"], ["no trainer '3'", "ddp_cpu"]),
    (["method=toy", "trainer=[cpu]"], ["trainer=[cpu]", "not a list"]),
    (["method=toy", "trainer@here=cpu"], ["trainer@here=cpu", "'trainer=cpu'"]),
    (["method=toy", "callbacks=[default,quite]"], ["'quite'", "'quiet'"]),
    (["method=toy", "logger=tensorbord"], ["'tensorboard'"]),
    (["method=toy", "debug=fd"], ["'fdr'"]),
    (["method=toy", "experiment=mine"], ["experiment=mine", "there is no experiment"]),
    (["method=toy", "backbone=null"], ["backbone=null"]),
    (["method=toy", "backbone=3"], ["no backbone '3'"]),
    (["method=toy", "backbone=mine.txt/"], ["no folder 'mine.txt/'"]),
    (["method=ecodiff", "~backbone"], ["~backbone"]),
    (["method=toy", "~method"], ["~method"]),
    # keys
    (["method=toy", "nothing=3"], ["no key 'nothing'"]),
    (["method=toy", "seed.x=1"], ["seed.x=1", "single value"]),
    (["method=toy", "method.lr.x=1"], ["method.lr", "{x: 1}"]),
    (["method=toy", "trainer.x.y=1"], ["trainer has no 'x'"]),
    (["method=toy", "choices.method=ecodiff"], ["no key 'choices'"]),
    (["method=toy", "hydra.run.dir=x"], ["no key 'hydra'"]),
    (["method=toy", "callbacks.progres.kind=plain"], ["'progress'"]),
    (["method=toy", "+callbacks.mine.kind=plain"], ["callbacks.mine._target_", "is missing"]),
    (["method=toy", "+callbacks.mine._target_=toy_plugin.toy.Nope"], ["no class 'Nope'"]),
    (["method=toy", "~nothing"], ["~nothing"]),
    (["method=toy", "~seed"], ["~seed"]),
    (["method=toy", "~test"], ["~test", "cannot be left out"]),
    (["method=toy", "~trainer._target_"], ["trainer._target_", "is missing"]),
    (["method=toy", "method._target_=os.system"], ["method._target_=os.system"]),
    (["method=toy", "method._target_=toy_plugin.toy.Nope"], ["no class 'Nope'"]),
    (["method=toy", "method._target_=3"], ["method._target_=3"]),
    # what the run sets itself
    (["method=toy", "trainer.callbacks=[]"], ["trainer.callbacks", "use callbacks="]),
    (["method=toy", "trainer.logger=true"], ["trainer.logger", "use logger="]),
    (["method=toy", "trainer.default_root_dir=x"], ["use run_dir="]),
    (["method=toy", "callbacks.checkpoints.folder=x"], ["callbacks.checkpoints.folder", "use run_dir="]),
    (["method=toy", "callbacks.checkpoints=3"], ["callbacks.checkpoints", "must be a block"]),
    # types, ranges, words
    (["method=toy", "seed=1.5"], ["is 1.5", "whole number"]),
    (["method=toy", "seed=true"], ["is true", "whole number"]),
    (["method=toy", "seed=null"], ["is null"]),
    (["method=toy", "seed='3'"], ["is '3'", "whole number"]),
    (["method=toy", "seed=99999999999"], ["< 4294967296"]),
    (["method=toy", "overwrite=yes"], ["'yes'", "true or false"]),
    (["method=toy", "method.lr=0"], ["is 0", "> 0"]),
    (["method=toy", "method.lr=inf"], ["finite"]),
    (["method=toy", "method.dropout=nan"], ["finite"]),
    (["method=toy", "method.lr={a:1}"], ["{a: 1}"]),
    (["method=toy", "trainer.precision=17"], ["is 17", "bf16-mixed"]),
    (["method=toy", "callbacks.checkpoints.every_n_train_steps=0"], ["is 0", ">= 1"]),
    (["method=toy", "callbacks.progress.kind=rih"], ["'rih'", "did you mean rich"]),
    (["method=ecodiff", "method.kinds=head"], ["'head'", "did you mean [head]"]),
    (["method=ecodiff", "method.kinds=[head,neuro]"], ["neuro", "head, neuron, modulation"]),
    (["method=ecodiff", "backbone.num_inference_steps=0"], ["is 0", ">= 1"]),
    (["method=ecodiff", "backbone.dtype=floatt32"], ["did you mean float32"]),
    (["method=ecodiff", "backbone.height=-64"], ["is -64"]),
    (["method=ecodiff", "backbone.pretrained=null"], ["backbone.pretrained"]),
    (["method=clip", "data=prompts"], ["data.drop_attribute", "PromptDataModule"]),
    (["method=toy", "data=concepts", "data.kind=objekt"], ["'objekt'", "did you mean object"]),
    (["method=toy", "data=concepts", "data.anchor={pistol:3}"], ["{pistol: 3}", "a mapping to text"]),
    (["method=toy", "data=concepts", "data.concept=pistl"], ["'pistl'", "did you mean 'pistol'"]),
    (["method=toy", "data=copro_v2", "data.categories=[violense]"], ["'violense'", "did you mean 'violence'"]),
    (["method=toy", "data=copro_v2", "data.experts=[hate,al]"], ["'al'", "did you mean 'all'"]),
    (["method=toy", "data=concepts", "data.anchor={pistol:cammera}"], ["'cammera'", "did you mean 'camera'"]),
    (["method=toy", "data=concepts", "data.neighbours=[foox]"], ["'foox'", "data.neighbours=[fox]"]),
    (["method=toy", "data=concepts", "data.filter_ratio=0"], ["is 0", "> 0 and <= 1"]),
    (["method=toy", "data=concepts", "data.neighbours=-1"], ["is -1", ">= 0 or a list"]),
    # overrides that cannot be read
    (["method=toy", ""], ["''", "key=value"]),
    (["method=toy", "="], ["key=value"]),
    (["method=toy", "a b=c"], ["a b=c", "cannot be read"]),
    (["method=toy", "method..lr=3"], ["method..lr=3"]),
    (["method=toy", "method.lr={"], ["method.lr={", "cannot be read"]),
    (["method=toy", "method.lr=${method.lr}"], ["method.lr=${method.lr}", "ecursive"]),
    (["method=toy", "method.lr=${oc.env:NO_SUCH_VARIABLE}"], ["NO_SUCH_VARIABLE"]),
    (["method=toy", "method.lr=???"], ["must be given"]),
    (["method=toy", "seed=foo(3)"], ["seed=foo(3)"]),
    (["method=toy", "name=a=b"], ["name=a=b", "'name=\"a=b\"'"]),
    (["method=toy", "name=\x1b[31mred"], [r"\x1b[31mred"]),
    (["method=toy", "seed=" + "\\n".join("abcdefghijklmnopqrst")], ["seed="]),
    (["method=toy", 'seed="a\nb\nc\nd\ne\nf\ng\nh\ni\nj\nk\nl\nm\nn\no"'], ["seed="]),
    (["method=toy", "seed=\udcff"], ["\\udcff"]),
    # flags
    (["method=toy", "--cfg", "all"], ["only --cfg job"]),
    (["method=toy", "--cgf"], ["--cgf", "'--cfg'"]),
    (["method=toy", "--seed=3"], ["without dashes"]),
    # sweeps
    (["method=toy", "-m", "seed=1,abc"], ["'abc'"]),
    (["method=toy", "-m", "seed=range(1,0)"], ["no value"]),
    (["method=toy", "-m", "method=glob(zzz)"], ["no value"]),
    (["method=toy", "-m", "seed=interval(0,1)"], ["seed=interval(0,1)"]),
    (["method=toy", "-m", "seed=1,2", "sweep_dir="], ["sweep_dir", "must name a folder"]),
    (["method=toy", "-m", "seed=1,2", "sweep_dir=mine.txt"], ["'mine.txt' is a file"]),
    # search path
    (["method=toy", "hydra.searchpath=3"], ["hydra.searchpath", "must be a list"]),
    (["method=toy", "hydra.searchpath=[ftp://there]"], ["ftp://"]),
    (["method=toy", "hydra.searchpath=[nowhere]"], ["no folder or package 'nowhere'"]),
    # places
    (["method=toy", "run_dir="], ["run_dir", "at least 1"]),
    (["method=toy", "run_dir=mine.txt"], ["'mine.txt' is a file"]),
    (["method=toy", "run_dir=mine.txt/run"], ["'mine.txt' is a file"]),
    (["method=toy", "runs_dir=mine.txt"], ["'mine.txt' is a file"]),
    (["method=toy", "run_dir=" + 300 * "x"], ["File name too long"]),
    (["method=toy", "run_dir=/proc/nobody/may/write"], ["'/proc/nobody'"]),
    (["method=toy", "resume=mine.txt"], ["'mine.txt' is not a checkpoint"]),
    (["method=toy", "resume=."], ["holds no checkpoints/last.ckpt"]),
    (["method=toy", "resume="], ["resume="]),
    (["method=ecodiff", "data.source=mine.csv"], ["no 'mine.csv' here"]),
    (["method=ecodiff", "method.judge=zoo:tiny_clp"], ["zoo:tiny_clp", "tiny_clip"]),
    (["method=ecodiff", "method.targets_folder=mine.txt"], ["'mine.txt' is a file"]),
    (["method=ecodiff", "backbone.pretrained=mine.txt"], ["is a file"]),
]


@pytest.mark.parametrize(("arguments", "words"), TYPED, ids=lambda value: ascii(" ".join(value))[1:60])
def test_typed(refused: Callable[..., str], arguments: list[str], words: list[str]) -> None:
    message = refused(*arguments, words=tuple(words))
    assert message.startswith("safelight: 1 problem,") or "-m" in arguments or "/proc" in message


# -- configuration files ----------------------------------------------------------------------------------------------

FILES: list[tuple[bytes, list[str]]] = [
    (b"# @package _global_\nmethod: [unclosed\n", ["not valid YAML", "bad.yaml"]),
    (b"\tmethod: 3", ["not valid YAML"]),
    (b"\xff\xfe\x00", ["UTF-8"]),
    (b"- a\n- b\n", ["method"]),
    (b"# @package _global_\nmethod: 3\n", ["method"]),
    (b"# @package _global_\nmethod:\n  lr: 3\n", ["method._target_", "is missing"]),
    (b"# @package _global_\ndefaults: 3\n", ["defaults"]),
    (b"# @package _global_\ndefaults:\n  - 3\n", ["defaults"]),
    (b"# @package _global_\ndefaults:\n  - override /data: nope\n", ["data/nope"]),
    (b"# @package _global_\nmethod:\n  _target_: toy_plugin.toy.Toy\n  lr: ${nope.nope}\n", ["nope.nope"]),
    (b"# @package _global_\nmethod:\n  _target_: toy_plugin.toy.Toy\ncallbacks: 3\ntrainer: 4\n", ["trainer"]),
    (b"# @package _global_\nmethod:\n  _target_: toy_plugin.toy.Toy\nlogger: [1]\n", ["bad"]),
]


@pytest.mark.parametrize(("content", "words"), FILES)
def test_configuration_file(refused: Callable[..., str], tmp_path: Path, content: bytes, words: list[str]) -> None:
    file = tmp_path / "configs" / "method" / "bad.yaml"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    refused(f"hydra.searchpath=[{tmp_path / 'configs'}]", "method=bad", words=tuple(words))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
def test_settings_beside_a_backbone_folder(refused: Callable[..., str], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "safelight.json").write_bytes(content)
    refused("method=toy", f"backbone={tmp_path / 'model'}", words=("safelight.json",))


# -- what only shows when the pieces are built -------------------------------------------------------------------------

BUILT: list[tuple[list[str], list[str]]] = [
    (["trainer.accelerator=tpuu"], ["tpuu"]),
    (["trainer.strategy=ddpp"], ["ddpp"]),
    (["trainer.devices=abc"], ["devices"]),
    (["trainer.devices=-5"], ["devices"]),
    (["trainer.max_steps=-7"], ["max_steps"]),
    (["trainer.val_check_interval=abc"], ["val_check_interval"]),
    (["data.batch_size=0"], ["batch_size is 0"]),
    (["data=null"], ["train_dataloader"]),
    (["method._target_=toy_plugin.toy.PointSet", "~method.lr", "~method.seed"], ["is not a LightningModule"]),
]


@pytest.mark.parametrize(("arguments", "words"), BUILT, ids=lambda value: ascii(" ".join(value))[1:60])
def test_built(refused: Callable[..., str], arguments: list[str], words: list[str]) -> None:
    refused("method=toy", "trainer=cpu", "trainer.max_steps=2", *arguments, words=tuple(words))


def test_a_run_folder_that_was_there_stays(refused: Callable[..., str], here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "notes.txt").write_text("mine")
    refused("method=toy", "trainer.accelerator=tpuu", "run_dir=mine", "overwrite=true", words=("tpuu",))


# -- as a user would ---------------------------------------------------------------------------------------------------

# Runs a program and says at its end whether torch was imported.
WATCHED = (
    "import atexit, sys\n"
    "atexit.register(lambda: print('torch' in sys.modules))\n"
    "from safelight.cli import {0}\n"
    "sys.exit({0}({1!r}))\n"
)


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """An interpreter of its own in a folder; the environment is that of ``clean_run_environment``."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize(
    ("main", "arguments", "word"),
    [
        ("train_main", ["method=ecodif", "trainer.max_step=3", "sed=1"], "3 problems"),
        ("train_main", ["method=ecodiff", "resume=mine.txt"], "is not a checkpoint"),
        ("train_main", ["method=ecodiff", "run_dir=mine.txt"], "is a file"),
        ("eval_main", ["ckpt_path=nowhere.ckpt"], "no file"),
    ],
)
def test_real_processes(here: Path, main: str, arguments: list[str], word: str) -> None:
    done = run_python(here, "-c", WATCHED.format(main, arguments))
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert word in done.stderr
    assert len(done.stderr.splitlines()) <= 15
    assert [(entry.name, entry.read_text()) for entry in here.iterdir()] == [("mine.txt", "mine")]


def test_the_script_itself(here: Path) -> None:
    done = run_python(here, str(REPOSITORY / "train.py"), "method=ecodif")
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'ecodiff'" in done.stderr
