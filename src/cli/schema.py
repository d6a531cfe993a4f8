"""JSON schema of a configuration, derived from the same constructor signatures that the command line checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from safelight.cli.crosschecks import TARGET
from safelight.cli.signatures import NOT_LITERAL, Parameter, signature_of
from safelight.cli.validation import BACKBONE, RUN_KEYS
from safelight.errors import SafelightError

# `${seed}` may stand wherever a value does.
_REFERENCE: Final = {"type": "string", "pattern": r"\$\{.+\}"}
_ANYTHING: Final[dict[str, Any]] = {}


def schema_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Schema of files that hold (parts of) a configuration like this one.

    It fits a run's ``config.yaml`` and ``experiment/``, ``tuned/`` and ``local/`` files for the same method and data.
    No key is required, because such files give only what differs.

    Args:
        config: as ``compose`` returns it.
    """
    properties: dict[str, Any] = {
        "defaults": {"type": "array", "description": "other files this one builds on"},
        "choices": {"type": "object"},
    }
    for key, annotation in RUN_KEYS.items():
        properties[key] = _value(Parameter(key, annotation, required=False))
    for key, value in config.items():
        if key not in properties:
            properties[key] = _block(value, key)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"Safelight: {(config.get('choices') or {}).get('method')}",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _block(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        return _ANYTHING
    target = value.get(TARGET, BACKBONE if where == "backbone" else None)
    if target is None:
        inner = {key: _block(block, f"{where}.{key}") for key, block in value.items()}
        return {"type": ["object", "null"], "properties": inner}
    try:
        signature = signature_of(str(target))
    except SafelightError:
        return _ANYTHING
    properties = {name: _value(parameter) for name, parameter in signature.parameters.items()}
    properties[TARGET] = {"type": "string", "description": "the class these keys are passed to"}
    block = {"type": "object", "properties": properties, "additionalProperties": signature.is_open}
    return {"anyOf": [block, {"type": "null"}, _REFERENCE]}


def _value(parameter: Parameter) -> dict[str, Any]:
    """Schema of one argument, with its meaning and its default."""
    found: dict[str, Any] = (
        {"anyOf": [*_alternatives(parameter), _REFERENCE]} if parameter.annotation is not Any else {}
    )
    if parameter.doc:
        found["description"] = parameter.doc
    if parameter.default is not NOT_LITERAL:
        found["default"] = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
    return found


def _alternatives(parameter: Parameter) -> list[dict[str, Any]]:
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticUserError
    from pydantic_core import SchemaError

    try:
        adapter = TypeAdapter(parameter.annotation, config=ConfigDict(arbitrary_types_allowed=True))
        found = adapter.json_schema()
    except (PydanticUserError, SchemaError, TypeError):
        return [_ANYTHING]
    nested = {"type": "object", "required": [TARGET]}
    return [found, nested] if parameter.takes_object else [found]
