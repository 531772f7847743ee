"""`celora estimate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from celora.cli.app import app
from celora.cli.options import (
    TRLS,
    Config,
    Data,
    Json,
    Model,
    Quiet,
    leave_out,
    look_ahead,
    one_of,
    print_json,
    settle_in,
)
from celora.settings.names import PRESET_NAMES

ESTIMATE_HELP = """Will it fit, and how long will it take? Answers in about a minute, and trains nothing.

It reads the rows and the model's configuration, no weights, and times a few blocks of random weights on this machine.
Then it shows the two or three best that fit: base, preset, checkpointing, memory, time of a step. It says what it left
out for lack of time. Options of celora train narrow the choice. For --gpu, times are computed, not measured.

\b
Examples:
  celora estimate --model ./model --data chats.jsonl
  celora estimate --model model.gguf --data chats.jsonl --memory 8GiB
  celora estimate --model ./model --data chats.jsonl --preset fast --max_length 512
  celora estimate --model ./model --data chats.jsonl --gpu "RTX 4060"
  celora estimate --model ./model --data chats.jsonl --json | jq .taken

celora train --memory 8GiB takes the row that is marked here."""


@app.command(help=ESTIMATE_HELP, short_help="Will it fit, and how long will it take?", context_settings=TRLS)
def estimate(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="A budget, like 8GiB; by default the free memory.")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="Show only this preset; by default auto and fast, on a CPU also exact.",
            autocompletion=one_of(PRESET_NAMES),
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="Answer for this NVIDIA GPU, like 'RTX 4060', instead of this machine."),
    ] = None,
    base: Annotated[Literal["int8"] | None, typer.Option("--base", help="int8: show only bases in 8 bits.")] = None,
    config: Config = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    look_ahead(context.args, config)
    from celora.train.request.arguments import parse

    own: dict[str, Any] = {"model": model, "data": data, "preset": preset, "base": base, "config": config}
    leave_out(context.args, ("output", "overwrite", "resume"), "celora estimate, which writes nothing")
    leave_out(context.args, ("eval_data",), "celora estimate, which looks at training alone")
    request = parse(context.args, own | {"memory": memory, "output": "celora-estimate", "quiet": quiet})
    from celora.machine.timing import disturbed
    from celora.train.forecast.estimate import estimate as find
    from celora.train.units import in_bytes

    settle_in()
    limit = request.options.memory
    busy = "" if gpu else disturbed()
    say = (lambda line: None) if as_json or quiet else typer.echo
    found = find(request, None if limit is None else in_bytes(limit), gpu=gpu, say=say)
    print_json(found.to_dict() | {"disturbed": busy}) if as_json else typer.echo(str(found))
    if busy and not as_json:
        typer.echo(f"Ask again when the machine is idle: {busy}.")
    if found.taken is None:
        raise typer.Exit(2)
