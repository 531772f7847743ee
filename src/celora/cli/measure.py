"""`celora audit`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

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
    Preset,
    Quiet,
    Reference,
    Rows,
    leave_out,
    look_ahead,
    print_json,
    settle_in,
)

AUDIT_HELP = """Compare the estimated LoRA gradient with the exact one on a batch of your own rows.

\b
Examples:
  celora audit --model ./model --data chats.jsonl
  celora audit --model ./model --data chats.jsonl --adapter out --rows 16
  celora audit --model ./model --data chats.jsonl --preset fast --json | jq .cosine
  celora audit --model ./model --data chats.jsonl --reference float32"""


@app.command(help=AUDIT_HELP, short_help="How much of the gradient an estimate keeps.", context_settings=TRLS)
def audit(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    adapter: Adapter = None,
    preset: Preset = None,
    config: Config = None,
    rows: Rows = None,
    reference: Reference = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    look_ahead(context.args, config)
    from celora.train.request.arguments import parse

    # audit takes the arguments of train, so that it sees the same batches. It writes nothing.
    own: dict[str, Any] = {"model": model, "data": data, "preset": preset, "config": config}
    own |= {"output": "celora-audit", "quiet": quiet}
    leave_out(context.args, ("output", "overwrite", "resume"), "celora audit, which writes nothing")
    leave_out(context.args, ("eval_data",), "celora audit, which uses training rows")
    leave_out(context.args, ("memory",), "celora audit, which takes the other settings as they are")
    leave_out(context.args, ADAPTERS if adapter else (), "an existing adapter, which has its own")
    request = parse(context.args, own)
    settle_in()
    from celora.train.prepare import audit_model

    report = audit_model(request, rows=rows, adapter=Path(adapter) if adapter else None, reference=reference)
    print_json(dataclasses.asdict(report)) if as_json else typer.echo(str(report))
