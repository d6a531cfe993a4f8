"""Command lines in processes of their own that start warm, so that a test may kill many of them."""

from __future__ import annotations

import multiprocessing
import os
import sys
from dataclasses import dataclass
from pathlib import Path

# What a run imports: done once, in the server that all processes are forked from. It never computes anything, so
# nothing that a fork would break (a GPU, autograd's threads) has been started in it.
_WARM = [
    "torch", "lightning.pytorch", "torchmetrics", "tensorboard", "safelight.cli.running", "safelight.callbacks.resume",
    "safelight.lightning_modules.base", "safelight.reporting.report", "safelight.datamodules.loading",
]  # fmt: skip
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_WARM)


@dataclass(frozen=True)
class Finished:
    """How a process ended; ``returncode`` is minus the signal's number for a killed one."""

    returncode: int
    stdout: str
    stderr: str


def _train(folder: str, arguments: list[str], variables: dict[str, str], out: str, err: str) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    # Buffered like any program whose output goes to a file.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    for name in ("SAFELIGHT_RUN_DIR", "HYDRA_FULL_ERROR"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    os.chdir(folder)
    from safelight.cli import app

    code = app.train_main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def train(folder: Path, *arguments: str, **variables: str) -> Finished:
    """``python train.py <arguments>`` in a folder, with extra environment variables."""
    out, err = (folder.with_name(f"{folder.name}.{stream}") for stream in ("out", "err"))
    process = _context.Process(target=_train, args=(str(folder), list(arguments), variables, str(out), str(err)))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return Finished(process.exitcode, out.read_text(), err.read_text())
