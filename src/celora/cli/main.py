"""The command line. It parses, prints and sets the exit status; `celora.train` and `celora.studies` do the work.

Results go to stdout, everything else to stderr. Exit status: 0 done; 2 bad input, explained in one line; 130 Ctrl-C; 1
any other failure, with a traceback if it is a bug. Each command imports torch and the training stack when it runs. So
`celora --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from celora.cli.app import app

# Each module registers its commands, in the order of the help.
# isort: off
from celora.cli import forecast  # noqa: F401
from celora.cli import train as _train  # noqa: F401
from celora.cli import sft as _sft  # noqa: F401
from celora.cli import watch, use  # noqa: F401
from celora.cli import measure, studies  # noqa: F401

# isort: on
from celora.cli.hush import hush
from celora.errors import CELoraError, first_line, out_of_memory
from celora.settings.names import GONE


def main(arguments: Sequence[str] | None = None, *, began: float | None = None) -> int:
    """Run a command and return its exit status. `began`: when it began, by `time.perf_counter`; by default now."""
    began = time.perf_counter() if began is None else began
    # What is piped is UTF-8, on Windows too. A character that cannot be written never fails a run.
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        with contextlib.suppress(ValueError):  # closed, or read already by a program that calls this
            if isinstance(stream, io.TextIOWrapper):
                own = stream.isatty() or "PYTHONIOENCODING" in os.environ
                stream.reconfigure(encoding=None if own else "utf-8", errors=errors)
    hush()
    try:
        # typer would print its usage for a mistake; here every mistake is one line.
        given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
        if given[0] in GONE:
            raise CELoraError(f"celora {given[0]} is gone: {GONE[given[0]]}")
        _check_once(given)
        status = _command().main(given, prog_name="celora", standalone_mode=False, obj=began)
    except CELoraError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Exception as error:
        # Usage errors of click, which typer vendors in some versions and imports in others.
        if hasattr(error, "format_message"):
            return _fail(str(error.format_message()))
        return _break_down(error)
    if status == 130:  # typer has turned an uncaught Ctrl-C into an exit status
        with contextlib.suppress(OSError):  # a terminal that was closed
            typer.echo("interrupted", err=True)
    return status if isinstance(status, int) else 0


def _check_once(given: Sequence[str]) -> None:
    """Of a setting that is given twice, the last counts. But nobody means to leave out a file."""
    from celora.train.request.fields import ALIASES

    written = [argument.partition("=")[0][2:].replace("-", "_") for argument in given if argument.startswith("--")]
    names = ["data", "eval_data", "model"] + ["output"] * (given[0] == "train")  # others refuse `output_dir` themselves
    for name in names:
        forms = [form for form in written if ALIASES.get(form, form) == name]
        if len(forms) > 1:
            others = [f"--{form}" for form in dict.fromkeys(forms) if form != name]
            also = f" (also as {' and '.join(others)})" if others else ""
            several = " (a folder may hold several files)" if name.endswith("data") else ""
            raise CELoraError(f"--{name.replace('_', '-')}{also} is given {len(forms)} times; give it once{several}")


@functools.cache
def _command() -> Any:
    return typer.main.get_command(app)


def _fail(message: str) -> int:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from celora.train.processes import speaks

        if not speaks():
            return 2
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def _break_down(error: Exception) -> int:
    """Print why a command failed, and return 1: one line if memory or disk ran out, a traceback if celora has a bug."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        typer.echo(f"failed: {error}; make room and run the command again (celora train: with --resume)", err=True)
    elif out_of_memory(error):
        typer.echo(
            f"failed: out of memory ({first_line(error)}); lower "
            "--per_device_train_batch_size or --max_length, or give --gradient_checkpointing true",
            err=True,
        )
    else:
        traceback.print_exception(error)
        typer.echo("This is a bug in celora: please report it together with what `celora doctor` prints.", err=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
