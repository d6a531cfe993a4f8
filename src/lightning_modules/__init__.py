"""The methods, one folder each. ``from safelight.lightning_modules import EcoDiff`` imports just that method.

Folders are discovered: a class is exported under its name when ``<folder>/module.py`` defines it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from safelight.lazy import lazy_exports

if TYPE_CHECKING:
    from safelight.lightning_modules.autoencoder.module import Autoencoder as Autoencoder
    from safelight.lightning_modules.base import SafelightModule as SafelightModule
    from safelight.lightning_modules.clip.module import Clip as Clip
    from safelight.lightning_modules.concept_erasure.module import ConceptErasure as ConceptErasure
    from safelight.lightning_modules.ecodiff.module import EcoDiff as EcoDiff
    from safelight.lightning_modules.heal.module import Heal as Heal
    from safelight.lightning_modules.latent_guard.module import LatentGuard as LatentGuard
    from safelight.lightning_modules.moe_x.module import MoEX as MoEX
    from safelight.lightning_modules.sae.module import SparseAutoencoders as SparseAutoencoders
    from safelight.lightning_modules.sae_universality.module import SAEUniversality as SAEUniversality
    from safelight.lightning_modules.safety_dpo.module import SafetyDPO as SafetyDPO
    from safelight.lightning_modules.text_to_image.module import TextToImage as TextToImage
    from safelight.lightning_modules.vision_mapping.module import VisionMapping as VisionMapping


def _homes() -> dict[str, str]:
    """Class name to the module that defines it, read from the sources without importing them."""
    homes = {"SafelightModule": "base"}
    for file in sorted(Path(__file__).parent.glob("*/module.py")):
        for name in re.findall(r"^class (\w+)\(SafelightModule\)", file.read_text(encoding="utf-8"), re.MULTILINE):
            homes[name] = f"{file.parent.name}.module"
    return homes


__getattr__, __dir__ = lazy_exports(__name__, _homes())
