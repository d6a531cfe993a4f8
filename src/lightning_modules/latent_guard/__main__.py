"""Judge the lines of a text file with an exported guard.

    python -m safelight.lightning_modules.latent_guard runs/latent_guard/<run>/export prompts.txt

One line per prompt: BLOCKED or passed, score, threshold, concept. The exit status is 1 when a prompt was blocked.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from safelight.errors import SafelightError


def main() -> int:
    """Parse the command line, judge, print."""
    parser = argparse.ArgumentParser(
        prog="python -m safelight.lightning_modules.latent_guard", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("guard", type=Path, help="export folder of a latent_guard run")
    parser.add_argument("prompts", help="text file with a prompt in each line, or - for standard input")
    parser.add_argument("--add", action="append", default=[], metavar="CONCEPT", help="add a concept to the list")
    parser.add_argument("--remove", action="append", default=[], metavar="CONCEPT", help="take one off the list")
    parser.add_argument("--only", nargs="+", metavar="CONCEPT", help="look for these concepts instead of the list")
    parser.add_argument("--list", nargs="*", metavar="NAME", help="look for curated lists (all without a name) instead")
    parser.add_argument("--threshold", type=float, help="instead of the guard's own")
    parser.add_argument("--benign", type=Path, help="file of harmless prompts: choose the threshold on them first")
    parser.add_argument("--fpr", type=float, default=0.01, help="share of these that may be blocked (default: .01)")
    parser.add_argument("--explain", action="store_true", help="name the words that carry the score of blocked prompts")
    given = parser.parse_args()
    try:
        return _judge(given)
    except SafelightError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _judge(given: argparse.Namespace) -> int:
    from safelight.lightning_modules.latent_guard.bank import ConceptBank
    from safelight.lightning_modules.latent_guard.concept_lists import curated
    from safelight.lightning_modules.latent_guard.guard import PromptGuard

    guard = PromptGuard.from_pretrained(given.guard)
    if given.only or given.list is not None:
        guard.bank = ConceptBank(guard.bank.embed, guard.bank.maker)
    listed = [] if given.list is None else curated(*given.list)
    guard.bank.extend([*listed, *(given.only or []), *given.add])
    for name in given.remove:
        guard.bank.remove(name)
    if given.threshold is not None:
        guard.threshold = given.threshold
    if given.benign is not None:
        print(f"threshold {guard.calibrate(_lines(given.benign), given.fpr):.4g} from {given.benign}")
    verdicts = guard.check(_lines(given.prompts), explain=given.explain)
    for number, verdict in enumerate(verdicts, 1):
        words = ", ".join(f"{word} {lost:+.2f}" for word, lost in verdict.words[:3])
        print(
            f"{number}\t{'BLOCKED' if verdict.blocked else 'passed'}\t{verdict.score:.3f}\t{verdict.threshold:.3f}\t"
            f"{verdict.concept or '-'}" + (f"\t{words}" if words else "")
        )
    blocked = sum(verdict.blocked for verdict in verdicts)
    print(f"{blocked} of {len(verdicts)} prompts blocked, {len(guard.bank)} concepts in the list")
    return int(blocked > 0)


def _lines(source: Path | str) -> list[str]:
    if str(source) == "-":
        text = sys.stdin.read()
    else:
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SafelightError(f"{source} cannot be read ({error})") from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise SafelightError(f"{source} holds no prompt")
    return lines


if __name__ == "__main__":
    sys.exit(main())
