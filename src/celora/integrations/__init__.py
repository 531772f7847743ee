"""celora in programs of others, which stay unchanged: scripts, TRL's command line, axolotl, LLaMA-Factory.

A tool hands over its settings and gets a callback for its Trainer. No mathematics, no training of its own. Imports the
front door and what stands below it, and of the tools only the one that a file is for.
"""

import os

DEFAULT = "exact"  # it changes no result, so a program that does not know of it cannot be surprised
VARIABLE = "CELORA_PRESET"


def default_preset() -> str:
    """The preset where neither an option nor a file names one: `CELORA_PRESET`, or else `exact`."""
    return os.environ.get(VARIABLE) or DEFAULT
