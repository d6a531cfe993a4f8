"""Plug-ins are found by their entry point, listed, composed and validated; a broken one harms nobody."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from safelight.cli import app, compose, hydra_files, plugins
from safelight.cli.composing import as_overrides
from safelight.cli.helping import help_text
from safelight.cli.problems import ConfigError

pytestmark = pytest.mark.usefixtures("clean_run_environment")


def install(folder: Path, name: str, package: str) -> None:
    """What an installer leaves of a package's entry point."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[safelight.plugins]\n{name} = {package}\n")


def forget() -> None:
    plugins.installed.cache_clear()
    hydra_files.loader_over.cache_clear()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages."""
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield tmp_path
    for name in ("broken_plugin",):
        sys.modules.pop(name, None)
    forget()


def test_an_entry_point_is_enough(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "toys", "toy_plugin")
    assert compose(["method=toy"])["method"]["_target_"] == "toy_plugin.toy.Toy"
    assert "Fit a plane to random points" in help_text()
    assert app.train_main(["method=toy", "method.lrr=1"]) == 2
    assert "did you mean 'lr'" in capsys.readouterr().err


def test_without_it_the_method_is_unknown(site: Path) -> None:
    with pytest.raises(ConfigError, match="no method 'toy'"):
        compose(["method=toy"])
    assert "plane" not in help_text()


@pytest.mark.parametrize(
    ("package", "reason"), [("nowhere", "ModuleNotFoundError"), ("broken_plugin", "RuntimeError: it is broken")]
)
def test_a_broken_one_is_named_and_left_out(site: Path, package: str, reason: str) -> None:
    (site / "broken_plugin").mkdir()
    (site / "broken_plugin" / "__init__.py").write_text("raise RuntimeError('it is broken')")
    install(site, "bad", package)
    install(site, "toys", "toy_plugin")
    page = help_text()
    assert "plug-ins that cannot be used" in page
    assert f"bad: {package}.configs cannot be imported: {reason}" in page
    assert compose(["method=toy"])["choices"]["method"] == "toy"


def test_help_lists_what_the_search_path_adds(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.train_main(["--help", "hydra.searchpath=[pkg://toy_plugin.configs]"]) == 0
    assert "Fit a plane" in capsys.readouterr().out
    folder = Path(__file__).parents[2] / "toy_plugin" / "configs"
    assert app.train_main(["--help", f"hydra.searchpath=[{folder}]"]) == 0
    assert "Fit a plane" in capsys.readouterr().out
    assert app.train_main(["--help", "hydra.searchpath=[pkg://nowhere.configs]"]) == 2
    assert "no package 'nowhere.configs'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "value",
    [1, 1.5, 1e-7, True, None, "plain", "a b", "it's", 'say "no"', "1", "null", "true", "", "a,b", "[x]", "back\\slash",
     "c\\'d", "${seed}x", [1, "a b", None], [{"a": 1, "b": "x y"}], "-m", "0x10", "1e3"],
)  # fmt: skip
def test_values_of_a_plain_dict_arrive_as_they_are(value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (word,) = as_overrides({"name": value})
    (parsed,) = OverridesParser.create().parse_overrides([word])
    found = parsed.value()
    if isinstance(found, list):
        found = [str(item) if isinstance(item, str) else item for item in found]
    assert found == value
    assert type(found) is type(value) or isinstance(value, str)


def test_nested_and_dotted_keys_are_one() -> None:
    nested = as_overrides({"method": "toy", "trainer": {"max_steps": 3, "x": {"y": 1}}})
    assert nested == ["method=toy", "trainer.max_steps=3", "trainer.x.y=1"]
