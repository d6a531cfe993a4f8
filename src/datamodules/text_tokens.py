"""Documents as tokens: tokenizers, and a folder that holds the tokens of both sides of a split, written once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safelight import zoo
from safelight.datamodules.faults import Faults, OnError, drawn
from safelight.datamodules.text_files import TextSource
from safelight.errors import SafelightError

BYTES, BPE = "bytes", "bpe:"
_ZOO = "zoo:"
END_OF_DOCUMENT = "<|endoftext|>"
"""How a tokenizer trained here writes the token before each document."""
_SMALLEST = 257
_FORMAT = 1
_CHARACTERS = 2**20


class TextTokenizer(Protocol):
    """Text to tokens and back.

    Attributes:
        vocab_size: tokens there are.
        end: the token before each document.
    """

    vocab_size: int
    end: int

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Tokens of each text; none of them is ``end``, whatever the text says."""

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens."""


class ByteTokenizer:
    """A token for each of the 256 bytes of UTF-8, and 256 before each document."""

    vocab_size, end = _SMALLEST, 256

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """See :class:`TextTokenizer`."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """See :class:`TextTokenizer`; bytes that are no UTF-8 become the replacement character."""
        pieces = [
            END_OF_DOCUMENT.encode() if token == self.end else bytes([token]) for token in (int(t) for t in tokens)
        ]
        return b"".join(pieces).decode(errors="replace")


class HubTokenizer:
    """A tokenizer of the transformers library.

    Args:
        name: id on the hub, or a folder or ``zoo:<entry>``, with which nothing is asked of the hub.

    Raises:
        SafelightError: there is none, or it has no token for the end of a text.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        shipped = name.startswith(_ZOO)
        folder = zoo.path(name.removeprefix(_ZOO)) if shipped else Path(name).expanduser()
        local = folder.is_dir()
        try:
            self.inner: Any = AutoTokenizer.from_pretrained(folder if local else name, local_files_only=local)
        except Exception as error:  # a damaged tokenizer.json raises nothing more special
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise SafelightError(
                f"tokenizer: {name!r} is neither {BYTES!r} nor {BPE}<size>, and no tokenizer could be loaded from it "
                f"({reason})"
            ) from error
        if self.inner.eos_token_id is None:
            raise SafelightError(f"tokenizer: {name!r} has no token for the end of a text (eos_token)")
        self.vocab_size, self.end = max(self.inner.get_vocab().values()) + 1, int(self.inner.eos_token_id)

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """See :class:`TextTokenizer`."""
        found = self.inner(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
            verbose=False,
        )  # fmt: skip
        return [np.asarray(tokens, np.int64) for tokens in found["input_ids"]]

    def decode(self, tokens: Iterable[int]) -> str:
        """See :class:`TextTokenizer`."""
        return str(self.inner.decode([int(token) for token in tokens], clean_up_tokenization_spaces=False))

    def identity(self) -> str:
        """A hash of all it knows."""
        fast = getattr(self.inner, "backend_tokenizer", None)
        known = fast.to_str() if fast is not None else repr(sorted(self.inner.get_vocab().items()))
        return hashlib.sha256(known.encode()).hexdigest()


def bpe_size(tokenizer: str) -> int | None:
    """Size that ``bpe:<size>`` asks for; None for another tokenizer.

    Raises:
        SafelightError: it is no number, or too small for all bytes.
    """
    if not tokenizer.startswith(BPE):
        return None
    size = tokenizer.removeprefix(BPE)
    if not size.isdecimal() or int(size) < _SMALLEST:
        raise SafelightError(f"tokenizer={tokenizer!r}: give {BPE}<size>, a whole number of at least {_SMALLEST}")
    return int(size)


