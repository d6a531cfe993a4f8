"""The map from vision to language: what is trained, what is written where, and what it has to beat."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from ecodiff_toys import trainer

from safelight.datamodules import LLaVADataModule
from safelight.errors import SafelightError
from safelight.lightning_modules import VisionMapping
from safelight.probing.tap import ActivationTap
from safelight.reporting import Report
from safelight.testing.contracts import MethodContract

pytest.importorskip("sae_lens")
SMALL: dict[str, Any] = {
    "pool": 4, "drop_cls": False, "max_length": 48, "lr": 1e-2, "sae_expansion": 0.5, "sae_k": 4, "sae_rows": 2,
    "pool_size": 5, "label": "thing", "freq_max": 1.0, "bootstrap": 20, "layers": [0, 3], "adapter": "linear",
}  # fmt: skip


class TestContract(MethodContract):
    method = "vision_mapping"
    overfit_ratio = 0.9
    equivalence_precision = "32-true"
    equivalence_tolerance = 1e-4
    # Scale and bias of the dictionaries' first batch would be those of another batch when it is cut in two.
    # The k of batchtopk is that of a process's own share.
    equivalence_changes: ClassVar[dict[str, Any]] = {"sae_scale": 1.0, "sae_architecture": "topk"}
    # Counts of the dictionaries' features stand beside small weights.
    state_ratio = 2.0
    opens_with = """
import json
from safetensors.torch import load_file
from torch import nn
settings = json.loads((folder / "config.json").read_text())
projection = nn.Linear(settings["d_in"], settings["d_out"])
projection.load_state_dict(load_file(folder / "projection.safetensors"))
assert (settings["d_in"], settings["d_out"]) == (128, 96)
"""

    def overrides(self) -> list[str]:
        small = (f"method.{key}={value}".replace(" ", "") for key, value in SMALL.items())
        return [*small, "data.limit=64", "data.test_size=16"]


def tiny(**settings: Any) -> VisionMapping:
    return VisionMapping(**SMALL | settings)


def data(**settings: Any) -> LLaVADataModule:
    return LLaVADataModule(**{"questions": ["thing"], "limit": 16, "test_size": 12, "batch_size": 4} | settings)


def fit(module: VisionMapping, steps: int = 2) -> Any:
    runner = trainer(max_steps=steps, max_epochs=-1, log_every_n_steps=1, limit_val_batches=0)
    runner.fit(module, data())
    return runner


def test_only_the_map_and_the_dictionaries_learn() -> None:
    module = tiny()
    before = {name: value.clone() for name, value in module.llm.state_dict().items()}
    fit(module)
    assert all(torch.equal(value, before[name]) for name, value in module.llm.state_dict().items())
    assert {name.split(".")[0] for name in module.state_dict()} == {"projection", "dictionaries"}
    assert {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad} == {
        "projection", "dictionaries"
    }  # fmt: skip


def test_dictionaries_do_not_change_the_map() -> None:
    with_them, narrow = tiny(), tiny(layers=[1])
    fit(with_them), fit(narrow)
    assert torch.equal(with_them.projection.weight, narrow.projection.weight)


def test_dictionaries_learn_from_all_tokens_but_the_first() -> None:
    module, source = tiny(sae_rows=800, layers=[0], sae_dead_after=7), data()
    assert module.dictionaries["0"].dead_after == 7
    fit(module, 1)
    source.setup()
    batch = next(iter(source.test_dataloader()))
    vectors = module._word_vectors(batch, 0)[0]
    rows = module.text_batch(batch)
    with ActivationTap(module.llm, ["resid_post.0"]).reading() as seen:
        module.llm(input_ids=rows.ids, attention_mask=rows.mask)
    words = seen["resid_post.0"][rows.mask.bool() & (torch.arange(rows.ids.shape[1]) > 0)]
    distance = torch.cdist(vectors, words).min(1).values
    assert float(distance.max()) < 0.1, "padding and the first token are no words"
    assert float(torch.cdist(words, vectors).min(1).values.max()) < 0.1, "and every word is drawn"


def test_pictures_stand_right_behind_the_first_token() -> None:
    module, source = tiny(), data()
    source.setup()
    batch = next(iter(source.test_dataloader()))
    rows = module.image_batch(batch)
    assert module.features(batch).shape == (len(rows.ids), 5, 128), "the class token and four squares"
    assert rows.inserted[:, 1:6].all()
    assert rows.inserted.sum() == 5 * len(rows.ids)
    words = module.text_batch(batch)
    text = module.chat.tokenizer.decode(words.ids[0][words.inserted[0]])
    assert text == batch["caption"][0] + "\n"
    said = module.chat.tokenizer.decode(rows.ids[0][rows.turns[0] == 1])
    assert said == f" {batch['thing'][0]}\n"


def test_the_rate_rises_and_falls_to_its_floor() -> None:
    from lightning.pytorch import Callback

    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, runner: Any, *args: Any) -> None:
            rates.append(runner.optimizers[0].param_groups[0]["lr"])

    module = tiny(lr=1.0, min_lr=0.1, warmup_ratio=0.2, layers=[0])
    trainer(max_steps=20, max_epochs=-1, limit_val_batches=0, callbacks=[Watch()]).fit(module, data())
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[12] == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < rates[-1] < 0.12


def test_what_a_run_measures_and_leaves(tmp_path: Path) -> None:
    module = tiny()
    runner = fit(module, 4)
    runner.test(module, data(), verbose=False)
    found = module.found.measured
    assert set(found) == {"", *module.control_names}
    # The caption in words is what the model was trained to answer about.
    assert found["caption_text"]["adapter_accuracy"] > 0.9
    assert found["shuffled_images"]["adapter_accuracy"] <= 0.5
    assert found[""]["fvu_text"] > 0
    assert found[""]["fvu_ratio_last"] == pytest.approx(found[""]["fvu_last"] / found["random_adapter"]["fvu_last"])
    assert found[""]["fvu_ratio_first"] == pytest.approx(found[""]["fvu_first"] / found["random_adapter"]["fvu_first"])
    norms = {name: module.found.figure(name, "vlm_img", "norm")[0] for name in ("random_adapter", "norm_matched")}
    assert norms["norm_matched"] != pytest.approx(norms["random_adapter"], rel=1e-2)
    report = Report("vision")
    module.fill_report(report)
    assert all(words in report.html() for words in ("another picture", "words alone", "untrained map"))
    module.export(tmp_path)
    with (tmp_path / "layers.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["token_type"] for line in lines} == {"vlm_img", "vlm_imgtext", "llm_text"}
    fvu = [line for line in lines if (line["metric"], line["adapter"]) == ("fvu", "trained")]
    assert all(float(line["ci_lo"]) <= float(line["mean"]) <= float(line["ci_hi"]) for line in fvu)
    again = tiny(adapter_ckpt=str(tmp_path))
    assert torch.equal(again.projection.weight, module.projection.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_surrogate": "no place"}, "write {caption}"),
        ({"layers": [4]}, "has layers 0 to 3"),
        ({"adapter_ckpt": "nowhere"}, "there is no file"),
    ],
)
def test_what_cannot_be_meant(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SafelightError, match=message):
        tiny(**settings)


def test_batches_without_pictures() -> None:
    with pytest.raises(SafelightError, match="expected image, conversation and caption"):
        tiny().features({"tokens": torch.zeros(2, 3)})
