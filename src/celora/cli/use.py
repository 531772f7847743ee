"""`celora chat`, `generate` and `export`: use a trained adapter."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from celora.cli.app import app
from celora.cli.options import Json, Overwrite, Quiet, check_file, possible, print_json, settle_in
from celora.errors import CELoraError
from celora.files import json_lines

CHAT_HELP = """Talk to the trained adapter in OUT, the --output folder of celora train.

\b
Examples:
  celora chat out
  celora chat out --base                                      # the untouched model answers, too
  celora chat out --prompt "What is a mitochondrion?" --temperature 0
  celora chat out --prompt "Hello!" --json | jq -r .generated
  celora chat out < questions.txt                             # each line is a turn

Ctrl-C ends an answer, Ctrl-D the conversation. /reset begins a new one. Nothing is sent anywhere."""
GENERATE_HELP = """Answer every row of a file with the trained adapter in OUT.

A row has a prompt, messages, an instruction (and an input) or text. Rows of training data work, too: the answers in
them are left out. Each row is written back with a new column `generated`.

\b
Examples:
  celora generate out --data prompts.jsonl --output answers.jsonl
  celora generate out --data test.jsonl --output answers.jsonl --base --temperature 0
  celora generate out --data prompts.jsonl --output answers.jsonl --resume     # after Ctrl-C or a crash
  celora generate out --data prompts.jsonl --limit 5 | jq -r .generated"""
EXPORT_HELP = """Write the adapter in OUT, or the whole merged model, for llama.cpp, Ollama, MLX or Transformers.

\b
Examples:
  celora export out --to gguf --output out.gguf                        # one file: llama-server --lora out.gguf
  celora export out --to gguf                                          # a folder: adapter.gguf, Modelfile
  celora export out --to gguf --merged --gguf base.gguf --outtype q8_0 # one file with everything
  celora export out --to safetensors --merged                          # a folder for Transformers
  celora export out --to mlx                                           # mlx_lm.generate --adapter-path

