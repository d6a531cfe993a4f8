"""Files that are damaged, of another kind, or somebody else's: named, refused, and nothing left behind."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from safelight import zoo
from safelight.cli import app
from safelight.errors import SafelightError

PLUGIN = "hydra.searchpath=[pkg://toy_plugin.configs]"
pytestmark = pytest.mark.usefixtures("clean_run_environment")


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
    (here / "sweep" / "plan.json").write_text('{"jobs": [], "search": null}')
    refused("method=toy", "-m", "seed=1,2", "sweep_dir=sweep", words=("belongs to another sweep",))
    (here / "sweep" / "plan.json").write_text("{")
    refused("method=toy", "-m", "seed=1,2", "sweep_dir=sweep", words=("plan.json is damaged",))


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


@contextmanager
def refusal(*words: str) -> Iterator[None]:
    """The block must end in a ``SafelightError`` whose message has all these words."""
    with pytest.raises(SafelightError) as caught:
        yield
    for word in words:
        assert word in str(caught.value)


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
    (tmp_path / name).write_bytes(content)
    with refusal(*words):
        data_module(f"data.source={tmp_path / name}", *arguments)


# The same files where concept erasure reads them; what its own readers refuse is in tests/unit/datamodules.
CONCEPT_TABLES: list[tuple[str, str, bytes, list[str]]] = [
    ("source", "empty.csv", b"", ["empty.csv holds no prompts"]),
    ("source", "other.txt", b"a cat\n", ["'a cat' holds none of", "data.anchor"]),
    ("source", "few.txt", b"a pistol\n", ["few.txt holds 1 prompts with 'pistol'", "data.pairs=24"]),
    ("retain", "latin.tsv", "caf\u00e9\n".encode("latin-1"), ["data.retain", "latin.tsv is not text in UTF-8"]),
    ("retain", "short.txt", b"a cat\n", ["short.txt holds 1 different captions", "ask for 264"]),
    ("attack_file", "captions.csv", b"caption,url\na,b\n", ["['caption', 'url']", "no known format"]),
    ("attack_file", "seeds.csv", b"prompt,evaluation_seed\na,b\n", ["line 2 of seeds.csv", "'b' as evaluation_seed"]),
]


@pytest.mark.parametrize(("argument", "name", "content", "words"), CONCEPT_TABLES, ids=[r[1] for r in CONCEPT_TABLES])
def test_concept_file(tmp_path: Path, argument: str, name: str, content: bytes, words: list[str]) -> None:
    from safelight.cli import compose
    from safelight.cli.building import build_datamodule
    from safelight.errors import SafelightError

    (tmp_path / name).write_bytes(content)
    data = build_datamodule(
        compose(["method=ecodiff", "data=concepts", "data.anchor=camera", f"data.{argument}={tmp_path / name}"])
    )
    assert data is not None
    with pytest.raises(SafelightError) as caught:
        data.setup("fit")
    for word in words:
        assert word in str(caught.value)


def test_a_folder_of_prompts(data_module: Callable[..., object], tmp_path: Path) -> None:
    with refusal("is a folder"):
        data_module(f"data.source={tmp_path}")


@pytest.mark.parametrize("damage", ["archive", "picture", "missing"])
def test_emoji_archive(tmp_path: Path, damage: str) -> None:
    from safelight.datamodules.emoji import read_picture

    file, name = tmp_path / "images.zip", "noto/octopus.png"
    whole = zipfile.ZipFile(zoo.path("emoji") / "images.zip").read(name)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other.png" if damage == "missing" else name, whole[:200] if damage == "picture" else whole)
    if damage == "archive":
        file.write_bytes(file.read_bytes()[:300])
    with refusal("images.zip", name):
        read_picture(file, name)


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
