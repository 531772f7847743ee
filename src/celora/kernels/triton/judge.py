"""Judges Triton's kernels on the user's GPU: which are right, and faster than torch.

They are tried in a process of their own. A kernel that writes where it must not leaves its process without a GPU, and
one may never end. So the process that makes the plan loses a kernel, and nothing else.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO

import torch

from celora.errors import first_line, out_of_memory
from celora.kernels import floats, plain
from celora.kernels.triton import judged, product, proof
from celora.machine.own_process import of_module
from celora.machine.timing import interleaved

_FASTER = 0.95  # of torch's time: less of a gain is noise
_REPEATS = 15
_SIZE = 4096  # rows and columns of what is timed
_WORDS = 32  # the softmax is timed for this many times as many columns as other kernels: for a vocabulary
_LIMIT_S = 600.0  # for one operation, of which most is to compile its variants
_NO_MEMORY = 77  # status of a process that had too little
_FROM_OUTSIDE = (-1, -2, -9, -15)  # statuses of one that was hung up, interrupted, killed or told to end
_BEGINS = '{"operation":'  # a finding in JSON

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Finding:
    """What was found of one operation: `Verdict` has the same of all."""

    operation: str
    wrong: str = ""
    faster: bool = False
    tiles: dict[str, int] = field(default_factory=dict)


def judge(device: torch.device, progress: Progress | None = None) -> judged.Verdict:
    """Which kernels are right and faster than torch on this GPU: measured once, then known from the user's cache.

    Every kernel is compared at odd sizes, in every dtype, with numbers that are not finite. Those that are right are
    timed. Most of the time is to compile them; how long it is was not measured.

    Where no process can try them, or has too little memory, a warning says so. Nothing is kept then, as another time
    it may.

    Args:
        progress: is called with the name of each operation before it is tried.
    """
    known = judged.verdict(device)
    if known is not None or device.type != "cuda":
        return known or judged.Verdict()
    if judged.cannot_run(device):
        judged.remember(device, judged.Verdict())
        return judged.Verdict()
    operations = [name for name in proof.OPERATIONS if name != "pack_floats" or floats.has_floats(device)]
    found: list[Finding] = []
    torch.cuda.empty_cache()  # what this process keeps for later is not there for another one
    try:
        while left := operations[len(found) :]:
            found += _by_a_process(device, left, progress or (lambda operation: None))
    except _UntriedError as error:
        warnings.warn(f"celora: Triton's kernels were not tried on {device}: {error}; torch's are used.", stacklevel=4)
        judged.remember(device, judged.Verdict(), lasting=False)
        return judged.Verdict()
    verdict = judged.Verdict(
        frozenset(each.operation for each in found if each.faster),
        {kind: number for each in found for kind, number in each.tiles.items()},
        {each.operation: each.wrong for each in found if each.wrong},
    )
    judged.remember(device, verdict)
    return verdict


class _UntriedError(Exception):
    """A process had no GPU or too little memory, or something else than a kernel ended it."""


def _by_a_process(device: torch.device, operations: Sequence[str], progress: Progress) -> list[Finding]:
    """What a process of its own finds of the first of these operations: of all but those after one that failed."""
    index = torch.cuda.current_device() if device.index is None else device.index
    if not sys.executable:
        raise _UntriedError("Python does not know its own program")
    command, place = of_module(__name__, str(index), *operations)
    found: list[Finding] = []
    with tempfile.TemporaryFile("w+", errors="replace") as said, _started(command, place, said) as process:
        late = threading.Event()
        limit = _limited(process, late)
        try:
            assert process.stdout is not None
            for line in process.stdout:  # the first finding is of no operation: it says that there is a GPU
                if not line.startswith(_BEGINS):
                    continue  # something printed before `_main` began
                limit.cancel()
                limit = _limited(process, late)
                found.append(Finding(**json.loads(line)))
                if not found[-1].wrong and len(found) <= len(operations):
                    progress(operations[len(found) - 1])
            status = process.wait()
        finally:
            limit.cancel()
            process.kill()
        said.seek(0)
        reason = next((line.strip() for line in reversed(said.readlines()) if line.strip()), f"status {status}")
    over = late.is_set()
    if not found or status == _NO_MEMORY or (status in _FROM_OUTSIDE and not over):
        raise _UntriedError(reason)
    if len(found) <= len(operations) and not found[-1].wrong:
        reason = f"had not ended after {_LIMIT_S / 60:.0f} minutes" if over else f"ended its process: {reason}"
        found.append(Finding(operations[len(found) - 1], reason))
    return found[1:]


def _started(command: Sequence[str], place: Mapping[str, str], said: IO[str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True, env=place)
    except OSError as error:
        raise _UntriedError(first_line(error)) from error


def _limited(process: subprocess.Popen[str], late: threading.Event) -> threading.Timer:
    """End the process, and set `late`, when the time of one operation is over."""

    def end() -> None:
        late.set()
        process.kill()

    limit = threading.Timer(_LIMIT_S, end)
    limit.daemon = True
    limit.start()
    return limit


def _end_with_parent() -> None:
    """End this process when the one that started it has closed its input, as the system does for one that is gone."""
    os.read(0, 1)  # `sys.stdin` would be locked when Python ends
    os._exit(1)


def _main(index: str, *operations: str) -> int:
    """Print a line for the GPU, then one for each operation, up to the first that fails: each a finding in JSON."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one is interrupted, too, and ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = torch.device("cuda", int(index))
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1) as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # where compilers may print
        try:
            torch.empty(1, device=device)
            print(json.dumps(asdict(Finding(""))), file=answers)
            for operation in operations:
                finding = find(operation, device)
                print(json.dumps(asdict(finding)), file=answers)
                if finding.wrong:
                    break  # what it wrote where it must not may let others fail
        except Exception as error:
            print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
            return _NO_MEMORY if out_of_memory(error) else 1
    return 0


