"""What a result does and does not show (after arXiv 2408.05859): the kind of claim, its support, its controls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, get_args

from safelight.errors import SafelightError
from safelight.reporting.files import write_text

FILE_NAME = "claims.json"
ClaimKind = Literal["semantic", "algorithmic"]
ClaimSupport = Literal["correlational", "interventional"]


@dataclass(frozen=True)
class Claim:
    """One claim and what stands behind it.

    Attributes:
        kind: ``semantic`` (what is represented) or ``algorithmic`` (what operation is performed).
        support: ``correlational`` (observed together) or ``interventional`` (changed one, the other changed).
        statement: The claim in one sentence.
        evidence: What was measured, with numbers; one entry per measurement.
        controls_beaten: The controls it was compared with and beat.
        not_shown: What a reader might conclude but was not tested. At least one entry: no claim shows everything.

    Raises:
        SafelightError: If a field is empty or a word is not one of the allowed.
    """

    kind: ClaimKind
    support: ClaimSupport
    statement: str
    evidence: Sequence[str]
    controls_beaten: Sequence[str] = field(default_factory=tuple)
    not_shown: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        for name, allowed in (("kind", get_args(ClaimKind)), ("support", get_args(ClaimSupport))):
            if getattr(self, name) not in allowed:
                raise SafelightError(f"claim {name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("evidence", "controls_beaten", "not_shown"):
            value = getattr(self, name)
            # A lone string is a sequence of letters: wrap it instead of printing it letter by letter.
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("statement", "evidence", "not_shown"):
            if not getattr(self, name):
                raise SafelightError(f"claim {self.statement!r}: {name} is empty; say it in a sentence")


def write_claims(folder: str | Path, claims: Sequence[Claim]) -> Path:
    """Writes ``folder/claims.json``: a list of the claims as objects."""
    content = json.dumps([asdict(claim) for claim in claims], indent=2, ensure_ascii=False)
    return write_text(Path(folder) / FILE_NAME, content + "\n")


def read_claims(path: str | Path) -> list[Claim]:
    """Reads what :func:`write_claims` wrote (a file, or the folder it lies in)."""
    source = Path(path)
    source = source / FILE_NAME if source.is_dir() else source
    return [Claim(**entry) for entry in json.loads(source.read_text(encoding="utf-8"))]
