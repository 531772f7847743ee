"""Kernels that are wrong or slower are not used. One that ends its process costs that process alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from celora.kernels import floats
from celora.kernels.triton import judge as judging
from celora.kernels.triton import judged, proof
from celora.kernels.triton.judge import Finding, judge
from triton_here import DEVICE, needs_triton, quiet

__all__ = ["quiet"]
GPU = torch.device("cuda", 0)
FASTER, SLOWER = {"triton": 1.0, "torch": 2.0}, {"triton": 2.0, "torch": 2.0}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU in name only: its tensors are on the CPU."""
    kept: list[judged.Verdict] = []
    monkeypatch.setattr(judged, "verdict", lambda device: kept[-1] if kept else None)
    monkeypatch.setattr(judged, "remember", lambda device, found, *, lasting=True: kept.append(found))
    monkeypatch.setattr(judged, "forget", lambda device: kept.clear())
    monkeypatch.setattr(judged, "cannot_run", lambda device: "")
    monkeypatch.setattr(floats, "has_floats", lambda device: False)
    monkeypatch.setattr(proof, "contenders", lambda *_: {"triton": int, "torch": int})
    monkeypatch.setattr(proof, "wrong", lambda *_, **__: "")
    monkeypatch.setattr(judging, "_fastest_tiles", lambda dtype, device, size: {"int8, depth first": 2})
    return monkeypatch


def timed(card: pytest.MonkeyPatch, *rounds: Mapping[str, float]) -> None:
    times = iter(rounds)
    card.setattr(judging, "interleaved", lambda *_, **__: {name: {"time_ms": ms} for name, ms in next(times).items()})


@pytest.mark.parametrize(
    ("rounds", "faster"),
    [
        ([FASTER] * 3, True),
        ([SLOWER], False),
        ([FASTER, SLOWER], False),  # in bfloat16 alone
        ([{"triton": 1.0}] * 3, True),  # torch cannot compute it here
    ],
)
def test_what_is_right_must_be_faster_in_every_dtype(
    rounds: list[Mapping[str, float]], faster: bool, card: pytest.MonkeyPatch
) -> None:
    timed(card, *rounds)
    assert judging.find("column_maxima", GPU) == Finding("column_maxima", faster=faster)
    assert judged.verdict(GPU) is None


def test_products_are_timed_with_their_fastest_tiles(card: pytest.MonkeyPatch) -> None:
    seen: list[judged.Verdict | None] = []
    card.setattr(proof, "contenders", lambda *_: seen.append(judged.verdict(GPU)) or {"triton": int, "torch": int})
    timed(card, *[FASTER] * 3)
    tiles = {"int8, depth first": 2}
    assert judging.find("pack_weight", GPU) == Finding("pack_weight", faster=True, tiles=tiles)
    assert [verdict.tiles for verdict in seen if verdict] == [tiles] * 3


def refuses() -> str:
    raise RuntimeError("out of resource\nmore")


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        (lambda: "was off", "was off"),
        (refuses, "failed: RuntimeError: out of resource"),
    ],
)
def test_what_is_wrong_is_not_timed(fails: Callable[[], str], said: str, card: pytest.MonkeyPatch) -> None:
    card.setattr(proof, "wrong", lambda *_, **__: fails())
    timed(card)
    assert judging.find("softmax_rows", GPU) == Finding("softmax_rows", said)


def test_too_little_memory_is_no_finding(card: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    card.setattr(judging, "interleaved", full)
    with pytest.raises(torch.OutOfMemoryError):
        judging.find("pack_weight", GPU)
    assert judged.verdict(GPU) is None  # what it was timed with
    card.setattr(proof, "wrong", full)
    with pytest.raises(torch.OutOfMemoryError):
        judging.find("column_maxima", GPU)


@needs_triton
def test_the_fastest_tiles_are_chosen_for_each_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(calls: Mapping[str, Callable[[], object]], **_: object) -> dict[str, dict[str, float]]:
        for call in calls.values():
            call()
        return {name: {"time_ms": abs(int(name) - 4)} for name in calls}

    monkeypatch.setattr(judging, "interleaved", interleaved)
    found = judging._fastest_tiles(torch.int8, DEVICE, 32)
    assert found == {"int8, columns first": 4, "int8, depth first": 4}


def test_there_is_nothing_to_judge_on_a_cpu() -> None:
    assert judge(torch.device("cpu")) == judged.Verdict()


OTHER = """
import json, os, sys, time
print(json.dumps({"operation": ""}), flush=True)
for operation in sys.argv[2:]:
    HERE
    print(json.dumps({"operation": operation, "faster": True, "tiles": {operation: 1}}), flush=True)
"""


@pytest.fixture
def other(card: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], None]:
    """The process that tries the kernels runs this code before it finds an operation right and faster."""

    def runs(code: str, module: str = OTHER) -> None:
        (tmp_path / "other_process.py").write_text(module.replace("HERE", code))
        card.syspath_prepend(tmp_path)  # in this process only: the other must get it from here
        card.setattr(judging, "__name__", "other_process")

    card.setattr(proof, "OPERATIONS", ("first", "second", "third"))
    return runs  # type: ignore[return-value]


