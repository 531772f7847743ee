"""Rows that are longer than `max_length`: TRL cuts them without a word; here they are counted and said."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]


def truncation_line(trainer: Any, rows: Any) -> str | None:
    """One line on what of `rows` does not fit into `max_length` tokens; None if all does, or if packing splits rows."""
    limit = trainer.args.max_length
    if limit is None or trainer.args.packing:
        return None
    prepared = trainer.train_dataset
    left_out = len(rows) - len(prepared)
    if not left_out and int(_lengths(prepared).max()) < limit:
        return None
    # Tokenised once more, without the cut; only where there may be one.
    uncut = copy.copy(trainer.args)
    uncut.max_length = None
    lengths = _lengths(trainer._prepare_dataset(rows, trainer.processing_class, uncut, False, None, "train"))
    over = lengths[lengths > limit]
    if not len(over):
        return f"{left_out:,} of {len(lengths):,} rows have nothing to learn and are not used." if left_out else None
    line = (
        f"{len(over):,} of {len(lengths):,} rows are longer than max_length={limit}: {int((over - limit).sum()):,} of "
        f"{int(lengths.sum()):,} tokens are cut off"
    )
    if left_out:
        line += f", and {left_out:,} rows have nothing to learn left and are not used"
    return f"{line}. A larger --max_length keeps more."


def _lengths(dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of every row, read block by block from the Arrow file."""
    blocks = dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=10_000)
    found = [pc.list_value_length(block["input_ids"]).to_numpy() for block in blocks]
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)
