"""The exported folder in a benchmark of other people, where that is installed (``pip install eval-unlearn``)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safelight.lightning_modules import ConceptErasure
from safelight.testing.pipelines import pipeline_folder


def test_eval_unlearn_draws_with_the_exported_folder(tmp_path: Path) -> None:
    free_run = pytest.importorskip("eval_unlearn.techniques.free_run.wrapper")
    module = ConceptErasure(backbone=str(pipeline_folder("flux")), minimality="none")
    for logits in module.bank.logits.values():
        logits.data[::2] = -1.0
    settings = {"height": 16, "width": 16, "max_sequence_length": 16}
    drawn = []
    for folder in (pipeline_folder("flux"), module.export(tmp_path)):
        technique = free_run.FreeRunTechnique(
            model_id=str(folder), device="cpu", use_fp16=False, num_inference_steps=2, guidance_scale=1.0
        )
        (picture,) = technique.generate(["a cat"], seed=3, **settings)
        drawn.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8))
    assert not torch.equal(*drawn)
