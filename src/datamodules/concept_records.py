"""Pairs on disk with the latents they should reach, so that costly targets are made once.

A folder holds ``manifest.jsonl`` (first a line about the whole, then a line per row) and ``x0_target.safetensors`` with
one tensor ``x0_target`` (N, *latent_shape), row by row.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from safelight.datamodules.concept_rows import Pair, Role
from safelight.errors import SafelightError

MANIFEST, SHARD = "manifest.jsonl", "x0_target.safetensors"
_KEY = "x0_target"
_FORMAT = "safelight concept pairs 1"
Kind = Literal["erase", "retain"]


@dataclass(frozen=True)
class ConceptRecords:
    """What a folder of records holds.

    Attributes:
        settings: what the latents depend on besides the rows: model, steps, guidance, target mode and so on.
        erased: concept to anchor.
        kind: whether the concepts are things or styles.
        concepts: all words a judge chooses between.
        rows: training rows, erase and retain, each with a seed.
        x0_target: latents to reach, (N, *latent_shape), one per row.
        tests: test rows of each role, without latents.
    """

    settings: dict[str, Any]
    erased: dict[str, str]
    kind: Literal["object", "style"]
    concepts: list[str]
    rows: list[tuple[Kind, Pair]]
    x0_target: Tensor
    tests: list[tuple[Role, Pair]]

    @property
    def hash(self) -> str:
        """Of everything the latents depend on."""
        content = [self.settings, self.erased, [(kind, asdict(pair)) for kind, pair in self.rows]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def pairs(self, kind: Kind) -> list[Pair]:
        """The training rows of a kind, in order."""
        return [pair for of, pair in self.rows if of == kind]


def write_pairs(folder: Path, records: ConceptRecords) -> Path:
    """Write records; a folder that holds them already is replaced as a whole.

    Args:
        folder: where to.
        records: see :meth:`~safelight.datamodules.concepts.ConceptDataModule.records`.

    Returns:
        The folder.

    Raises:
        SafelightError: rows and latents are not one to one, or a row has no seed.
    """
    if len(records.rows) != len(records.x0_target):
        raise SafelightError(f"x0_target: {len(records.x0_target)} latents for {len(records.rows)} rows")
    if any(pair.seed is None for _, pair in records.rows):
        raise SafelightError("rows: a row without a seed cannot be drawn again; give every pair one")
    about = {
        "format": _FORMAT,
        "hash": records.hash,
        "settings": records.settings,
        "erased": records.erased,
        "kind": records.kind,
        "concepts": records.concepts,
    }
    rows: list[dict[str, Any]] = [{"kind": kind, **asdict(pair)} for kind, pair in records.rows]
    rows += [{"role": role, **asdict(pair)} for role, pair in records.tests]
    text = "".join(json.dumps(line) + "\n" for line in [about, *rows])
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest goes first and comes last: a kill in between leaves no folder that looks whole.
    (folder / MANIFEST).unlink(missing_ok=True)
    tensors = {_KEY: records.x0_target.detach().cpu().contiguous()}
    _replace(folder / SHARD, lambda file: save_file(tensors, file))
    _replace(folder / MANIFEST, lambda file: file.write_text(text, encoding="utf-8"))
    return folder


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    write(aside)
    aside.replace(file)


def read_pairs(folder: Path) -> ConceptRecords:
    """Read what :func:`write_pairs` wrote.

    Raises:
        SafelightError: a file is missing, damaged or changed since.
    """
    for name in (MANIFEST, SHARD):
        if not (folder / name).is_file():
            raise SafelightError(
                f"data.source: {str(folder)!r} is a folder without {name}; give a folder of records, a .txt, .csv or "
                ".tsv file, 'emoji' or 'templates'"
            )
    try:
        about, *lines = [json.loads(line) for line in (folder / MANIFEST).read_text(encoding="utf-8").splitlines()]
        if about["format"] != _FORMAT:
            raise SafelightError(f"data.source: {folder / MANIFEST} has format {about['format']!r}, not {_FORMAT!r}")
        rows = [(cast(Kind, line.pop("kind")), Pair(**line)) for line in lines if "kind" in line]
        tests = [(cast(Role, line.pop("role")), Pair(**line)) for line in lines if "role" in line]
        x0_target = load_file(folder / SHARD)[_KEY]
        records = ConceptRecords(
            about["settings"], about["erased"], about["kind"], about["concepts"], rows, x0_target, tests
        )
    except SafelightError:
        raise
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise SafelightError(
            f"data.source: the records in {folder} are damaged ({error!r}); write them again"
        ) from error
    if records.hash != about["hash"]:
        raise SafelightError(
            f"data.source: {folder / MANIFEST} was changed after it was written; write the pairs again"
        )
    if len(rows) != len(x0_target) or {kind for kind, _ in rows} != set(get_args(Kind)):
        counts = {kind: sum(of == kind for of, _ in rows) for kind in get_args(Kind)}
        raise SafelightError(
            f"data.source: {folder} has {len(x0_target)} latents for {counts} rows; each row needs one, both kinds rows"
        )
    return records


def refuse_other_settings(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuse latents that were made by another model or in another way.

    Args:
        recorded: ``settings`` of the records.
        current: the same of this run; keys that only the records have are not compared.

    Raises:
        SafelightError: they differ; the message says in what.
    """
    # Through JSON, as the recorded ones went: tuples are lists there.
    now = json.loads(json.dumps(dict(current)))
    differing = [
        f"{key}: {recorded.get(key, 'nothing')!r} in the records, {value!r} now"
        for key, value in sorted(now.items())
        if recorded.get(key) != value
    ]
    if differing:
        raise SafelightError(
            "data.source: the records' latents were made otherwise: "
            + "; ".join(differing)
            + ". Write the pairs again, "
            "or run with the records' settings"
        )


