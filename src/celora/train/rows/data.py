"""Loads rows of four shapes, in the form that TRL's SFTTrainer expects.

A bad row raises one line that says where it stands and what is wrong. `datasets` streams the rows into an Arrow file,
so memory stays flat. The cache key has the size and times of every source file, so a changed file is read again. Code
that comes with a data set is never run.
"""

from __future__ import annotations

import difflib
import hashlib
import re
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets

from celora.errors import CELoraError
from celora.train.rows import readers
from celora.train.rows.places import hub_rows, local_files
from celora.train.rows.readers import READERS, fail

SHAPES: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt + completion": ("prompt", "completion"),
    "instruction (+ input) + output": ("instruction", "output"),
    "text": ("text",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
# Keys that a chat template renders, too. celora keeps only role and content, so it refuses rows with these.
_RENDERED = ("tool_calls", "function_call", "reasoning_content", "thinking")
_NO_TOOLS = (
    "is not trained on here; leave such rows out, or use TRL's SFTTrainer, with celora.attach(trainer.model, 'auto')"
)
_NO_ANSWER = (
    "no message is the assistant's, so there is nothing to learn; leave the row out, or learn every token with "
    "--assistant_only_loss false"
)
_COLUMNS = [*dict.fromkeys(column for columns in SHAPES.values() for column in columns), "input"]
_KNOWN_SHAPES = f"a row has {', or '.join(SHAPES)}"
Row = Mapping[str, Any]
E = TypeVar("E", bound=BaseException)


def load_rows(
    source: str | Path,
    *,
    split: str = "train",
    chat: bool,
    config: str | None = None,
    text_field: str | None = None,
    cache_dir: str | Path | None = None,
    answers: bool = False,
) -> datasets.Dataset:
    """Load the rows of `source`, all of one shape, with the columns that SFTTrainer expects and no others.

    The first row decides the shape, and the others must have it, too:

    - `messages`: a conversation.
    - `prompt` + `completion`: two strings, or two lists of messages.
    - `instruction` (+ `input`) + `output`: becomes a prompt and a completion; lists of messages if `chat`.
    - `text`.

    Args:
        source: a `.jsonl`, `.json`, `.csv` or `.parquet` file, a folder of such files, or the name of a hub data set. A
            `.json` or `.jsonl` file has one row per line, or one list of rows. Only such a list is read into memory.
        split: which files of a folder, or which split of a hub data set. Files have the split in their name
            (`test.jsonl`, `reviews_test.jsonl`, `test-00000-of-00002.parquet`), and are read in name order. If no name
            says `train`, every file that names no other split is training data. A single file is read whole.
        chat: whether the tokenizer has a chat template.
        config: the configuration of a hub data set.
        text_field: the column that is read as `text`, whatever else the first row has; None for `text` of other rows.
        cache_dir: where `datasets` keeps the rows; None for its own cache.
        answers: only answers are learnt, so a row of messages must have a message of the assistant.

    Raises:
        CELoraError: the source cannot be read, or a row has no known shape. The message names file and line.
    """
    files = local_files(source, split)
    if files and config is not None:
        raise CELoraError(f"dataset_config={config!r} is for hub data sets, and {str(source)!r} is here; leave it out.")
    stamps = [(str(f), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for f in files for s in [f.stat()]]
    hub = None if files else hub_rows(str(source), split, config)
    key = hashlib.sha256(repr((stamps, code_digest(__file__, readers.__file__))).encode()).hexdigest()
    try:
        return datasets.Dataset.from_generator(
            _generate,
            gen_kwargs={
                "name": str(source),
                "files": tuple(str(file) for file in files),
                "hub": hub,
                "chat": chat,
                "text_field": text_field,
                "answers": answers,
                "key": key,
            },
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
    except Exception as error:
        # datasets wraps what the generator raises; the user should see the line inside.
        if said := _cause(error, CELoraError):
            raise said from None
        if refused := _cause(error, OSError):
            cache = cache_dir or datasets.config.HF_DATASETS_CACHE
            raise CELoraError(
                f"cannot keep the rows of {str(source)!r} in {str(cache)!r}: {refused.strerror or refused}; make room "
                "there, or name another folder in HF_DATASETS_CACHE"
            ) from error
        raise


def has_turns(rows: datasets.Dataset) -> bool:
    """Whether these are conversations, which the chat template renders, and not texts."""
    return "messages" in rows.column_names or isinstance(rows[0].get("prompt"), list)


def _cause(error: BaseException | None, kind: type[E]) -> E | None:
    """The first error of this kind in the chain of causes, or None."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def code_digest(*files: str) -> str:
    """For the key of a cache: what another version of celora has put there may differ."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _generate(
    name: str,
    files: tuple[str, ...],
    hub: datasets.Dataset | None,
    chat: bool,
    text_field: str | None,
    answers: bool,
    key: str,
) -> Iterator[dict[str, Any]]:
    placed = (
        (pair for file in files for pair in READERS[Path(file).suffix.lower()](Path(file)))
        if hub is None
        else ((f"{name}, row {number}", row) for number, row in enumerate(hub, 1))
    )
    shape = first = start = None
    for place, row in placed:
        if isinstance(row, dict) and text_field in row:
            row = row | {"text": row[text_field]}
        found = _shape(place, row, prefer=shape or (None if text_field is None else "text"))
        example = _example(place, row, found, chat)
        if answers and "messages" in example and all(message["role"] != "assistant" for message in example["messages"]):
            fail(place, _NO_ANSWER)
        this = f"{found} as {'lists' if isinstance(next(iter(example.values())), list) else 'strings'}"
        if first is None:
            shape, first, start = found, this, place
        elif this != first:
            fail(place, f"this row is {this}, the first one ({start}) is {first}; keep one shape per data set")
        yield example
    if first is None:
        raise CELoraError(f"{name}: no rows; expected at least one: {_KNOWN_SHAPES}.")


# --- one row ---------------------------------------------------------------------------------------------------------


def _shape(place: str, row: Any, prefer: str | None) -> str:
    """The name of the row's shape. If several fit, `prefer`, or else the first in `SHAPES`."""
    if not isinstance(row, dict):
        fail(place, f"a row is {reprlib.repr(row)}; expected an object with columns: {_KNOWN_SHAPES}")
    found = fitting(row)
    if not found:
        fail(place, _no_shape(row))
    return prefer if prefer in found else found[0]


def fitting(row: Row) -> list[str]:
    """The names of the shapes that the row has all columns of."""
    present = {column for column, value in row.items() if value is not None}
    return [shape for shape, columns in SHAPES.items() if present.issuperset(columns)]


def _example(place: str, row: Row, shape: str, chat: bool) -> dict[str, Any]:
    if holds(row.get("tools")) and shape in ("messages", "prompt + completion"):
        fail(place, f"'tools' {_NO_TOOLS}")
    if shape == "messages":
        return {"messages": _learnable(place, "messages", row["messages"])}
    if shape == "text":
        return {"text": check_text(place, "text", row["text"])}
    if shape == "prompt + completion":
        lists = [isinstance(row[column], list) for column in ("prompt", "completion")]
        if lists[0] != lists[1]:
            fail(place, "'prompt' and 'completion' differ in kind; give two strings or two message lists")
        if str(row.get("label")).lower() == "false":
            fail(
                place,
                "'label' is false, which marks a bad completion, and all are learnt; leave the row out, use TRL's "
                "KTOTrainer, or rename a column that means something else",
            )
        if lists[0]:
            asked = check_messages(place, "prompt", row["prompt"])
            return {"prompt": asked, "completion": _learnable(place, "completion", row["completion"])}
        return {column: check_text(place, column, row[column]) for column in ("prompt", "completion")}
    prompt = instruction(place, row)
    completion = check_text(place, "output", row["output"])
    if not chat:
        return {"prompt": prompt.as_text(), "completion": completion}
    return {
        "prompt": [{"role": "user", "content": str(prompt)}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def _learnable(place: str, column: str, value: Any) -> list[dict[str, str]]:
    """`check_messages`, and refuse an answer that is marked as not to be learnt."""
    messages = check_messages(place, column, value)
    for number, message in enumerate(value):
        if message["role"] == "assistant" and message.get("weight") == 0:
            fail(place, f"{column}[{number}].weight is 0, and every answer is learnt here; leave the row out")
    return messages


class Instruction(str):
    """An instruction, followed by its input if there is one: what a user's message says."""

    def as_text(self) -> str:
        """The prompt without a chat template: an empty line ends it."""
        return f"{self}\n\n"


def instruction(place: str, row: Row) -> Instruction:
    """The instruction of a row."""
    asked = check_text(place, "instruction", row["instruction"])
    if row.get("input") not in (None, ""):
        asked += "\n\n" + check_text(place, "input", row["input"])
    return Instruction(asked)


def _no_shape(row: Row) -> str:
    nulls = [column for column in _COLUMNS if column != "input" and column in row and row[column] is None]
    if nulls:
        return f"{nulls[0]!r} is null; expected a value. Fill it in or drop the row; {_KNOWN_SHAPES}"
    missing = [column for column in _COLUMNS if column not in row]
    near = {c: difflib.get_close_matches(c.lower(), missing, n=1) for c in row if c not in _COLUMNS}
    if "conversations" in row:
        near["conversations"] = ["messages"]
        turns = row["conversations"]
        if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "from" in turns[0]:
            return (
                "'conversations' with 'from' and 'value' are no known row; write 'messages' with 'role' and 'content'"
            )
    if "chosen" in row and "rejected" in row:
        return "'chosen' and 'rejected' are for preference training; use TRL's DPOTrainer, with celora.attach"
    asked, answer = ("", "output") if "instruction" in row else ("prompt", "completion")
    near |= {column: [asked] for column in ("question", "input") if asked in missing and column in row}
    near |= {column: [answer] for column in ("answer", "output", "response") if answer in missing and column in row}
    for mark in ";\t|":
        if len(row) == 1 and any(name.strip() in _COLUMNS for name in next(iter(row)).split(mark)[1:]):
            return f"columns are separated by {mark!r}; save the file with commas"
    hints = [f"{match[0]!r} for {column!r}" for column, match in near.items() if match]
    hint = f" (did you mean {' and '.join(hints)}?)" if hints else ""
    return f"columns {', '.join(map(repr, row)) or '(none)'} are no known row{hint}; {_KNOWN_SHAPES}"


def check_text(place: str, column: str, value: Any) -> str:
    """Return the value if it is usable text, else refuse it. `place` and `column` say where it stands."""
    if not isinstance(value, str):
        came = "null" if value is None else type(value).__name__
        fail(place, f"{column!r} is {came} {'' if value is None else reprlib.repr(value)}; expected a string")
    if not value.strip():
        fail(place, f"{column!r} is empty; expected some text. Fill it in or drop the row")
    if "\0" in value or re.search("[\ud800-\udfff]", value):
        fail(place, f"{column!r} holds a NUL or half a surrogate pair; expected text. Clean the row")
    text: str = value
    return text


def holds(value: Any) -> bool:
    """Whether a value, possibly JSON as text, is not empty."""
    return bool(value) and not (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def check_messages(place: str, column: str, value: Any) -> list[dict[str, str]]:
    """Return the value as a conversation, with only role and content of each message, or refuse it."""
    expected = "expected a list of {'role': ..., 'content': ...}"
    if not isinstance(value, list) or not value:
        fail(place, f"{column!r} is {reprlib.repr(value)}; {expected}")
    messages = []
    for number, message in enumerate(value):
        label = f"{column}[{number}]"
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            keys = f"keys {', '.join(map(repr, message))}" if isinstance(message, dict) else reprlib.repr(message)
            fail(place, f"{label} has {keys}; {expected}")
        if rendered := [key for key in _RENDERED if holds(message.get(key))]:
            fail(place, f"{label}.{rendered[0]} {_NO_TOOLS}")
        role = check_text(place, f"{label}.role", message["role"])
        if role not in ROLES:
            fail(place, f"{label}.role is {role!r}; expected one of {', '.join(ROLES)}")
        content = message["content"]
        # An empty system message switches off a template's default one. Any other empty message is a mistake.
        if not (role == "system" and content == ""):
            content = check_text(place, f"{label}.content", content)
        messages.append({"role": role, "content": content})
    return messages
