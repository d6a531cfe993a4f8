"""Two processes learn the masks that one process learns on the same global batch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from ecodiff_toys import toy_ecodiff, toy_generator, trainer

from safelight.datamodules.loading import ResumableLoader
from safelight.datamodules.prompts import PromptDataset

STEPS = 3


def train(batch_size: int, correction: str, precision: str, **settings: object) -> dict[str, torch.Tensor]:
    generator = toy_generator(steps=3)
    if precision == "64-true":
        generator.denoiser.double()
    module = toy_ecodiff(generator, beta=0.01, correction=correction, correction_samples=6)
    settings["precision"] = precision
    data = PromptDataset([str(i % 10) for i in range(24)])
    trainer(max_steps=STEPS, **settings).fit(module, ResumableLoader(data, batch_size=batch_size, shuffle=True))
    pairs = torch.tensor([seed for _, seed in module.calibration_pairs])
    return module.bank.scores() | {"multiplier": module.target.multiplier.clone(), "pairs": pairs}


def _worker(rank: int, folder: str, port: int, *how: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        torch.save(train(2, *how, devices=2, strategy="ddp"), f"{folder}/{rank}.pt")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


# Gradients with the correction in sight are small differences of large terms, and Adam divides by their size: single
# precision alone moves them by 6e-6 here. Double precision shows that nothing else does.
@pytest.mark.ddp
@pytest.mark.parametrize(("correction", "precision"), [("after", "32-true"), ("joint", "64-true")])
def test_two_processes_learn_what_one_learns(correction: str, precision: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(str(tmp_path), port, correction, precision), nprocs=2)
    one = train(4, correction, precision)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    assert max((value - 3).abs().max().item() for name, value in one.items() if name.startswith("ff")) > 0.1
    for name, value in one.items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        if name != "pairs":  # which samples calibrate may depend on the number of processes
            assert torch.allclose(ranks[0][name], value, atol=1e-6, rtol=0), name
