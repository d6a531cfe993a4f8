"""Fixtures of data modules' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_toys import STORIES, lines, written


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    return written(tmp_path, "stories.jsonl", lines(STORIES))
