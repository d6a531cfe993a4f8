"""Model cards in the Hugging Face format: a YAML header and what a reader must know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from safelight.errors import SafelightError
from safelight.reporting.files import write_text

# Identifiers the hub knows and that occur here; anything else becomes "other" with its name beside it.
_LICENCES = frozenset(
    {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m"}
    | {"gemma", "gpl-3.0", "llama3", "mit", "openrail", "openrail++", "other", "unlicense"}
)


def write_model_card(
    folder: str | Path,
    *,
    title: str,
    command: str,
    data: str,
    metrics: Mapping[str, float],
    licence: str,
    base_model: str | None = None,
    text: str = "",
    tags: Sequence[str] = (),
    datasets: Sequence[str] = (),
    library_name: str | None = None,
    pipeline_tag: str | None = None,
    usage: str = "",
) -> Path:
    """Writes ``folder/README.md``.

    Args:
        folder: The artefact's folder.
        title: Heading of the card.
        command: The exact command line that made the artefact.
        data: What it was trained or calibrated on, in words, with its licence.
        metrics: Name -> value, as in ``summary.json``.
        licence: A hub licence identifier such as ``apache-2.0``, or a name of its own.
        base_model: Hub id or local name of the model it was made from.
        text: Free markdown placed under the title.
        tags: Hub tags; ``safelight`` is always among them.
        datasets: Hub-style data set names.
        library_name: The library that opens the artefact (``diffusers``, ``peft``, ...).
        pipeline_tag: Hub task such as ``text-to-image``.
        usage: Python lines that open the artefact without Safelight.

    Raises:
        SafelightError: If title, command, data or licence is empty: a card without them helps nobody.
    """
    for name, value in (("title", title), ("command", command), ("data", data), ("licence", licence)):
        if not value.strip():
            raise SafelightError(f"model card: {name} is empty; the card must state it")
    known = licence.lower() in _LICENCES
    header: dict[str, Any] = {"license": licence.lower() if known else "other"}
    if not known:
        header["license_name"] = licence
    if library_name:
        header["library_name"] = library_name
    if pipeline_tag:
        header["pipeline_tag"] = pipeline_tag
    # The hub refuses anything but its own ids here, so local names are told in the text only.
    if base_model and ":" not in base_model and not base_model.startswith(("/", ".", "~")):
        header["base_model"] = base_model
    header["tags"] = list(dict.fromkeys(["safelight", *tags]))
    if datasets:
        header["datasets"] = list(datasets)
    if metrics:
        header["metrics"] = list(metrics)
    body = _body(title, text, command, data, metrics, licence, base_model, usage)
    front = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    return write_text(Path(folder) / "README.md", f"---\n{front}---\n\n{body}")


def _body(
    title: str,
    text: str,
    command: str,
    data: str,
    metrics: Mapping[str, float],
    licence: str,
    base_model: str | None,
    usage: str,
) -> str:
    parts = [f"# {title}"]
    if text.strip():
        parts.append(text.strip())
    if usage.strip():
        parts += ["## Use", f"```python\n{usage.strip()}\n```"]
    parts += ["## Made with", f"```bash\n{command.strip()}\n```", "## Data", data.strip()]
    if metrics:
        rows = "\n".join(f"| {name} | {value:.6g} |" for name, value in metrics.items())
        parts += ["## Metrics", f"| metric | value |\n|---|---:|\n{rows}"]
    parts += ["## Licence", licence + (f"; made from `{base_model}`, whose terms apply too." if base_model else ".")]
    return "\n\n".join(parts) + "\n"
