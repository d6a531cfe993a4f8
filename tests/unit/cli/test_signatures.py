"""Signatures read from source files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import pytest

from safelight.cli.signatures import signature_of
from safelight.cli.validation import check_value, describe
from safelight.errors import SafelightError

SOURCE = '''
from __future__ import annotations
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Optional
import torch
from annotated_types import Ge, Interval
from torch import nn
from .kinds import Kind, Size

class Base(nn.Module):
    def __init__(self, width: int, *, depth: Annotated[int, Ge(1)] = 2) -> None: ...

class Child(Base):
    """No constructor of its own."""

class Wrapper(Base):
    def __init__(self, *, ratio: Annotated[float, Interval(ge=0, le=1)] = 0.5, kind: Kind = "a", size: Size = 1,
                 net: nn.Module | str | None = None, betas: tuple[float, float] = (0.9, 0.99),
                 names: Sequence[str] = (), late: "Optional[int]" = None, **kwargs: Any) -> None: ...
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that would fail if anybody imported it."""
    name = f"pkg_{tmp_path.name.replace('-', '_')}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "models.py").write_text(SOURCE)
    (folder / "kinds.py").write_text(
        'from typing import Literal, Union\nKind = Literal["a", "b"]\nSize = Union[int, Kind]\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    return f"{name}.models"


def test_inherited_constructor(package: str) -> None:
    signature = signature_of(f"{package}.Child")
    assert list(signature.parameters) == ["width", "depth"]
    assert signature.parameters["width"].required
    assert not signature.parameters["depth"].required
    assert not signature.is_open


def test_keywords_handed_on_belong_to_the_base(package: str) -> None:
    signature = signature_of(f"{package}.Wrapper")
    assert {"width", "depth", "ratio", "kind"} <= set(signature.parameters)
    assert not signature.is_open


def test_aliases_are_followed_to_their_module(package: str) -> None:
    parameters = signature_of(f"{package}.Wrapper").parameters
    assert parameters["kind"].annotation == Literal["a", "b"]
    assert set(get_args(parameters["size"].annotation)) == {int, Literal["a", "b"]}
    assert parameters["late"].annotation == int | None


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("ratio", [0, 1, 0.25], [2, -0.1, "0.5", True, None]),
        ("kind", ["a"], ["c", 1]),
        ("depth", [1], [0, 1.5, "2"]),
        ("betas", [[0.9, 0.95]], [[0.9], "ab", [0.9, "x"]]),
        ("names", [[], ["x"]], ["x", [1]]),
        ("net", [None, "unet", {"_target_": "torch.nn.Linear"}], [3, {"a": 1}]),
    ],
)
def test_values_are_held_against_annotations(package: str, name: str, good: list[Any], bad: list[Any]) -> None:
    parameter = signature_of(f"{package}.Wrapper").parameters[name]
    assert [check_value(parameter, value) for value in good] == [None] * len(good)
    assert all(check_value(parameter, value) for value in bad)


def test_words_for_annotations(package: str) -> None:
    parameters = signature_of(f"{package}.Wrapper").parameters
    assert describe(parameters["ratio"].annotation) == "a number >= 0 and <= 1"
    assert describe(parameters["betas"].annotation) == "a list of 2: [a number, a number]"
    assert describe(int | None) == "a whole number or null"
    assert describe(Literal["a"] | Literal["b"] | None) == "one of a, b or null"


def test_missing_module_and_class(package: str) -> None:
    with pytest.raises(SafelightError, match=r"no module 'nowhere\.at_all'"):
        signature_of("nowhere.at_all.Thing")
    with pytest.raises(SafelightError, match="no class 'Absent'"):
        signature_of(f"{package}.Absent")


def test_the_trainer_without_importing_lightning() -> None:
    code = (
        "import sys; from safelight.cli.signatures import signature_of\n"
        "p = signature_of('lightning.pytorch.Trainer').parameters\n"
        "assert p['max_steps'].annotation is int and p['strategy'].takes_object, p\n"
        "assert 'bf16-mixed' in str(p['precision'].annotation)\n"
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
