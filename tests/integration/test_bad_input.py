"""Everything a user can get wrong: one screen, exit code 2, the culprit by name, and nothing left behind.

A table per room. All cases go through ``train_main`` and ``eval_main`` in this process; ``test_real_processes`` runs a
few as a user would, and makes sure that a misspelt word never waits for torch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from safelight.cli import app

TESTS = Path(__file__).parents[1]
REPOSITORY = TESTS.parent
PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
pytestmark = pytest.mark.usefixtures("clean_run_environment")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a user, who keeps one file in it."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    monkeypatch.chdir(folder)
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused, and checks the manners that all refusals share."""

    def run(*arguments: str, words: tuple[str, ...] = (), main: Callable[..., int] = app.train_main) -> str:
        before = tree(here)
        assert main([PLUGIN, *arguments] if main is app.train_main else list(arguments)) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert 1 <= len(message.splitlines()) <= 15, message
        assert "\x1b" not in message
        for word in words:
            assert word in message, message
        assert tree(here) == before
        return message

    return run


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


# -- files that are damaged, of another kind, or of somebody else ------------------------------------------------------


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the toy."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    assert app.train_main([PLUGIN, "method=toy", "trainer=cpu", "trainer.max_steps=6", f"run_dir={folder}"]) == 0
    return folder


