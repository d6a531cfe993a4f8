"""What a result does and does not show (after arXiv 2408.05859): the kind of claim, its support, its controls."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from safelight.errors import SafelightError
from safelight.reporting.charts import format_number
from safelight.reporting.files import write_text

FILE_NAME = "claims.json"
ClaimKind = Literal["behavioural", "semantic", "algorithmic"]
ClaimSupport = Literal["correlational", "interventional"]
CAUSAL_WORDS = (
    "because", "due to", "cause", "causes", "caused", "causing", "make", "makes", "made", "making",
    "drive", "drives", "drove", "driven", "lead to", "leads to", "led to", "result in", "results in",
    "determine", "determines", "responsible for", "rely on", "relies on", "uses", "used by",
)  # fmt: skip
"""Words that a correlational claim may not be stated with, as whole words. A guard against slips, not a proof."""
_CAUSAL = re.compile(r"\b(" + "|".join(word.replace(" ", r"\s+") for word in CAUSAL_WORDS) + r")\b", re.IGNORECASE)
_QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"")


@dataclass(frozen=True)
class Claim:
    """One claim and what stands behind it.

    Attributes:
        kind: ``behavioural`` (which input gives which output), ``semantic`` (what is represented) or ``algorithmic``
            (which operations act on it).
        support: ``correlational`` (observed together) or ``interventional`` (changed one, the other changed).
        statement: The claim in one sentence. A correlational one may not contain :data:`CAUSAL_WORDS`, except in
            `` `backticks` `` or double quotes, where the words are data.
        evidence: What was measured, with numbers; one entry per measurement.
        controls_beaten: Those of ``controls_run`` that did worse.
        not_shown: What a reader might conclude but was not tested. At least one entry: no claim shows everything.
        subject: What was looked at: model, layer, place, dictionary.
        assumptions: What has to hold for the evidence to mean what the statement says.
        controls_run: Every control to what it gave, a number or a text (None: not recorded). Left out, it is those
            beaten.
        n: On how many items it was measured.
        n_of: What these items are, such as ``test prompts``.
        effect: The size of the effect.
        effect_of: What ``effect`` measures, with its unit.
        interval: 95 % interval of the effect, (low, high).
        p: p-value.
        follow_up: The intervention that would test a correlational claim, in one sentence.

    Raises:
        SafelightError: If a field is empty, a word is not one of the allowed, a number is impossible, or the words
            say more than the support.
    """

    kind: ClaimKind
    support: ClaimSupport
    statement: str
    evidence: Sequence[str]
    controls_beaten: Sequence[str] = field(default_factory=tuple)
    not_shown: Sequence[str] = field(default_factory=tuple)
    _: KW_ONLY
    subject: str = ""
    assumptions: Sequence[str] = field(default_factory=tuple)
    controls_run: Mapping[str, float | str | None] = field(default_factory=dict)
    n: int | None = None
    n_of: str = ""
    effect: float | None = None
    effect_of: str = ""
    interval: tuple[float, float] | None = None
    p: float | None = None
    follow_up: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("kind", get_args(ClaimKind)), ("support", get_args(ClaimSupport))):
            if getattr(self, name) not in allowed:
                raise SafelightError(f"claim {name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("evidence", "controls_beaten", "not_shown", "assumptions"):
            value = getattr(self, name)
            # A lone string is a sequence of letters: wrap it instead of printing it letter by letter.
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("statement", "evidence", "not_shown"):
            if not getattr(self, name):
                raise self._error(f"{name} is empty; say it in a sentence")
        self._check_controls()
        self._check_numbers()
        if self.support == "correlational" and (said := _CAUSAL.search(_QUOTED.sub("", self.statement))):
            raise self._error(
                f"the support is correlational, but {said[0]!r} speaks of a cause; say what was observed together "
                "(words that are data go in backticks)"
            )

    @property
    def exploratory(self) -> bool:
        """Whether no control was run: the evidence has been compared with nothing."""
        return not self.controls_run

    def _check_controls(self) -> None:
        # What was beaten must have been run, so a claim that names only the beaten ones has still named controls.
        given = self.controls_run or dict.fromkeys(self.controls_beaten)
        stray = [name for name in self.controls_beaten if name not in given]
        if stray:
            raise self._error(f"controls_beaten has {stray[0]!r}, controls_run has only {', '.join(given)}")
        object.__setattr__(self, "controls_run", {name: _plain(value) for name, value in given.items()})

    def _check_numbers(self) -> None:
        for name in ("effect", "p"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, self._finite(name, value))
        if self.p is not None and not 0 <= self.p <= 1:
            raise self._error(f"p={self.p}: a p-value lies in [0, 1]")
        if self.n is not None:
            n = self._finite("n", self.n)
            if n < 1 or n != int(n):
                raise self._error(f"n={self.n}: give a whole number above 0, or leave it out")
            object.__setattr__(self, "n", int(n))
        if self.interval is not None:
            low, high = (self._finite("interval", value) for value in self.interval)
            if low > high:
                raise self._error(f"interval=({low}, {high}): the lower end comes first")
            if self.effect is None:
                raise self._error("an interval needs the effect it belongs to")
            object.__setattr__(self, "interval", (low, high))

    def _finite(self, name: str, value: Any) -> float:
        if not math.isfinite(number := float(value)):
            raise self._error(f"{name}={number} is no finite number; leave out what could not be measured")
        return number

    def _error(self, what: str) -> SafelightError:
        return SafelightError(f"claim {self.statement!r}: {what}")


def finite(value: float) -> float | None:
    """The value, or None where it is NaN or infinite: a claim leaves out what could not be measured."""
    return value if math.isfinite(value) else None


def verdict(claims: Sequence[Claim]) -> str:
    """What several claims support together, in one or two sentences; all correlational ones support no cause."""
    if not claims:
        return "No claim is made."
    count = sum(claim.support == "interventional" for claim in claims)
    if count == 0:
        told = "Only correlations are listed here: no causal claim is supported."
    elif count == len(claims):
        told = "Each claim listed here rests on an intervention: something was changed, and the effect was measured."
    else:
        told = (
            f"Claims that rest on an intervention: {count} of {len(claims)}. The others say what was observed together."
        )
    if exploratory := sum(claim.exploratory for claim in claims):
        told += f" Exploratory, as no control was run: {exploratory} of {len(claims)}."
    return told


def told_controls(claim: Claim) -> list[str]:
    """Every control with what it gave and whether it was beaten, such as ``random mask: 0.164, beaten``."""
    return [
        f"{name}{'' if value is None else ': ' + _text(value)}, {'' if name in claim.controls_beaten else 'not '}beaten"
        for name, value in claim.controls_run.items()
    ]


def told_effect(claim: Claim) -> str:
    """Effect, interval and p-value in a line; empty if none is given."""
    parts = []
    if claim.effect is not None:
        effect = f"{claim.effect_of}: " * bool(claim.effect_of) + format_number(claim.effect)
        if claim.interval is not None:
            effect += " (95 % interval {} to {})".format(*map(format_number, claim.interval))
        parts.append(effect)
    if claim.p is not None:
        parts.append("p < 0.0001" if claim.p < 1e-4 else f"p = {claim.p:.2g}")
    return ", ".join(parts)


def told_n(claim: Claim) -> str:
    """The number of items and what they are, such as ``1,200 test prompts``; empty if not given."""
    return "" if claim.n is None else f"{claim.n:,} {claim.n_of}".strip()


def markdown_table(claims: Sequence[Claim]) -> str:
    """The sentence of :func:`verdict` and a Markdown table with a row per claim."""
    if not claims:
        return verdict(claims) + "\n"
    head = ("claim", "kind", "support", "looked at", "effect", "n", "controls", "not shown")
    rows = [
        (
            claim.statement,
            claim.kind,
            claim.support + (", exploratory" if claim.exploratory else ""),
            claim.subject,
            told_effect(claim),
            told_n(claim),
            "; ".join(told_controls(claim)) or "none was run",
            "; ".join(claim.not_shown),
        )
        for claim in claims
    ]
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([verdict(claims), "", lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def write_claims(folder: str | Path, claims: Sequence[Claim]) -> Path:
    """Writes ``folder/claims.json``: a list of the claims as objects, each with ``exploratory`` added."""
    entries = [asdict(claim) | {"exploratory": claim.exploratory} for claim in claims]
    return write_text(Path(folder) / FILE_NAME, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")


def read_claims(path: str | Path) -> list[Claim]:
    """Reads what :func:`write_claims` wrote (a file, or the folder it lies in), older files with fewer fields too."""
    source = Path(path)
    source = source / FILE_NAME if source.is_dir() else source
    entries = json.loads(source.read_text(encoding="utf-8"))
    # Derived from the controls, so it is never read back.
    return [Claim(**{name: value for name, value in entry.items() if name != "exploratory"}) for entry in entries]


def _plain(value: Any) -> float | str | None:
    """A control's value as JSON can hold it; one that is not finite is told in words, it spoils no report."""
    if value is None or isinstance(value, str):
        return value
    number = float(value)
    return number if math.isfinite(number) else format_number(number)


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else format_number(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "–"
