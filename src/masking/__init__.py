"""Gates on structural units of a denoiser: find, attach, sample, harden, correct, fold, remove, save.

Names are imported on first use, so importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.lazy import lazy_exports

if TYPE_CHECKING:
    from safelight.masking.bank import MaskBank as MaskBank
    from safelight.masking.baselines import activation_scores as activation_scores
    from safelight.masking.baselines import magnitude_scores as magnitude_scores
    from safelight.masking.baselines import random_scores as random_scores
    from safelight.masking.baselines import second_order_scores as second_order_scores
    from safelight.masking.compensation import Compensation as Compensation
    from safelight.masking.correction import least_squares_correction as least_squares_correction
    from safelight.masking.files import import_reference_masks as import_reference_masks
    from safelight.masking.files import load_masks as load_masks
    from safelight.masking.files import save_masks as save_masks
    from safelight.masking.files import save_pruned as save_pruned
    from safelight.masking.files import write_manifest as write_manifest
    from safelight.masking.gates import saturation_logit as saturation_logit
    from safelight.masking.groups import DEFAULT_GROUPS as DEFAULT_GROUPS
    from safelight.masking.groups import GROUPS as GROUPS
    from safelight.masking.groups import MaskGroup as MaskGroup
    from safelight.masking.groups import choose_groups as choose_groups
    from safelight.masking.hardening import harden as harden
    from safelight.masking.hardening import kept_fraction as kept_fraction
    from safelight.masking.hardening import removed_params as removed_params
    from safelight.masking.load import load_pipeline as load_pipeline
    from safelight.masking.load import load_pruned as load_pruned
    from safelight.masking.merging import merge_masks as merge_masks
    from safelight.masking.merging import overlap as overlap
    from safelight.masking.removal import fold as fold
    from safelight.masking.removal import remove as remove
    from safelight.masking.units import KINDS as KINDS
    from safelight.masking.units import Kind as Kind
    from safelight.masking.units import Price as Price
    from safelight.masking.units import Site as Site
    from safelight.masking.units import UnitSpec as UnitSpec
    from safelight.masking.units import count_tokens as count_tokens
    from safelight.masking.units import find_units as find_units
    from safelight.masking.units import prunable_params as prunable_params
    from safelight.masking.units import specs_for as specs_for

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
    "saturation_logit": "gates",
    "DEFAULT_GROUPS": "groups",
    "GROUPS": "groups",
    "MaskGroup": "groups",
    "choose_groups": "groups",
    "harden": "hardening",
    "kept_fraction": "hardening",
    "removed_params": "hardening",
    "merge_masks": "merging",
    "overlap": "merging",
    "fold": "removal",
    "remove": "removal",
    "Compensation": "compensation",
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
