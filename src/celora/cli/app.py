"""The typer application that commands register with, its help, and the options of `celora` itself."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import celora
from celora.errors import CELoraError

HELP = """Faster LoRA fine-tuning of Hugging Face models. The result is an ordinary PEFT adapter.

\b
Start here:
  celora doctor                     # what is fast on this machine
  celora demo                       # LoRA and celora side by side on a small model, in minutes
  celora estimate --model MODEL --data rows.jsonl   # will it fit, and how long?
  celora train --model MODEL --data rows.jsonl --output out
  celora chat out                   # talk to the trained model
  celora COMMAND --help             # options and examples of a command
  celora --install-completion       # complete commands and options with TAB

\b
Results go to stdout, progress and notes to stderr. --quiet leaves out the notes. --json prints results for programs.
Exit status: 0 done, 1 failed, 2 bad input (one line says what to do), 130 stopped with Ctrl-C."""
app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"celora {celora.__version__}")
        raise typer.Exit


def print_all_help(asked: bool) -> None:
    if asked:
        from celora.numerics.estimators import ESTIMATORS
        from celora.train.request.fields import help_all

        typer.echo(help_all())
        typer.echo(f"\nestimators, in the celora: part of the --config file: {', '.join(sorted(ESTIMATORS))}.")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand != "train" and (count := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise CELoraError(f"celora {context.invoked_subcommand} was started in {count} processes; it runs in one")
