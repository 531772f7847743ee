"""The one exception that users see: one line that says what came, what is allowed and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CELoraError(ValueError):
    """Bad input to celora. The message is a single line; the command line prints it and exits with status 2."""

    def __init__(self, message: str) -> None:
        # It may quote another library, which writes several lines. Spaces in the name of a file stay.
        super().__init__(" ".join(line for part in message.splitlines() if (line := part.strip())))


class Diverged(CELoraError):
    """A training whose numbers are no longer finite."""


class Damaged(CELoraError):
    """A file of weights that is cut off, or that holds something else."""


def unknown(kind: str, name: object, known: Iterable[str]) -> CELoraError:
    """An error for a name that is not known, with the nearest known one if there is one.

    >>> str(unknown("preset", "papper", ["paper", "off"]))
    "unknown preset 'papper'; did you mean 'paper'? Known: off, paper"
    """
    choices = sorted(known)
    near = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return CELoraError(f"unknown {kind} {name!r}{hint} Known: {', '.join(choices)}")


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """The known name that equals `name`, ignoring case; or the error of `unknown`.

    >>> choose("arm", "lora", ["LoRA", "exact"])
    'LoRA'
    """
    choices = list(known)
    for choice in choices:
        if choice.casefold() == name.casefold():
            return choice
    raise unknown(kind, name, choices)


def first_line(error: BaseException) -> str:
    """The first line of what an error says; the name of its class if it says nothing.

    >>> first_line(OSError("no such file\\nlook elsewhere")), first_line(MemoryError())
    ('no such file', 'MemoryError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def out_of_memory(error: BaseException) -> bool:
    """Whether Python or torch raised this error because memory ran out."""
    # By name: torch may not be imported yet. Its CPU allocator, CUDA, cuBLAS and Triton raise RuntimeErrors.
    said = ("can't allocate memory", "out of memory", "_ALLOC_FAILED")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in said))
    )
