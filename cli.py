"""Command line of dcl_lightning from a checkout: ``python cli.py fit --config configs/icarl_digits.yaml``."""

import sys

from dcl_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
