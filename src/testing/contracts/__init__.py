"""The contract that every method keeps, as tests: subclass :class:`MethodContract` once per method and get them all.

    from safelight.testing.contracts import MethodContract

    class TestMine(MethodContract):
        method = "mine"                                        # configs/method/mine.yaml
        opens_with = "import json; json.loads((folder / 'mine.json').read_text())"

        def overrides(self):
            return ["hydra.searchpath=[pkg://my_package.configs]", "data.size=8"]

Everything runs on the CPU on the method's own configuration, made tiny by ``overrides``. In a ``conftest.py``,
``pytest.register_assert_rewrite("safelight.testing.contracts")`` makes failures say more.
"""

from __future__ import annotations

from collections.abc import Sequence

from safelight.cli.composing import options
from safelight.testing.contracts.killing import Killing
from safelight.testing.contracts.sharding import Sharding
from safelight.testing.contracts.storing import Storing
from safelight.testing.contracts.training import Training

__all__ = ["MethodContract", "discovered_methods"]


def discovered_methods(searchpath: Sequence[str] = ()) -> list[str]:
    """Names of all methods that have a ``configs/method/<name>.yaml``.

    Args:
        searchpath: further places of configurations, such as ``pkg://my_package.configs``.
    """
    return options("method", searchpath)


class MethodContract(Training, Storing, Sharding, Killing):
    """What a method promises, tested on a tiny instance of it.

    What a subclass says about its method is described in :class:`~safelight.testing.contracts.instance.Instance`.
    """
