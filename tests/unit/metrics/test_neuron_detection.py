"""Neurons told by explanations: sampling, scoring, the token surrogate and chat models."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safelight.metrics.neuron_chat import ChatReader, local_chat
from safelight.metrics.neuron_detection import (
    NeuronDetection,
    TokenSet,
    Window,
    detection_score,
    split_windows,
    windows_of,
)

WORDS = [f"w{number}" for number in range(60)]


def made(kind: str, count: int = 200, seed: int = 0) -> tuple[list[Window], list[Window]]:
    """Windows of a neuron for the word ``w7`` (``word``), and of one that fires anywhere (``noise``)."""
    draw = torch.Generator().manual_seed(seed)
    firing, silent = [], []
    while len(firing) < count or len(silent) < count:
        ids = torch.randint(0, 60, (16,), generator=draw).tolist()
        tokens = [WORDS[number] for number in ids]
        strength = torch.rand(16, generator=draw) + 0.01
        if kind == "word":
            values = [float(value) if number == 7 else 0.0 for number, value in zip(ids, strength, strict=True)]
        else:
            place = int(torch.randint(0, 32, (1,), generator=draw))
            values = [float(value) if number == place else 0.0 for number, value in enumerate(strength)]
        (firing if max(values) > 0 else silent).append(Window(tokens, values))
    return firing[:count], silent[:count]


def test_a_neuron_for_a_word_is_told_and_noise_is_not() -> None:
    firing, silent = made("word")
    told = detection_score(firing, silent, TokenSet(), TokenSet())
    assert told.by_decile == (1.0,) * 10
    assert told.silent == 1
    assert told.balanced == 1
    noise = detection_score(*made("noise"), TokenSet(), TokenSet())
    assert 0.4 < noise.balanced < 0.6
    # Another neuron's explanation is the control.
    other = detection_score(firing, silent, TokenSet(), TokenSet(), explanation="w9")
    assert 0.3 < other.balanced < 0.65


def test_the_surrogate_takes_the_strongest_tokens() -> None:
    windows = [Window(["a", "b", "c"], [0.0, 2.0, 3.0]), Window(["b", "c", "d"], [4.0, 1.0, -5.0])]
    assert TokenSet().explain(windows) == "b\0c"
    assert TokenSet(1).explain(windows) == "b"
    assert TokenSet().classify("b\0c", [Window(["a", "c"], [0, 0]), Window(["a", "d"], [9, 9])]) == [True, False]


@given(st.integers(40, 120), st.integers(10, 40))
def test_windows_are_spread_over_the_activations(count: int, shown: int) -> None:
    firing = [Window([str(number)], [float(number + 1)]) for number in range(count)]
    explained, deciles = split_windows(firing, shown=shown, seed=0)
    values = [sorted(window.values[0] for window in part) for part in deciles]
    everything = sorted([w.values[0] for w in explained] + [value for part in values for value in part])
    assert everything == [float(number + 1) for number in range(count)], "each window is on one side"
    assert len(explained) <= shown
    filled = [part for part in values if part]
    assert all(low[-1] < high[0] for low, high in pairwise(filled))


def test_counts_of_each_decile() -> None:
    class Half:
        def classify(self, explanation: str, windows: list[Window]) -> list[bool | None]:
            return [(None if window.values[0] == 0 and n == 0 else n % 2 == 0) for n, window in enumerate(windows)]

    firing = [Window(["x"], [float(number)]) for number in range(1, 241)]
    silent = [Window(["y"], [0.0])] * 50
    found = detection_score(firing, silent, TokenSet(), Half(), tested=100)  # type: ignore[arg-type]
    assert found.by_decile == (0.5,) * 10
    assert found.silent == pytest.approx(25 / 49)
    assert found.answered == pytest.approx(149 / 150)
    assert NeuronDetection((1.0,) * 10, 0.0, 1.0).balanced == 0.5
    with pytest.raises(ValueError, match="12 windows with and 50 without the neuron are too few"):
        detection_score(firing[:12], silent, TokenSet(), TokenSet())


def test_windows_of_rows() -> None:
    tokens = torch.arange(20).view(2, 10)
    values = torch.zeros(2, 10)
    values[0, 5], values[1, 9] = 2.0, 3.0
    firing, silent = windows_of(tokens, values, [str(number) for number in range(20)], width=4)
    assert [list(window.tokens) for window in firing] == [["4", "5", "6", "7"]]
    assert list(firing[0].values) == [0, 2, 0, 0]
    assert [window.tokens[0] for window in silent] == ["0", "10", "14"]


def test_chat_models_are_asked_and_read() -> None:
    asked = []

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return "It fires on **b**." if "have in common" in prompt else "Sure: [1, 0, 1] or rather\n[0, 1]"

    reader = ChatReader(ask, batch_size=2)
    said = reader.explain([Window(["a", "b"], [0.0, 4.0]), Window(["b", "c"], [2.0, 0.1])])
    assert said == "It fires on **b**."
    assert "1. a<<b>>(10)" in asked[0]
    assert "2. <<b>>(5)c" in asked[0]
    windows = [Window([letter], [0.0]) for letter in "xyz"]
    assert reader.classify(said, windows) == [False, True, None]
    assert "1. x\n2. y" in asked[1]
    assert "4.0" not in "".join(asked[1:]), "a scorer never sees activations"


def test_a_local_model_answers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["?", "hello", "there", "user"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?", pad_token="?")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=4, n_positions=32, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=None)
    ).save_pretrained(tmp_path)
    ask = local_chat(str(tmp_path), max_new_tokens=3)
    assert ask("hello there") == ask("hello there")
    assert len(ask("hello").split()) <= 3
