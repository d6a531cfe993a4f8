"""The probe of a run whose change is known: one direction goes, another comes."""

from __future__ import annotations

import json
import logging
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

pytest.importorskip("sae_lens")

from safelight.callbacks.checkpointing import Checkpoints, read_checkpoint
from safelight.callbacks.jsonl import MetricsJsonl
from safelight.callbacks.resume import ExactResume
from safelight.callbacks.sae_probe import SAEProbe
from safelight.datamodules.loading import ResumableLoader
from safelight.errors import SafelightError
from safelight.probing.dictionary import SparseDictionary
from safelight.probing.dictionary_files import read_sae, write_sae
from safelight.testing.running import on_two_ranks, quiet_trainer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

WIDTH, ROWS, BATCHES, CHANGE, STEPS = 12, 32, 6, 8, 24
GOES, COMES = 3, 5


class Toy(LightningModule):
    """Vectors with few active directions; from step 8 on training closes direction 3 and opens direction 5."""

    def __init__(self) -> None:
        super().__init__()
        gate = torch.ones(WIDTH)
        gate[COMES] = 0
        self.gate = nn.Parameter(gate)
        self.site, self.dropout = nn.Identity(), nn.Dropout(0.5)
        self.seen: list[Tensor] = []
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.site(batch * self.gate)
        self.seen.append(hidden.detach().clone())
        loss = 0.01 * self.dropout(hidden).mean()
        if self.trainer.global_step >= CHANGE:
            loss = loss + self.gate[GOES].square() + (self.gate[COMES] - 1).square()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5)


