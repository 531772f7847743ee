"""`celora train`."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

import typer

from celora.cli.app import app, print_all_help
from celora.cli.options import TRLS, Config, Data, Json, Model, Preset, importing, look_ahead, print_json, settle_in
from celora.files import quoted

TRAIN_HELP = """Fine-tune MODEL on DATA with LoRA. The preset says how much of the arithmetic is estimated.

\b
Examples:
  celora train --model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl --output out
  celora train --model ./model --data rows.csv --output out --max_steps 200 --learning_rate 1e-4 --lora_r 32
  celora train --model ./model --data rows.csv --output out --base int8 --preset fast   # frozen weights in 8 bits
  celora train --config run.yaml --preset off --output plain      # flags win over the file
  celora train --output out --resume                              # after Ctrl-C or a crash
  celora train --config run.yaml --resume                         # a queue can repeat this: it starts or continues
  torchrun --nproc-per-node 8 -m celora train --config run.yaml   # several devices; accelerate launch -m works too
  celora train --config sft.yaml                                  # a file made for `trl sft`

Ctrl-C stops at the end of the step and saves; a second one stops at once.

Every field of TRL's SFTConfig and the LoRA fields of its ModelConfig are accepted under their own names, here and in
the YAML file (--bf16 false, --per-device-train-batch-size 4). --help-all lists them, with the defaults that differ from
TRL's and why."""


# Arguments without which another command would read other rows, or make other tokens of them.
_READING = frozenset({"assistant_only_loss", "chat_template_path", "completion_only_loss", "eos_token", "max_length"})
_READING |= {"model_revision", "packing", "packing_strategy", "pad_token", "truncation_mode"}


@app.command(help=TRAIN_HELP, short_help="Fine-tune a model on your rows.", context_settings=TRLS)
def train(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Folder for adapter, checkpoints, metrics, report.")
    ] = None,
    preset: Preset = None,
    base: Annotated[
        Literal["int8"] | None, typer.Option("--base", help="int8: store the frozen base model in 8 bits.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="A budget, like 8GiB: take the fastest settings that should fit.")
    ] = None,
    config: Config = None,
    eval_data: Annotated[str | None, typer.Option("--eval-data", "--eval_data", help="Rows to evaluate on.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")] = False,
    as_json: Json = False,
    help_all: Annotated[
        bool, typer.Option("--help-all", callback=print_all_help, is_eager=True, help="List every setting.")
    ] = False,
) -> None:
    look_ahead(context.args, config)
    own: dict[str, object] = {
        "model": model,
        "data": data,
        "output": output,
        "preset": preset,
        "config": config,
        "eval_data": eval_data,
    }
    own |= {"base": base, "memory": memory, "resume": resume, "overwrite": overwrite, "quiet": quiet}
    with importing():
        from celora.train.request.arguments import parse

        request = parse(context.args, own)
        from celora.train.run import train as run

    settle_in()
    result = run(request, began=context.obj, compares=True)
    if as_json and result.summary:
        print_json({"status": result.status, "output": str(result.output)} | result.summary)
    elif result.summary and result.status != "interrupted" and not request.options.quiet:
        with contextlib.suppress(OSError):  # the run is saved, whether or not anybody reads this
            typer.echo(_ending(request, result))
    if result.status == "interrupted":
        raise typer.Exit(130)


def _ending(request: Any, result: Any) -> str:
    """The lines printed after a run: its result, where the files are, and what to do next."""
    from celora.train.wall_clock import spent

    output, loss = str(result.output), result.summary.get("loss")
    shown = "" if loss is None else f"  loss {loss:.4f}"
    if (evaluated := result.summary.get("eval_loss")) is not None:
        shown += f"  evaluation loss {evaluated:.4f}"
    if (on_base := result.summary.get("eval_base_loss")) is not None:
        shown += f" (on the original base {on_base:.4f})"
    inputs = f"--model {quoted(request.model)} --data {quoted(request.data)}"
    inputs += f" --base {request.options.base}" if request.options.base else ""
    inputs += "".join(
        f" --{name} {quoted(str(value))}"
        for name, value in request.given.items()
        if (name in _READING or name.startswith("dataset_")) and isinstance(value, str | int)
    )
    if result.summary.get("estimated_cost", 1.0) < 1:
        then = f"celora audit {inputs} --adapter {quoted(output)}   # how much of the gradient the estimate keeps"
    else:
        then = f"celora compare {inputs} --output {quoted(f'{output}-compared')}   # against plain LoRA"
    parts = [f"{part} {s:.1f} s" for part, s in spent(result.summary).items() if s >= 0.05]
    where = f"Wall-clock: {', '.join(parts)}\n" if parts and result.status == "finished" else ""
    if (seconds := result.summary.get("train_seconds_of_peft")) is not None:
        where += f"With PEFT alone, train would have taken about {seconds:.1f} s (measured on batches of this run).\n"
    return (
        f"{result.status}: step {result.step}{shown}  {result.summary['seconds']:.1f} s\n"
        f"{where}"
        f"Adapter: {output}, loaded by PeftModel.from_pretrained(model, {output!r})\n"
        f"Report:  {result.output / 'report.html'}\n"
        f"Next:    {then}"
    )
