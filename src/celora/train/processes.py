"""One run in several processes, as torchrun and `accelerate launch` start them.

The first process (rank 0) writes, prints and decides for all. If a job fails, the process that fails first says why, in
one line. The launcher then ends the others; they say nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from celora.errors import CELoraError

_PATIENCE_S = 5.0


def rank() -> int:
    """The number of this process; 0 if there is only one."""
    return int(os.environ.get("RANK", 0))


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def processes_here() -> int:
    """How many of the processes run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes()))


def is_first() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def introduce_deepspeed() -> None:
    """Set up DeepSpeed's communication before a model is loaded in parts. On CPUs, Accelerate does not do it."""
    import deepspeed

    deepspeed.init_distributed()  # uses the existing process group


def wait_for_all() -> None:
    """Wait until all processes have called this. Collective."""
    if processes() > 1:
        from accelerate import PartialState  # imported late: the folder's lock does not need it

        PartialState().wait_for_everyone()


def speaks() -> bool:
    """Whether this process should say why the job failed. All processes share a store; the first to ask it says why."""
    if processes() == 1:
        return True
    answers: list[bool] = []
    # In a thread: if the store's host has frozen, the call returns long after its own time limit.
    asking = threading.Thread(target=lambda: answers.append(_first_to_ask()), daemon=True)
    asking.start()
    asking.join(_PATIENCE_S)
    return answers[0] if answers else True


def _first_to_ask() -> bool:
    try:
        port, attempt = int(os.environ["MASTER_PORT"]), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        host, patience = os.environ["MASTER_ADDR"], timedelta(seconds=_PATIENCE_S)
        store = dist.TCPStore(host, port, is_master=False, timeout=patience)  # type: ignore[attr-defined]
        return bool(store.add(f"celora/failures/{attempt}", 1) == 1)
    except (KeyError, ValueError, RuntimeError):  # the store is gone: its host was the process that failed
        return True


def lost_contact(error: BaseException) -> bool:
    """Whether a collective raised this error because another process is gone."""
    return processes() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


@contextmanager
def losing_contact(output: os.PathLike[str]) -> Iterator[None]:
    """If a collective inside fails because another process is gone, say so in one line."""
    try:
        yield
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        raise CELoraError(
            f"process {rank()} of {processes()} lost contact with the others: one of them was killed or failed. "
            f"Start again with --resume to go on from the last checkpoint in {os.fspath(output)}"
        ) from error
