"""``python -m safelight.cli train ...`` is the ``safelight`` command without its script."""

import sys

from safelight.cli import main

if __name__ == "__main__":
    sys.exit(main())
