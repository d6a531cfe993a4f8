"""Measurements: torchmetrics of fidelity and recognition, and the cost of a model. One idea per file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.lazy import lazy_exports

if TYPE_CHECKING:
    from safelight.metrics.accuracy import ConceptAccuracy as ConceptAccuracy
    from safelight.metrics.accuracy import ShuffledAccuracy as ShuffledAccuracy
    from safelight.metrics.board_state import BoardCoverage as BoardCoverage
    from safelight.metrics.board_state import BoardReconstruction as BoardReconstruction
    from safelight.metrics.clip import ClipJudge as ClipJudge
    from safelight.metrics.clip_score import ClipScore as ClipScore
    from safelight.metrics.cost import cost_report as cost_report
    from safelight.metrics.detection import ClipDetector as ClipDetector
    from safelight.metrics.detection import ConceptDetector as ConceptDetector
    from safelight.metrics.detection import Detection as Detection
    from safelight.metrics.detection import load_detector as load_detector
    from safelight.metrics.detection_rate import DetectionRate as DetectionRate
    from safelight.metrics.distance import FeatureDistance as FeatureDistance
    from safelight.metrics.feature_correlation import FeatureCorrelation as FeatureCorrelation
    from safelight.metrics.illusion_recall import IllusionRecall as IllusionRecall
    from safelight.metrics.latent import LatentError as LatentError
    from safelight.metrics.legal_moves import LegalMoveRate as LegalMoveRate
    from safelight.metrics.nudity import NudeNetDetector as NudeNetDetector
    from safelight.metrics.perceptual import ClipMaps as ClipMaps
    from safelight.metrics.perceptual import PerceptualDistance as PerceptualDistance
    from safelight.metrics.reconstruction import Reconstruction as Reconstruction
    from safelight.metrics.safety import AnyJudge as AnyJudge
    from safelight.metrics.safety import NudityJudge as NudityJudge
    from safelight.metrics.safety import OpenNsfwJudge as OpenNsfwJudge
    from safelight.metrics.safety import Q16Judge as Q16Judge
    from safelight.metrics.safety import SafetyJudge as SafetyJudge
    from safelight.metrics.safety import WordsJudge as WordsJudge
    from safelight.metrics.safety import load_safety_judge as load_safety_judge
    from safelight.metrics.samples import SampleMean as SampleMean
    from safelight.metrics.samples import SampleRows as SampleRows
    from safelight.metrics.structure import SSIM as SSIM
    from safelight.metrics.top_tokens import TopTokens as TopTokens
    from safelight.metrics.vlm import VlmDetector as VlmDetector
    from safelight.metrics.zero_shot import ZeroShotDetector as ZeroShotDetector

_HOME = {
    "AnyJudge": "safety",
    "BoardCoverage": "board_state",
    "BoardReconstruction": "board_state",
    "ClipDetector": "detection",
    "ClipJudge": "clip",
    "ClipMaps": "perceptual",
    "ClipScore": "clip_score",
    "ConceptAccuracy": "accuracy",
    "ConceptDetector": "detection",
    "Detection": "detection",
    "DetectionRate": "detection_rate",
    "FeatureCorrelation": "feature_correlation",
    "FeatureDistance": "distance",
    "IllusionRecall": "illusion_recall",
    "LatentError": "latent",
    "LegalMoveRate": "legal_moves",
    "NudeNetDetector": "nudity",
    "NudityJudge": "safety",
    "OpenNsfwJudge": "safety",
    "PerceptualDistance": "perceptual",
    "Q16Judge": "safety",
    "Reconstruction": "reconstruction",
    "SSIM": "structure",
    "SafetyJudge": "safety",
    "SampleMean": "samples",
    "SampleRows": "samples",
    "ShuffledAccuracy": "accuracy",
    "TopTokens": "top_tokens",
    "VlmDetector": "vlm",
    "WordsJudge": "safety",
    "ZeroShotDetector": "zero_shot",
    "cost_report": "cost",
    "load_detector": "detection",
    "load_safety_judge": "safety",
}
__all__ = sorted(_HOME)
__getattr__, __dir__ = lazy_exports(__name__, _HOME)
