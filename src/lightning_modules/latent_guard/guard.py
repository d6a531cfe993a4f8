"""The guard in use: prompts in, verdicts out. Needs no Lightning, no Hydra and no training data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.errors import SafelightError
from safelight.lightning_modules.latent_guard.bank import ConceptBank
from safelight.lightning_modules.latent_guard.encoders import TextEncoder, TextFeatures, load_text_encoder
from safelight.lightning_modules.latent_guard.head import ConceptVectors, EmbeddingMappingLayer
from safelight.lightning_modules.latent_guard.wording import readings
from safelight.metrics.ranking import threshold_at_fpr
from safelight.reporting.files import write_text

ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class Verdict:
    """What the guard says of one prompt.

    Attributes:
        prompt: as it was given.
        blocked: whether a concept reaches its threshold.
        score: of the concept that is furthest above its threshold, or least below; minus infinity with an empty list.
        concept: that concept; None with an empty list.
        category: of it.
        threshold: that it was compared with.
        words: words of the prompt with the score that is lost without them, the most telling first; only on request.
    """

    prompt: str
    blocked: bool
    score: float
    concept: str | None
    category: str
    threshold: float
    words: tuple[tuple[str, float], ...] = ()


class PromptGuard:
    """Decides whether prompts contain a concept of its list.

    A prompt is compared in its normal form and in what that may also stand for (digits read as letters, spelled words
    joined), a long one window by window; the highest score counts.

    Args:
        encoder: frozen text encoder, on its device.
        head: trained embedding mapping layer; moved there.
        threshold: scaled similarity from which a prompt is blocked; None until :meth:`calibrate` finds one, and until
            then nothing is judged.
        calibration: how the threshold was chosen, in words and numbers.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        head: EmbeddingMappingLayer,
        threshold: float | None,
        calibration: dict[str, Any] | None = None,
    ) -> None:
        if threshold is not None and not math.isfinite(threshold):
            raise SafelightError(f"threshold={threshold}: a guard needs a number to compare scores with")
        if encoder.dim != head.dim:
            raise SafelightError(
                f"the head was trained on features of width {head.dim}, {encoder.name} makes {encoder.dim}"
            )
        self.encoder = encoder
        self.head = head.to(encoder.device).eval().requires_grad_(False)
        self.threshold, self.calibration = threshold, dict(calibration or {})
        self.bank = ConceptBank(self._embed, self._maker())

    def _maker(self) -> str:
        digest = hashlib.sha256(self.encoder.key().encode())
        for name, value in sorted(self.head.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    @torch.no_grad()
    def _embed(self, phrases: Sequence[str]) -> ConceptVectors:
        pooled = [
            self.encoder(phrases[i : i + ENCODED_AT_ONCE]).pooled for i in range(0, len(phrases), ENCODED_AT_ONCE)
        ]
        return self.head.concepts(torch.cat(pooled))

    # -- use ---------------------------------------------------------------------------------------------------------

    def check(self, prompts: Sequence[str] | str, *, explain: bool = False) -> list[Verdict]:
        """Judge prompts.

        Args:
            prompts: one or several texts.
            explain: find out which words carry the score of blocked prompts, by leaving out one at a time.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if bad := [type(text).__name__ for text in texts if not isinstance(text, str)]:
            raise SafelightError(f"prompts: expected texts, got {bad[0]}")
        verdicts = self.verdicts(texts, self.scores(texts))
        if explain:
            verdicts = [self._explained(v) if v.blocked else v for v in verdicts]
        return verdicts

    def scores(self, prompts: Sequence[str]) -> Tensor:
        """(P, concepts) on the CPU in double precision, concepts in the order of ``bank.names``."""
        owners, windows = [], []
        for place, prompt in enumerate(prompts):
            for window in dict.fromkeys(w for reading in readings(prompt) for w in self.encoder.windows(reading)):
                owners.append(place)
                windows.append(window)
        best = torch.full((len(prompts), len(self.bank)), float("-inf"), dtype=torch.float64)
        if not len(self.bank) or not windows:
            return best
        rows = []
        for start in range(0, len(windows), ENCODED_AT_ONCE):
            rows.append(self.feature_scores(self.encoder(windows[start : start + ENCODED_AT_ONCE])))
        where = torch.tensor(owners)[:, None].expand(-1, len(self.bank))
        return best.scatter_reduce(0, where, torch.cat(rows), "amax")

    @torch.no_grad()
    def feature_scores(self, features: TextFeatures) -> Tensor:
        """Scores of texts whose features are there already, (B, concepts)."""
        scores = self.head(features.tokens, self.bank.vectors(), features.mask)
        return self.bank.by_concept(scores.double().cpu())

    def verdicts(self, prompts: Sequence[str], scores: Tensor) -> list[Verdict]:
        """What scores mean.

        Raises:
            SafelightError: there is no threshold yet, or a score is not a number; nothing passes unjudged.
        """
        if self.threshold is None:
            raise SafelightError("the guard has no threshold yet: call calibrate() with harmless prompts, or set it")
        if bool(scores.isnan().any()):
            raise SafelightError("the guard computed a score that is not a number; no prompt passes unjudged")
        limits, entries = self.bank.thresholds(self.threshold), list(self.bank)
        found = []
        for prompt, row in zip(prompts, scores, strict=True):
            if not entries:
                found.append(Verdict(prompt, False, float("-inf"), None, "", self.threshold))
                continue
            place = int((row - limits).argmax())
            score, limit = float(row[place]), float(limits[place])
            found.append(Verdict(prompt, score >= limit, score, entries[place].name, entries[place].category, limit))
        return found

    def _explained(self, verdict: Verdict) -> Verdict:
        assert verdict.concept is not None
        place = self.bank.names.index(verdict.concept)
        words = verdict.prompt.split()
        shorter = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
        lost = verdict.score - self.scores(shorter)[:, place]
        ranked = sorted(zip(words, lost.tolist(), strict=True), key=lambda pair: -pair[1])
        return Verdict(**{**verdict.__dict__, "words": tuple(ranked)})

    # -- calibration -------------------------------------------------------------------------------------------------

    def calibrate(self, benign: Sequence[str], target_fpr: float = 0.01, per_concept: bool = False) -> float:
        """Choose the threshold so that at most ``target_fpr`` of harmless prompts like these are blocked.

        The bound holds for new prompts of the same kind, whatever the scores look like (split conformal). To be done
        again when the list changes much: the best match of a longer list is higher.

        Args:
            benign: harmless prompts like those that will come.
            target_fpr: share of them that may be blocked.
            per_concept: first bring every concept's scores on these prompts to mean 0 and standard deviation 1. One
                half of the prompts then serves for that and the other for the threshold.

        Returns:
            The new threshold.

        Raises:
            SafelightError: there are too few prompts for that rate, or no concepts.
        """
        if not len(self.bank):
            raise SafelightError("the list of concepts is empty: add some before calibrating")
        for concept in list(self.bank):
            self.bank.change(concept.name, shift=0.0, scale=1.0)
        prompts = list(benign)
        if per_concept:
            normalising, prompts = prompts[::2], prompts[1::2]
            scores = self.scores(normalising)
            for concept, mean, deviation in zip(list(self.bank), scores.mean(0), scores.std(0), strict=True):
                self.bank.change(concept.name, shift=float(mean), scale=max(float(deviation), 1e-6))
        self.threshold = threshold_at_fpr(self.scores(prompts).amax(1), target_fpr)
        self.calibration = {
            "kind": "target_fpr", "target_fpr": target_fpr, "per_concept": per_concept, "prompts": len(benign),
            "concepts": len(self.bank),
        }  # fmt: skip
        return self.threshold

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write ``guard.json``, ``head.safetensors`` and the list of concepts. The encoder is named, not copied."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
        save_file(state, folder / "head.safetensors")
        scale = float(self.head.tempr.detach())
        settings = {
            "encoder": self.encoder.settings(), "head": self.head.settings(), "threshold": self.threshold,
            "threshold_cosine": None if self.threshold is None else self.threshold / scale, "scale": scale,
            "calibration": self.calibration, "maker": self._maker(),
        }  # fmt: skip
        write_text(folder / "guard.json", json.dumps(settings, indent=1) + "\n")
        self.bank.save(folder)
        return folder

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, encoder: TextEncoder | None = None, device: str = "cpu"
    ) -> PromptGuard:
        """Open an exported guard.

        Args:
            folder: with ``guard.json``; a run folder or its ``export`` will do.
            encoder: an encoder that is open already; None opens the one that the guard names.
            device: where to run.

        Raises:
            SafelightError: weights, settings or the list of concepts are missing or damaged.
        """
        place = guard_folder(folder)
        try:
            settings = json.loads((place / "guard.json").read_text(encoding="utf-8"))
            head = EmbeddingMappingLayer(**settings["head"])
            head.load_state_dict(load_file(place / "head.safetensors"))
            threshold, calibration = settings["threshold"], settings.get("calibration")
            threshold = None if threshold is None else float(threshold)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise SafelightError(
                f"{place}: the guard cannot be read ({str(error).splitlines()[0]}); export it again"
            ) from error
        encoder = encoder or load_text_encoder(settings["encoder"]).to(device)
        guard = cls(encoder, head, threshold, calibration)
        if settings.get("maker") != guard._maker():
            raise SafelightError(
                f"{place}: head.safetensors and guard.json do not belong together, or the encoder is not "
                f"{settings['encoder']}"
            )
        guard.bank = ConceptBank.load(place, guard._embed, guard._maker(), encoder.device)
        return guard

    def add(self, names: Iterable[str], category: str = "") -> None:
        """Add concepts to the list; ``bank`` has further ways to change it."""
        for name in names:
            self.bank.add(name, category=category)


def guard_folder(folder: str | Path) -> Path:
    """Where the files of an exported guard lie: in the folder, or in ``export`` of a run folder.

    Raises:
        SafelightError: in neither.
    """
    for place in (Path(folder), Path(folder) / "export"):
        if (place / "guard.json").is_file():
            return place
    raise SafelightError(f"{folder}: there is no guard.json, so no guard; give the export folder of a latent_guard run")