def read_reference_latents(folder: Path) -> Tensor:
    """Target latents of a folder in the layout of the authors' code.

    It holds ``0.pt``, ``1.pt``, ... which are safetensors files in spite of their name: ``latents``, the last latents
    of a trajectory, and for the even numbers, which erase, ``deconcept_latents``, the latents to reach. Odd numbers
    retain: their own last latent is what to reach. Prompts are not stored there: put them and these latents together
    in :class:`ConceptRecords`, for :func:`write_pairs`.

    Args:
        folder: the authors' ``save_dir``.

    Returns:
        (N, sequence, channels), packed as FLUX has them, in the order of the numbers.

    Raises:
        SafelightError: there are no such files, one is missing or one is damaged.
    """
    numbers = sorted(int(file.stem) for file in folder.glob("*.pt") if file.stem.isdecimal())
    if not numbers or numbers != list(range(len(numbers))):
        raise SafelightError(f"{folder}: expected files 0.pt, 1.pt, ... without a gap, found {len(numbers)} of them")
    latents = []
    for number in numbers:
        name = "latents" if number % 2 else "deconcept_latents"
        file = folder / f"{number}.pt"
        try:
            tensors = load_file(file)
        except (SafetensorError, OSError) as error:
            raise SafelightError(f"{file} is no safetensors file ({error})") from error
        if name not in tensors or tensors[name].ndim < 2 or not tensors[name].numel():
            raise SafelightError(f"{file} holds no {name!r} but {sorted(tensors)}")
        # Last of the trajectory, and the first dimension of one sample falls away.
        latents.append(tensors[name].flatten(0, -3)[-1] if tensors[name].ndim > 2 else tensors[name])
    if len({latent.shape for latent in latents}) > 1:
        raise SafelightError(f"{folder}: latents of several sizes: {sorted({tuple(x.shape) for x in latents})}")
    return torch.stack(latents)


def with_seeds(pairs: Sequence[Pair], seeds: Sequence[int]) -> list[Pair]:
    """The pairs, each with the noise seed it is drawn with."""
    return [replace(pair, seed=int(seed)) for pair, seed in zip(pairs, seeds, strict=True)]
