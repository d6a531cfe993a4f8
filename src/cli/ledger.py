"""The memory of a sweep: which runs were started, how each ended, and one table of what came out."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from safelight.cli.ending import as_table
from safelight.errors import SafelightError

State = Literal["new", "started", "submitted", "stopped", "failed", "done"]
_WAIT_SECONDS: Final = 60.0


class Ledger:
    """``ledger.jsonl`` in the folder of a sweep: one line per event, the last line of a run is its state.

    Args:
        folder: of the sweep; runs lie in its sub-folders ``000``, ``001``, …
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "ledger.jsonl"
        self.descriptor: int | None = None

    def run_folder(self, number: int) -> Path:
        """Where a run writes."""
        return self.folder / f"{number:03d}"

    def record(self, number: int, state: State, overrides: Sequence[str], **facts: Any) -> None:
        """Add a line; on the disk before anything else happens."""
        line = {"run": f"{number:03d}", "state": state, "overrides": list(overrides), **facts}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def last_lines(self) -> dict[str, dict[str, Any]]:
        """Run name to the newest line about it; a line that a crash cut short is left out."""
        found: dict[str, dict[str, Any]] = {}
        for text in self.file.read_text(encoding="utf-8").splitlines() if self.file.is_file() else ():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            found[line["run"]] = line
        return found

    def state(self, number: int) -> State:
        """How far a run is; a summary proves that it was finished, whoever was there to note it."""
        state: State = self.last_lines().get(f"{number:03d}", {}).get("state", "new")
        unsure = state in ("started", "submitted", "stopped")
        return "done" if unsure and (self.run_folder(number) / "summary.json").is_file() else state

    def is_due(self, number: int, retry: bool) -> bool:
        """Whether a run is still to be made; failed ones only on request."""
        state = self.state(number)
        return state in ("new", "started", "stopped") or (state == "failed" and retry)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second sweep out of the folder as long as this process or a run it started is alive.

        Raises:
            SafelightError: somebody else is still working here.
        """
        try:
            import fcntl
        except ImportError:  # Not on Windows, where nobody is kept out.
            yield
            return
        with self.file.open("a", encoding="utf-8") as file:
            deadline, told = time.monotonic() + _WAIT_SECONDS, False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() > deadline:
                        raise SafelightError(f"a sweep is still running in {str(self.folder)!r}") from error
                    if not told:
                        print(f"sweep: waiting for a run that is still ending in {self.folder}", flush=True)
                    told = True
                    time.sleep(0.2)
            self.descriptor = file.fileno()
            try:
                yield
            finally:
                self.descriptor = None

    def rows(self, jobs: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
        """One flat row per run: state, the settings in which runs differ, metrics, controls, time, folder."""
        from safelight.reporting import read_summary

        varied = varied_settings(jobs)
        rows = []
        for number, settings in enumerate(varied):
            folder = self.run_folder(number)
            row: dict[str, Any] = {"run": folder.name, "state": self.state(number), **settings}
            if (folder / "summary.json").is_file():
                summary = read_summary(folder)
                row |= summary.metrics
                row |= {f"{control}/{k}": v for control, values in summary.controls.items() for k, v in values.items()}
                row["wall_seconds"] = summary.wall_seconds
            rows.append(row | {"folder": str(folder)})
        return rows

    def write_csv(self, jobs: Sequence[Sequence[str]]) -> Path:
        """``summary.csv``: all rows with all columns."""
        rows = self.rows(jobs)
        path = self.folder / "summary.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
        return path

    def table(self, jobs: Sequence[Sequence[str]]) -> str:
        """The same for the screen, without controls and folders."""
        rows = [{k: v for k, v in row.items() if "/" not in k and k != "folder"} for row in self.rows(jobs)]
        return as_table(rows)


def varied_settings(jobs: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """For each job the keys in which the jobs differ, with their values."""
    named = [dict(word.lstrip("+").partition("=")[::2] for word in job) for job in jobs]
    keys = list(dict.fromkeys(key for settings in named for key in settings))
    varied = [key for key in keys if len({settings.get(key) for settings in named}) > 1]
    return [{key: settings[key] for key in varied if key in settings} for settings in named]


def same_plan(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two plans ask for the same runs; in which order does not matter."""
    return sorted(map(json.dumps, one["jobs"])) == sorted(map(json.dumps, other["jobs"])) and (
        one["search"] == other["search"]
    )
