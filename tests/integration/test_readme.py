"""What README.md tells people to paste works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_set_up_is_two_lines_and_the_same_installation() -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if "pip install" in line]
    assert len(lines) == 2
    run, test = lines
    assert run.endswith("python train.py method=ecodiff")
    assert test.endswith(".venv/bin/pytest -n 2")
    assert all(
        line.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e ") for line in lines
    )


def test_the_snippet_trains_in_a_foreign_project_without_hydra(tmp_path: Path) -> None:
    (snippet,) = blocks("python")
    code = snippet + "\nimport sys\nassert 'hydra' not in sys.modules and method.global_step == 4\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
