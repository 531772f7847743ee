"""Run something as a user who is not root, because no folder is read-only for root."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534


@contextmanager
def public_folder() -> Iterator[Path]:
    """A temporary folder that other users can read. pytest's own are private."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_nobody(do: Callable[[], object]) -> BaseException | None:
    """The exception that `do` raises in a child process with the rights of an ordinary user."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def child() -> None:
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        try:
            do()
        except BaseException as error:
            there.send(error)
        else:
            there.send(None)

    process = context.Process(target=child)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child never touches the threads of the parent
        process.start()
    there.close()
    error: BaseException | None = here.recv()
    process.join()
    return error
