"""`python -m celora.run train.py ARGUMENTS`: an unchanged script, with celora. `celora.integrations.script` does it."""

from __future__ import annotations

import sys

from celora.integrations.script import main

if __name__ == "__main__":
    sys.exit(main())
