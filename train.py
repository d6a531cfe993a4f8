"""Train a method: ``python train.py method=ecodiff``; ``python train.py --help`` lists what there is."""

import sys

from safelight.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