ENDS = {
    "by itself": (
        """if operation == "second": print(json.dumps({"operation": operation, "wrong": "was off"})); sys.exit()""",
        "was off",
    ),
    "by an error": (
        """if operation == "second": sys.exit("CUDA error: an illegal memory access")""",
        "ended its process: CUDA error: an illegal memory access",
    ),
    "by a fault": ("""if operation == "second": os.kill(os.getpid(), 11)""", "ended its process: status -11"),
    "after a line": (
        """if operation == "second":
        print(json.dumps({"operation": operation, "wrong": "was off"}), flush=True)
        os.kill(os.getpid(), 6)""",
        "was off",
    ),
    "without a word": ("""if operation == "second": sys.exit()""", "ended its process: status 0"),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_process_that_ends_costs_one_kernel(how: str, other: Callable[[str], None], card: pytest.MonkeyPatch) -> None:
    code, said = ENDS[how]
    other(code)
    tried: list[str] = []
    found = judge(GPU, tried.append)
    assert found == judged.Verdict(frozenset({"first", "third"}), {"first": 1, "third": 1}, {"second": said})
    assert tried == ["first", "second", "third"]
    card.setattr(judging, "__name__", "gone")
    assert judge(GPU) is found  # not measured again


def test_a_kernel_that_does_not_end(other: Callable[[str], None], card: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    class Waiting(threading.Thread):
        """A timer that has waited long enough when the other process is at its kernel."""

        def __init__(self, seconds: float, ends: Callable[[], None]) -> None:
            super().__init__(daemon=True)
            self.ends, self.over = ends, False

        def run(self) -> None:
            while not self.over and not begun.exists():
                time.sleep(0.01)
            if not self.over:
                begun.unlink()
                self.ends()

        def cancel(self) -> None:
            self.over = True

    card.setattr(threading, "Timer", Waiting)
    other(f"""if operation == "first": open({str(begun)!r}, "w").close(); time.sleep(600)""")
    found = judge(GPU)
    assert found.wrong == {"first": "had not ended after 10 minutes"}
    assert found.operations == {"second", "third"}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("""if operation == "second": print("no room", file=sys.stderr); sys.exit(77)""", "no room"),
        ("""if operation == "second": os.kill(os.getpid(), 15)""", "status -15"),
        ("""if operation == "second": os.kill(os.getpid(), 9)""", "status -9"),  # as the system does without memory
    ],
)
def test_what_no_kernel_did_leaves_no_lasting_verdict(
    code: str, said: str, other: Callable[[str], None], card: pytest.MonkeyPatch
) -> None:
    other(code)
    kept: list[tuple[judged.Verdict, bool]] = []
    card.setattr(judged, "remember", lambda device, found, *, lasting=True: kept.append((found, lasting)))
    with pytest.warns(UserWarning, match=f"not tried on cuda:0: {said}; torch's are used"):
        assert judge(GPU) == judged.Verdict()
    assert kept == [(judged.Verdict(), False)]  # of this process alone


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (lambda patch: patch.setattr(sys, "executable", ""), "does not know its own program"),
        (lambda patch: patch.setattr(sys, "executable", "/nowhere/python"), "No such file"),
    ],
)
def test_no_process_can_be_started(
    breaks: Callable[[pytest.MonkeyPatch], None], said: str, other: Callable[[str], None], card: pytest.MonkeyPatch
) -> None:
    other("")
    with card.context() as patch:
        breaks(patch)
        with pytest.warns(UserWarning, match=said):
            assert judge(GPU) == judged.Verdict()


def test_a_process_that_does_not_reach_the_gpu(other: Callable[[str, str], None]) -> None:
    other("", "raise SystemExit('all devices are busy')")
    with pytest.warns(UserWarning, match="not tried on cuda:0: all devices are busy; torch's are used"):
        assert judge(GPU) == judged.Verdict()


def test_what_others_print_is_no_finding(other: Callable[[str, str], None]) -> None:
    other("", f"print('hello', flush=True)\n{OTHER.replace('HERE', '')}")
    assert judge(GPU).operations == {"first", "second", "third"}


def run(code: str, *given: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import os, sys, torch\nfrom celora.kernels.triton import judge\n{code}\nsys.exit(judge._main(*sys.argv[1:]))"
    )
    read, write = os.pipe()  # the input of one whose starter is there
    try:
        command = [sys.executable, "-c", code, *given]
        return subprocess.run(command, stdin=read, capture_output=True, text=True, check=False)
    finally:
        os.close(read)
        os.close(write)


FOUND = """
torch.empty = lambda *_, **__: None
def find(operation, device):
    os.write(1, b"what a compiler prints\\n")
    if operation == "full":
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return judge.Finding(operation, "was off" if operation == "wrong" else "", True, {"int8": 2})
judge.find = find
"""


def test_the_other_process_gives_a_line_for_each_operation_up_to_one_that_fails() -> None:
    done = run(FOUND, "0", "right", "wrong", "right")
    assert [Finding(**json.loads(line)) for line in done.stdout.splitlines()] == [
        Finding(""),
        Finding("right", "", True, {"int8": 2}),
        Finding("wrong", "was off", True, {"int8": 2}),
    ]
    assert done.stderr.count("what a compiler prints") == 2
    assert done.returncode == 0


def test_the_other_process_says_that_it_had_no_memory() -> None:
    done = run(FOUND, "0", "full", "right")
    assert (done.returncode, len(done.stdout.splitlines())) == (judging._NO_MEMORY, 1)
    assert done.stderr.splitlines()[-1] == "OutOfMemoryError: CUDA out of memory."


def test_the_other_process_says_that_there_is_no_such_gpu() -> None:
    done = run("", "99", "right")
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()[-1]) > 10


def test_the_other_process_ends_with_the_one_that_started_it() -> None:
    hangs = FOUND.replace("    if operation == ", "    import time; time.sleep(600)\n    if operation == ")
    code = f"import os, sys, torch\nfrom celora.kernels.triton import judge\n{hangs}\njudge._main('0', 'right')"
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline()  # it is at work
        process.stdin.close()  # as when the other one is gone
        assert process.wait() == 1
