"""Bytes and seconds, read and written as a user does."""

from __future__ import annotations

import re

from celora.errors import CELoraError

_UNITS = {"B": 1} | {
    f"{letter}{end}": base**power
    for power, letter in enumerate("KMGT", 1)
    for end, base in (("", 1024), ("IB", 1024), ("B", 1000))
}


def in_bytes(text: str) -> int:
    """`8GiB` or `512 MB` as a number of bytes; CELoraError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or not 0 < float(found[1]) * unit < 2**63:
        raise CELoraError(f"--memory {text!r}; expected a size with its unit, like 8GiB or 512MB")
    return int(float(found[1]) * unit)


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