def train_bpe(documents: Iterable[str], size: int, folder: Path) -> None:
    """Write a byte-level BPE of documents as a folder that ``AutoTokenizer`` opens.

    Args:
        documents: to learn merges from.
        size: tokens at most, among them all bytes and the end of a document; fewer where nothing is left to merge.
        folder: to be made.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[END_OF_DOCUMENT], initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(documents, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_DOCUMENT).save_pretrained(folder)


class TokenFile:
    """Tokens of one side, in a file that is mapped where it is read: processes of a loader share its pages.

    Args:
        file: of numbers, little-endian.
        dtype: ``<u2`` or ``<u4``.
        size: tokens in it.
    """

    def __init__(self, file: Path, dtype: str, size: int) -> None:
        self.file, self.dtype, self.size = file, dtype, size
        self._mapped: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self.size

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be pickled with all its numbers.
        return {**self.__dict__, "_mapped": None}

    def read(self, start: int, length: int) -> Tensor:
        """Tokens (length,) from ``start`` on."""
        if self._mapped is None:
            self._mapped = np.memmap(self.file, self.dtype, "r", shape=(self.size,))
        return torch.from_numpy(self._mapped[start : start + length].astype(np.int64))


@dataclass(frozen=True)
class TokenFolder:
    """What :func:`token_folder` found or wrote.

    Attributes:
        folder: that it is kept in.
        tokenizer: that wrote the tokens.
        train: the training documents, in order, ``tokenizer.end`` before each.
        test: the others.
    """

    folder: Path
    tokenizer: TextTokenizer
    train: TokenFile
    test: TokenFile


def default_cache() -> Path:
    """``$SAFELIGHT_CACHE/text``, or ``~/.cache/safelight/text``."""
    return Path(os.environ.get("SAFELIGHT_CACHE") or Path.home() / ".cache" / "safelight").expanduser() / "text"


def token_folder(
    source: TextSource, tokenizer: str, held_out: float, on_error: OnError = "raise", cache: Path | None = None
) -> TokenFolder:
    """Tokens of documents, from the cache where they were written before.

    Args:
        source: of the documents.
        tokenizer: ``bytes``, ``bpe:<size>``, a folder or an id of the hub.
        held_out: share of the documents that are kept from training, by a hash of their text.
        on_error: what to do about a document that cannot be used; a warning is repeated when the cache is used.
        cache: folder with a folder for each set of arguments; None for :func:`default_cache`.

    Raises:
        SafelightError: documents or tokenizer cannot be read, there are too few for both sides, or the cache cannot be
            written.
    """
    size = bpe_size(tokenizer)
    known: TextTokenizer | None = None
    which = tokenizer
    if size is None and tokenizer == BYTES:
        known = ByteTokenizer()
    elif size is None:
        known = hub = HubTokenizer(tokenizer)
        which = hub.identity()
    key = json.dumps([_FORMAT, source.identity(), which, held_out, on_error])
    cache = default_cache() if cache is None else cache
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not _is_whole(folder):
        try:
            _write(folder, _Job(source, known, size or 0, held_out, on_error))
        except OSError as error:
            raise SafelightError(
                f"cache_dir: cannot write to {cache} ({error.strerror or error}); give another data.cache_dir"
            ) from error
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    faults = Faults(on_error)
    faults.count, faults.first = facts["left_out"]
    faults.report()
    sides = {side: TokenFile(_file(folder, side), facts["dtype"], facts["tokens"][side]) for side in ("train", "test")}
    return TokenFolder(folder, known or HubTokenizer(str(folder / "tokenizer")), sides["train"], sides["test"])


@dataclass(frozen=True)
class _Job:
    """How tokens are to be written; without a tokenizer, one of ``size`` tokens is trained."""

    source: TextSource
    tokenizer: TextTokenizer | None
    size: int
    held_out: float
    on_error: OnError

    def side(self, text: str) -> str:
        return "test" if drawn(text) < self.held_out else "train"


def _file(folder: Path, side: str) -> Path:
    return folder / f"{side}.bin"


def _is_whole(folder: Path) -> bool:
    """Whether a folder was written to its end and nothing is missing since."""
    try:
        facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        width = np.dtype(facts["dtype"]).itemsize
        return all(_file(folder, side).stat().st_size == width * size for side, size in facts["tokens"].items())
    except (OSError, ValueError, KeyError):
        return False


def _write(folder: Path, job: _Job) -> None:
    """Fill a draft beside a folder, then give it the folder's name: what is interrupted has another one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        _fill(draft, job)
        if folder.exists() and not _is_whole(folder):
            shutil.rmtree(folder)
        try:
            draft.rename(folder)
        except OSError:
            # Another process may have been faster.
            if not _is_whole(folder):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill(folder: Path, job: _Job) -> None:
    tokenizer = job.tokenizer
    if tokenizer is None:
        known = job.source.read(Faults(job.on_error))
        train_bpe((text for text in known if job.side(text) == "train"), job.size, folder / "tokenizer")
        tokenizer = HubTokenizer(str(folder / "tokenizer"))
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    documents, tokens = {"train": 0, "test": 0}, {"train": 0, "test": 0}
    faults = Faults(job.on_error)
    with _file(folder, "train").open("wb") as train, _file(folder, "test").open("wb") as test:
        files = {"train": train, "test": test}
        for texts in _batches(job.source.read(faults)):
            for text, found in zip(texts, tokenizer.encode(texts), strict=True):
                side = job.side(text)
                files[side].write(np.concatenate(([tokenizer.end], found)).astype(dtype).tobytes())
                documents[side] += 1
                tokens[side] += 1 + len(found)
    _check(documents, job)
    facts = {"dtype": dtype, "documents": documents, "tokens": tokens, "left_out": [faults.count, faults.first]}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _check(documents: dict[str, int], job: _Job) -> None:
    path, every = job.source.path, sum(documents.values())
    if not every:
        raise SafelightError(f"path: {path} holds no document that can be used")
    if every == 1:
        raise SafelightError(
            f"path: {path} holds one document, and a document is either for training or for tests; give more of them, "
            "or a data.separator where it is to be cut"
        )
    if not all(documents.values()):
        raise SafelightError(
            f"data.held_out={job.held_out}: of the {every} documents of {path}, {documents['train']} are for training "
            f"and {documents['test']} for tests; give more documents, another held_out, or a data.separator"
        )


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Documents in lists of about a million characters: enough to be encoded in parallel."""
    batch, size = [], 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
