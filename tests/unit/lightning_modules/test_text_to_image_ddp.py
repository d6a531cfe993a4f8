"""Both kinds of U-Net on two processes; the contract does the same with FLUX."""

from __future__ import annotations

import pytest
import test_text_to_image as flux

from safelight.testing.running import largest_difference, on_two_ranks
from safelight.testing.states import same, state_of


class UNet(flux.TestContract):
    __test__ = False  # only its tools are wanted

    def __init__(self, family: str) -> None:
        self.family = family


@pytest.mark.ddp
@pytest.mark.parametrize("family", ["unet_sdxl", "unet_sd"])
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_learn_what_one_learns(family: str, strategy: str) -> None:
    contract = UNet(family)
    assert contract.config["method"]["_target_"].endswith("TextToImage")
    if strategy == "ddp":
        ranks, alone = on_two_ranks(contract._train_as_rank), contract.trained_state(4, 3)
    else:
        ranks, alone = on_two_ranks(contract._as_shard, 5, None, None), contract._whole(5, None, None)
    assert same(ranks[0], ranks[1])
    gap, where = largest_difference(ranks[0], alone)
    assert gap <= 1e-6, where
    assert largest_difference(state_of(contract.build()), alone)[0] > 1e-3
