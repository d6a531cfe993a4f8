"""Detectors that find anything one can name: OWL-ViT, OWLv2 and Grounding DINO through transformers."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics.detection import Detection, Facts, check_share, check_template, load_pretrained, to_images

_TYPES = ("owlvit", "owlv2", "grounding-dino", "mm-grounding-dino")


class ZeroShotDetector:
    """Boxes around whatever a text names; the concept is found where a box is sure enough.

    MCE's evaluation (arXiv 2507.13386) runs Grounding DINO base with both thresholds at 0.1 and averages the top box
    score without thresholding it. Here ``found`` is the thresholded detection and ``score`` that top score: compare the
    mean of ``score`` with its table, and the rate with everybody else's.

    Args:
        model: Folder of the model and its processor, or hub id, such as ``IDEA-Research/grounding-dino-base``.
        box_threshold: A box counts above this score, in [0, 1].
        text_threshold: Grounding DINO only: a box belongs to the words whose own score is above this, in [0, 1], and a
            box without words does not count.
        template: What the model is asked for, with ``{}`` for the concept.
        batch_size: Pictures per forward pass.
        device: Where to run.

    Raises:
        SafelightError: If the model is not at hand or of another type, or a threshold is out of range.
    """

    def __init__(
        self,
        model: str,
        *,
        box_threshold: float = 0.1,
        text_threshold: float = 0.1,
        template: str = "{}",
        batch_size: int = 8,
        device: str | torch.device = "cpu",
    ) -> None:
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        self.box_threshold = check_share("ZeroShotDetector", "box_threshold", box_threshold)
        self.text_threshold = check_share("ZeroShotDetector", "text_threshold", text_threshold)
        self.template = check_template("ZeroShotDetector", template)
        self.name, self.batch_size = model, batch_size
        self.processor: Any = load_pretrained("zero_shot", model, lambda: AutoProcessor.from_pretrained(model))
        self.model: Any = load_pretrained(
            "zero_shot",
            model,
            lambda: AutoModelForZeroShotObjectDetection.from_pretrained(model, dtype=torch.float32),
        )
        if self.model.config.model_type not in _TYPES:
            raise SafelightError(
                f"ZeroShotDetector: model={model!r} is of type {self.model.config.model_type!r}; "
                f"known are {', '.join(_TYPES)}"
            )
        self.model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def detect(self, pictures: Tensor, concept: str) -> Detection:
        """Whether a box of ``concept`` passes the thresholds in each picture of ``(B, 3, H, W)`` in [0, 1].

        Returns:
            ``score`` is the best box's score, whether or not it passes.

        Raises:
            SafelightError: If the pictures have another shape.
        """
        images, query = to_images("ZeroShotDetector", pictures), self.template.format(concept)
        found: list[bool] = []
        scores: list[Tensor] = []
        for start in range(0, len(images), self.batch_size):
            chunk = images[start : start + self.batch_size]
            inputs = self.processor(text=[[query]] * len(chunk), images=chunk, return_tensors="pt").to(
                self.model.device
            )
            outputs = self.model(**inputs)
            # (B, boxes, texts or tokens); places of padding are -inf and become 0.
            scores.append(outputs.logits.float().sigmoid().flatten(1).amax(1).cpu())
            found += [self._counts(result) for result in self._boxes(outputs, inputs, query, len(chunk))]
        return Detection(torch.tensor(found, device=pictures.device), torch.cat(scores).to(pictures.device))

    def _boxes(self, outputs: Any, inputs: Any, query: str, number: int) -> list[dict[str, Any]]:
        """Boxes above the box threshold, per picture, with the text that each belongs to."""
        post_process = self.processor.post_process_grounded_object_detection
        results: list[dict[str, Any]]
        if "grounding" in self.model.config.model_type:
            results = post_process(
                outputs, inputs["input_ids"], threshold=self.box_threshold, text_threshold=self.text_threshold
            )
        else:
            results = post_process(outputs, threshold=self.box_threshold, text_labels=[[query]] * number)
        return results

    @staticmethod
    def _counts(result: dict[str, Any]) -> bool:
        """Whether a box belongs to a word: only the concept was asked for, so any word or part of one is it."""
        return any(any(letter.isalnum() for letter in text) for text in result["text_labels"])

    def facts(self) -> Facts:
        """Model, library version, thresholds and template."""
        facts: Facts = {
            "detector": "zero_shot",
            "model": self.name,
            "version": f"transformers {version('transformers')}",
            "threshold": self.box_threshold,
            "template": self.template,
            "classes": ["the concept asked for"],
        }
        if "grounding" in self.model.config.model_type:
            facts["text_threshold"] = self.text_threshold
        return facts
