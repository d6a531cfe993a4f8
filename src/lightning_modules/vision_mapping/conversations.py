"""Conversations as tokens: which of them an assistant says, and where a picture goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError

Conversation = tuple[tuple[str, str], ...]
"""Questions with their answers."""


@dataclass(frozen=True)
class Turns:
    """A conversation in tokens.

    Attributes:
        ids: all of its tokens.
        spans: first and one past the last token of each answer, its closing tokens included.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right.

    Attributes:
        ids: (B, T).
        mask: (B, T), 1 for what is not padding.
        turns: (B, T), number of the answer that a token belongs to, counted from 1; 0 for none.
        inserted: (B, T), positions of the picture, or of the words that stand for it.
        prompt: (B, T), positions before the first answer.
    """

    ids: Tensor
    mask: Tensor
    turns: Tensor
    inserted: Tensor
    prompt: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(*(value.to(device) for value in (self.ids, self.mask, self.turns, self.inserted, self.prompt)))

    @property
    def last(self) -> int:
        """How many positions, counted from the end, are needed to predict all answers."""
        said = (self.turns > 0).any(0).nonzero()
        first = int(said[0]) if len(said) else self.ids.shape[1]
        return self.ids.shape[1] - max(first - 1, 0)

    @property
    def text(self) -> Tensor:
        """(B, T), positions of the prompt but the first, which holds no word."""
        behind = self.prompt.clone()
        behind[:, 0] = False
        return behind

    @property
    def after(self) -> Tensor:
        """(B, T), positions of the prompt behind what was inserted."""
        seen = self.inserted.long().cumsum(1) > 0
        return self.prompt & seen & ~self.inserted


class Chat:
    """Writes conversations in the form a model was trained on, whatever its tokenizer.

    The template is asked for growing parts of a conversation; what two texts have in common, token by token, tells
    where an answer begins and ends.

    Args:
        tokenizer: of transformers.
        insert_pos: position of the first inserted token (paper: 1, right behind the first token).

    Raises:
        SafelightError: it has no chat template.
    """

    def __init__(self, tokenizer: Any, insert_pos: int = 1) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise SafelightError(
                "llm: its tokenizer has no chat template, so how questions are put to it is not known; choose a model "
                "that answers questions, or put a chat_template.jinja beside it"
            )
        self.tokenizer, self.insert_pos = tokenizer, insert_pos
        fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.fill: int = 0 if fill is None else int(fill)
        self._special = set(tokenizer.all_special_ids)
        # Epochs bring the same conversations again, and templates are slow.
        self.turns = lru_cache(maxsize=50_000)(self._turns)

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache, which can be neither copied nor pickled."""
        return {key: value for key, value in self.__dict__.items() if key != "turns"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.turns = lru_cache(maxsize=50_000)(self._turns)

    def tokens(self, text: str) -> list[int]:
        """Tokens of a text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def written(self, messages: Sequence[dict[str, str]], prompt: bool = False) -> list[int]:
        """Tokens of messages in the template's form; ``prompt`` ends them where an answer is to begin."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
        return self.tokens(text)

    def _turns(self, conversation: Conversation) -> Turns:
        messages = [
            {"role": role, "content": content}
            for pair in conversation
            for role, content in zip(("user", "assistant"), pair, strict=True)
        ]
        whole = self.written(messages)
        spans = []
        for place in range(1, len(messages), 2):
            start = _shared(self.written(messages[:place], prompt=True), whole)
            end = len(whole) if place + 1 == len(messages) else _shared(self.written(messages[: place + 1]), whole)
            spans.append((start, self._closed(whole, start, end)))
        return Turns(tuple(whole), tuple(spans))

    def _closed(self, ids: list[int], start: int, end: int) -> int:
        """End of an answer; white space behind the token that ends a turn is the template's, not the answer's."""
        while end - 1 > start and ids[end - 2] in self._special and not self.tokenizer.decode([ids[end - 1]]).strip():
            end -= 1
        return end

    def batch(
        self,
        conversations: Sequence[Sequence[tuple[str, str]]],
        inserted: Sequence[Sequence[int]],
        max_length: int,
        longest: int | None = None,
    ) -> Batch:
        """Conversations with tokens inserted.

        Args:
            conversations: B.
            inserted: for each, what goes to ``insert_pos``.
            max_length: tokens of a conversation, inserted ones not counted; what is beyond is cut off.
            longest: tokens that a row may have with them, the model's positions; None for any number.
        """
        rows = [self.turns(tuple((q, a) for q, a in conversation)) for conversation in conversations]
        limits = [max_length if longest is None else min(max_length, longest - len(new)) for new in inserted]
        lengths = [min(len(row.ids), limit) + len(new) for row, new, limit in zip(rows, inserted, limits, strict=True)]
        width = max(lengths)
        ids = torch.full((len(rows), width), self.fill)
        mask, turns = torch.zeros_like(ids), torch.zeros_like(ids)
        placed, prompt = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for place, (row, new, length, limit) in enumerate(zip(rows, inserted, lengths, limits, strict=True)):
            at, more = self.insert_pos, len(new)
            line = [*row.ids[:at], *new, *row.ids[at:limit]]
            ids[place, :length] = torch.tensor(line)
            mask[place, :length] = 1
            placed[place, at : at + more] = True
            first = row.spans[0][0] if row.spans else len(row.ids)
            prompt[place, : min(first + more, length)] = True
            for number, (start, end) in enumerate(row.spans, 1):
                if start < limit:
                    turns[place, start + more : min(end, limit) + more] = number
        return Batch(ids, mask, turns, placed, prompt)


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of tokens that two texts begin with in common."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
