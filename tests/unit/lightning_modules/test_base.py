"""What every method inherits: its card, and the optimiser that most of them share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

from safelight.lightning_modules import SafelightModule
from safelight.lightning_modules.schedules import adamw_warmup_cosine


def card(folder: Path, base: Any = None, **facts: Any) -> tuple[dict[str, Any], str]:
    """Header and text of a card of a module that knows these facts."""
    module = SafelightModule()
    if facts:
        module.run_facts = facts
    words: dict[str, Any] = {"title": "A thing", "command": "python mine.py", "data": "pictures of `{data}`"}
    file = module.write_card(folder, base=base, **words, tags=["odd"])
    _, header, text = file.read_text().split("---\n", 2)
    return yaml.safe_load(header), text


def test_a_card_says_what_the_run_knows(tmp_path: Path) -> None:
    header, text = card(tmp_path, command="python train.py seed=3", data="emoji", metrics={"ssim": 0.5})
    assert header == {"license": "apache-2.0", "tags": ["safelight", "odd"], "metrics": ["ssim"]}
    assert "python train.py seed=3" in text
    assert "python mine.py" not in text
    assert "pictures of `emoji`" in text
    assert "| ssim | 0.5 |" in text


def test_a_card_without_a_command_line(tmp_path: Path) -> None:
    header, text = card(tmp_path)
    assert "metrics" not in header
    assert "python mine.py" in text
    assert "pictures of `given`" in text


@pytest.mark.parametrize(
    ("name", "source", "licence", "origin"),
    [
        ("tiny_flux", None, "apache-2.0", "tiny_flux"),
        ("sdxl", "stabilityai/sdxl", "other", "stabilityai/sdxl"),
    ],
)
def test_the_licence_is_that_of_the_model_it_was_made_from(
    tmp_path: Path, name: str, source: str | None, licence: str, origin: str
) -> None:
    header, _ = card(tmp_path, base=SimpleNamespace(name=name, source=source))
    assert header["license"] == licence
    assert header["base_model"] == origin


def test_adamw_with_warmup_and_cosine() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    module = LightningModule()
    module._trainer = SimpleNamespace(estimated_stepping_batches=12.0)  # type: ignore[assignment]
    made: Any = adamw_warmup_cosine(module, [weight], lr=0.5, warmup_steps=4, weight_decay=0.25, betas=(0.5, 0.75))
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]
    assert type(optimizer) is torch.optim.AdamW
    assert schedule["interval"] == "step"
    group = optimizer.param_groups[0]
    assert group["params"] == [weight]
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.5, 0.75))
    rates = []
    for _ in range(13):
        rates.append(group["lr"])
        optimizer.step()
        schedule["scheduler"].step()
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[8] == pytest.approx(0.25)
    assert rates[12] == pytest.approx(0)


def test_a_report_beside_the_method_is_found_from_subclasses_too() -> None:
    from safelight.lightning_modules import Clip, MoEX
    from safelight.lightning_modules.moe_x import report as pages

    class Mine(MoEX):
        pass

    small = {"block_size": 8, "n_layer": 1, "n_head": 1, "d_model": 8}
    assert Mine(**small)._pages() is pages  # type: ignore[arg-type]
    assert Mine(**small).summary_table() is None  # type: ignore[arg-type]
    assert Clip()._pages() is None
    assert Clip().summary_table() is None
