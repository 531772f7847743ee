"""`celora sft`: TRL's own training script, with celora attached to the model that it trains."""

from __future__ import annotations

import argparse
from subprocess import CalledProcessError
from typing import Annotated, Any, NoReturn

import typer

from celora.cli.app import app
from celora.cli.options import TRLS, one_of
from celora.errors import CELoraError, choose
from celora.integrations import default_preset
from celora.settings.names import PRESET_NAMES

SFT_HELP = """Run `trl sft` with celora. ARGUMENTS are those of `trl sft`, unchanged.

\b
Examples:
  celora sft --model_name_or_path ./model --dataset_name chats --use_peft --output_dir out
  celora sft --preset auto --config sft.yaml --num_processes 2
  trl sft --help                                                  # its arguments

Without an accelerator, `--use_cpu true` is added. TRL decides everything else: defaults, files and checkpoints are its
own. `celora train --config sft.yaml` takes the same file, and writes celora's output folder."""


@app.command(help=SFT_HELP, short_help="Run `trl sft`, its arguments unchanged, with celora.", context_settings=TRLS)
def sft(
    context: typer.Context,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="exact (the default), auto, fast or paper.", autocompletion=one_of(PRESET_NAMES)),
    ] = None,
) -> None:
    preset = choose("preset", preset or default_preset(), PRESET_NAMES)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from trl.cli import accelerate_launcher
    from trl.cli.main import main
    from yaml import YAMLError

    launch_script, usage = accelerate_launcher.launch_training_script, argparse.ArgumentParser.error

    def launch(**given: Any) -> None:
        """Like TRL's, whose launcher starts the script under celora."""
        launch_script(**given, launch_command_fn=lambda parsed: through_celora(parsed, preset))

    accelerate_launcher.launch_training_script = launch
    argparse.ArgumentParser.error = _refuse  # type: ignore[method-assign]
    try:
        main(["sft", *context.args, *_where(context.args)])
    except CalledProcessError as error:  # the script has said why
        raise typer.Exit(error.returncode) from None
    except ChildFailedError as error:  # one of several scripts has
        raise typer.Exit(max(1, error.get_first_failure()[1].exitcode)) from None
    except (ValueError, OSError, YAMLError) as error:
        raise CELoraError(f"trl sft: {error}") from error
    finally:
        accelerate_launcher.launch_training_script = launch_script
        argparse.ArgumentParser.error = usage  # type: ignore[method-assign]


def _refuse(self: argparse.ArgumentParser, message: str) -> NoReturn:
    """Without the usage of a hundred lines, which argparse prints above its message."""
    raise ValueError(f"{message}; trl sft --help lists the arguments")


def _where(arguments: list[str]) -> list[str]:
    """TRL trains in bfloat16 by default, and without an accelerator asks for this argument then."""
    from celora.machine.device import accelerator

    said = any(argument.partition("=")[0] == "--use_cpu" for argument in arguments)
    return [] if said or accelerator() is not None else ["--use_cpu", "true"]


def through_celora(parsed: Any, preset: str) -> None:
    """Start what `accelerate launch` was asked to start, as `python -m celora.run` would."""
    from accelerate.commands.launch import launch_command

    parsed.training_script_args = ["--preset", preset, parsed.training_script, *parsed.training_script_args]
    parsed.module, parsed.training_script = True, "celora.cli.sft_script"
    launch_command(parsed)
