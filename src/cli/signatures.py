"""Read constructor signatures from source files, without importing what they belong to.

Importing torch and Lightning costs seconds; a misspelt key should cost none of them. So the schema of a block of
configuration, which is the signature of the class it names, is read from the syntax tree of that class's file. Names in
annotations are looked up where the file imports them from; what cannot be known without importing counts as "anything".
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from safelight.errors import SafelightError

# Modules cheap enough to import for the names that annotations use.
_LIGHT_MODULES: Final = frozenset(
    {"typing", "typing_extensions", "collections.abc", "annotated_types", "pathlib", "datetime", "builtins", "types"}
)
_BUILTINS: Final[dict[str, Any]] = {
    t.__name__: t for t in (int, float, str, bool, list, dict, tuple, set, frozenset, bytes, complex)
} | {"None": None, "object": Any}
_MAX_HOPS: Final = 8


class _NotLiteral:
    """The type of ``NOT_LITERAL``: a default that only running the code could tell."""


NOT_LITERAL: Final = _NotLiteral()


class _Unknown:
    """A class that exists but that plain values cannot be an instance of (a Tensor, a Strategy)."""


@dataclass(frozen=True)
class Parameter:
    """One keyword of a constructor.

    Attributes:
        name: the keyword.
        annotation: its type for plain values; ``Any`` when nothing is known.
        required: whether it has no default.
        takes_object: whether an object built from a nested ``_target_`` fits as well.
        default: its default, ``NOT_LITERAL`` where that is not a plain value or there is none.
        doc: what the docstring says about it, on one line; empty when it says nothing.
    """

    name: str
    annotation: Any
    required: bool
    takes_object: bool = False
    default: Any = NOT_LITERAL
    doc: str = ""


@dataclass(frozen=True)
class Signature:
    """What a class or function may be called with.

    Attributes:
        target: dotted path that was asked for.
        parameters: keyword name to parameter.
        is_open: whether unknown keywords are accepted too (``**kwargs`` that end nowhere known).
    """

    target: str
    parameters: dict[str, Parameter]
    is_open: bool


@dataclass(frozen=True)
class _Found:
    """A top-level definition and the module whose names its annotations use."""

    module: str
    node: ast.AST


@cache
def module_file(name: str) -> Path | None:
    """Source file of a module, found from the file system without importing any parent package but the lookup's own."""
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for location in spec.submodule_search_locations or ():
        base = Path(location).joinpath(*rest)
        for candidate in (base / "__init__.py", base.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    return None


@cache
def _tree(module: str) -> ast.Module | None:
    file = module_file(module)
    if file is None:
        return None
    try:
        return ast.parse(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise SafelightError(f"{file}:{error.lineno}: {error.msg}") from error


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, including those inside ``if TYPE_CHECKING`` and ``try``."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements(statement.body)
            yield from _statements(statement.orelse)


def _absolute(statement: ast.ImportFrom, module: str) -> str:
    """Dotted path that a ``from ... import`` means inside ``module``."""
    if not statement.level:
        return statement.module or ""
    file = module_file(module)
    is_package = file is not None and file.name == "__init__.py"
    parts = module.split(".")
    parts = parts[: len(parts) - statement.level + (1 if is_package else 0)]
    return ".".join(parts + ([statement.module] if statement.module else []))


def _find(module: str, name: str, hops: int = _MAX_HOPS) -> _Found | None:
    """The definition of ``name`` as seen in ``module``, following imports."""
    tree = _tree(module)
    if tree is None or hops == 0:
        return None
    for statement in _statements(tree.body):
        if isinstance(statement, ast.ClassDef | ast.FunctionDef) and statement.name == name:
            return _Found(module, statement)
        if isinstance(statement, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in statement.targets
        ):
            return _Found(module, statement.value)
        if isinstance(statement, ast.AnnAssign) and statement.value and ast.unparse(statement.target) == name:
            return _Found(module, statement.value)
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    return _find(_absolute(statement, module), alias.name, hops - 1)
    return _find_in_package(module, name)


def _find_in_package(module: str, name: str) -> _Found | None:
    """A class that a package exports lazily: look through its files for one that defines it."""
    file = module_file(module)
    if file is None or file.name != "__init__.py" or not module.startswith("safelight."):
        return None
    pattern = re.compile(rf"^(class|def) {re.escape(name)}\b", re.MULTILINE)
    for candidate in sorted(file.parent.rglob("*.py")):
        if pattern.search(candidate.read_text(encoding="utf-8")):
            inner = candidate.relative_to(file.parent).with_suffix("").parts
            path = ".".join([module, *(part for part in inner if part != "__init__")])
            if path != module:
                return _find(path, name, hops=1)
    return None


def _imported_from(module: str, name: str) -> str | None:
    """The module a top-level name is imported from, or is itself (``import x``)."""
    tree = _tree(module)
    for statement in _statements(tree.body) if tree else ():
        if isinstance(statement, ast.ImportFrom):
            if any((alias.asname or alias.name) == name for alias in statement.names):
                return _absolute(statement, module)
        elif isinstance(statement, ast.Import):
            for alias in statement.names:
                if (alias.asname or alias.name.split(".")[0]) == name:
                    return alias.name if alias.asname else alias.name.split(".")[0]
    return None


def _evaluate(node: ast.expr, module: str, hops: int = _MAX_HOPS) -> Any:
    """Turn an annotation's syntax into a type; ``_Unknown`` where that would need an import."""
    if hops == 0:
        return Any
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str() as text):
            return _evaluate(ast.parse(text, mode="eval").body, module, hops - 1)
        case ast.Name(id=name):
            return _evaluate_name(name, module, hops)
        case ast.Attribute(value=ast.Name(id=owner), attr=attribute):
            source = _imported_from(module, owner)
            return getattr(importlib.import_module(source), attribute, Any) if source in _LIGHT_MODULES else _Unknown
        case ast.Attribute():
            return _Unknown
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _union([_evaluate(left, module, hops), _evaluate(right, module, hops)])
        case ast.Subscript(value=value, slice=index):
            return _evaluate_subscript(_evaluate(value, module, hops), index, module, hops)
    return Any


def _evaluate_name(name: str, module: str, hops: int) -> Any:
    source = _imported_from(module, name)
    if source in _LIGHT_MODULES:
        return getattr(importlib.import_module(source), name, Any)
    if source is None and name in _BUILTINS:
        return _BUILTINS[name]
    found = _find(module, name)
    if found is None or isinstance(found.node, ast.ClassDef):
        return _Unknown
    return _evaluate(found.node, found.module, hops - 1) if isinstance(found.node, ast.expr) else Any


def _evaluate_subscript(origin: Any, index: ast.expr, module: str, hops: int) -> Any:
    items = index.elts if isinstance(index, ast.Tuple) else [index]
    if origin is typing.Literal:
        try:
            return typing.Literal[tuple(ast.literal_eval(item) for item in items)]
        except ValueError:
            return Any
    if origin is typing.Annotated:
        base = _evaluate(items[0], module, hops)
        constraints = [c for item in items[1:] if (c := _constraint(item, module)) is not None]
        return typing.Annotated[(base, *constraints)] if constraints and base not in (Any, _Unknown) else base
    if origin in (Any, _Unknown):
        return origin
    if getattr(origin, "__name__", "") == "Callable":
        return _Unknown
    arguments = [... if isinstance(i, ast.Constant) and i.value is ... else _evaluate(i, module, hops) for i in items]
    if origin in (typing.Union, typing.Optional):
        return _union([*arguments, None] if origin is typing.Optional else arguments)
    arguments = [Any if argument is _Unknown else argument for argument in arguments]
    try:
        return origin[tuple(arguments)]
    except TypeError:
        return Any


def _constraint(node: ast.expr, module: str) -> Any:
    """``Interval(ge=0, le=1)`` and its relatives from annotated_types; None for anything else."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None
    if _imported_from(module, node.func.id) != "annotated_types":
        return None
    kind = getattr(importlib.import_module("annotated_types"), node.func.id, None)
    try:
        arguments = [ast.literal_eval(argument) for argument in node.args]
        keywords = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg}
    except ValueError:
        return None
    return kind(*arguments, **keywords) if kind else None


def _union(members: list[Any]) -> Any:
    """A union; unknown classes stay in it as ``_Unknown`` so that the caller can tell."""
    return Any if any(member is Any for member in members) else typing.Union[tuple(members)]  # noqa: UP007 - dynamic


def _plain(annotation: Any) -> tuple[Any, bool]:
    """The part of an annotation that plain values can match, and whether an object could match as well."""
    if annotation is _Unknown:
        return Any, True
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
        known = tuple(member for member in members if member is not _Unknown)
        return (typing.Union[known] if known else Any), len(known) < len(members)  # noqa: UP007 - dynamic
    return annotation, annotation is Any


def _signature(found: _Found, target: str, hops: int = _MAX_HOPS) -> Signature:
    """Signature of a function, or of a class through its own or inherited ``__init__``."""
    if isinstance(found.node, ast.FunctionDef):
        return _from_arguments(found.node, found.module, target, argument_docs(ast.get_docstring(found.node) or ""))
    assert isinstance(found.node, ast.ClassDef)
    own = next((s for s in found.node.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"), None)
    docs = argument_docs("\n".join(ast.get_docstring(node) or "" for node in (found.node, own) if node))
    signature = _from_arguments(own, found.module, target, docs) if own else Signature(target, {}, True)
    if not signature.is_open or hops == 0:
        return signature
    # No __init__, or one that hands keywords on: the first base class with a known constructor answers for the rest.
    for base in found.node.bases:
        parent = _find(found.module, base.id) if isinstance(base, ast.Name) else None
        if parent is not None and isinstance(parent.node, ast.ClassDef):
            inherited = _signature(parent, target, hops - 1)
            return Signature(target, inherited.parameters | signature.parameters, inherited.is_open)
    return signature


def argument_docs(docstring: str) -> dict[str, str]:
    """Argument name to its description, from the ``Args:`` section of a Google docstring."""
    docs: dict[str, list[str]] = {}
    inside, indent, name = False, 0, ""
    for line in docstring.splitlines():
        if line.strip() in ("Args:", "Arguments:"):
            inside, indent, name = True, 0, ""
            continue
        if not inside or not line.strip():
            continue
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            inside = False
            continue
        indent = indent or depth
        entry = re.match(r"\s*\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)", line) if depth == indent else None
        if entry:
            name = entry[1]
            docs[name] = [entry[2]]
        elif name:
            docs[name].append(line.strip())
    return {name: " ".join(" ".join(lines).split()) for name, lines in docs.items()}


def _literal(node: ast.expr | None) -> Any:
    try:
        return NOT_LITERAL if node is None else ast.literal_eval(node)
    except ValueError:
        return NOT_LITERAL


def _from_arguments(function: ast.FunctionDef, module: str, target: str, docs: dict[str, str]) -> Signature:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    parameters = {}
    for argument, default in pairs:
        if argument.arg in ("self", "cls"):
            continue
        evaluated = _evaluate(argument.annotation, module) if argument.annotation else Any
        annotation, takes_object = _plain(evaluated)
        parameters[argument.arg] = Parameter(
            argument.arg, annotation, default is None, takes_object, _literal(default), docs.get(argument.arg, "")
        )
    return Signature(target, parameters, arguments.kwarg is not None)


@cache
def class_attribute(target: str, name: str) -> Any:
    """A plain class attribute of the class at a dotted path or of the first base that has one; None if there is none.

    Args:
        target: for example ``safelight.lightning_modules.EcoDiff``.
        name: for example ``monitor``.
    """
    module, _, class_name = target.rpartition(".")
    found = _find(module, class_name) if module_file(module) else None
    for _ in range(_MAX_HOPS):
        if found is None or not isinstance(found.node, ast.ClassDef):
            return None
        for statement in found.node.body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            value = getattr(statement, "value", None)
            if isinstance(value, ast.expr) and any(isinstance(t, ast.Name) and t.id == name for t in targets):
                literal = _literal(value)
                return None if literal is NOT_LITERAL else literal
        base = next((b for b in found.node.bases if isinstance(b, ast.Name)), None)
        found = _find(found.module, base.id) if base else None
    return None


@cache
def source_of(target: str) -> ast.ClassDef | None:
    """The syntax tree of the class at a dotted path; None when there is no such class."""
    module, _, name = target.rpartition(".")
    found = _find(module, name) if module_file(module) else None
    return found.node if found is not None and isinstance(found.node, ast.ClassDef) else None


@cache
def signature_of(target: str) -> Signature:
    """Signature of the class or function at a dotted path, read from its source.

    Args:
        target: for example ``lightning.pytorch.Trainer``.

    Raises:
        SafelightError: there is no such module or no such name in it.
    """
    module, _, name = target.rpartition(".")
    if not module or module_file(module) is None:
        raise SafelightError(f"there is no module {module or target!r}")
    found = _find(module, name)
    if found is None or not isinstance(found.node, ast.ClassDef | ast.FunctionDef):
        raise SafelightError(f"module {module!r} has no class {name!r}")
    return _signature(found, target)
