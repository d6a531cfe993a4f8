"""What ships with the package: real sample data and small trained models, each in an ordinary format.

Every entry is a folder with a card (``README.md``) that states data, command, measured quality and licence.
"""

from __future__ import annotations

from pathlib import Path

from safelight.errors import SafelightError

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the shipped entries, sorted."""
    return sorted(p.name for p in _FOLDER.iterdir() if p.is_dir() and (p / "README.md").is_file())


def path(name: str) -> Path:
    """Folder of the shipped entry ``name``, such as ``"tiny_flux"``.

    Raises:
        SafelightError: no such entry ships with this version.
    """
    folder = _FOLDER / name
    if name not in names():
        raise SafelightError(f"zoo:{name} does not ship with this version; there are: {', '.join(names())}")
    return folder
