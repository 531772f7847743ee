"""`celora audit` and `celora plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from celora.cli.app import app
from celora.cli.options import (
    ADAPTERS,
    TRLS,
    Adapter,
    Config,
    Data,
    Json,
    Model,
    Overwrite,
    PlanFile,
    Preset,
    Quiet,
    Reference,
    Rows,
    check_file,
    leave_out,
    look_ahead,
    possible,
    print_json,
    settle_in,
)
from celora.settings.names import PLAN_NAME

AUDIT_HELP = """Compare the estimated LoRA gradient with the exact one on a batch of your own rows.

\b
Examples:
  celora audit --model ./model --data chats.jsonl
  celora audit --model ./model --data chats.jsonl --adapter out --rows 16
  celora audit --model ./model --data chats.jsonl --plan plan.json --json | jq .cosine
  celora audit --model ./model --data chats.jsonl --reference float32"""
PLAN_HELP = """Choose an estimate for each layer of MODEL: the fastest mix that keeps the fidelity.

\b
Examples:
  celora plan --model ./model --data chats.jsonl --output plan.json --fidelity 0.998
  celora train --model ./model --data chats.jsonl --output out --preset auto --plan plan.json"""


@app.command(help=AUDIT_HELP, short_help="How much of the gradient an estimate keeps.", context_settings=TRLS)
def audit(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    adapter: Adapter = None,
    preset: Preset = None,
    plan: PlanFile = None,
    config: Config = None,
    rows: Rows = None,
    reference: Reference = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    look_ahead(context.args, config)
    from celora.train.request.arguments import parse

    # audit takes the arguments of train, so that it sees the same batches. It writes nothing.
    own: dict[str, Any] = {"model": model, "data": data, "preset": preset, "config": config, "plan": plan}
    own |= {"output": "celora-audit", "quiet": quiet}
    if plan and preset is None:
        own["preset"] = "auto"
    leave_out(context.args, ("output", "overwrite", "resume"), "celora audit, which writes nothing")
    leave_out(context.args, ("eval_data",), "celora audit, which uses training rows")
    leave_out(context.args, ("memory",), "celora audit, which takes the other settings as they are")
    leave_out(context.args, ADAPTERS if adapter else (), "an existing adapter, which has its own")
    request = parse(context.args, own)
    settle_in()
    from celora.train.prepare import audit_model

    report = audit_model(request, rows=rows, adapter=Path(adapter) if adapter else None, reference=reference)
    print_json(dataclasses.asdict(report)) if as_json else typer.echo(str(report))


@app.command(help=PLAN_HELP, short_help="Choose an estimate for each layer, by measuring.", context_settings=TRLS)
def plan(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    output: Annotated[
        Path, typer.Option("--output", callback=possible, help="File that the plan is written to.")
    ] = Path(PLAN_NAME),
    fidelity: Annotated[
        float | None,
        typer.Option("--fidelity", help="Least cosine between estimated and exact LoRA gradient; by default 0.998."),
    ] = None,
    forward: Annotated[
        bool, typer.Option("--forward", help="Also consider forwards in 8 bits, as in preset fast.")
    ] = False,
    adapter: Adapter = None,
    config: Config = None,
    rows: Rows = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")] = False,
    as_json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    look_ahead(context.args, config)
    from celora.train.request.arguments import parse

    check_file(output, overwrite=overwrite)
    own = {"model": model, "data": data, "fidelity": fidelity, "config": config, "output": "celora-plan"}
    not_here = ("preset", "plan", "resume", "eval_data")
    leave_out(context.args, not_here, "celora plan, which makes what preset auto trains with")
    leave_out(context.args, ("output",), "celora plan by another name")
    leave_out(context.args, ("memory",), "celora plan, which takes the other settings as they are")
    leave_out(context.args, ADAPTERS if adapter else (), "an existing adapter, which has its own")
    request = parse(context.args, own | {"preset": "auto", "quiet": quiet})
    from celora.train.prepare import plan_model
    from celora.train.progress import progress_console

    settle_in()
    given = Path(adapter) if adapter else None
    made = plan_model(request, rows=rows, adapter=given, console=progress_console(), forward=forward)
    try:
        made.save(output)
    finally:  # print the plan even if it cannot be saved
        if as_json:
            print_json(made.to_dict())
        elif not quiet:
            typer.echo(made)
    if not as_json and not quiet:
        typer.echo(f"Saved as {output}")
