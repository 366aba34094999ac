"""``python -m dcl_lightning`` is the command line."""

import sys

from dcl_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
