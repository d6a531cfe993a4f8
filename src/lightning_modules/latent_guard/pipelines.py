"""A guard in front of any diffusers pipeline: judged before denoising, from the pipeline's own text features."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from safelight.errors import SafelightError
from safelight.lightning_modules.latent_guard.encoders import TextEncoder
from safelight.lightning_modules.latent_guard.guard import PromptGuard, Verdict, guard_folder
from safelight.lightning_modules.latent_guard.wording import normalise, readings


class BlockedPromptError(SafelightError):
    """A prompt contains a forbidden concept.

    Attributes:
        verdicts: of all prompts of the call.
    """

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        self.verdicts = list(verdicts)
        blocked = [verdict for verdict in verdicts if verdict.blocked]
        # The prompt itself is not repeated: messages end up in logs.
        names = ", ".join(sorted({str(verdict.concept) for verdict in blocked}))
        super().__init__(f"{len(blocked)} of {len(self.verdicts)} prompt(s) blocked: {names}")


class GuardedPipeline:
    """A pipeline that draws nothing for prompts that the guard blocks.

    The pipeline's own pass through its text encoder is read along; no second one is made, but for prompts that are
    disguised or too long, whose other readings have to be encoded. It fails closed: denoising does not start unless
    every prompt of the call was judged.

    Args:
        pipeline: any diffusers pipeline with a text encoder.
        guard: see :class:`PromptGuard`; with the encoder of the pipeline its features are used, with another one the
            prompts are judged before the pipeline is called.
        component: which text encoder of the pipeline the guard was trained on.
    """

    def __init__(self, pipeline: Any, guard: PromptGuard, component: str = "text_encoder") -> None:
        self.pipeline, self.guard = pipeline, guard
        self.text_encoder: nn.Module = getattr(pipeline, component)
        self.shares_features = guard.encoder.model is self.text_encoder
        self.verdicts: list[Verdict] = []
        """Of the last call."""

    @classmethod
    def with_own_encoder(cls, pipeline: Any, folder: Any, component: str = "text_encoder") -> GuardedPipeline:
        """Open an exported guard on the pipeline's own text encoder, which is then not loaded twice.

        Raises:
            SafelightError: the guard was trained on another encoder's features.
        """
        place = guard_folder(folder)
        named = json.loads((place / "guard.json").read_text(encoding="utf-8"))["encoder"]
        tokenizer = getattr(pipeline, component.replace("text_encoder", "tokenizer"))
        encoder = TextEncoder(
            getattr(pipeline, component), tokenizer, pooling=named["pooling"], max_length=named["max_length"],
            mask_padding=named["mask_padding"], name=named["pretrained"],
        )  # fmt: skip
        return cls(pipeline, PromptGuard.from_pretrained(place, encoder=encoder), component)

    def __call__(self, prompt: str | Sequence[str] | None = None, *args: Any, **keywords: Any) -> Any:
        """Call the pipeline.

        Raises:
            BlockedPromptError: a prompt contains a forbidden concept.
            SafelightError: there is no text to judge, such as with ``prompt_embeds``.
        """
        texts = _texts(prompt, keywords)
        if not self.shares_features:
            self._judge(texts, self.guard.scores(texts))
            return self.pipeline(prompt, *args, **keywords)
        self.verdicts = []
        with self._watching(texts):
            return self.pipeline(prompt, *args, **keywords)

    def _judge(self, texts: Sequence[str], scores: Tensor) -> None:
        self.verdicts = self.guard.verdicts(texts, scores)
        if any(verdict.blocked for verdict in self.verdicts):
            raise BlockedPromptError(self.verdicts)

    @contextmanager
    def _watching(self, texts: list[str]) -> Iterator[None]:
        """Judge from the text encoder's output, and let no denoising begin before that."""
        encoder = self.guard.encoder
        room = encoder.max_length - encoder.tokenizer.num_special_tokens_to_add()
        own = [encoder.tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
        forms = [normalise(text) for text in texts]
        same = [encoder.tokenizer(form, add_special_tokens=False, verbose=False).input_ids for form in forms]
        # What the pipeline encodes is the text as typed and cut: all the rest needs readings of its own.
        plain = [
            readings(text) == [form] and ids == other and len(ids) <= room
            for text, form, ids, other in zip(texts, forms, own, same, strict=True)
        ]
        expected = encoder.tokenizer(
            texts, padding="max_length", truncation=True, max_length=encoder.max_length, return_tensors="pt"
        )
        found: dict[int, Tensor] = {}

        def read(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
            tokens = given["input_ids"] if "input_ids" in given else args[0]
            states = getattr(output, "last_hidden_state", None)
            if states is None:
                states = output[0]
            for place in range(len(texts)):
                rows = (tokens.cpu() == expected.input_ids[place]).all(1).nonzero().flatten()
                if place in found or not plain[place] or not len(rows):
                    continue
                row = int(rows[0])
                mask = expected.attention_mask[place : place + 1].bool().to(tokens.device)
                features = encoder.from_states(tokens[row : row + 1], states[row : row + 1], mask)
                found[place] = self.guard.feature_scores(features)[0]

        def gate(module: nn.Module, args: Any) -> None:
            if self.verdicts:
                return
            rest = [place for place in range(len(texts)) if place not in found]
            if rest:
                found.update(zip(rest, self.guard.scores([texts[place] for place in rest]), strict=True))
            self._judge(texts, torch.stack([found[place] for place in range(len(texts))]))

        denoiser: nn.Module = getattr(self.pipeline, "unet", None) or self.pipeline.transformer
        hooks = [
            self.text_encoder.register_forward_hook(read, with_kwargs=True),
            denoiser.register_forward_pre_hook(gate),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if not self.verdicts:
            raise SafelightError(
                "the pipeline drew without its denoiser being seen; the guard cannot vouch for the result"
            )


def _texts(prompt: str | Sequence[str] | None, keywords: dict[str, Any]) -> list[str]:
    """Every text that a call draws from."""
    given = [prompt, *(value for key, value in keywords.items() if key in ("prompt", "prompt_2", "prompt_3"))]
    texts: list[str] = []
    for value in given:
        texts += [value] if isinstance(value, str) else list(value or [])
    if not texts:
        raise SafelightError("a guarded pipeline needs prompt=<text>: embeddings cannot be judged")
    if embedded := [key for key in keywords if key.startswith("prompt_embeds") or key == "ip_adapter_image"]:
        raise SafelightError(f"a guarded pipeline takes no {embedded[0]}: only texts can be judged")
    return texts
