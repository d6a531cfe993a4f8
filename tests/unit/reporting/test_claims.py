"""Claims: what is refused, what is exploratory, what is written, and what a page says of several together."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from safelight.errors import SafelightError
from safelight.reporting import Claim, Report, write_claims
from safelight.reporting.claims import CAUSAL_WORDS, finite, markdown_table, read_claims, verdict

NO_CAUSE = "no causal claim is supported"


def claim(support: str = "correlational", statement: str = "A goes with B.", **more: Any) -> Claim:
    return Claim("semantic", support, statement, ["r 0.5"], not_shown=["why"], **more)  # type: ignore[arg-type]


FULL = Claim(
    "behavioural", "interventional", "One input gives one output.", ["12 of 40", "3 of 40"], ["random"], ["why", "how"],
    subject="model, layer 3", assumptions=["the judge is right"], controls_run={"random": 0.25, "mean": "as good"},
    n=1200, n_of="prompts", effect=0.5, effect_of="rise, nats", interval=(0.25, 0.75), p=0.002, follow_up="Swap it.",
)  # fmt: skip


def test_emptiness_and_unknown_words_are_refused() -> None:
    assert Claim("semantic", "interventional", "s", "one measurement", [], "why").evidence == ("one measurement",)
    with pytest.raises(SafelightError, match="kind='causal': choose one of behavioural, semantic, algorithmic"):
        Claim("causal", "interventional", "s", ["e"], [], ["n"])  # type: ignore[arg-type]
    with pytest.raises(SafelightError, match="support='strong': choose one of correlational, interventional"):
        claim("strong")
    with pytest.raises(SafelightError, match="not_shown is empty"):
        Claim("semantic", "correlational", "s", ["e"])
    with pytest.raises(SafelightError, match="evidence is empty"):
        Claim("semantic", "correlational", "s", [], [], ["n"])


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"p": 1.5}, r"p=1.5: a p-value lies in \[0, 1\]"),
        ({"p": -0.1}, "p=-0.1"),
        ({"p": math.nan}, "p=nan is no finite number"),
        ({"effect": math.nan}, "effect=nan is no finite number; leave out"),
        ({"effect": 0.5, "interval": (0.6, 0.4)}, "the lower end comes first"),
        ({"effect": 0.5, "interval": (math.nan, 0.4)}, "interval=nan is no finite number"),
        ({"interval": (0.4, 0.6)}, "an interval needs the effect"),
        ({"n": 0}, "n=0: give a whole number above 0"),
        ({"n": 2.5}, "n=2.5: give a whole number"),
        ({"n": math.nan}, "n=nan is no finite number"),
        ({"controls_beaten": ["rnadom"], "controls_run": {"random": 1.0}}, "'rnadom', controls_run has only random"),
    ],
)
def test_impossible_numbers_are_refused(numbers: dict[str, Any], text: str) -> None:
    with pytest.raises(SafelightError, match=text):
        claim(**numbers)


def test_the_ends_of_the_allowed_ranges_are_allowed() -> None:
    made = claim(p=0, n=1, effect=1, interval=(1, 1))
    assert (made.p, made.n, made.effect, made.interval) == (0.0, 1, 1.0, (1.0, 1.0))
    assert claim(p=1).p == 1.0
    assert [finite(value) for value in (0.5, math.nan, -math.inf)] == [0.5, None, None]


def test_a_claim_without_controls_is_exploratory() -> None:
    assert claim().exploratory
    # A control that was run and won is still a control.
    lost = claim(controls_run={"random": 0.9})
    assert not lost.exploratory
    assert lost.controls_beaten == ()
    # A beaten one must have been run.
    named = claim(controls_beaten=["random"])
    assert not named.exploratory
    assert named.controls_run == {"random": None}
    assert claim(controls_run={"random": math.nan}).controls_run == {"random": "not finite"}


@pytest.mark.parametrize("word", CAUSAL_WORDS)
def test_correlational_claims_name_no_cause(word: str) -> None:
    statement = f"A {word.capitalize()} B."
    with pytest.raises(SafelightError, match=f"correlational, but '{word.capitalize()}' speaks of a cause"):
        claim(statement=statement)
    assert claim("interventional", statement).statement == statement


def test_only_whole_words_outside_quotes_count() -> None:
    for statement in (
        "The causeway is remade.",
        'It fires on `because` and on "due to".',
        "A router causally unnamed.",
    ):
        assert claim(statement=statement).statement == statement
    with pytest.raises(SafelightError, match="speaks of a cause"):
        claim(statement="It fires on `cats`, which\nleads  to `dogs`.")


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    claims = [FULL, claim(), claim(controls_beaten=["random"])]
    path = write_claims(tmp_path, claims)
    assert read_claims(tmp_path) == read_claims(path) == claims
    entries = json.loads(path.read_text())
    assert [entry["exploratory"] for entry in entries] == [False, True, False]
    assert entries[0] == {
        "kind": "behavioural", "support": "interventional", "statement": "One input gives one output.",
        "evidence": ["12 of 40", "3 of 40"], "controls_beaten": ["random"], "not_shown": ["why", "how"],
        "subject": "model, layer 3", "assumptions": ["the judge is right"],
        "controls_run": {"random": 0.25, "mean": "as good"}, "n": 1200, "n_of": "prompts", "effect": 0.5,
        "effect_of": "rise, nats", "interval": [0.25, 0.75], "p": 0.002, "follow_up": "Swap it.", "exploratory": False,
    }  # fmt: skip


def test_files_from_before_the_new_fields_are_read(tmp_path: Path) -> None:
    kept = ("kind", "support", "statement", "evidence", "controls_beaten", "not_shown")
    old = {name: value for name, value in asdict(FULL).items() if name in kept}
    (tmp_path / "claims.json").write_text(json.dumps([old]))
    (found,) = read_claims(tmp_path)
    assert found == Claim(**old)
    assert found.controls_run == {"random": None}
    assert found.n is None


def test_the_verdict_counts_interventions_and_missing_controls() -> None:
    tested, seen = claim("interventional", controls_run={"random": 1}), claim(controls_run={"random": 1})
    assert verdict([]) == "No claim is made."
    assert verdict([seen]) == f"Only correlations are listed here: {NO_CAUSE}."
    assert verdict([tested]).startswith("Each claim listed here rests on an intervention")
    assert verdict([tested, seen, claim()]) == (
        "Claims that rest on an intervention: 1 of 3. The others say what was observed together. "
        "Exploratory, as no control was run: 1 of 3."
    )


def test_markdown_table() -> None:
    assert markdown_table([FULL, claim(statement="A | B\ngo together.")]) == (
        "Claims that rest on an intervention: 1 of 2. The others say what was observed together. "
        "Exploratory, as no control was run: 1 of 2.\n\n"
        "| claim | kind | support | looked at | effect | n | controls | not shown |\n"
        "|---|---|---|---|---|---|---|---|\n"
        "| One input gives one output. | behavioural | interventional | model, layer 3 | rise, nats: 0.500 (95 % "
        "interval 0.250 to 0.750), p = 0.002 | 1,200 prompts | random: 0.250, beaten; mean: as good, not beaten | "
        "why; how |\n"
        "| A \\| B go together. | semantic | correlational, exploratory | – | – | – | none was run | why |\n"
    )
    assert "| p < 0.0001 |" in markdown_table([claim(p=0)])
    assert markdown_table([]) == "No claim is made.\n"


def test_a_page_of_correlations_says_what_it_does_not_support() -> None:
    page = Report("t")
    page.add_claims([claim(), claim(controls_run={"random": 0.5})])
    assert page.html().count(NO_CAUSE) == 1
    assert page.html().count('<span class="badge open">exploratory</span>') == 1
    assert "<dt>Controls</dt><dd>none was run</dd>" in page.html()
    page = Report("t")
    page.add_claims([claim(), FULL])
    assert NO_CAUSE not in page.html()


def test_a_card_has_a_line_for_what_was_given() -> None:
    page = Report("t")
    page.add_claims([FULL])
    html = page.html()
    assert '<span class="badge">behavioural</span><span class="badge strong">interventional</span><p>' in html
    for line in (
        "<dt>Looked at</dt><dd>model, layer 3</dd>",
        "<dt>Effect</dt><dd>rise, nats: 0.500 (95 % interval 0.250 to 0.750), p = 0.002</dd>",
        "<dt>Measured on</dt><dd>1,200 prompts</dd>",
        "<dt>Controls</dt><dd><ul><li>random: 0.250, beaten</li><li>mean: as good, not beaten</li></ul></dd>",
        "<dt>Assumed</dt><dd>the judge is right</dd>",
        "<dt>Not shown</dt><dd><ul><li>why</li><li>how</li></ul></dd>",
        "<dt>To be tested by</dt><dd>Swap it.</dd>",
    ):
        assert line in html
    page = Report("t")
    page.add_claims([claim()])
    names = ("Looked at", "Effect", "Measured on", "Assumed", "To be tested by")
    assert not any(f"<dt>{name}</dt>" in page.html() for name in names)
