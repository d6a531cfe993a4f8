"""What a run leaves behind for people: summary.json, the report page, pictures, claims and model cards."""

from __future__ import annotations

from typing import TYPE_CHECKING

from safelight.lazy import lazy_exports

if TYPE_CHECKING:
    from safelight.reporting.claims import Claim as Claim
    from safelight.reporting.claims import write_claims as write_claims
    from safelight.reporting.model_card import write_model_card as write_model_card
    from safelight.reporting.pictures import grid as grid
    from safelight.reporting.report import Report as Report
    from safelight.reporting.report import Tile as Tile
    from safelight.reporting.summary import Summary as Summary
    from safelight.reporting.summary import read_summary as read_summary
    from safelight.reporting.summary import split_logged as split_logged
    from safelight.reporting.summary import write_summary as write_summary
    from safelight.reporting.tables import measured_rows as measured_rows

_HOME = {
    "Claim": "claims",
    "Report": "report",
    "Summary": "summary",
    "Tile": "report",
    "grid": "pictures",
    "measured_rows": "tables",
    "read_summary": "summary",
    "split_logged": "summary",
    "write_claims": "claims",
    "write_model_card": "model_card",
    "write_summary": "summary",
}
__all__ = sorted(_HOME)
__getattr__, __dir__ = lazy_exports(__name__, _HOME)
