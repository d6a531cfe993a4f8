"""Names of the adapters that one training has."""

from __future__ import annotations

from collections.abc import Sequence

from safelight.errors import SafelightError

ONLY = "safety"
"""Name of the adapter where there are no experts."""
CONTROL = "no_guard"
ALL = "all"
"""Name of the adapter that learns from every category and is compared with the merge, not merged."""
CATEGORIES = ("hate", "harassment", "violence", "self_harm", "sexual", "shocking", "illegal")
"""Of harm in CoProV2: an expert each for ``experts=all``."""


def adapter_names(experts: str | Sequence[str] | None) -> list[str]:
    """Names of the adapters: of the only one, of each category for ``all``, or as given.

    Raises:
        SafelightError: one cannot be a name, or they are too few to merge.
    """
    if experts is None:
        return [ONLY]
    names = [experts] if isinstance(experts, str) else list(experts)
    if names == [ALL]:
        return list(CATEGORIES)
    if bad := [name for name in names if "." in name or not name]:
        raise SafelightError(f"experts={names}: {bad[0]!r} cannot be a name of an adapter; leave out dots")
    if len(set(names)) < len(names) or (len(names) > 1 and len(set(names) - {ALL}) < 2):
        raise SafelightError(f"experts={names}: merging needs two different ones beside 'all'; null is one for all")
    return names
