"""Asks a vision-language model about pictures, with or without solved examples before the question."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.illusion_probe.prompting import (
    Demonstrations,
    Row,
    Setting,
    Task,
    icl_question,
    right_answer,
    zero_shot_question,
)
from safelight.metrics.detection import load_pretrained, to_images

MAX_NEW_TOKENS = 15
"""Length of an answer (paper)."""


class Turn(NamedTuple):
    """A picture, what is asked about it, and the answer where it is an example.

    Attributes:
        image: (3, S, S) in [-1, 1].
        question: in words.
        answer: None for the question that is to be answered.
    """

    image: Tensor
    question: str
    answer: str | None = None


class Answerer(Protocol):
    """Whatever can look at pictures and answer in words."""

    def __call__(self, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        """One answer to the last turn of each conversation."""
        ...


class Answered(NamedTuple):
    """An answer beside what the picture shows."""

    row: Row
    answer: str


class VlmAnswerer:
    """An image-text-to-text model of transformers, decoded greedily (paper).

    Args:
        model: folder of the model and its processor, or id on the hub.
        batch_size: conversations a forward pass.
        dtype: of the weights; ``auto`` takes the stored one.
        device: where to run.

    Raises:
        SafelightError: the model is not at hand.
    """

    def __init__(
        self, model: str, *, batch_size: int = 4, dtype: str = "auto", device: str | torch.device = "cpu"
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.batch_size = batch_size
        self.processor: Any = load_pretrained("vlm", model, lambda: AutoProcessor.from_pretrained(model))
        self.model: Any = load_pretrained(
            "vlm", model, lambda: AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
        )
        self.model.eval().requires_grad_(False).to(device)
        # Answers are written behind the last token, which has to be the question's in every row.
        self.processor.tokenizer.padding_side = "left"

    @torch.no_grad()
    def __call__(self, conversations: Sequence[Sequence[Turn]]) -> list[str]:
        """See :class:`Answerer`."""
        answers: list[str] = []
        for start in range(0, len(conversations), self.batch_size):
            chunk = conversations[start : start + self.batch_size]
            images = [[to_images("vlm", (turn.image[None] + 1) / 2)[0] for turn in turns] for turns in chunk]
            texts = [self.prompt(turns) for turns in chunk]
            inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt").to(self.model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            made = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            new = made[:, inputs["input_ids"].shape[1] :]
            answers += [str(text) for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return answers

    def prompt(self, turns: Sequence[Turn]) -> str:
        """A conversation as text in the model's own chat format, or line by line if it has none."""
        if getattr(self.processor, "chat_template", None) is None:
            mark = getattr(self.processor, "image_token", "")
            return "\n".join(f"{mark}{turn.question} {turn.answer or ''}".rstrip() for turn in turns)
        messages: list[dict[str, Any]] = []
        for turn in turns:
            content = [{"type": "image"}, {"type": "text", "text": turn.question}]
            messages.append({"role": "user", "content": content})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))


def row_of(sample: Mapping[str, Any]) -> Row:
    """What a sample of a data set shows."""
    return Row(sample["shape"], sample["scene"], int(sample["index"]))


def conversations(
    samples: Any,
    task: Task,
    *,
    shapes: Sequence[str],
    scenes: Sequence[str],
    shots: int = 0,
    setting: Setting = "ICL1",
    seed: int = 0,
    places: Sequence[int] | None = None,
) -> Iterator[tuple[Row, list[Turn]]]:
    """What is asked about each picture of a data set, examples from the same data set before it.

    Args:
        samples: with ``[place]`` and ``len``; dicts with ``image``, ``shape``, ``scene`` and ``index``.
        task: what is asked; ``tcs``, both at once, only with examples.
        shapes: that can be answered.
        scenes: that can be answered.
        shots: number of examples.
        setting: what they share with the question.
        seed: of the draw.
        places: of the samples asked about; None for all.

    Raises:
        SafelightError: ``tcs`` without examples, or too few pictures for the examples.
    """
    if shots == 0:
        if task == "tcs":
            raise SafelightError("task=tcs: both at once is asked behind examples only; give shots, or ask tc and ts")
        question, rows = zero_shot_question(task, shapes, scenes), []
    else:
        question, rows = icl_question(task, shapes, scenes), [row_of(samples[place]) for place in range(len(samples))]
    place_of = {row.index: place for place, row in enumerate(rows)}
    # An example whose class is no option would teach to answer something else.
    usable = [row for row in rows if row.shape in shapes and row.scene in scenes]
    examples = Demonstrations(usable, setting, shots, seed)
    for place in range(len(samples)) if places is None else places:
        sample = samples[place]
        query = row_of(sample)
        shown = [
            Turn(samples[place_of[row.index]]["image"], question, right_answer(row, task))
            for row in examples.draw(query)
        ]
        yield query, [*shown, Turn(sample["image"], question)]


def ask(
    samples: Any,
    answerer: Answerer,
    task: Task,
    *,
    chunk: int = 16,
    **settings: Any,
) -> list[Answered]:
    """Answers about the pictures of a data set.

    Args:
        samples: see :func:`conversations`, as for ``task`` and ``settings``.
        answerer: a model, or any function like :class:`Answerer`.
        task: what is asked.
        chunk: conversations handed over at once.
        settings: see :func:`conversations`.
    """
    found: list[Answered] = []
    waiting: list[tuple[Row, list[Turn]]] = []

    def answer() -> None:
        answers = answerer([turns for _, turns in waiting])
        found.extend(Answered(row, text) for (row, _), text in zip(waiting, answers, strict=True))
        waiting.clear()

    for entry in conversations(samples, task, **settings):
        waiting.append(entry)
        if len(waiting) == chunk:
            answer()
    if waiting:
        answer()
    return found