def broken_checkpoints(folder: Path, good: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no checkpoints, and a word of the reason."""
    made = {name: (folder / f"{name}.ckpt", word) for name, word in {
        "empty": "not a checkpoint", "cut": "not a checkpoint", "flipped": "", "pickled": "could run code",
        "weights": "Safelight", "list": "not a checkpoint", "bare": "not a checkpoint",
    }.items()}  # fmt: skip
    content = good.read_bytes()
    made["empty"][0].write_bytes(b"")
    made["cut"][0].write_bytes(content[: len(content) // 2])
    with zipfile.ZipFile(made["flipped"][0], "w") as archive:
        archive.writestr("last/data.pkl", b"garbage")
    torch.save({"model": torch.nn.Linear(2, 2)}, made["pickled"][0])
    torch.save({"state_dict": {}}, made["weights"][0])
    torch.save([torch.zeros(2)], made["list"][0])
    made["bare"][0].write_bytes(b"\x80\x04}q\x00.")
    return made


KINDS = ("empty", "cut", "flipped", "pickled", "weights", "list", "bare")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_checkpoint(refused: Callable[..., str], toy_run: Path, tmp_path: Path, kind: str) -> None:
    file, word = broken_checkpoints(tmp_path, toy_run / "checkpoints" / "last.ckpt")[kind]
    refused(f"ckpt_path={file}", main=app.eval_main, words=(file.name, word))
    refused("method=toy", f"resume={file}", words=(file.name, word))


def test_a_checkpoint_of_another_method(refused: Callable[..., str], toy_run: Path) -> None:
    refused("method=ecodiff", f"resume={toy_run}", words=("is a checkpoint of toy, not of ecodiff", "method=toy"))


def test_a_checkpoint_of_another_shape(refused: Callable[..., str], toy_run: Path, tmp_path: Path) -> None:
    content = torch.load(toy_run / "checkpoints" / "last.ckpt", weights_only=True)
    content["state_dict"]["net.0.weight"] = torch.zeros(3, 3)
    torch.save(content, tmp_path / "other.ckpt")
    refused(f"ckpt_path={tmp_path / 'other.ckpt'}", main=app.eval_main, words=("does not fit", "net.0.weight"))


EVALUATED: list[tuple[list[str], list[str]]] = [
    ([], ["ckpt_path", "must be given"]),
    (["ckpt_path=mine.ckpt"], ["no file 'mine.ckpt'"]),
    (["ckpt_path=<run>"], ["is a folder", "best.ckpt"]),
    (["ckpt_path=<best>", "method=ecodiff"], ["the method is the checkpoint's"]),
    (["ckpt_path=<best>", "data.batch_sise=2"], ["'batch_size'"]),
    (["ckpt_path=<best>", "data.batch_size=x"], ["is 'x'"]),
    (["ckpt_path=<best>", "data=nope"], ["no data 'nope'"]),
    (["ckpt_path=<best>", "seed=${nope}"], ["nope"]),
    (["ckpt_path=<best>", "seed={"], ["seed={"]),
    (["ckpt_path=<best>", "eval_dir=."], ["is not empty"]),
    (["ckpt_path=<best>", "eval_dir=mine.txt"], ["'mine.txt' is a file"]),
    (["ckpt_path=<best>", "--fast"], ["--fast"]),
]


@pytest.mark.parametrize(("arguments", "words"), EVALUATED, ids=lambda value: " ".join(value)[:60])
def test_evaluated(refused: Callable[..., str], toy_run: Path, arguments: list[str], words: list[str]) -> None:
    best = toy_run / "checkpoints" / "best.ckpt"
    filled = [word.replace("<run>", str(toy_run)).replace("<best>", str(best)) for word in arguments]
    if plugged := [word for word in filled if word.startswith("data=")]:
        filled = [*(word for word in filled if word not in plugged), PLUGIN, *plugged]
    refused(*filled, main=app.eval_main, words=tuple(words))


def test_a_run_folder_in_use(refused: Callable[..., str], here: Path, toy_run: Path) -> None:
    shutil.copytree(toy_run, here / "used")
    message = refused("method=toy", "run_dir=used", words=("holds an earlier run", "resume=auto", "overwrite=true"))
    assert "1 problem" in message


def test_another_sweep_in_the_folder(refused: Callable[..., str], here: Path) -> None:
    (here / "sweep").mkdir()
    (here / "sweep" / "jobs.json").write_text("[]")
    refused("method=toy", "-m", "seed=1,2", "sweep_dir=sweep", words=("belongs to another sweep",))
    (here / "sweep" / "jobs.json").write_text("{")
    refused("method=toy", "-m", "seed=1,2", "sweep_dir=sweep", words=("jobs.json is damaged",))


# -- data and weights of a real method ---------------------------------------------------------------------------------

ECODIFF = ("method=ecodiff", "trainer=cpu", "method.judge=null", "data.size=4", "data.test_size=2", "data.batch_size=2")

TABLES: list[tuple[str, bytes, list[str], list[str]]] = [
    ("empty.csv", b"", [], ["empty.csv holds no prompts"]),
    ("blank.txt", b"\n\n \n", [], ["blank.txt holds no prompts"]),
    ("short.csv", b"a cat\na dog\n", [], ["holds 2 prompts", "ask for 6"]),
    ("latin.csv", "caf\u00e9\n".encode("latin-1") * 9, [], ["latin.csv is not text in UTF-8"]),
    ("latin.txt", "caf\u00e9\n".encode("latin-1") * 9, [], ["latin.txt is not text in UTF-8"]),
    ("named.csv", b"caption,url\na,b\n", ["data.column=prompt"], ["column='prompt'", "caption"]),
    ("narrow.tsv", b"a\tb\nc\td\n", ["data.column=2"], ["column=2", "2 column(s)"]),
    ("picture.csv", b"\x89PNG\r\n\x1a\n\x00\x00", [], ["picture.csv"]),
]


@pytest.fixture(scope="module")
def data_module() -> Callable[..., object]:
    """Builds the data of a configuration as a run does."""
    from safelight.cli import compose
    from safelight.cli.building import build_datamodule

    def build(*arguments: str) -> object:
        data = build_datamodule(compose([*ECODIFF, *arguments]))
        assert data is not None
        data.setup("fit")
        return data

    return build


@pytest.mark.parametrize(("name", "content", "arguments", "words"), TABLES, ids=[row[0] for row in TABLES])
def test_prompt_file(
    data_module: Callable[..., object], tmp_path: Path, name: str, content: bytes, arguments: list[str],
    words: list[str],
) -> None:  # fmt: skip
    from safelight.errors import SafelightError

    (tmp_path / name).write_bytes(content)
    with pytest.raises(SafelightError) as caught:
        data_module(f"data.source={tmp_path / name}", *arguments)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_of_prompts(data_module: Callable[..., object], tmp_path: Path) -> None:
    from safelight.errors import SafelightError

    with pytest.raises(SafelightError, match="is a folder"):
        data_module(f"data.source={tmp_path}")


@pytest.mark.parametrize("damage", ["archive", "picture", "missing"])
def test_emoji_archive(tmp_path: Path, damage: str) -> None:
    from safelight.datamodules.emoji import read_picture
    from safelight.errors import SafelightError

    file, name = tmp_path / "images.zip", "noto/octopus.png"
    whole = zipfile.ZipFile(zoo.path("emoji") / "images.zip").read(name)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other.png" if damage == "missing" else name, whole[:200] if damage == "picture" else whole)
    if damage == "archive":
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(SafelightError) as caught:
        read_picture(file, name)
    assert "images.zip" in str(caught.value)
    assert name in str(caught.value)


def damage_pipeline(folder: Path, kind: str) -> list[str]:
    """Break one thing in a pipeline folder; words that the message must have."""
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if kind == "cut":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind == "header":
        weights.write_bytes(b"\xff" * 64)
    elif kind == "pickled":
        torch.save({"w": torch.zeros(2)}, weights.with_suffix(".bin"))
        weights.unlink()
        return [".bin", "could run code".replace("could", "can")]
    elif kind == "index":
        (folder / "model_index.json").write_bytes(b"\xff{")
        return ["model_index.json"]
    elif kind == "list":
        (folder / "model_index.json").write_text("[]")
        return ["model_index.json"]
    elif kind == "no index":
        (folder / "model_index.json").unlink()
        return ["model_index.json"]
    elif kind == "config":
        (folder / "transformer" / "config.json").write_text("{")
        return [str(folder)]
    elif kind == "width":
        file = folder / "transformer" / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "num_attention_heads": config["num_attention_heads"] * 2}))
        return [str(folder)]
    elif kind == "manifest":
        (folder / "transformer" / "pruning.json").write_text("{}")
        return ["transformer"]
    elif kind == "settings":
        (folder / "safelight.json").write_text("[1]")
        return ["safelight.json"]
    return [weights.name]


DAMAGES = ("cut", "header", "pickled", "index", "list", "no index", "config", "width", "manifest", "settings")


@pytest.mark.skipif("tiny_flux" not in zoo.names(), reason="tiny_flux is not built in this checkout")
@pytest.mark.parametrize("kind", DAMAGES)
def test_pipeline_folder(refused: Callable[..., str], tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo.path("tiny_flux"), folder)
    words = damage_pipeline(folder, kind)
    refused(*ECODIFF, f"backbone={folder}", words=tuple(words))


# -- as a user would ---------------------------------------------------------------------------------------------------

# Runs a program and says at its end whether torch was imported.
WATCHED = (
    "import atexit, sys\n"
    "atexit.register(lambda: print('torch' in sys.modules))\n"
    "from safelight.cli import {0}\n"
    "sys.exit({0}({1!r}))\n"
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
    environment = {k: v for k, v in os.environ.items() if k != "SAFELIGHT_RUN_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.format(main, arguments)], cwd=here, env=environment, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == "False\n"
    assert word in done.stderr
    assert len(done.stderr.splitlines()) <= 15
    assert tree(here) == {"mine.txt": b"mine"}


def test_the_script_itself(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), "method=ecodif"], cwd=here, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'ecodiff'" in done.stderr
