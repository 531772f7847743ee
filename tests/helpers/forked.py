"""Start a process for a test without the seconds that a new interpreter spends on imports.

One process imports the libraries, but neither celora nor a test (`fork_server.py`). Each process for a test is a fork
of it, with its own signals, environment, output and exit status. Where forks are not safe, it is a new interpreter.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from room import with_room

FORKS = sys.platform == "linux"  # Windows has none; Apple's libraries do not survive them
_DOOR = "CELORA_TESTS_DOOR"


@contextlib.contextmanager
def server() -> Iterator[None]:
    """The process to fork from. What is started meanwhile shares it: pytest-xdist's workers."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as last:
        if FORKS:
            door = last.enter_context(socket.socket(socket.AF_UNIX))
            os.environ[_DOOR] = f"{folder}/door"
            door.bind(os.environ[_DOOR])
            door.listen()
            command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), str(door.fileno())]
            unread = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}  # what libraries say when imported
            process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[door.fileno()], **unread)
            last.callback(process.communicate)
        yield


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
        call = pickle.dumps((work, arguments, dict(environment), os.getcwd()))
        status = (_fork if FORKS else _spawn)((call, *map(str, files)), timeout)
        if status is None:
            raise subprocess.TimeoutExpired(work.__name__, timeout or 0)
        said = [file.read_text(encoding="utf-8") for file in files]
        return subprocess.CompletedProcess([work.__name__, *map(str, arguments)], status, *said)


def _fork(given: tuple[Any, ...], timeout: float | None) -> int | None:
    """The exit status of a fork that calls `_begin(*given)`. None if it took too long."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.environ[_DOOR])
        client.sendall(pickle.dumps((sys.path, pickle.dumps((_begin, given)))))
        process = _number(client)
        client.settimeout(timeout)
        try:
            return _number(client)
        except TimeoutError:
            os.kill(process, signal.SIGKILL)
            return None


def _number(client: socket.socket) -> int:
    return int(struct.unpack("i", client.recv(4, socket.MSG_WAITALL))[0])


def _spawn(given: tuple[Any, ...], timeout: float | None) -> int | None:
    """The same in a new interpreter."""
    process = multiprocessing.get_context("spawn").Process(target=_begin, args=given)
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def _begin(call: bytes, *files: str) -> None:
    for number, file in enumerate(files, 1):
        handle = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    work, arguments, own, cwd = pickle.loads(call)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(own)
    tempfile.tempdir = None  # look for it again, in this environment
    with_room(work, *arguments)


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
