"""The same method in another process, and in two at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from safelight.testing.contracts.instance import Instance
from safelight.testing.running import in_fresh_process, largest_difference, on_two_ranks
from safelight.testing.states import State, same, state_of


class Processes(Instance):
    """Tests that need other processes, and of accumulation, which equals them."""

    def test_trains_without_hydra(self) -> None:
        """A process in which Hydra and OmegaConf cannot be imported builds and trains the module."""
        self.config  # noqa: B018  # composed here, where Hydra is
        assert in_fresh_process(self._train_alone) > 0

    def _train_alone(self) -> float:
        module = self.build()
        before = state_of(module)
        self.fit(module, steps=1)
        return largest_difference(before, state_of(module))[0]

    @pytest.mark.ddp
    def test_two_processes_learn_what_one_learns(self) -> None:
        """Two processes with batches of b take the steps that one takes with batches of 2b."""
        size = self.batch_size
        self.config  # noqa: B018
        ranks = on_two_ranks(self._train_as_rank)
        assert same(ranks[0], ranks[1]), "the two processes hold different values"
        self._compare(ranks[0], self.trained_state(2 * size, 3))

    def _train_as_rank(self) -> State:
        # Twice the batches, because each process sees a half of every global batch.
        return self.trained_state(self.batch_size, 6, devices=2, strategy="ddp")

    def test_accumulated_batches_are_one_batch(self) -> None:
        """Two batches of b with accumulation take the step of one batch of 2b."""
        size = self.batch_size
        parts = self.trained_state(size, 6, accumulate_grad_batches=2)
        self._compare(parts, self.trained_state(2 * size, 3))

    def _compare(self, state: State, reference: State) -> None:
        gap, where = largest_difference(state, reference)
        assert gap <= self.equivalence_tolerance, f"differs by {gap:.2g} at {where}"
        start = state_of(self.build(**self.equivalence_changes))
        moved, _ = largest_difference(start, reference)
        assert moved > 100 * self.equivalence_tolerance, "nothing was learned that could differ"

    @pytest.mark.ddp
    def test_two_processes_measure_what_one_measures(self, tmp_path: Path) -> None:
        """Test metrics of an odd number of samples, exactly: the sample that is repeated counts once."""
        file = self.saved(self.build(), tmp_path)
        ranks = on_two_ranks(self._measure_as_rank, file)
        assert self.steady(ranks[0]) == self.steady(ranks[1])
        assert self.steady(ranks[0]) == self.steady(self.measured_after(file))

    def _measure_as_rank(self, file: Path) -> dict[str, float]:
        return self.measured_after(file, devices=2, strategy="ddp")
