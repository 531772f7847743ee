"""Where the wall-clock of a command goes, from its start to the saved adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PARTS = ("start", "load", "tokenise", "choose", "train", "evaluate", "save", "report", "compare")


class WallClock:
    """Seconds of each part of a command. No second counts twice. Python's own start and end are in no part.

    - `start`: imports, and looking at the arguments and the output folder.
    - `load`: reading model and rows, and measuring whether a step fits into memory.
    - `tokenise`: turning rows into tokens, and counting what is learnt and what is cut off.
    - `choose`: choosing settings for `--memory`, choosing what is estimated, and attaching it.
    - `train`, `evaluate`, `save`: as their names say.
    - `report`: writing the report, also while the run trains.
    - `compare`: measuring what PEFT alone would have taken.

    Args:
        began: when the command began, by `time.perf_counter`; by default now.
    """

    def __init__(self, began: float | None = None) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inside = 0.0  # seconds of the parts nested in the current one
        if began is not None:
            self.seconds["start"] = time.perf_counter() - began

    @contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Add the time of the body to `part`, minus the time of parts nested in it."""
        begin, outer = time.perf_counter(), self._inside
        self._inside = 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - begin
            self.seconds[part] += took - self._inside
            self._inside = outer + took

    def summary(self) -> dict[str, float]:
        """Seconds of each part, under the names that a run's summary uses."""
        return {f"{part}_seconds": round(seconds, 3) for part, seconds in self.seconds.items()}


def spent(summary: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of each part, read from a run's summary; empty for a run by an earlier version."""
    return {part: summary[f"{part}_seconds"] for part in PARTS if f"{part}_seconds" in summary}
