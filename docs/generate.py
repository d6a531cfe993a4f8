"""The pages of the documentation that are made from the code: one per method, the paper index, and copies of READMEs.

mkdocs calls ``on_files`` and ``on_page_markdown`` (see ``mkdocs.yml``); ``pages()`` is what the tests look at.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
import drawing
import reading
from reading import REPOSITORY, Method

DOCS = Path(__file__).parent
# Files of the repository that become pages, and what they are called there.
COPIES = {"CONTRIBUTING.md": "adding.md", "examples/README.md": "examples.md", "benchmarks/README.md": "benchmarks.md",
          "examples/plugin/README.md": "plugin.md"}  # fmt: skip
_PAPERS_NOTE = (
    "Our numbers are measured on the small models that ship with the package. They show that the method works here, "
    "not that the paper's full-size number was reproduced."
)
_LINK = re.compile(r"(!?)\[([^\[\]]*)\]\(([^()\s]+)\)")


def pages() -> dict[str, str]:
    """Path of every generated page and its markdown."""
    found = {"papers.md": paper_index(), "methods/index.md": method_index(), "architecture.md": architecture()}
    found |= {f"methods/{method.name}.md": method_page(method) for method in reading.methods()}
    for source, target in sources().items():
        if target not in found:
            text = (REPOSITORY / source).read_text(encoding="utf-8")
            found[target] = relinked(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL), source, target)
    return found


def sources() -> dict[str, str]:
    """Files of the repository that have a page: path there -> page."""
    found = dict(COPIES) | {f"docs/{p.name}": p.name for p in DOCS.glob("*.md")}
    found |= {f"src/zoo/{p.parent.name}/README.md": f"zoo/{p.parent.name}.md"
              for p in (REPOSITORY / "src" / "zoo").glob("*/README.md")}  # fmt: skip
    found |= {f"src/lightning_modules/{m.name}/README.md": f"methods/{m.name}.md" for m in reading.methods()}
    return found


def relinked(text: str, source: str, target: str) -> str:
    """Links of a file of the repository as they must read on its page; what has no page stays as its name."""
    known = sources()

    def new(match: re.Match[str]) -> str:
        picture, words, address = match.groups()
        path, _, anchor = address.partition("#")
        if not path or re.match(r"[a-z]+:", address):
            return match[0]
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        there = f"{there}/README.md" if f"{there}/README.md" in known else there
        page = known.get(there) or (there.removeprefix("docs/") if there.startswith("docs/pictures/") else None)
        if page is None:
            return words
        relative = posixpath.relpath(page, posixpath.dirname(target) or ".")
        return f"{picture}[{words}]({relative}{'#' + anchor if anchor else ''})"

    return _LINK.sub(new, text)


def method_page(method: Method) -> str:
    """One method: its README, then what its constructor takes, what it measures, and its configuration."""
    readme = relinked(method.readme, f"src/lightning_modules/{method.name}/README.md", f"methods/{method.name}.md")
    lines = [readme.rstrip() if readme else f"# {method.class_name}\n\n{method.summary}", ""]
    if not readme:
        lines += ["```bash", f"python train.py method={method.name}", "```", ""]
    lines += ["## In Python", "", "```python", f"from safelight.lightning_modules import {method.class_name}", "",
              f"method = {method.class_name}()", "```", ""]  # fmt: skip
    lines += [method.summary, "", _prose(method.details), ""]
    lines += ["## Settings", "", f"Each is a keyword of `{method.class_name}(...)` and a key of the command line, "
              f"`method.<name>=<value>`.", "", "| name | value | default | |", "|---|---|---|---|"]  # fmt: skip
    lines += [f"| `{a.name}` | {a.kind} | `{a.default}` | {_cell(a.text)} |" for a in method.arguments]
    lines += ["", "## What is measured", "", *_measured(method.facts), ""]
    lines += [
        "## Configuration",
        "",
        f"`configs/method/{method.name}.yaml`:",
        "",
        "```yaml",
        method.config.strip(),
        "```",
        "",
    ]
    if method.tuned:
        named = ", ".join(f"`{name.removeprefix(method.name + '-')}`" for name in method.tuned)
        lines += [f"The paper's settings are taken by themselves on {named} (`configs/tuned/`).", ""]
    return "\n".join(lines)


def _prose(text: str) -> str:
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _cell(text: str) -> str:
    return _prose(text).replace("|", "\\|").replace("<", "&lt;")


def _measured(facts: dict[str, Any]) -> list[str]:
    lines = ["Names in `summary.json`: " + ", ".join(f"`{name}`" for name in facts.get("metric_names") or ()) + "."]
    if facts.get("control_names"):
        named = ", ".join(f"`{name}`" for name in facts["control_names"])
        lines += ["", f"Controls measured beside it: {named}."]
    for name, entry in (facts.get("paper_numbers") or {}).items():
        lines += ["", f"Paper: `{name}` {entry['value']} ({entry['source']})."]
    return lines


def readme_rows() -> dict[str, tuple[str, str]]:
    """Method -> (command, our number) of the table in README.md, so that it is written in one place."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[`(\w+)`\]\([^)]*\) \|[^\n]*?\| (`[^`]+`) \| ([^|\n]+) \|$", text, re.MULTILINE)
    return {name: (command, ours) for name, command, ours in rows}


