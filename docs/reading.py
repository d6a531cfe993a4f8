"""What the documentation knows about the code, read from its sources; nothing is imported, so it builds anywhere."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src"
CONFIGS = REPOSITORY / "configs"
METHODS = SOURCE / "lightning_modules"


@dataclass
class Argument:
    """One keyword of a method's constructor."""

    name: str
    kind: str
    default: str
    text: str


@dataclass
class Method:
    """A method as its folder and its configuration describe it."""

    name: str
    sentence: str
    class_name: str
    summary: str
    details: str
    arguments: list[Argument]
    facts: dict[str, Any]
    readme: str
    config: str
    tuned: list[str] = field(default_factory=list)


@dataclass
class Experiment:
    """One published number: a file of ``configs/experiment``."""

    name: str
    sentence: str
    method: str
    paper: dict[str, dict[str, Any]]


def methods() -> list[Method]:
    """All shipped methods, in alphabetical order; found by their configuration like everywhere else."""
    return [_method(file) for file in sorted((CONFIGS / "method").glob("*.yaml"))]


def experiments() -> list[Experiment]:
    """All shipped experiments, in alphabetical order."""
    found = []
    for file in sorted((CONFIGS / "experiment").glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        method, paper = _method_and_paper(file)
        found.append(Experiment(file.stem, _sentence(text), method, paper))
    return found


def _method_and_paper(file: Path) -> tuple[str, dict[str, dict[str, Any]]]:
    """What an experiment picks and quotes; one that is built on another has these from there."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    method, paper = "", {}
    for entry in content["defaults"]:
        if isinstance(entry, str):
            method, paper = _method_and_paper(file.with_name(f"{entry}.yaml"))
        else:
            method = entry.get("override /method", method)
    return method, {**paper, **content.get("paper", {})}


def _sentence(text: str) -> str:
    """The first comment of a configuration file: its line of ``--help``."""
    return next(line[2:] for line in text.splitlines() if line.startswith("# ") and not line.startswith("# @"))


def _method(file: Path) -> Method:
    text = file.read_text(encoding="utf-8")
    name = file.stem
    class_name = yaml.safe_load(text)["method"]["_target_"].rpartition(".")[2]
    tree = ast.parse((METHODS / name / "module.py").read_text(encoding="utf-8"))
    node = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name)
    parts = re.split(r"\n\n(?=Args:\n)", ast.get_docstring(node) or "", maxsplit=1)
    summary, _, details = parts[0].partition("\n\n")
    readme = METHODS / name / "README.md"
    return Method(
        name=name,
        sentence=_sentence(text),
        class_name=class_name,
        summary=" ".join(summary.split()),
        details=details,
        arguments=_arguments(node, described(parts[1]) if len(parts) > 1 else {}),
        facts=_facts(tree, node),
        readme=readme.read_text(encoding="utf-8") if readme.is_file() else "",
        config=text,
        tuned=sorted(p.stem for p in (CONFIGS / "tuned").glob(f"{name}-*.yaml")),
    )


def described(section: str) -> dict[str, str]:
    """The ``Args:`` section of a docstring as name -> sentence."""
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _arguments(node: ast.ClassDef, texts: dict[str, str]) -> list[Argument]:
    (init,) = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
    pairs = zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True)
    return [
        Argument(a.arg, _kind(a.annotation), ast.unparse(d) if d else "required", texts.get(a.arg, ""))
        for a, d in pairs
    ]


def _kind(node: ast.expr | None) -> str:
    """An annotation in words: what may be typed."""
    if node is None:
        return ""
    text = ast.unparse(node)
    text = re.sub(r"Literal\[((?:[^\[\]])*)\]", lambda m: " \\| ".join(w.strip("' ") for w in m[1].split(",")), text)
    bounds = re.fullmatch(r"Annotated\[(\w+), (\w+)\((.*)\)\]", text)
    if bounds:
        signs = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
        named = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
        kind, rule, limits = bounds.groups()
        if rule in signs:
            return f"{kind} {signs[rule]} {limits}"
        return f"{kind} " + ", ".join(f"{named[k]} {v}" for k, v in (part.split("=") for part in limits.split(", ")))
    text = re.sub(r"Annotated\[(\w+), .*?\)\]", r"\1", text)
    return re.sub(r" \| ", r" \\| ", text)


def _facts(tree: ast.Module, node: ast.ClassDef) -> dict[str, Any]:
    """Class attributes that describe a method; constants of the module may stand in them."""
    known: dict[str, Any] = {"MappingProxyType": dict}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            known[statement.targets[0].id] = _value(statement.value, known)
    wanted = ("metric_names", "control_names", "paper_numbers", "monitor", "frozen")
    found: dict[str, Any] = {}
    for statement in node.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value = getattr(statement, "value", None)
        if isinstance(target, ast.Name) and target.id in wanted and value is not None:
            found[target.id] = _value(value, known)
    return found


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    try:
        return eval(compile(ast.Expression(node), "<class attribute>", "eval"), {"__builtins__": {}}, known)
    except Exception:
        return None


def rooms() -> dict[str, str]:
    """Name of every room of the package and the first sentence of its docstring."""
    found = {}
    for file in sorted(SOURCE.glob("*/__init__.py")):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        found[file.parent.name] = re.split(r"(?<=\.)\s", " ".join(text.split()))[0].rstrip(".")
    return found


def named() -> set[str]:
    """Rooms whose classes the configurations name: the command line builds these without importing them by hand."""
    found: set[str] = set()
    for file in CONFIGS.rglob("*.yaml"):
        found |= set(re.findall(r"_target_: safelight\.(\w+)", file.read_text(encoding="utf-8")))
    return found & set(rooms())


def arrows() -> dict[tuple[str, str], list[str]]:
    """``(importing room, imported room)`` -> the files that do it, over all imports at any depth of the code."""
    names = rooms()
    found: dict[tuple[str, str], list[str]] = {}
    for room in names:
        for file in sorted((SOURCE / room).rglob("*.py")):
            targets = {t for t in _imported(file) if t in names and t != room}
            for target in sorted(targets):
                found.setdefault((room, target), []).append(str(file.relative_to(SOURCE)))
    return found


def _imported(file: Path) -> set[str]:
    """Rooms that a file imports from."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {parts[1] for parts in (name.split(".") for name in found) if parts[0] == "safelight" and len(parts) > 1}
