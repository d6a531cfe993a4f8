"""Gates on structural units of a denoiser: find, attach, sample, harden, correct, fold, remove, save.

Names are imported on first use, so importing the package costs nothing.
"""

from __future__ import annotations

from safelight.lazy import lazy_exports

_HOME = {
    "KINDS": "units",
    "Kind": "units",
    "Price": "units",
    "Site": "units",
    "UnitSpec": "units",
    "count_tokens": "units",
    "find_units": "units",
    "prunable_params": "units",
    "specs_for": "units",
    "MaskBank": "bank",
    "harden": "hardening",
    "kept_fraction": "hardening",
    "removed_params": "hardening",
    "fold": "removal",
    "remove": "removal",
    "least_squares_correction": "correction",
    "activation_scores": "baselines",
    "magnitude_scores": "baselines",
    "random_scores": "baselines",
    "second_order_scores": "baselines",
    "import_reference_masks": "files",
    "load_masks": "files",
    "save_masks": "files",
    "save_pruned": "files",
    "write_manifest": "files",
    "load_pipeline": "load",
    "load_pruned": "load",
}

__all__ = list(_HOME)
__getattr__, __dir__ = lazy_exports(__name__, _HOME)
