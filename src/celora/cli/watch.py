"""`celora watch`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from celora.cli.app import app
from celora.cli.options import Json, Quiet, each_possible, print_json

_EVERY_S = 2.0
WATCH_HELP = """Show the progress of runs: loss, speed, time left, memory and the error of the estimates.

\b
Examples:
  celora watch out                                                # until the run ends
  celora watch lora celora                                        # two runs side by side
  celora watch out --once
  celora watch out --quiet && celora chat out                     # wait until the run ends
  celora watch out --json | jq .runs[0].loss

It only reads the files of the runs. Ctrl-C ends it, and the runs go on."""


@app.command(help=WATCH_HELP, short_help="Watch runs while they train.")
def watch(
    outs: Annotated[
        list[Path], typer.Argument(metavar="OUT...", callback=each_possible, help="Output folders of runs.")
    ],
    once: Annotated[bool, typer.Option("--once", help="Show the runs once, and end.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    from rich.console import Console
    from rich.live import Live

    from celora.train.live import look, show

    def seen() -> Sequence[Any]:
        return [look(out) for out in outs]

    if as_json:
        print_json({"runs": [snapshot.to_dict() for snapshot in seen()]})
        return
    console = Console(quiet=quiet)
    plain = not (console.encoding or "").lower().startswith("utf")
    if once or not (quiet or console.is_terminal):
        console.print(show(seen(), plain=plain))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            snapshots = seen()
            live.update(show(snapshots, plain=plain), refresh=True)
            if not any(snapshot.goes_on for snapshot in snapshots):
                return
            time.sleep(_EVERY_S)