class Crash(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("crashed")


def data(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(ROWS * 10, WIDTH, generator=generator) < 0.15
    return active * (1 + torch.rand(ROWS * 10, WIDTH, generator=generator))


def loader(size: int = ROWS) -> ResumableLoader:
    return ResumableLoader(data(), batch_size=size, shuffle=True)  # type: ignore[arg-type]


def probe(**settings: Any) -> SAEProbe:
    chosen = {"d_sae": 2 * WIDTH, "k": 3, "batches": BATCHES, "steps": 250, "batch_size": 128, "lr": 1e-2}
    return SAEProbe("site", **({**chosen, "every_n_steps": 5, "vectors": None} | settings))


def fit(callbacks: list[Any], folder: Path, steps: int = STEPS, resume: Path | None = None, **settings: Any) -> Toy:
    module = Toy()
    torch.manual_seed(7)
    trainer = quiet_trainer(max_steps=steps, callbacks=callbacks, default_root_dir=folder, **settings)
    trainer.fit(module, loader(), ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An autoencoder whose features are the coordinates; at most three are active."""
    dictionary = SparseDictionary(WIDTH, WIDTH, k=3, scale=1.0)
    with torch.no_grad():
        for name, value in dictionary.sae.named_parameters():
            value.copy_(torch.eye(WIDTH) if name.startswith("W") else torch.zeros_like(value))
    return str(write_sae(dictionary.sae, tmp_path_factory.mktemp("sae")))


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[SAEProbe, Toy, Path]:
    folder = tmp_path_factory.mktemp("run")
    callback = probe()
    module = fit([callback], folder, logger=MetricsJsonl(folder))
    return callback, module, folder


def kept_by_three_largest(x: Tensor) -> Tensor:
    floor = x.topk(3, 1).values[:, -1:]
    return x.clamp(min=0) * (x >= floor)


# -- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_a_dictionary_that_is_known(tmp_path: Path, identity: str) -> None:
    callback = probe(sae=identity, d_sae=None)
    module = fit([callback], tmp_path)
    found = json.loads((tmp_path / "sae_probe.json").read_text())
    assert found == callback.found
    first, last = torch.cat(module.seen[:BATCHES]), torch.cat(module.seen[-BATCHES:])
    mean = first.mean(0)
    for part, x in (("before", first), ("after", last)):
        made = kept_by_three_largest(x)
        fvu = (x - made).square().sum() / (x - mean).square().sum()
        assert found[part]["fvu"] == pytest.approx(float(fvu), rel=1e-5)
        assert found[part]["l0"] == pytest.approx(float((made > 0).sum(1).float().mean()), rel=1e-6)
        assert found[part]["vectors"] == BATCHES * ROWS
    assert (found["before"]["steps"], found["after"]["steps"]) == ([1, 6], [19, 24])
    old, new = ((kept_by_three_largest(x) > 0).double().mean(0) for x in (first, last))
    lost, gained = found["lost"][0], found["gained"][0]
    assert lost == {"feature": GOES, "before": pytest.approx(float(old[GOES])), "after": 0.0}
    assert gained == {"feature": COMES, "before": 0.0, "after": pytest.approx(float(new[COMES]))}
    order = [entry["after"] - entry["before"] for entry in found["lost"]]
    assert order == sorted(order)
    assert all(change < 0 for change in order)
    assert not {entry["feature"] for entry in found["lost"]} & {entry["feature"] for entry in found["gained"]}
    halves = [
        torch.cat([kept_by_three_largest(x) > 0 for x in module.seen[start:BATCHES:2]]).double().mean(0)
        for start in (0, 1)
    ]
    assert found["chance"] == pytest.approx(float((halves[0] - halves[1]).abs().max()))
    assert lost["before"] - lost["after"] > found["chance"], "a real change beats the difference of two halves"
    assert not (tmp_path / "sae_probe").exists()


def test_a_trained_dictionary_names_the_direction_that_went(probed: tuple[SAEProbe, Toy, Path]) -> None:
    callback = probed[0]
    found = callback.found
    assert callback.dictionary is not None
    assert callback.dictionary.d_sae == 2 * WIDTH

    def writes(entry: dict[str, Any]) -> Tensor:
        row = callback.dictionary.decoder[entry["feature"]]  # type: ignore[union-attr]
        return row / row.norm()

    assert float(writes(found["lost"][0])[GOES]) > 0.7
    assert found["lost"][0]["after"] < 0.3 * found["lost"][0]["before"]
    # What it never saw it cannot put together again.
    assert found["after"]["fvu"] > 1.5 * found["before"]["fvu"]


def test_before_is_measured_on_batches_it_did_not_learn_from(probed: tuple[SAEProbe, Toy, Path]) -> None:
    callback, module, _ = probed
    dictionary, found = callback.dictionary, callback.found
    assert dictionary is not None
    mean = torch.cat(module.seen[:BATCHES]).mean(0)
    # Of six batches the second and the sixth.
    for part, x in (
        ("before", torch.cat([module.seen[1], module.seen[5]])),
        ("after", torch.cat(module.seen[-BATCHES:])),
    ):
        fvu = (x - dictionary(x)).square().sum() / (x - mean).square().sum()
        assert found[part]["fvu"] == pytest.approx(float(fvu), rel=1e-5)
        assert found[part]["l0"] == pytest.approx(float((dictionary.encode(x) != 0).sum(1).float().mean()))
    assert found["before"]["steps"] == [2, 6]
    assert found["before"]["vectors"] == 2 * ROWS


def test_it_logs_as_the_run_goes_on(probed: tuple[SAEProbe, Toy, Path]) -> None:
    callback, module, folder = probed
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mine = {line["step"] + 1: line["sae_probe/fvu"] for line in lines if "sae_probe/fvu" in line}
    assert list(mine) == [6, 10, 15, 20, 24]
    assert mine[6] == callback.found["before"]["fvu"]
    assert mine[24] == callback.found["after"]["fvu"]
    mean = torch.cat(module.seen[:BATCHES]).mean(0)
    x = torch.cat(module.seen[6:10])
    fvu = (x - callback.dictionary(x)).square().sum() / (x - mean).square().sum()  # type: ignore[misc]
    assert mine[10] == pytest.approx(float(fvu), rel=1e-5), "four batches since the autoencoder is there"


def test_another_run_can_read_what_was_written(probed: tuple[SAEProbe, Toy, Path], tmp_path: Path) -> None:
    callback, module, folder = probed
    x = torch.cat(module.seen[-BATCHES:])
    sae = read_sae(str(folder / "sae_probe"))
    assert torch.allclose(sae.decode(sae.encode(x)), callback.dictionary(x), atol=1e-4)  # type: ignore[misc]


def test_fewer_vectors_are_evenly_spread(tmp_path: Path, identity: str) -> None:
    callback = probe(sae=identity, d_sae=None, vectors=5)
    module = fit([callback], tmp_path)
    x = torch.cat([seen[[0, 6, 12, 19, 25]] for seen in module.seen[-BATCHES:]])
    assert callback.found["after"]["vectors"] == 5 * BATCHES
    l0 = (kept_by_three_largest(x) > 0).sum(1).double().mean()
    assert callback.found["after"]["l0"] == pytest.approx(float(l0))


# -- the run stays what it is -----------------------------------------------------------------------------------------


def test_training_is_the_same_with_and_without(probed: tuple[SAEProbe, Toy, Path], tmp_path: Path) -> None:
    def states() -> list[Any]:
        return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]

    plain = fit([], tmp_path)
    expected = states()
    watched = fit([probe()], tmp_path)
    assert states() == expected
    assert watched.losses == plain.losses
    assert torch.equal(watched.gate, plain.gate)
    assert probed[1].losses == plain.losses
    assert not watched.site._forward_hooks
    assert watched.training


@pytest.mark.parametrize("stop", [4, 20])
def test_a_resumed_run_ends_with_the_same_figures(
    probed: tuple[SAEProbe, Toy, Path], tmp_path: Path, stop: int
) -> None:
    # The probe stands before the checkpoints by itself: Lightning puts these last.
    checkpoints = Checkpoints(tmp_path / "checkpoints", every_n_train_steps=stop)
    first = [checkpoints, ExactResume(), probe(), Crash(stop + 2)]
    with pytest.raises(RuntimeError, match="crashed"):
        fit(first, tmp_path, enable_checkpointing=True)
    assert not (tmp_path / "sae_probe.json").exists()
    file = tmp_path / "checkpoints" / "last.ckpt"
    (key,) = [key for key in read_checkpoint(file)["callbacks"] if key.startswith("SAEProbe")]
    assert "site" in key
    callback = probe()
    fit([ExactResume(), callback], tmp_path, resume=file)
    expected = probed[0].found
    assert callback.found["lost"] == expected["lost"]
    assert callback.found == expected


def test_accumulated_batches_count_one_by_one(tmp_path: Path, identity: str) -> None:
    callback = probe(sae=identity, d_sae=None)
    module = fit([callback], tmp_path, 9, accumulate_grad_batches=2)
    assert len(module.seen) == 18
    assert callback.found["after"]["steps"] == [6, 9]
    assert callback.found["before"]["vectors"] == BATCHES * ROWS
    l0 = (kept_by_three_largest(torch.cat(module.seen[-BATCHES:])) > 0).sum(1).double().mean()
    assert callback.found["after"]["l0"] == pytest.approx(float(l0))


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes_are_told_before_the_first_step(tmp_path: Path, identity: str) -> None:
    with pytest.raises(SafelightError, match="k=16: of d_sae=8 features"):
        SAEProbe("site", d_sae=8)
    with pytest.raises(SafelightError, match="batches=1: at least 2"):
        SAEProbe("site", batches=1)
    with pytest.raises(SafelightError, match=r"sae_probe\.batches=6: training ends after 6 steps"):
        fit([probe()], tmp_path, 6)
    with pytest.raises(SafelightError, match=r"no sub-module 'sight'; .* did you mean 'site'"):
        fit([SAEProbe("sight", d_sae=24, k=3)], tmp_path, 30)
    assert not list(tmp_path.iterdir())


def test_vectors_that_do_not_fit(tmp_path: Path, identity: str) -> None:
    class Wide(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(self.site(torch.cat([batch, batch], 1))[:, :WIDTH], batch_idx)

    def run(module: LightningModule, callback: SAEProbe, rows: ResumableLoader | None = None) -> None:
        quiet_trainer(max_steps=STEPS, callbacks=[callback], default_root_dir=tmp_path).fit(module, rows or loader())

    with pytest.raises(SafelightError, match=r"it takes vectors of width 12, site 'site' has 24"):
        run(Wide(), probe(sae=identity, d_sae=None, call=0))
    with pytest.raises(SafelightError, match=r"call=2: a step came through site 'site' only 1 time"):
        run(Toy(), probe(call=2))
    same = ResumableLoader(torch.ones(64, WIDTH), batch_size=8)  # type: ignore[arg-type]
    with pytest.raises(SafelightError, match="all the same"):
        run(Constant(), probe(sae=identity, d_sae=None), same)


class Constant(Toy):
    """Nothing of it changes."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.site(batch).mean() + 0 * self.gate.sum()


def test_a_site_that_is_never_passed(tmp_path: Path) -> None:
    module = Toy()
    module.idle = nn.Identity()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer = quiet_trainer(
            max_steps=STEPS, callbacks=[SAEProbe("idle", batches=BATCHES)], default_root_dir=tmp_path
        )
        trainer.fit(module, loader())
    messages = [str(warning.message) for warning in told]
    assert sum("a step did not come through it" in message for message in messages) == 1
    assert any("0 of batches=6 batches" in message for message in messages)
    assert not list(tmp_path.iterdir())


# -- processes --------------------------------------------------------------------------------------------------------


def _rank(folder: str) -> tuple[dict[str, Any], list[float], int]:
    callback = probe(batch_size=64, steps=60)
    module = Toy()
    trainer = Trainer(
        max_steps=20, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader(ROWS // 2))
    assert callback.dictionary is not None
    return callback.found, callback.dictionary.decoder[0].tolist(), len(callback.state_dict()["ranks"])


@pytest.mark.ddp
def test_two_processes_have_one_autoencoder_and_one_set_of_figures(tmp_path: Path) -> None:
    (found, row, ranks), (other, other_row, _) = on_two_ranks(_rank, str(tmp_path))
    assert row == other_row
    assert found == other
    assert ranks == 2
    assert found["after"]["vectors"] == BATCHES * ROWS, "of both"
    assert json.loads((tmp_path / "sae_probe.json").read_text()) == found
