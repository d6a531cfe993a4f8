"""Features of texts, computed once: compact, in half precision, and on request kept on disk between runs."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safelight.lightning_modules.latent_guard.encoders import TextEncoder, TextFeatures, buckets
from safelight.lightning_modules.latent_guard.wording import normalise

ENCODED_AT_ONCE = 64
_PER_FILE = 2048
_TELL_EVERY = 10.0


def _digest(text: str) -> str:
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:32]


class FeatureStore:
    """Token features by text, in fp16, each at its true length.

    Texts of equal length are encoded together, so that a text's features do not depend on its company.

    Args:
        encoder: makes the features.
        folder: where they are kept between runs; None for memory only. Files there are memory-mapped.
    """

    def __init__(self, encoder: TextEncoder, folder: str | Path | None = None) -> None:
        self.encoder = encoder
        name = hashlib.sha256(encoder.key().encode()).hexdigest()[:16]
        self.folder = None if folder is None else Path(folder).expanduser() / name
        self._rows: dict[str, Tensor] = {}
        self.reload()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, text: str) -> bool:
        return _digest(text) in self._rows

    def __getstate__(self) -> dict[str, object]:
        # A copy in another process encodes again what it needs, instead of dragging memory-mapped files along.
        return {**self.__dict__, "_rows": {}}

    @property
    def bytes(self) -> int:
        """Size of all features."""
        return sum(rows.numel() * rows.element_size() for rows in self._rows.values())

    def reload(self) -> None:
        """Read what is on disk, by other processes too."""
        if self.folder is not None and self.folder.is_dir():
            for file in sorted(self.folder.glob("*.safetensors")):
                self._read(file)

    def add(self, texts: Iterable[str], progress: Callable[[str], None] | None = None) -> int:
        """Encode what is not there yet, and keep it on disk where there is a folder.

        Args:
            texts: any texts.
            progress: gets a line every ten seconds or so.

        Returns:
            How many texts were encoded.
        """
        missing = list({_digest(text): text for text in texts if text not in self}.values())
        begun = told = time.monotonic()
        for start in range(0, len(missing), _PER_FILE):
            fresh = self._encode(missing[start : start + _PER_FILE])
            self._rows.update(fresh)
            if self.folder is not None:
                self._write(fresh)
            done, now = start + len(fresh), time.monotonic()
            if progress is not None and now - told > _TELL_EVERY and done < len(missing):
                rest = (now - begun) / done * (len(missing) - done)
                progress(f"encoded {done:,} of {len(missing):,}  eta {int(rest // 60)}:{int(rest % 60):02d}")
                told = now
        return len(missing)

    def __call__(self, texts: Sequence[str], device: torch.device | None = None) -> TextFeatures:
        """Features of texts, padded to the longest."""
        rows = self._found(texts)
        longest = max(map(len, rows), default=0)
        tokens = torch.zeros(len(rows), longest, self.encoder.dim, dtype=torch.float16)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for place, row in enumerate(rows):
            tokens[place, : len(row)], mask[place, : len(row)] = row, True
        target = device or self.encoder.device
        return TextFeatures(tokens.to(target).float(), mask.to(target))

    def pooled(self, texts: Sequence[str], device: torch.device | None = None) -> Tensor:
        """Pooled vectors of texts, (B, D)."""
        rows = [row[0].float() for row in self._found(texts)]
        return torch.stack(rows).to(device or self.encoder.device)

    def _found(self, texts: Sequence[str]) -> list[Tensor]:
        keys = [_digest(text) for text in texts]
        missing = list({key: text for key, text in zip(keys, texts, strict=True) if key not in self._rows}.values())
        if missing:
            self._rows.update(self._encode(missing))
        return [self._rows[key] for key in keys]

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoder, found = self.encoder, {}
        plain = [normalise(text) for text in texts]
        ids = encoder.tokenizer(plain, truncation=True, max_length=encoder.max_length).input_ids
        for group in buckets([len(row) for row in ids], ENCODED_AT_ONCE):
            features = encoder([texts[place] for place in group])
            kept = features.tokens.to("cpu", torch.float16)
            for place, row in zip(group, kept, strict=True):
                found[_digest(texts[place])] = row.clone()
        return found

    def _write(self, rows: dict[str, Tensor]) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        keys = sorted(rows)
        lengths = torch.tensor([len(rows[key]) for key in keys])
        table = {"tokens": torch.cat([rows[key] for key in keys]), "lengths": lengths}
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
        os.close(handle)
        save_file(table, name, {"keys": " ".join(keys), "encoder": self.encoder.key()})
        # Named by content: two processes that encode the same texts write the same file.
        target = self.folder / f"{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:16]}.safetensors"
        os.replace(name, target)
        self._read(target)

    def _read(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as opened:
                keys = opened.metadata()["keys"].split()
                tokens, lengths = opened.get_tensor("tokens"), opened.get_tensor("lengths").tolist()
        except (SafetensorError, KeyError, TypeError, OSError):
            # Half a file of a machine that went down; what it held is encoded again.
            file.unlink(missing_ok=True)
            return
        self._rows.update(zip(keys, tokens.split(lengths), strict=True))
