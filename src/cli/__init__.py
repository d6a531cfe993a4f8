"""The command line, as functions: ``train.py``, ``eval.py``, notebooks and tests call the same ones.

Importing this package costs nothing; each name is loaded when it is first used::

    from safelight import cli

    config = cli.compose(["method=ecodiff", "trainer.max_steps=10"])
    summary = cli.train(config)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.lazy import lazy_exports

if TYPE_CHECKING:
    from safelight.cli.app import eval_main as eval_main
    from safelight.cli.app import main as main
    from safelight.cli.app import train_main as train_main
    from safelight.cli.composing import compose as compose
    from safelight.cli.evaluating import evaluate as evaluate
    from safelight.cli.running import train as train
    from safelight.cli.validation import validate as validate

_HOME = {
    "compose": "composing",
    "eval_main": "app",
    "evaluate": "evaluating",
    "main": "app",
    "train": "running",
    "train_main": "app",
    "validate": "validation",
}
__all__ = sorted(_HOME)
__getattr__, __dir__ = lazy_exports(__name__, _HOME)
