"""Command lines in processes of their own that start warm, so that a test may kill many of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from safelight.testing.running import TIMEOUT, free_port, rank_variables

# What a run imports: done once, in the server that all processes are forked from. It never computes anything, so
# nothing that a fork would break (a GPU, autograd's threads) has been started in it.
_WARM = [
    "torch", "lightning.pytorch", "torchmetrics", "tensorboard", "safelight.cli.running", "safelight.cli.validation",
    "safelight.callbacks.resume", "safelight.lightning_modules.base", "safelight.reporting.report",
    "safelight.datamodules.loading", "safelight.testing.signals",
    # A second and a half of every run that has a pipeline.
    "diffusers.pipelines.flux.pipeline_flux", "transformers.models.clip.modeling_clip", "peft",
]  # fmt: skip
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_WARM)


@dataclass(frozen=True)
class Finished:
    """How a command line ended.

    Attributes:
        returncode: exit code; minus the number of the signal for a killed process.
        stdout: all of standard output.
        stderr: all of standard error.
    """

    returncode: int
    stdout: str
    stderr: str


def train(folder: Path, *arguments: str, ranks: int = 1, **variables: str) -> Finished:
    """``python train.py <arguments>`` in a folder; with more ranks, as ``torchrun`` starts it.

    When one process ends badly, all are killed with all that they started: neither loader workers nor other ranks
    outlive it, as on a machine that goes down.

    Args:
        folder: the current folder of the run. Output goes into files beside it, not into it.
        arguments: the command line without the program.
        ranks: processes; they find each other through the variables of ``torchrun``.
        variables: further environment variables.

    Returns:
        What the process did that failed first; what rank 0 did when none failed.
    """
    port = free_port() if ranks > 1 else 0
    processes, outputs = [], []
    for rank in range(ranks):
        own = rank_variables(rank, ranks, port) if ranks > 1 else {}
        paths = [folder.with_name(f"{folder.name}.{rank}.{stream}") for stream in ("out", "err")]
        task = (str(folder), list(arguments), own | variables, *map(str, paths))
        processes.append(_context.Process(target=_train, args=task))
        outputs.append(paths)
    for process in processes:
        process.start()
    shown = _first_that_fails(processes)
    code = processes[shown].exitcode
    assert code is not None
    return Finished(code, *(path.read_text() for path in outputs[shown]))


def _first_that_fails(processes: list[ForkServerProcess]) -> int:
    """Wait until all have ended well, or one has failed or hangs; then nothing of any of them is left.

    Returns:
        Rank of the one that failed; 0 when none has.

    Raises:
        TimeoutError: one hangs. It is killed too, but must not pass for one that killed itself.
    """
    deadline = time.monotonic() + TIMEOUT
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    failed, hangs = None, False
    while running and failed is None:
        ready = wait(list(running), deadline - time.monotonic())
        ended = [running.pop(sentinel) for sentinel in list(running) if sentinel in ready]
        if not ended:
            failed, hangs = min(running.values()), True
        failed = next((rank for rank in ended if processes[rank].exitcode != 0), failed)
    for process in processes:
        assert process.pid is not None
        if failed is not None:
            process.kill()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.join()
    if hangs:
        raise TimeoutError(f"a run did not end within {TIMEOUT} s")
    return failed or 0


def _train(folder: str, arguments: list[str], variables: dict[str, str], out: str, err: str) -> None:
    os.setpgid(0, 0)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    # Buffered like any program whose output goes to a file.
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    for name in ("SAFELIGHT_RUN_DIR", "HYDRA_FULL_ERROR"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    os.chdir(folder)
    import torch

    from safelight.cli import app

    # Many tests share a machine, and with more threads the order of sums would be theirs to choose.
    torch.set_num_threads(1)
    code = app.train_main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
