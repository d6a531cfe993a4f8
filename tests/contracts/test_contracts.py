"""Every method with a ``configs/method/*.yaml`` keeps the contract of ``safelight.testing.contracts``.

Its unit test says how: ``tests/unit/lightning_modules/test_<method>.py`` has a class ``TestContract(MethodContract)``.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from safelight.testing.contracts import MethodContract, discovered_methods

METHODS = discovered_methods()
UNIT_TESTS = Path(__file__).parents[1] / "unit" / "lightning_modules"


@pytest.fixture
def contracts(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """File and method of each contract. Only names leave it: a class found in this module would be collected again."""
    monkeypatch.syspath_prepend(UNIT_TESTS)
    found = {}
    for file in sorted(UNIT_TESTS.glob("test_*.py")):
        for value in vars(importlib.import_module(file.stem)).values():
            if isinstance(value, type) and issubclass(value, MethodContract) and value is not MethodContract:
                if vars(value).get("__test__") is False:
                    continue
                # What pytest would not collect is no contract that is kept.
                assert value.__name__.startswith("Test"), f"pytest passes over {file.name}'s {value.__name__}"
                found[file.name] = value.method
    return found


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_contract(name: str, contracts: dict[str, str]) -> None:
    file = f"test_{name}.py"
    assert contracts.get(file) == name, (
        f"tests/unit/lightning_modules/{file} needs a class TestContract(MethodContract) with method = {name!r}"
    )


def test_every_contract_has_a_method(contracts: dict[str, str]) -> None:
    assert sorted(contracts.values()) == METHODS
