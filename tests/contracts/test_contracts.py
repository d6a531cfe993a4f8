"""Every method with a ``configs/method/*.yaml`` keeps the contract of ``safelight.testing.contracts``.

How a method is made tiny stands in ``methods/<method>.py``, in a class ``Contract``; a method without one fails here.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from safelight.testing.contracts import MethodContract, discovered_methods

TOY = "toy"
METHODS = sorted({*discovered_methods(), TOY})
ENTRIES = Path(__file__).parent / "methods"

for _name in METHODS:
    if (ENTRIES / f"{_name}.py").is_file():
        # pytest collects by the name in this module.
        globals()[f"Test_{_name}"] = importlib.import_module(f"contracts.methods.{_name}").Contract


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_contract(name: str) -> None:
    contract = globals().get(f"Test_{name}")
    assert contract is not None, f"write tests/contracts/methods/{name}.py with a class Contract(MethodContract)"
    assert issubclass(contract, MethodContract)
    assert contract.method == name


def test_every_contract_has_a_method() -> None:
    assert {file.stem for file in ENTRIES.glob("*.py")} == set(METHODS)