def paper_index() -> str:
    """Paper -> class -> command -> the paper's number -> ours; and what is not there yet."""
    known, ours = {method.name: method for method in reading.methods()}, readme_rows()
    lines = [
        "# Papers",
        "",
        _PAPERS_NOTE,
        "",
        "| paper | class | command | the paper | ours, at tiny size |",
        "|---" * 5 + "|",
    ]
    planned = []
    for entry in yaml.safe_load((DOCS / "papers.yaml").read_text(encoding="utf-8")):
        link = f"{entry['title']}, [arXiv {entry['arxiv']}](https://arxiv.org/abs/{entry['arxiv']})"
        for name in entry["methods"]:
            if name not in known:
                planned.append(f"| {link} | `{name}` |")
                continue
            method = known[name]
            numbers = "; ".join(
                f"{e['value']}: {e['source']}" for e in (method.facts.get("paper_numbers") or {}).values()
            )
            command, number = ours.get(name, (f"`python train.py method={name}`", "not measured"))
            page = f"[`{method.class_name}`](methods/{name}.md)"
            lines.append(f"| {link} | {page} | {command} | {numbers or 'none quoted'} | {number} |")
    lines += ["", "## One command per number", "", "Quoted figures stand beside a run's own in its report.", ""]
    lines += ["| command | | quoted |", "|---|---|---|"]
    for experiment in reading.experiments():
        quoted = ", ".join(f"`{name}` {entry['value']}" for name, entry in experiment.paper.items())
        page = f"[{experiment.method}](methods/{experiment.method}.md)"
        command = f"`python train.py experiment={experiment.name}`"
        lines.append(f"| {command} | {page}: {_cell(experiment.sentence)} | {quoted or 'our own study'} |")
    if planned:
        lines += [
            "",
            "## Not there yet",
            "",
            "Planned, with nothing to run so far:",
            "",
            "| paper | method |",
            "|---|---|",
            *planned,
        ]
    return "\n".join(lines) + "\n"


def method_index() -> str:
    """All methods with their sentence."""
    rows = [f"| [`{m.name}`]({m.name}.md) | {m.sentence} |" for m in reading.methods()]
    return "\n".join(["# Methods", "", "| method | |", "|---|---|", *rows, ""])


def architecture() -> str:
    """The page about the house: prose from ``architecture.in.md``, the rooms and all arrows from the code."""
    texts = reading.rooms()
    table = ["| room | what | imports |", "|---|---|---|"]
    for room, targets in drawing.graph().items():
        named = ", ".join(f"`{target}`" for target in sorted(targets)) or "nothing of ours"
        table.append(f"| `{room}` | {_prose(texts[room])} | {named} |")
    text = (DOCS / "architecture.in.md").read_text(encoding="utf-8")
    return text.replace("<!-- rooms -->", "\n".join(table))


def on_files(files: Any, config: Any) -> Any:
    """Mkdocs: add the generated pages, in place of files of the same name."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        old = files.get_file_from_path(path)
        if old is not None:
            files.remove(old)
        files.append(File.generated(config, path, content=text))
    return files
