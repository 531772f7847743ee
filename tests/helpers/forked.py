"""Start a process for a test without the seconds that a new interpreter spends on imports.

One process imports the libraries, but neither celora nor a test. Each process for a test is a fork of it, with its own
signals, environment, output and exit status. Where forks are not safe, it is a new interpreter.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

LIBRARIES = [
    "accelerate.commands.launch", "datasets", "peft", "plotly.graph_objects", "pytest", "rich.console",
    "torch.distributed.elastic.multiprocessing.api", "torch.distributed.fsdp", "torch.testing",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "transformers.trainer",
    "trl.trainer.sft_trainer", "trl.trainer.sft_config", "typer",
]  # fmt: skip
# Windows has no forks; Apple's libraries do not survive them.
_START = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    _START.set_forkserver_preload(LIBRARIES)


def run(
    work: Callable[..., None],
    *arguments: Any,
    environment: Mapping[str, str] = os.environ,
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """Call `work(*arguments)` in a process of its own. Return its exit status and output, like `subprocess.run`."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        given = (work, arguments, dict(environment), os.getcwd(), *map(str, files))
        process = _START.Process(target=_begin, args=given)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(work.__name__, timeout or 0)
        said = [file.read_text(encoding="utf-8") for file in files]
        return subprocess.CompletedProcess([work.__name__, *map(str, arguments)], process.exitcode or 0, *said)


def _begin(work: Callable[..., Any], arguments: tuple[Any, ...], own: dict[str, str], cwd: str, *files: str) -> None:
    gc.freeze()  # the collector need not look at what was there before the fork
    for number, file in enumerate(files, 1):
        handle = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(own)
    tempfile.tempdir = None  # look for it again, in this environment
    work(*arguments)


def script(path: str | Path, *arguments: object) -> None:
    """Run it like `python PATH ARGUMENTS`."""
    sys.argv = [str(path), *map(str, arguments)]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(str(path), run_name="__main__")


def code(text: str) -> None:
    """Run it like `python -c TEXT`."""
    sys.argv = ["-c"]
    exec(text, {"__name__": "__main__"})


def interpreter(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS`, like `subprocess.run`."""
    return run(_module, *command[command.index("-m") + 1 :])


def _module(name: str, *arguments: str) -> None:
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def accelerate_launch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `accelerate launch`, whose processes are new interpreters."""
    return run(_accelerate_launch, [*map(str, arguments)])


def _accelerate_launch(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    launch_command(launch_command_parser().parse_args(arguments))


def torchrun(
    path: str | Path, *arguments: object, processes: int = 2, ahead: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `torchrun` with this script in several processes. Its agent imports the module `ahead`, and forks them."""
    return run(_torchrun, [f"--nproc-per-node={processes}", "--run-path", str(path), *map(str, arguments)], ahead)


def _torchrun(arguments: list[str], ahead: str | None) -> None:
    from torch.distributed.run import main

    if ahead is not None:
        importlib.import_module(ahead)
    main(["--standalone", "--start-method", "fork" if sys.platform == "linux" else "spawn", *arguments])
