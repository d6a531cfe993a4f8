"""Who may import whom, and what may not be imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import safelight
from safelight.lightning_modules import _homes

ROOT = Path(safelight.__file__).parent
# A room and the rooms of the house it may look into. Anything may use `safelight.errors`, `lazy` and `quiet`.
MAY_IMPORT = {
    "cli": {"lightning_modules", "generators", "masking", "metrics", "reporting", "datamodules", "callbacks", "zoo"},
    "lightning_modules": {"generators", "masking", "metrics", "probing", "reporting", "zoo"},
    "generators": {"masking", "zoo"},
    "masking": set(),
    "metrics": {"zoo"},
    "reporting": set(),
    "datamodules": {"zoo"},
    "callbacks": {"probing", "reporting"},
    "probing": {"zoo"},
    "zoo": {"lightning_modules", "datamodules", "generators", "metrics", "reporting"},
}
# What tests and plug-in authors use may reach everywhere.
MAY_IMPORT["testing"] = set(MAY_IMPORT)
# Single files that everything stands on.
MAY_IMPORT |= {"errors": set(), "lazy": set(), "quiet": set(), "__init__": set()}
# Libraries that belong to one room, and one that belongs nowhere: a second copy of Lightning.
ONLY_IN = {"hydra": {"cli"}, "omegaconf": {"cli"}, "submitit": {"cli"}, "optuna": {"cli"}, "pytorch_lightning": set()}
LIGHT = ["safelight", "safelight.cli", "safelight.cli.app", "safelight.cli.composing", "safelight.cli.validation"]
HEAVY = {"torch", "lightning", "diffusers", "transformers", "torchmetrics", "peft"}


def imported(file: Path) -> Iterator[str]:
    """Dotted paths of everything a file imports, at any depth."""
    module = ["safelight", *file.relative_to(ROOT).with_suffix("").parts]
    package = module[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def rooms() -> list[str]:
    """Folders of the package."""
    return sorted(p.name for p in ROOT.iterdir() if (p / "__init__.py").is_file() and p.name != "configs")


def files_of(room: str) -> list[Path]:
    """A room's files; a single file at the top of the package is a room of its own."""
    return sorted((ROOT / room).rglob("*.py")) if room in rooms() else [ROOT / f"{room}.py"]


def test_every_file_is_in_a_room_with_a_rule() -> None:
    assert {*rooms(), *(file.stem for file in ROOT.glob("*.py"))} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_no_arrow_runs_up(room: str) -> None:
    wrong = []
    for file in files_of(room):
        for name in imported(file):
            parts = name.split(".")
            if parts[0] != "safelight" or parts[1:2] in ([room], ["errors"], ["lazy"], ["quiet"], ["__version__"]):
                continue
            # Scripts that build the zoo may use everything; the package itself only finds folders.
            if room == "zoo" and file.name != "__init__.py":
                continue
            # `import safelight` alone does not say what it is after.
            if len(parts) < 2 or parts[1] not in MAY_IMPORT[room]:
                wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert wrong == []


@pytest.mark.parametrize("library", sorted(ONLY_IN))
def test_a_library_stays_in_its_room(library: str) -> None:
    found = {
        room
        for room in MAY_IMPORT
        for file in files_of(room)
        if any(name.split(".")[0] == library for name in imported(file))
    }
    assert found == ONLY_IN[library]


def test_methods_do_not_import_each_other_nor_what_they_share_a_method() -> None:
    folder = ROOT / "lightning_modules"
    methods = {file.parent.name for file in folder.glob("*/__init__.py")}
    # `from safelight.lightning_modules import EcoDiff` means the folder of the class.
    home_of = {name: home.partition(".")[0] for name, home in _homes().items()} | {name: name for name in methods}
    wrong = []
    for file in sorted(folder.rglob("*.py")):
        own = file.relative_to(folder).parts[0]
        if own == "__init__.py":  # it names all of them, for type checkers
            continue
        for name in imported(file):
            parts = name.split(".")
            if parts[:2] == ["safelight", "lightning_modules"] and len(parts) > 2:
                home = home_of.get(parts[2])
                if home in methods - {own}:
                    wrong.append(f"{file.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_nothing_heavy_before_it_is_needed() -> None:
    packages = [f"safelight.{room}" for room in rooms() if room != "testing"]
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT + packages!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted({HEAVY!r} & set(sys.modules))\n"
        "    assert not heavy, f'{name} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_the_source_folder_is_refused() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT.parent)!r}); import src"
    if ROOT.name != "src":
        pytest.skip("not an editable install")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "import 'safelight', not 'src'" in done.stderr
