"""Text for language models: documents as one stream of tokens, cut into rows of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Interval, MinLen
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from safelight.datamodules.faults import OnError
from safelight.datamodules.loading import ResumableLoader
from safelight.datamodules.text_files import TextSource
from safelight.datamodules.text_tokens import TextTokenizer, TokenFile, TokenFolder, bpe_size, token_folder
from safelight.errors import SafelightError


class TokenRows(Dataset[dict[str, Any]]):
    """Windows of a stream of tokens; items: ``tokens`` (T + 1,) and ``index``.

    Window i begins ``stride`` tokens behind window i - 1. With a stride of T they share one token, the last that is
    predicted in one and the first that is read in the next: every token of the stream but the first is predicted in
    exactly one window. Tokens behind the last full window, fewer than ``stride``, are left out.

    Args:
        tokens: the stream.
        block_size: T.
        stride: tokens from window to window.
        size: use so many windows only, evenly spread; None for all.
    """

    def __init__(self, tokens: TokenFile, block_size: int, stride: int, size: int | None = None) -> None:
        self.tokens, self.block_size = tokens, block_size
        every: Sequence[int] = range(0, max(len(tokens) - block_size, 0), stride)
        chosen = size is not None and size < len(every)
        self.starts = [every[place * len(every) // size] for place in range(size)] if size and chosen else every

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.tokens.read(self.starts[index], self.block_size + 1), "index": index}


class TextDataModule(LightningDataModule):
    r"""Documents in tokens, each behind an end-of-document token, split by a hash of the text, cut into windows.

    Windows go on over the ends of documents. They begin at the same tokens in every epoch, only their order changes.
    Tokens are written once, to a memory-mapped file that later runs with the same documents and tokenizer read again.

    Args:
        path: ``zoo:text``; a ``.txt`` or ``.jsonl`` file, perhaps as ``.xz``; a folder of these; or ``hf:<data set>``
            or ``hf:<data set>:<configuration>``, whose ``train`` split is read (needs the package datasets). Or a list
            of these.
        separator: what stands between the documents of a ``.txt`` file, line breaks written as ``\n``; null where a
            file is one document.
        text_key: key of the text in a JSON line, or its column in a data set of the hub.
        documents: use the so many first documents only; null for all.
        tokenizer: ``bytes`` (256 and one for the end of a document), ``bpe:<size>`` (a byte-level BPE of so many tokens
            at most, trained on the training documents), ``zoo:tiny_lm``, a folder with a transformers tokenizer, or
            its id on the hub.
        block_size: context of the model, tokens; a row has one more (paper: 1024).
        held_out: share of the documents that training never sees.
        stride: tokens from one test row to the next; null for ``block_size``, with which every test token is predicted
            once. Perplexity is that of these rows: the first tokens of a row are predicted from little, and a smaller
            stride counts tokens several times.
        test_size: rows of the tests, evenly spread over the held-out documents; null for all.
        cache_dir: folder for tokens; null for ``$SAFELIGHT_CACHE/text``, or ``~/.cache/safelight/text``.
        on_error: a file or line that cannot be used ends the run, or is left out with a warning.
        batch_size: rows per device and step.
        test_batch_size: test rows per device.
        num_workers: loader processes.
        seed: order of the rows.

    Raises:
        SafelightError: ``tokenizer`` or ``separator`` cannot be meant.
    """

    def __init__(
        self,
        *,
        path: str | Annotated[list[str], MinLen(1)] = "zoo:text",
        separator: Annotated[str, MinLen(1)] | None = None,
        text_key: str = "text",
        documents: Annotated[int, Ge(2)] | None = None,
        tokenizer: Annotated[str, MinLen(1)] = "bytes",
        block_size: Annotated[int, Ge(2)] = 1024,
        held_out: Annotated[float, Interval(gt=0, lt=1)] = 0.1,
        stride: Annotated[int, Ge(1)] | None = None,
        test_size: Annotated[int, Ge(1)] | None = 256,
        cache_dir: str | None = None,
        on_error: OnError = "raise",
        batch_size: Annotated[int, Gt(0)] = 24,
        test_batch_size: Annotated[int, Ge(1)] = 32,
        num_workers: Annotated[int, Ge(0)] = 0,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)  # Lightning refuses to log names that the model has with other values
        # The command line hands a backslash on as it is.
        separator = separator.replace("\\n", "\n") if separator else separator
        self.source = TextSource(path, separator, text_key, documents)
        bpe_size(tokenizer)
        self.tokenizer, self.block_size, self.held_out, self.stride = tokenizer, block_size, held_out, stride
        self.test_size, self.cache_dir, self.on_error = test_size, cache_dir, on_error
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.num_workers, self.seed = num_workers, seed
        self._found: TokenFolder | None = None
        self.train_set: TokenRows | None = None

    def prepare_data(self) -> None:
        """Write the tokens where they are not there yet: in one process, while the others wait."""
        self._tokens()

    def setup(self, stage: str | None = None) -> None:
        """Open the tokens; safe to call again.

        Raises:
            SafelightError: documents or tokenizer cannot be read, or there are too few for a row on both sides.
        """
        if self.train_set is not None:
            return
        found = self._tokens()
        train = TokenRows(found.train, self.block_size, self.block_size)
        test = TokenRows(found.test, self.block_size, self.stride or self.block_size, self.test_size)
        if not len(train) or not len(test):
            raise SafelightError(
                f"data.block_size={self.block_size}: {len(found.train)} training and {len(found.test)} test tokens "
                f"make {len(train)} and {len(test)} rows; give more text or a shorter context"
            )
        self.train_set, self.test_set = train, test

    def _tokens(self) -> TokenFolder:
        if self._found is None:
            cache = Path(self.cache_dir).expanduser() if self.cache_dir else None
            self._found = token_folder(self.source, self.tokenizer, self.held_out, self.on_error, cache)
        return self._found

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """What makes tokens of text and back; writes the tokens where they are not there yet."""
        return self._tokens().tokenizer

    @property
    def vocab_size(self) -> int:
        """Tokens of the tokenizer, which a model needs at least; writes them where they are not there yet."""
        return self.text_tokenizer.vocab_size

    def train_dataloader(self) -> ResumableLoader:
        """Rows of training documents in an order fixed by (seed, epoch)."""
        assert self.train_set is not None
        return ResumableLoader(
            self.train_set, batch_size=self.batch_size, shuffle=True, drop_last=True, num_workers=self.num_workers,
            seed=self.seed,
        )  # fmt: skip

    def val_dataloader(self) -> DataLoader[Any]:
        """Rows of held-out documents."""
        return self.test_dataloader()

    def test_dataloader(self) -> DataLoader[Any]:
        """Rows of held-out documents."""
        return DataLoader(self.test_set, batch_size=self.test_batch_size, num_workers=self.num_workers)
