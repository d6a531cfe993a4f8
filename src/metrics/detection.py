"""temporary"""

from typing import NamedTuple
import torch


class Detection(NamedTuple):
    found: object
    score: object


class ClipDetector:
    def __init__(self, judge, labels):
        self.judge, self.labels = judge, list(labels)

    def _scale(self):
        return self.judge.model.logit_scale.exp()

    def detect(self, pictures, concept):
        sim = self.judge.similarity(pictures, [f"a {l}" for l in self.labels])
        k = self.labels.index(concept)
        return Detection(sim.argmax(1) == k, (sim * self._scale()).softmax(1)[:, k])

    def prefers(self, pictures, texts, others):
        f = self.judge.features(pictures)
        a = (f * self.judge.text_features(texts)).sum(1)
        b = (f * self.judge.text_features(others)).sum(1)
        return Detection(a > b, torch.sigmoid((a - b) * self._scale()))


def load_detector(spec, labels):
    from safelight.metrics.clip import ClipJudge

    return ClipDetector(ClipJudge(spec), labels)
