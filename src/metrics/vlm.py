"""A vision-language model as judge: asked yes or no, the probabilities of the two answers are compared."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics.detection import Detection, Facts, check_share, check_template, load_pretrained, to_images

_QUESTION = "Does this picture show {}? Answer yes or no."


class VlmDetector:
    """Asks a vision-language model whether the concept is in the picture.

    Nothing is sampled: the score is p(yes) / (p(yes) + p(no)) of the first token of the answer, each summed over how
    the word may begin ("yes", "Yes", with and without a space), so it is the same at every call.

    Args:
        model: Folder of the model and its processor, or hub id of an image-text-to-text model, such as
            ``llava-hf/llava-v1.6-mistral-7b-hf``.
        question: The question, with ``{}`` for the concept.
        threshold: The concept is found above this score, in [0, 1].
        batch_size: Pictures per forward pass.
        dtype: Type of the weights; ``auto`` takes the stored one.
        device: Where to run.

    Raises:
        SafelightError: If the model is not at hand, the threshold is out of range, or its tokenizer cannot tell yes
            from no.
    """

    def __init__(
        self,
        model: str,
        *,
        question: str = _QUESTION,
        threshold: float = 0.5,
        batch_size: int = 4,
        dtype: str = "auto",
        device: str | torch.device = "cpu",
    ) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.question = check_template("VlmDetector", question, "question")
        self.threshold = check_share("VlmDetector", "threshold", threshold)
        self.name, self.batch_size = model, batch_size
        self.processor: Any = load_pretrained("vlm", model, lambda: AutoProcessor.from_pretrained(model))
        self.model: Any = load_pretrained(
            "vlm", model, lambda: AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
        )
        self.model.eval().requires_grad_(False).to(device)
        self._yes, self._no = self._first_tokens("yes"), self._first_tokens("no")
        # A tokenizer that writes the space before a word as a token of its own begins both answers alike.
        shared = self._yes & self._no
        self._yes, self._no = self._yes - shared, self._no - shared
        if not self._yes or not self._no:
            raise SafelightError(f"VlmDetector: the tokenizer of model={model!r} has no tokens that tell yes from no")

    @torch.no_grad()
    def detect(self, pictures: Tensor, concept: str) -> Detection:
        """The answer for every picture of ``(B, 3, H, W)`` in [0, 1].

        Raises:
            SafelightError: If the pictures have another shape.
        """
        images, prompt = to_images("VlmDetector", pictures), self.prompt(concept)
        scores: list[Tensor] = []
        for start in range(0, len(images), self.batch_size):
            chunk = images[start : start + self.batch_size]
            # Pictures of one size under one question give rows of one length, so no row is padded.
            inputs = self.processor(
                text=[prompt] * len(chunk), images=[[image] for image in chunk], return_tensors="pt"
            ).to(self.model.device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            logits = self.model(**inputs).logits[:, -1].float()
            yes, no = (logits[:, sorted(tokens)].logsumexp(1) for tokens in (self._yes, self._no))
            scores.append(torch.sigmoid(yes - no))
        score = torch.cat(scores).to(pictures.device)
        return Detection(score > self.threshold, score)

    def prompt(self, concept: str) -> str:
        """The text the model reads: the question in its own chat format, or after its picture token if it has none."""
        question = self.question.format(concept)
        if getattr(self.processor, "chat_template", None) is None:
            return f"{getattr(self.processor, 'image_token', '')}{question}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def _first_tokens(self, word: str) -> set[int]:
        tokenizer = self.processor.tokenizer
        forms = [word, word.capitalize(), f" {word}", f" {word.capitalize()}"]
        encoded = [tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
        unknown = tokenizer.unk_token_id
        return {tokens[0] for tokens in encoded if tokens and tokens[0] != unknown}

    def facts(self) -> Facts:
        """Model, library version, threshold and question."""
        return {
            "detector": "vlm",
            "model": self.name,
            "version": f"transformers {version('transformers')}",
            "threshold": self.threshold,
            "question": self.question,
            "classes": ["yes", "no"],
        }
