"""Short runs for tests: a quiet trainer, what happened in it, and the same code in other processes."""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import multiprocessing
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

TIMEOUT = 240
"""Seconds after which another process counts as hanging."""


def quiet_trainer(**settings: Any) -> Trainer:
    """A CPU trainer that prints and writes nothing, and whose length only ``max_steps`` limits."""
    chosen: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return Trainer(**(chosen | settings))


class Watch(Callback):
    """Losses of all batches, which frozen modules were seen in training mode, and what the optimisers held."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.training: set[str] = set()
        self.optimised: dict[int, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Look before the step."""
        frozen = getattr(pl_module, "frozen", ())
        for name in frozen:
            part = getattr(pl_module, name, None)
            if isinstance(part, nn.Module):
                self.training |= {f"{name}.{path}".rstrip(".") for path, m in part.named_modules() if m.training}
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                self.optimised |= {id(parameter): parameter for parameter in group["params"]}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning hands over the loss divided by the number of accumulated batches."""
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses.append(float(loss) * trainer.accumulate_grad_batches)


def digest(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Hash of each tensor's bits by name."""
    return {
        name: hashlib.sha256(
            value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for name, value in tensors
        if value.numel()
    }


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """Largest absolute difference between two states, and where it is.

    Raises:
        AssertionError: the states have different keys.
    """
    assert a.keys() == b.keys(), f"only one of the states has {sorted(a.keys() ^ b.keys())[:5]}"
    gaps = {key: (a[key].double() - b[key].double()).abs().max().item() for key in a if a[key].numel()}
    worst = max(gaps, key=lambda key: gaps[key])
    return gaps[worst], worst


# -- other processes -------------------------------------------------------------------------------------------------


@cache
def _pool() -> tuple[ProcessPoolExecutor, ProcessPoolExecutor]:
    """Two fresh interpreters that stay for the next task: importing torch and diffusers takes longer than a task.

    Each has a queue of its own, so that it is the same rank every time: torch remembers which shard is whose.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=_start), ProcessPoolExecutor(1, context, initializer=_start)


def _start() -> None:
    faulthandler.enable()
    torch.set_num_threads(1)


def in_fresh_process(task: Callable[..., Any], *arguments: Any) -> Any:
    """What ``task`` returns in a process that has not imported what the tests of this one have.

    Args:
        task: a function or method that can be pickled.
        arguments: its arguments.
    """
    return _results([_pool()[0].submit(_alone, task, arguments)])[0]


def on_two_ranks(task: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``task`` returns in each of two processes that find each other as ranks 0 and 1 of a process group.

    Where a signal ends one of them, the task runs once more in two fresh ones: gloo's threads free tensors while Python
    goes on, and once in many hundred runs the process does not survive that (``free(): invalid pointer``).

    Args:
        task: a function or method that can be pickled; a ``Trainer(devices=2, strategy="ddp")`` in it joins the group.
        arguments: its arguments.

    Raises:
        BrokenProcessPool: a process was ended a second time.
    """
    try:
        return _on_two_ranks(task, arguments)
    except BrokenProcessPool:
        warnings.warn(f"{task} ended a process, see its error output; it runs once more", stacklevel=2)
        return _on_two_ranks(task, arguments)


def _on_two_ranks(task: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
    port = free_port()
    return _results([_pool()[rank].submit(_as_rank, rank, port, task, arguments) for rank in (0, 1)])


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def rank_variables(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment variables that ``torchrun`` gives to one process of one machine.

    Args:
        rank: of the process.
        ranks: number of processes.
        port: where rank 0 waits for the others.
    """
    return {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip


def _results(futures: list[Future[Any]]) -> list[Any]:
    done, waiting = wait(futures, TIMEOUT, FIRST_EXCEPTION)
    failed = next((future.exception() for future in done if future.exception()), None)
    if failed or waiting:
        # The other rank would wait for ever.
        for pool in _pool():
            for process in pool._processes.values():
                process.kill()
            pool.shutdown(wait=False, cancel_futures=True)
        _pool.cache_clear()
        raise failed or TimeoutError(f"no result after {TIMEOUT} s")
    return [future.result() for future in futures]


def _alone(task: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    with without_hydra():
        return task(*arguments)


def _as_rank(rank: int, port: int, task: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    variables = rank_variables(rank, 2, port)
    os.environ |= variables
    try:
        return task(*arguments)
    finally:
        if torch.distributed.is_initialized():
            gc.collect()
            torch.distributed.destroy_process_group()
        for name in variables:
            del os.environ[name]


@contextmanager
def without_hydra() -> Iterator[None]:
    """Importing Hydra or OmegaConf fails inside the block, with the traceback of who did it."""
    blocked = ("hydra", "omegaconf")
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in blocked}
    for name in kept:
        del sys.modules[name]
    sys.modules |= dict.fromkeys(blocked)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in blocked:
            del sys.modules[name]
        sys.modules |= kept


def without_safelight(code: str, folder: Path) -> str:
    """Run Python lines in an interpreter that cannot import safelight.

    Args:
        code: may use ``folder``.
        folder: a path.

    Returns:
        What was printed.

    Raises:
        AssertionError: the lines failed; the message is their error output.
    """
    start = f"import sys\nsys.modules['safelight'] = None\nfrom pathlib import Path\nfolder = Path({str(folder)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, check=False, timeout=TIMEOUT, cwd=folder
    )
    assert done.returncode == 0, f"the export does not open without safelight:\n{done.stderr[-3000:]}"
    return done.stdout
