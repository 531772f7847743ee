"""`python -m celora`, for launchers that start modules: `torchrun -m celora train ...`."""

import sys

from celora.cli import main

if __name__ == "__main__":
    sys.exit(main())
