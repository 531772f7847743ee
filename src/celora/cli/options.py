"""Options and checks that several commands share."""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from celora.errors import CELoraError
from celora.files import check_name, finite
from celora.settings.names import PRESET_NAMES

Model = Annotated[str | None, typer.Option("--model", help="Hugging Face name, local folder or .gguf file.")]
Data = Annotated[
    str | None, typer.Option("--data", help=".jsonl, .json, .csv or .parquet file, a folder, or a hub data set.")
]
# Options that typer does not know are TRL's; `celora.train.request.arguments` reads them.
TRLS = {"allow_extra_args": True, "ignore_unknown_options": True}
# Settings that an existing adapter already has.
ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_task_type",
             "lora_modules_to_save", "lora_bias", "bias", "use_rslora", "use_dora")  # fmt: skip
COMPARED = ("LoRA", "exact", "paper", "auto", "fast")


def one_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """A completion for the shell: the names that begin with what is typed. Nothing slow is imported for it."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


def possible(parameter: typer.CallbackParam, path: Any) -> Any:
    """Return the path with the user's home for `~`, or refuse a name that no file can have."""
    if path is None:
        return None
    check_name(str(parameter.name), path)
    return type(path)(os.path.expanduser(path))


def each_possible(parameter: typer.CallbackParam, paths: list[Any]) -> list[Any]:
    """`possible` of several paths."""
    return [possible(parameter, path) for path in paths]


Preset = Annotated[
    str | None,
    typer.Option(
        "--preset", help="auto (the default), fast, exact, paper or off.", autocompletion=one_of(PRESET_NAMES)
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", callback=possible, help="Folder of a trained adapter; by default a new adapter."),
]
Rows = Annotated[
    int | None,
    typer.Option("--rows", min=1, max=1_000_000, help="Rows in a batch; by default per_device_train_batch_size."),
]
Reference = Annotated[
    Literal["float32"] | None,
    typer.Option(
        "--reference", help="Also compare PEFT's and celora's gradients with the float32 gradient of the same weights."
    ),
]
Config = Annotated[
    str | None,
    typer.Option("--config", help="YAML file of settings, also one made for trl sft."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings, errors and the result.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")]


def check_file(output: Path, *, overwrite: bool) -> None:
    """Refuse an output file that exists or is not writable, before any work begins."""
    if output.is_dir() or not output.parent.is_dir():
        raise CELoraError(f"--output {str(output)!r}; expected a file in a folder that exists")
    if output.exists() and not overwrite:
        raise CELoraError(f"--output {str(output)!r} exists; --overwrite replaces it")
    if not os.access(output.parent, os.W_OK):
        raise CELoraError(f"--output {str(output)!r}; its folder cannot be written to")


def leave_out(tokens: Sequence[str], names: Sequence[str], of: str) -> None:
    """Refuse flags that this command would ignore. Keys of a file may stay: it may be made for training."""
    from celora.train.request.fields import read_flags

    for name in read_flags(tokens):
        if name in names:
            raise CELoraError(f"--{name} is not for {of}; leave it out.")


def look_ahead(tokens: Sequence[str], config: str | None) -> None:
    """Before torch is imported: refuse unknown flags, and set the environment variables of the --config file."""
    from celora.train.request.fields import check_flags

    check_flags(tokens)
    if config is not None:
        from celora.train.request.yaml_file import set_environment

        set_environment(config)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(finite(value), indent=2, allow_nan=False))


@contextmanager
def importing() -> Iterator[None]:
    """Import the training stack here, and look for garbage neither meanwhile nor, later, in what the imports made.

    That is half a million objects, which stay. Going through them again and again takes a fifth of the start.
    """
    if "torch" in sys.modules:  # the program that calls this looks after its own
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # nanobind's modules, such as Triton's, call whatever is frozen at the end leaked
        gc.enable()


def settle_in() -> None:
    """Set up memory and threads of this process. A program may do so; a library must not."""
    from celora.machine.allocator import keep_freed_memory
    from celora.machine.threads import use_allowed_threads

    keep_freed_memory()
    use_allowed_threads()
