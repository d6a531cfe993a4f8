"""A chat model that explains neurons and detects them by its explanations (prompts in delphi's manner)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from safelight.metrics.neuron_detection import Window

_EXPLAIN = """Below are pieces of text in which one neuron of a language model is active. Tokens at which it is
active are between << and >>; behind each stands how active it is, from 1 to 10.

{windows}

What do these tokens have in common, or what comes before them? Answer with one short sentence."""
_CLASSIFY = """A neuron of a language model is described as: {explanation}

For each of these {count} pieces of text, say whether the neuron is active somewhere in it.

{windows}

Answer with nothing but a JSON list of {count} numbers, 1 for active and 0 for not active."""


class ChatReader:
    """Both halves of a detection score, with any chat model.

    Args:
        ask: a prompt to the model's answer; see :func:`local_chat`.
        batch_size: windows judged in one question (delphi: 5).
    """

    def __init__(self, ask: Callable[[str], str], *, batch_size: int = 5) -> None:
        self.ask, self.batch_size = ask, batch_size

    def explain(self, windows: Sequence[Window]) -> str:
        """One sentence about windows whose firing tokens are marked, with activations in tenths of the largest."""
        top = max((max(window.values) for window in windows), default=0.0)
        lines = [f"{number}. {_marked(window, top)}" for number, window in enumerate(windows, 1)]
        return self.ask(_EXPLAIN.format(windows="\n".join(lines))).strip()

    def classify(self, explanation: str, windows: Sequence[Window]) -> list[bool | None]:
        """Answers to each window; None where the model did not answer with as many zeros and ones."""
        found: list[bool | None] = []
        for start in range(0, len(windows), self.batch_size):
            part = windows[start : start + self.batch_size]
            lines = [f"{number}. {''.join(window.tokens)}" for number, window in enumerate(part, 1)]
            question = _CLASSIFY.format(explanation=explanation, count=len(part), windows="\n".join(lines))
            found += _answers(self.ask(question), len(part))
        return found


def _marked(window: Window, top: float) -> str:
    parts = []
    for token, value in zip(window.tokens, window.values, strict=True):
        level = round(10 * value / top) if top > 0 else 0
        parts.append(f"<<{token}>>({level})" if level > 0 else token)
    return "".join(parts)


def _answers(text: str, count: int) -> list[bool | None]:
    """The last list of so many zeros and ones in a text."""
    for found in reversed(re.findall(r"\[[\s01,]*\]", text)):
        try:
            values = json.loads(found)
        except json.JSONDecodeError:
            continue
        if len(values) == count:
            return [bool(value) for value in values]
    return [None] * count


def local_chat(model: str, *, max_new_tokens: int = 100, device: str | torch.device = "cpu") -> Callable[[str], str]:
    """A transformers chat model as a function from prompt to answer; greedy, so the same every time.

    Args:
        model: folder or hub id (paper: about 70 billion parameters).
        max_new_tokens: of an answer.
        device: where to run.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto").eval().to(device)

    @torch.no_grad()
    def ask(prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(device)
        made = network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answer: str = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return answer

    return ask