Every tensor is read back and compared. The folder appears when it is complete. Except for MLX, it
has a Modelfile for Ollama."""
Out = Annotated[Path, typer.Argument(metavar="OUT", callback=possible, help="Output folder of a run, or a checkpoint.")]
Where = Annotated[
    str | None, typer.Option("--model", help="The base model, if it is no longer where the run found it.")
]
Base = Annotated[bool, typer.Option("--base", help="Let the untouched base model answer, too.")]
Raw = Annotated[
    bool | None,
    typer.Option(
        "--raw/--template",
        help="Give prompts to the model without the chat template, or with it; by default as in training.",
    ),
]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "--max_new_tokens", min=1, help="Longest answer.")]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", min=0.0, help="0 takes the likeliest token; by default the model's own settings."),
]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON lines: an object for each answer.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of the sampling.")]


@app.command(help=CHAT_HELP, short_help="Talk to a trained adapter.")
def chat(
    out: Out,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Ask only this, and end.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="The system message.")] = None,
    model: Where = None,
    base: Base = False,
    raw: Raw = None,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    as_json: JsonLines = False,
) -> None:
    with _loaded(out, model, base, raw) as trained:
        from celora.train.use.generation import Conversation, Sampling

        sampling = Sampling(max_new_tokens, temperature, seed)
        who = {"adapter": False} | ({"base": True} if base else {})
        talks = {name: Conversation(trained, sampling, base=off, system=system) for name, off in who.items()}
        if prompt is not None:
            _answer(prompt, talks, as_json)
            return
        interactive = sys.stdin.isatty() and not as_json
        if interactive and not quiet:
            typer.echo(f"{out} on {trained.base}. Ctrl-C ends an answer, Ctrl-D the conversation.", err=True)
            if not talks["adapter"].has_turns:
                typer.echo("Without the chat template: each prompt is continued by itself.", err=True)
        for line in _turns(interactive):
            if line.strip() == "/reset":
                for talk in talks.values():
                    talk.forget()
                continue
            before = [(talk, talk.turns) for talk in talks.values()]
            try:
                _answer(line, talks, as_json, interactive)
            except CELoraError as error:
                if not interactive:
                    raise
                for talk, turns in before:
                    talk.turns = turns  # what only one of them has answered is forgotten
                typer.echo(f"error: {error}", err=True)


@app.command(help=GENERATE_HELP, short_help="Answer many prompts with a trained adapter.")
def generate(
    out: Out,
    data: Annotated[Path, typer.Option("--data", callback=possible, help=".jsonl, .json, .csv or .parquet file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", callback=possible, help="File for the answers, JSON lines; by default stdout."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Rows to answer; by default all.")] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "--batch_size", min=1, max=4096, help="Rows answered at a time.")
    ] = 8,
    model: Where = None,
    base: Base = False,
    raw: Raw = None,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = None,
    seed: Seed = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an existing file, with the same adapter and settings.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: JsonLines = False,
) -> None:
    if resume and (overwrite or output is None):
        raise CELoraError("--resume continues the file in --output; give --output FILE, and no --overwrite")
    if output is not None:
        check_file(output, overwrite=overwrite or resume)
    from celora.train.use.prompts import answer_all, answered_rows, load_prompts, prompt_files
    from celora.train.use.trained import text_field_of

    if output is not None and output.exists() and any(file.samefile(output) for file in prompt_files(data)):
        raise CELoraError(f"--output {str(output)!r} is the --data; give another file")
    rows = load_prompts(data, limit=limit, text_field=text_field_of(out))
    earlier = answered_rows(output, [row for row, _ in rows], base=base) if resume and output is not None else []

    def say(done: int, new: list[dict[str, Any]]) -> None:
        if output is None or as_json:
            typer.echo(json_lines(new), nl=False)
        if not quiet:
            typer.echo(f"{done} of {len(rows)} rows answered", err=True)

    with _loaded(out, model, base, raw) as trained:
        from celora.train.interrupt import like_ctrl_c
        from celora.train.use.generation import Sampling

        sampling = Sampling(max_new_tokens, temperature, seed)
        try:
            with like_ctrl_c():
                answer_all(
                    trained, rows, sampling, batch=batch_size, base=base, earlier=earlier, output=output, say=say
                )
        except KeyboardInterrupt:
            if output is not None:
                typer.echo("To continue, give the same command with --resume.", err=True)
            raise
    if output is not None and not quiet:
        typer.echo(f"Saved as {output}", err=True)


@app.command(help=EXPORT_HELP, short_help="Write a trained adapter for llama.cpp, Ollama, MLX or Transformers.")
def export(
    out: Out,
    to: Annotated[Literal["gguf", "safetensors", "mlx"], typer.Option("--to", help="Format.")],
    merged: Annotated[bool, typer.Option("--merged", help="The whole model, the adapter merged into it.")] = False,
    gguf: Annotated[
        Path | None, typer.Option("--gguf", callback=possible, help="The base model as a GGUF file.")
    ] = None,
    outtype: Annotated[
        Literal["f16", "q8_0", "f32"] | None,
        typer.Option("--outtype", help="How a merged GGUF file stores its weights; by default f16."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", callback=possible, help="Folder to write, or a file .gguf; by default a folder beside OUT."
        ),
    ] = None,
    model: Where = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    from celora.train.formats.export import export as run
    from celora.train.loading import quiet_libraries
    from celora.train.use.trained import unfinished

    with quiet_libraries():
        made = run(out, to, merged=merged, gguf=gguf, outtype=outtype, output=output, model=model, overwrite=overwrite)
    if line := unfinished(out):
        typer.echo(line, err=True)
    if as_json:
        print_json({"output": str(made.output), "files": made.files, "tensors": made.tensors, "command": made.command})
    elif not quiet:
        what = str(made.output) if made.output.is_file() else f"{made.output}: {', '.join(made.files)}"
        typer.echo(f"{what}\n{made.tensors} tensors read back and compared")
        if made.command:
            typer.echo(f"Run it: {made.command}")


@contextlib.contextmanager
def _loaded(out: Path, model: str | None, base: bool, raw: bool | None) -> Iterator[Any]:
    """Load the trained model, and keep other libraries quiet while the body runs.

    Prompts are given to it without the chat template (`raw`), with it, or as its training rows were (None).
    """
    from celora.train.loading import quiet_libraries
    from celora.train.use.generation import check_base
    from celora.train.use.trained import load_trained, unfinished

    settle_in()
    with quiet_libraries():
        trained = load_trained(out, model)
        if line := unfinished(out):
            typer.echo(line, err=True)
        if base:
            check_base(trained)
        if raw is False and not trained.tokenizer.chat_template:
            raise CELoraError(f"--template: the tokenizer of {trained.base!r} has no chat template; leave it out")
        yield trained if raw is None else dataclasses.replace(trained, raw=raw)


def _turns(interactive: bool) -> Iterator[str]:
    """Yield the lines that the user types, or those of stdin, without empty ones."""
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # `input` then has a history, and keys to edit a line
    while True:
        try:
            line = input("> ") if interactive else _next_line()
        except EOFError:
            if interactive:
                typer.echo()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            typer.echo("\n(Ctrl-D ends the conversation)", err=True)
            continue
        if line.strip():
            yield line


def _next_line() -> str:
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff")  # as files of Windows have them


def _answer(prompt: str, talks: dict[str, Any], as_json: bool, interactive: bool = False) -> None:
    """Ask every conversation, and print each answer as it grows, or all at the end as JSON.

    `interactive`: Ctrl-C ends an answer alone. The next conversation is asked, too, so that all have the same turns.
    """
    made = {}
    for name, talk in talks.items():
        if as_json:
            made[name] = talk.ask(prompt)
            continue
        try:
            if len(talks) > 1:
                typer.secho(f"{name}: ", bold=True, nl=False)
            talk.ask(prompt, lambda text: typer.echo(text, nl=False))
        except KeyboardInterrupt:
            if not interactive:
                raise
        typer.echo()
    if as_json:
        row = {"prompt": prompt, "generated": made["adapter"]}
        typer.echo(json_lines([row | ({"generated_by_base": made["base"]} if "base" in made else {})]), nl=False)