def find(operation: str, device: torch.device) -> Finding:
    """What this process finds of one operation."""
    if reason := proof.wrong_somewhere(operation, device):
        return Finding(operation, reason)
    tiles = {}
    if operation.startswith("pack"):
        tiles = _fastest_tiles(torch.float8_e4m3fn if operation == "pack_floats" else torch.int8, device, _SIZE)
        judged.remember(device, judged.Verdict(tiles=tiles), lasting=False)  # it is timed with them
    try:
        faster = all(_is_faster(operation, device, dtype) for dtype in judged.DTYPES)
    finally:
        judged.forget(device)
    return Finding(operation, faster=faster, tiles=tiles)


def _is_faster(operation: str, device: torch.device, dtype: torch.dtype) -> bool:
    tokens, columns = (_SIZE // _WORDS, _WORDS * _SIZE) if operation == "softmax_rows" else (_SIZE, _SIZE)
    calls = proof.contenders(operation, device, tokens, (columns, _SIZE), dtype)
    times = interleaved(calls, repeats=_REPEATS, device=device)
    return "torch" not in times or times["triton"]["time_ms"] < _FASTER * times["torch"]["time_ms"]


def _fastest_tiles(dtype: torch.dtype, device: torch.device, size: int) -> dict[str, int]:
    """The fastest of the tiles that this GPU has room for, for both layouts."""
    a = torch.ones(size, size, device=device).to(dtype)
    scale, out = torch.ones(size, device=device), torch.empty(size, size, device=device, dtype=torch.bfloat16)
    found = {}
    for b in (a, plain.column_major(a)):
        calls: dict[str, Callable[[], object]] = {
            str(number): functools.partial(product.scaled_product, a, b, scale, scale, out, tiles=tiles)
            for number, tiles in enumerate(product.TILES)
            if number
        }
        times = interleaved(calls, repeats=_REPEATS, device=device)
        best = min(times, key=lambda name: times[name]["time_ms"])
        found[product.kind(dtype, depth_first=b.stride(0) == 1)] = int(best)
    return found


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
