"""Is the concept in the picture? What a detector answers, the CLIP detector, and which detector a setting means."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from safelight.errors import SafelightError
from safelight.metrics.clip import ClipJudge

Facts = dict[str, str | float | list[str]]


class Detection(NamedTuple):
    """What a detector says about a batch of pictures.

    Attributes:
        found: Whether the concept is in each picture, bool ``(B,)``.
        score: How sure the detector is that it is, float ``(B,)`` in [0, 1].
    """

    found: Tensor
    score: Tensor


@runtime_checkable
class ConceptDetector(Protocol):
    """Looks for one concept in pictures; any object with these two methods can be a judge."""

    def detect(self, pictures: Tensor, concept: str) -> Detection:
        """Looks for ``concept`` in every picture of ``(B, 3, H, W)`` in [0, 1]."""

    def facts(self) -> Facts:
        """What a result needs to be compared with another: model, library version, threshold, classes."""


class ClipDetector:
    """A CLIP model chooses among all labels; the concept is found where its label wins.

    It needs no threshold, but it always answers with one of the labels, so give all things that a picture may show,
    the concept's replacement among them.

    Args:
        judge: The CLIP model.
        labels: The things to choose among, such as ``["cat", "pistol"]``.
        template: How a label becomes a text, with ``{}`` for the label.

    Raises:
        SafelightError: If there are fewer than two different labels, or the template has no place for them.
    """

    def __init__(self, judge: ClipJudge, labels: Sequence[str], template: str = "a {}") -> None:
        self.labels = list(dict.fromkeys(labels))
        if len(self.labels) < 2:
            raise SafelightError(
                f"ClipDetector: labels={list(labels)!r}; CLIP can only choose, so give at least two different labels"
            )
        self.judge = judge
        self.template = check_template("ClipDetector", template)
        self._texts = [self.template.format(label) for label in self.labels]

    @torch.no_grad()
    def detect(self, pictures: Tensor, concept: str) -> Detection:
        """Whether the label ``concept`` beats all others in each picture.

        Args:
            pictures: ``(B, 3, H, W)`` in [0, 1].
            concept: One of the labels.

        Returns:
            ``score`` is the softmax probability of the concept at the model's own temperature.

        Raises:
            SafelightError: If the concept is no label.
        """
        if concept not in self.labels:
            near = difflib.get_close_matches(concept, self.labels, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(self.labels[:10])}, ..."
            raise SafelightError(f"ClipDetector: concept={concept!r} is none of its {len(self.labels)} labels; {hint}")
        place = self.labels.index(concept)
        logits = self._scale * self.judge.similarity(pictures, self._texts)
        return Detection(logits.argmax(1) == place, logits.softmax(1)[:, place])

    @torch.no_grad()
    def prefers(self, pictures: Tensor, texts: Sequence[str], other_texts: Sequence[str]) -> Detection:
        """Whether each picture fits its own text better than its other text: how a style is recognised.

        Two full captions that differ only in the style ask about nothing else.

        Args:
            pictures: ``(B, 3, H, W)`` in [0, 1].
            texts: One text per picture, naming the concept.
            other_texts: One text per picture, the same without the concept or with its replacement.

        Returns:
            ``score`` is the softmax probability of the first of the two texts; 0.5 and not found on a tie.

        Raises:
            SafelightError: If there is not one text of each kind per picture.
        """
        if not len(pictures) == len(texts) == len(other_texts):
            raise SafelightError(
                f"ClipDetector: {len(pictures)} pictures, {len(texts)} texts and {len(other_texts)} other_texts: "
                "give one of each per picture"
            )
        features = self.judge.features(pictures)
        gap = self.judge.text_features(texts) - self.judge.text_features(other_texts)
        score = torch.sigmoid(self._scale * (features * gap).sum(1))
        return Detection(score > 0.5, score)

    def facts(self) -> Facts:
        """Model, library version, the rule that decides, and the labels."""
        return {
            "detector": "clip",
            "model": self.judge.name,
            "version": f"transformers {version('transformers')}",
            "threshold": "the label wins",
            "template": self.template,
            "classes": list(self.labels),
        }

    @property
    def _scale(self) -> Tensor:
        return self.judge.model.logit_scale.exp()


def load_detector(
    spec: str | Mapping[str, Any], labels: Sequence[str] = (), device: str | torch.device = "cpu"
) -> ConceptDetector:
    """The detector that a setting means.

    Args:
        spec: ``"zoo:tiny_clip"`` or the folder of a ``CLIPModel``; or a mapping with ``kind`` (``clip``, ``zero_shot``,
            ``vlm``, ``nudenet``) and that detector's own arguments, such as
            ``{"kind": "zero_shot", "model": "google/owlv2-base-patch16", "box_threshold": 0.2}``.
        labels: What a CLIP detector chooses among; the others need none.
        device: Where the detector's model runs; NudeNet runs where its own runtime does.

    Raises:
        SafelightError: If the kind or an argument is unknown, or the model is not at hand.
    """
    settings = {"kind": "clip", "model": spec} if isinstance(spec, str) else dict(spec)
    kind = settings.pop("kind", None)
    if kind not in _HOMES:
        raise SafelightError(
            f"judge={spec!r}: kind={kind!r} is unknown; choose one of {', '.join(_HOMES)}, or give a CLIP folder"
        )
    module, name = _HOMES[kind]
    make: Callable[..., ConceptDetector] = getattr(import_module(f"safelight.metrics.{module}"), name)
    known = inspect.signature(make).parameters
    shared = {key: value for key, value in {"labels": labels, "device": device}.items() if key in known}
    try:
        inspect.signature(make).bind(**shared, **settings)
    except TypeError as error:
        raise SafelightError(
            f"judge={spec!r}: {error}; {kind!r} takes {', '.join(key for key in known if key not in shared)}"
        ) from error
    return make(**shared, **settings)


def clip_detector(
    labels: Sequence[str],
    device: str | torch.device = "cpu",
    model: str = "zoo:tiny_clip",
    template: str = "a {}",
) -> ClipDetector:
    """A :class:`ClipDetector` from the folder of its model; arguments as there."""
    return ClipDetector(ClipJudge(model, device=device), labels, template)


# kind -> module and what makes it; imported on use, because each needs another library.
_HOMES = {
    "clip": ("detection", "clip_detector"),
    "zero_shot": ("zero_shot", "ZeroShotDetector"),
    "vlm": ("vlm", "VlmDetector"),
    "nudenet": ("nudity", "NudeNetDetector"),
}


def load_pretrained(kind: str, model: str, load: Callable[[], Any]) -> Any:
    """Calls ``load`` and says what to do when the model ``model`` is neither a folder nor in the hub's cache.

    Raises:
        SafelightError: If there is no such model, or it cannot be read.
    """
    try:
        return load()
    # What transformers raises for ids that are not at hand, unknown architectures and damaged folders.
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise SafelightError(
            f"judge: the {kind} model {model!r} is not at hand or cannot be read ({reason}); give model=<folder> "
            "with the model and its processor as written by save_pretrained; judge=zoo:tiny_clip runs without"
        ) from error


def check_template(owner: str, template: str, argument: str = "template") -> str:
    """The template, if it has exactly one place ``{}`` to put the concept.

    Raises:
        SafelightError: Otherwise.
    """
    if template.count("{}") != 1 or template.replace("{}", "").count("{"):
        raise SafelightError(f"{owner}: {argument}={template!r} should hold {{}} once, where the concept goes")
    return template


def check_share(owner: str, argument: str, value: float) -> float:
    """The value, if it lies in [0, 1].

    Raises:
        SafelightError: Otherwise.
    """
    if not 0 <= value <= 1:
        raise SafelightError(f"{owner}: {argument} must lie in [0, 1], got {value}")
    return value


def to_images(owner: str, pictures: Tensor) -> list[Image.Image]:
    """Pictures ``(B, 3, H, W)`` in [0, 1] as 8-bit RGB images, what processors of every library take.

    Raises:
        SafelightError: If the shape is another one.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise SafelightError(f"{owner}: expected pictures (B, 3, H, W) in [0, 1], got {tuple(pictures.shape)}")
    pixels = (pictures.detach().float().clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    return [Image.fromarray(pixel.permute(1, 2, 0).contiguous().numpy()) for pixel in pixels]
