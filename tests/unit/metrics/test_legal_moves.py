"""Games that keep to the rules, and where others leave them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("chess")

from safelight.errors import SafelightError
from safelight.metrics import LegalMoveRate
from safelight.metrics.legal_moves import played


@pytest.mark.parametrize(
    ("game", "legal", "illegal"),
    [
        (";1.e4 e5 2.Nf3 Nc6 3.Bb", 4, None),
        (";1.e4 e5 2.Nf3 Nc6;1.d4 Ke4", 4, None),
        (";1.e4 e5 2.Nf5 Nc6 3.d4 ", 2, "2.Nf5"),
        (";1.e4 e5 3.Nf3 Nc6 ", 2, "3.Nf3"),
        (";1.e4 2.Nf3 ", 1, "2.Nf3"),
        (";1.e4! e5 ", 0, "1.e4!"),
        (";1.e4  e5 ", 1, ""),
        (";1.f3 e5 2.g4 Qh4# 3.a3 a6 ", 4, "3.a3"),
        (";1.e4", 0, None),
        (";;", 0, ""),
    ],
)
def test_how_far_a_text_is_a_game(game: str, legal: int, illegal: str | None) -> None:
    found = played(game)
    assert (found.legal, found.illegal) == (legal, illegal)


def test_the_rate_counts_up_to_the_first_illegal_move() -> None:
    metric = LegalMoveRate()
    metric.update([";1.e4 e5 2.Nf3 Nc6 3.", ";1.e4 e5 2.Nf5 Nc6 "], [1, 0], torch.tensor([0, 1]))
    metric.update([";1.e4 e5 2.Nf5 Nc6 "], [0], torch.tensor([1]))  # a repeat
    assert float(metric.compute()) == pytest.approx((3 + 2) / (3 + 2 + 1))


def test_the_rules_are_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "chess", None)
    with pytest.raises(SafelightError, match=r"pip install 'safelight\[chess\]'"):
        played(";1.e4 e5")
