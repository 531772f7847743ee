"""Many prompts, one answer each: rows are read, answered in batches and written as JSON lines.

The file is whole at every moment: it is replaced as a whole, every so often and when the command ends or is stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from celora.errors import CELoraError
from celora.files import write_text
from celora.train.rows.data import check_messages, check_text, instruction, local_files
from celora.train.rows.readers import READERS, fail
from celora.train.use.generation import Prompt, Sampling, answers
from celora.train.use.trained import Trained

GENERATED, BY_BASE = "generated", "generated_by_base"
_SAVE_S = 30.0
_EXPECTED = "expected a row with prompt, messages, instruction (+ input) or text"


def load_prompts(source: Path, *, limit: int | None = None) -> list[tuple[dict[str, Any], Prompt]]:
    """The rows of a file or folder, and what is asked in each.

    A row of the data that a model was trained on can be asked as it is: what the model should say is left out. That is
    the last message if it is the assistant's, and every column but `prompt`, or `instruction` and `input`.

    Raises:
        CELoraError: the file cannot be read, or a row asks nothing; it names file and line.
    """
    files = local_files(source, "test" if source.is_dir() else "train")
    placed = (pair for file in files for pair in READERS[file.suffix.lower()](file))
    found = [(row, asked_in(place, row)) for place, row in islice(placed, limit)]
    if not found:
        raise CELoraError(f"{str(source)!r}: no rows; {_EXPECTED}")
    return found


def asked_in(place: str, row: Any) -> Prompt:
    """The prompt of a row."""
    if not isinstance(row, dict):
        fail(place, f"no object; {_EXPECTED}")
    if taken := {GENERATED, BY_BASE} & row.keys():
        fail(place, f"the column {min(taken)!r} is where the answer goes; rename it")
    if row.get("messages") is not None:
        messages = check_messages(place, "messages", row["messages"])
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            fail(place, "no message asks anything: all are the assistant's")
        return messages
    if row.get("prompt") is not None:
        check: Callable[[str, str, Any], Prompt] = check_messages if isinstance(row["prompt"], list) else check_text
        return check(place, "prompt", row["prompt"])
    if row.get("instruction") is not None:
        return instruction(place, row)
    if row.get("text") is None:
        fail(place, f"columns {', '.join(map(repr, row)) or '(none)'}; {_EXPECTED}")
    return check_text(place, "text", row["text"])


def answered_rows(output: Path, rows: Sequence[dict[str, Any]], *, base: bool) -> list[dict[str, Any]]:
    """What an earlier call has written to `output`, to be continued.

    Raises:
        CELoraError: it is not the beginning of the answers to these rows.
    """
    if not output.is_file():
        return []
    earlier = [row for _, row in READERS[".jsonl"](output)]
    own = {GENERATED, BY_BASE} if base else {GENERATED}
    for number, row in enumerate(earlier):
        given = {key: value for key, value in row.items() if key not in own} if isinstance(row, dict) else None
        if number >= len(rows) or given != json.loads(_line(rows[number])) or not own <= row.keys():
            raise CELoraError(
                f"row {number + 1} of {str(output)!r} is no answer to row {number + 1} of the data, so it cannot be "
                "resumed; --overwrite begins anew"
            )
    return earlier


def answer_all(
    trained: Trained,
    rows: Sequence[tuple[dict[str, Any], Prompt]],
    sampling: Sampling,
    *,
    batch: int,
    raw: bool = False,
    base: bool = False,
    earlier: Sequence[dict[str, Any]] = (),
    output: Path | None = None,
    say: Callable[[int, list[dict[str, Any]]], object] = lambda done, new: None,
) -> list[dict[str, Any]]:
    """Answer the rows that `earlier` has not; gives all, and keeps `output` up to date.

    Args:
        batch: how many rows are answered side by side.
        base: also ask the untouched model.
        output: where the answers go; what is answered by then is written if something stops the command.
        say: hears, after each batch, how many rows are answered and the new ones.
    """
    done, saved = list(earlier), time.monotonic()
    written = len(done)
    try:
        for start in range(len(done), len(rows), batch):
            part = rows[start : start + batch]
            prompts = [prompt for _, prompt in part]
            columns = {GENERATED: answers(trained, prompts, sampling, raw=raw)}
            if base:
                columns[BY_BASE] = answers(trained, prompts, sampling, raw=raw, base=True)
            new = [row | {name: texts[i] for name, texts in columns.items()} for i, (row, _) in enumerate(part)]
            done += new
            say(len(done), new)
            if output is not None and time.monotonic() - saved > _SAVE_S:
                _save(output, done)
                written, saved = len(done), time.monotonic()
    finally:
        if output is not None and (len(done) > written or not rows[len(done) :]):
            _save(output, done)
    return done


def _save(output: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(output, "".join(_line(row) + "\n" for row in rows))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)
