"""Reports rows that are longer than `max_length`. TRL cuts them silently; celora counts them and says so."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]

from celora.borrowed import borrow

_LOSE_NOTHING = ("bfd_split", "wrapped")  # packing strategies that continue a long row in the next sequence


def truncation_lines(trainer: Any, rows: Any, eval_rows: Any = None) -> Iterator[str]:
    """Lines for `rows` and for `eval_rows`: what does not fit into `max_length` tokens, or the model's positions."""
    args, positions = trainer.args, _positions(trainer.model.config.get_text_config())
    if borrow("trl:SFTTrainer._prepare_dataset") is None:
        return
    eval_packing = args.packing if args.eval_packing is None else args.eval_packing
    for kind, split, given, prepared, packing in (
        ("rows", "train", rows, trainer.train_dataset, args.packing),
        ("rows to evaluate on", "eval", eval_rows, trainer.eval_dataset, eval_packing),
    ):
        if given is None:
            continue
        whole = args.max_length is None or (packing and args.packing_strategy in _LOSE_NOTHING)
        if not whole and (line := _line(trainer, kind, split, given, prepared)):
            yield line
        lengths = sequence_lengths(prepared)
        whole_rows = "seq_lengths" in prepared.column_names or not packing
        if whole_rows and (beyond := int((lengths > positions).sum())):
            yield (
                f"{beyond:,} of {len(lengths):,} {kind} have more tokens than the {positions:,} positions that the "
                f"model was made for. --max_length {positions} cuts them."
            )


def _positions(config: Any) -> int:
    """The positions that a model was made for. A rotation that is scaled reaches further; then nobody knows how far."""
    turns = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each_kind = [each for each in (turns, *turns.values()) if isinstance(each, Mapping)]
    scaled = {each.get("rope_type", each.get("type", "default")) for each in each_kind} - {"default", None}
    most = getattr(config, "max_position_embeddings", None) or 0
    return sys.maxsize if scaled or most <= 0 else most


def _line(trainer: Any, kind: str, split: str, rows: Any, prepared: Any) -> str | None:
    limit, fitting = trainer.args.max_length, sequence_lengths(prepared)
    left_out = len(rows) - len(fitting)
    if not left_out and int(fitting.max()) < limit:
        return None
    # Tokenise once more without the cut, only if something may have been cut.
    uncut = copy.copy(trainer.args)
    uncut.max_length = None
    lengths = sequence_lengths(trainer._prepare_dataset(rows, trainer.processing_class, uncut, False, None, split))
    over = lengths[lengths > limit]
    if not len(over):
        return f"{left_out:,} of {len(lengths):,} {kind} have nothing to learn and are not used." if left_out else None
    line = (
        f"{len(over):,} of {len(lengths):,} {kind} are longer than max_length={limit}: "
        f"{int((over - limit).sum()):,} of {int(lengths.sum()):,} tokens are cut off"
    )
    if left_out:
        line += f", and {left_out:,} rows have nothing to learn left and are not used"
    return f"{line}. A larger --max_length keeps more."


def sequence_lengths(dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of every row of the user; rows packed into one sequence are counted separately."""
    if "seq_lengths" in dataset.column_names:
        return _measured(dataset, "seq_lengths", pc.list_flatten)
    return row_lengths(dataset)


def row_lengths(dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of every row of a prepared data set."""
    return _measured(dataset, "input_ids", pc.list_value_length)


def _measured(dataset: Any, column: str, measure: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The numbers that `measure` makes of a column, read block by block from the Arrow file."""
    blocks = dataset.select_columns(column).with_format("arrow").iter(batch_size=10_000)
    found = [measure(block[column]).to_numpy() for block in blocks]
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)
