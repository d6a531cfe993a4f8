"""Sparse dictionaries in a loop of one's own: scale, dead features, thresholds, and what they recover."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from safelight.errors import SafelightError
from safelight.probing.dictionary import SparseDictionary
from safelight.probing.mixing import MixingBuffer

pytest.importorskip("sae_lens")
SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 3}, "batchtopk": {"k": 3}, "matryoshka": {"k": 3}, "standard": {"penalty": 0.6},
    "jumprelu": {"penalty": 0.5}, "gated": {"penalty": 0.6},
}  # fmt: skip


class Truth:
    """96 directions in 32 dimensions, each active with p = .03."""

    def __init__(self, seed: int = 0) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.directions = F.normalize(torch.randn(96, 32, generator=self.draw), dim=1)

    def batch(self, size: int = 256) -> Tensor:
        active = torch.rand(size, 96, generator=self.draw) < 0.03
        return active * (1 + 0.3 * torch.randn(size, 96, generator=self.draw)) @ self.directions

    def recovered(self, rows: Tensor) -> float:
        """Mean over the true directions of the largest cosine with a row."""
        return float((self.directions @ F.normalize(rows, dim=1).T).abs().max(1).values.mean())


def trained(truth: Truth, architecture: Any, steps: int, **settings: Any) -> SparseDictionary:
    found = SparseDictionary(32, 96, architecture=architecture, **SETTINGS[architecture] | settings)
    optimizer = torch.optim.Adam(found.parameters(), lr=2e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss, _ = found.loss(truth.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(found.parameters(), 1.0)
        found.advance()
        optimizer.step()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "standard", "jumprelu"])
def test_true_directions_are_recovered(architecture: str) -> None:
    truth = Truth()
    found = trained(truth, architecture, 2500)
    assert truth.recovered(found.sae.W_dec.detach()) >= 0.85
    assert float(found.dead.float().mean()) <= 0.05
    assert truth.recovered(torch.randn(96, 32, generator=torch.Generator().manual_seed(1))) <= 0.5


def test_a_short_training_finds_more_than_chance() -> None:
    truth = Truth()
    found = trained(truth, "topk", 400)
    assert truth.recovered(found.sae.W_dec.detach()) > 0.65
    assert truth.recovered(SparseDictionary(32, 96, k=3).sae.W_dec.detach()) < 0.5


@pytest.mark.parametrize("architecture", SETTINGS)
def test_scale_and_bias_are_those_of_the_first_batch(architecture: Any) -> None:
    x = 5 + torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    found = SparseDictionary(8, 32, architecture=architecture, **SETTINGS[architecture])
    loss, parts = found.loss(x)
    assert float(found.scale) == pytest.approx(8**0.5 / float(x.norm(dim=1).mean()), rel=1e-6)
    assert torch.allclose(found.sae.b_dec, x.mean(0) * found.scale, atol=1e-6)
    assert set(parts) >= {"mse", "l0"}
    assert torch.isfinite(loss)
    found.loss(100 * x)
    assert float(found.scale) == pytest.approx(8**0.5 / float(x.norm(dim=1).mean()), rel=1e-6), "of the first only"
    given = SparseDictionary(8, 32, architecture=architecture, scale=2.0, **SETTINGS[architecture])
    given.loss(x)
    assert float(given.scale) == 2.0
    assert not given.sae.b_dec.any()


def test_codes_and_reconstructions_are_those_of_the_formula() -> None:
    found = SparseDictionary(8, 32, k=3, seed=2)
    x = 3 * torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    found.begin(x)
    sae, norms = found.sae, found.sae.W_dec.norm(dim=1)
    with torch.no_grad():
        hidden = ((x * found.scale - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms
        kept = torch.zeros_like(hidden).scatter(1, hidden.topk(3).indices, hidden.topk(3).values.relu())
        assert torch.allclose(found.encode(x), kept, atol=1e-5)
        assert torch.allclose(found(x), ((kept / norms) @ sae.W_dec + sae.b_dec) / found.scale, atol=1e-5)


def test_dead_features_are_counted_in_steps() -> None:
    found = SparseDictionary(8, 32, k=2, dead_after=2, seed=0)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    found.begin(x)
    active = (found.encode(x) != 0).any(0)
    for _ in range(3):
        found.loss(x)
        found.loss(x)  # two batches of one step
        found.advance()
    assert int(found.seen) == 3
    assert (found.idle[active] == 0).all()
    assert (found.idle[~active] == 3).all()
    assert torch.equal(found.dead, ~active)
    assert int(found.tokens) == 24
    assert int(found.counts.sum()) == 6 * int((found.encode(x) != 0).sum())


def test_dead_features_get_a_loss_of_their_own() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    found = SparseDictionary(8, 32, k=1, dead_after=1, seed=0)
    found.begin(x)
    found.idle.fill_(9)
    loss, parts = found.loss(x)
    assert float(parts["auxiliary_reconstruction"]) > 0
    assert float(loss.detach()) == pytest.approx(float(parts["mse"] + parts["auxiliary_reconstruction"]), rel=1e-5)


def test_penalties_grow() -> None:
    found = SparseDictionary(8, 32, architecture="standard", penalty=2.0, penalty_warmup=4)
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    found.begin(x)
    terms = []
    for _ in range(6):
        terms.append(float(found.loss(x)[1]["l1"]))
        found.advance()
    assert [term / terms[-1] for term in terms] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_a_fixed_threshold_takes_the_place_of_the_batch() -> None:
    truth = Truth()
    found = trained(truth, "batchtopk", 300)
    x = truth.batch(2000)
    with torch.no_grad():
        together = found.encode(x)
        with found.at_inference():
            apart = torch.cat([found.encode(part) for part in x.split(7)])
            assert torch.equal(apart != 0, found.encode(x) != 0), "no vector changes another's code"
        assert torch.equal(found.encode(x), together)
    assert int((together != 0).sum()) == 6000
    assert float((apart != 0).float().sum(1).mean()) == pytest.approx(3, rel=0.3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 33}, "of d_sae=32"),
        ({"architecture": "matryoshka", "k": 2, "widths": [8, 16]}, "end in d_sae=32"),
        ({"architecture": "matryoshka", "k": 2, "widths": [16, 8, 32]}, "growing"),
    ],
)
def test_sizes_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        SparseDictionary(8, 32, **settings)


def test_vectors_without_content() -> None:
    with pytest.raises(SafelightError, match=r"mean norm of 0\.0"):
        SparseDictionary(8, 32, k=2).loss(torch.zeros(4, 8))


def test_every_vector_of_the_buffer_comes_out_once() -> None:
    buffer = MixingBuffer(12, 1)
    handed = []
    for step in range(30):
        new = torch.arange(4.0)[:, None] + 4 * step
        out = buffer.exchange([new], seed=0, step=step)[0]
        assert out.shape == (4, 1)
        if step >= 3:
            handed += out.flatten().tolist()
        else:
            assert torch.equal(out, new), "while it fills up, new vectors are used"
    assert len(set(handed)) == len(handed) == 27 * 4
    assert sorted(handed + buffer.kept.flatten().tolist()) == [float(n) for n in range(120)]
    # Vectors of several sites stay together.
    pair = MixingBuffer(8, 1, sites=2)
    for step in range(6):
        new = torch.arange(4.0)[:, None] + 4 * step
        first, second = pair.exchange([new, -new], seed=0, step=step)
        assert torch.equal(first, -second)
    with pytest.raises(SafelightError, match="less than the 4 vectors"):
        MixingBuffer(3, 1).exchange([torch.zeros(4, 1)], 0, 0)
