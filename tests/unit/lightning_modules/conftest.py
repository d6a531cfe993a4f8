from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safelight.zoo.skeletons import tiny_clip

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tiny_clip(folder)
    return folder
