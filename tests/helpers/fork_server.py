"""The process that all tests' processes are forked from: `fork_server.py DOOR`, a socket that listens.

It imports the libraries when it is first asked, and ends when its input does. A request is `sys.path` and a call. The
answer is the process's id, and then its exit status. `forked.py` asks.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback

LIBRARIES = [
    "accelerate.commands.launch", "datasets", "peft", "plotly.graph_objects", "pytest", "rich.console",
    "torch.distributed.elastic.multiprocessing.api", "torch.distributed.fsdp", "torch.testing",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "transformers.trainer",
    "trl.trainer.sft_trainer", "trl.trainer.sft_config", "typer",
]  # fmt: skip


def serve(door: socket.socket) -> socket.socket:
    """Fork a process for each request, and tell its status when it has ended. Return in such a process alone."""
    asked: dict[int, socket.socket] = {}
    ended, note = os.pipe()
    os.set_blocking(note, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(note)
    while True:
        ready, _, _ = select.select([sys.stdin, door, ended], [], [])
        if ended in ready:
            os.read(ended, 1024)
            while asked and (child := os.waitpid(-1, os.WNOHANG))[0]:
                with contextlib.suppress(OSError), asked.pop(child[0]) as client:
                    client.sendall(struct.pack("i", os.waitstatus_to_exitcode(child[1])))
        if sys.stdin in ready:
            os._exit(0)
        if door in ready:
            client, _ = door.accept()
            import_libraries()
            child_id = os.fork()
            if not child_id:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                for own in (ended, note):
                    os.close(own)
                for other in (door, *asked.values()):
                    other.close()
                return client
            asked[child_id] = client


def import_libraries() -> None:
    """Import neither celora nor a test. Later calls do nothing."""
    if gc.get_freeze_count():
        return
    gc.disable()
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # a fork's collector need not look at what was there before
    gc.enable()


def answer(client: socket.socket) -> None:
    """Make the call, in the process that was forked for it."""
    with client, client.makefile("rb") as request:
        client.sendall(struct.pack("i", os.getpid()))
        sys.path[:], call = pickle.load(request)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    work, arguments = pickle.loads(call)
    work(*arguments)


def status_of(client: socket.socket) -> int:
    """The exit status of a process that calls `answer` and ends."""
    try:
        answer(client)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    status = status_of(serve(socket.socket(fileno=int(sys.argv[1]))))
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
