"""Evaluate a checkpoint: ``python eval.py ckpt_path=<run folder>/checkpoints/best.ckpt``."""

import sys

from safelight.cli import eval_main

if __name__ == "__main__":
    sys.exit(eval_main())
