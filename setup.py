"""Map the repository's folders to the package: ``src/`` is ``safelight``, ``configs/`` is ``safelight.configs``.

Everything else about the build stands in ``pyproject.toml``; packages are discovered, so a new method folder is
importable at once without touching this file.
"""

from setuptools import find_packages, setup

setup(
    package_dir={"safelight": "src", "safelight.configs": "configs"},
    packages=["safelight", *(f"safelight.{name}" for name in find_packages("src")), "safelight.configs"],
)
