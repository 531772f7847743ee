"""`benchmarks/gpu.py` without a GPU: it says so, stops at what is wrong, and writes whole rows and tables."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import celora
import forked
from benchmarks import gpu, rows
from benchmarks.kernels import gpu as kernels
from benchmarks.kernels.roofline import MODELS, Llama
from benchmarks.kernels.tables import gpu_kernels
from benchmarks.steps import gpu as steps
from benchmarks.steps.tables import gpu_steps, gpu_waits
from celora.kernels import backends, floats
from celora.kernels.triton import judged, proof
from celora.modeling import varlen
from celora.studies.cells import Cell
from celora.studies.step import ARMS
from without import without

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[2]
SMALL = Cell("h64-v1k", "instruct", "float32", 64)
TINY = {"tiny": Llama(32, 64, blocks=1, heads=1, words=96)}
# transformers 5.24 has renamed it; TRL and the versions that celora supports have the old name.
CHECKPOINTING = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
# What an image for GPUs need not have: the application, and celora as an installed package.
ALONE = """
import runpy, sys
from importlib import metadata
for name in ("trl", "datasets", "gguf", "plotly", "dill"):
    sys.modules[name] = None
found = metadata.version
def version(name):
    if name == "celora":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.version = version
sys.argv[:] = [{path!r}]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_starts_as_a_file_without_the_application_and_says_that_there_is_no_gpu() -> None:
    if torch.cuda.is_available():
        return
    done = forked.run(forked.code, ALONE.format(path=str(ROOT / "benchmarks" / "gpu.py")))
    assert done.returncode == 2, done.stderr
    assert done.stderr.endswith("need an NVIDIA GPU, and torch finds none; run this where there is one.\n")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(judged, "cannot_run", lambda device: "")
    monkeypatch.setattr(floats, "has_floats", lambda device: False)
    monkeypatch.setattr(kernels, "processes", lambda number: nullcontext(map))
    return monkeypatch


def test_a_kernel_that_is_wrong_is_found_against_torch_alone(
    card: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: set[tuple[str, str | None]] = set()

    def wrong_somewhere(operation: str, device: torch.device, dtypes: tuple[torch.dtype]) -> str:
        asked.add((operation, backends.chosen(torch.float32, device)["quantise_rows"]))
        return "was off" if (operation, dtypes) == ("softmax_rows", (torch.float16,)) else ""

    card.setattr(kernels, "wrong_attention", lambda device, dtype: "")
    card.setattr(proof, "wrong_somewhere", wrong_somewhere)
    assert kernels.check(CPU) is False
    assert asked == {(name, "torch") for name in proof.OPERATIONS if name != "pack_floats"}
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if not line.startswith("right: ")] == ["WRONG: softmax_rows torch.float16 was off"]
    assert len(said) == 3 * len(proof.OPERATIONS)  # attention takes the place of 8-bit floats
    card.setattr(proof, "wrong_somewhere", lambda *_: "")
    assert kernels.check(CPU) is True
    capsys.readouterr()
    card.setattr(kernels, "wrong_attention", _break)
    assert kernels.check(CPU) is False
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"WRONG: {kernels.ATTENTION} torch.float32 failed: RuntimeError: no such kernel"


@pytest.mark.parametrize("alone", [True, False])
def test_what_ran_out_of_memory_beside_others_is_tried_alone(
    card: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], alone: bool
) -> None:
    """If it runs out alone as well, it is not called wrong; yet nothing showed that it is right."""
    beside: list[int] = []

    @contextmanager
    def processes(number: int) -> Iterator[Callable[..., Iterable[Any]]]:
        beside.append(number)
        yield map

    def wrong_attention(device: torch.device, dtype: torch.dtype) -> str:
        return _refuse() if dtype == torch.float16 and (beside[-1] > 1 or not alone) else ""

    card.setattr(kernels, "processes", processes)
    card.setattr(kernels, "at_once", lambda device: 4)
    card.setattr(kernels, "wrong_attention", wrong_attention)
    card.setattr(proof, "wrong_somewhere", lambda *_: "")
    assert kernels.check(CPU) is alone
    assert beside == [4, 1]
    said = f"{kernels.ATTENTION} torch.float16"
    last = f"right: {said}" if alone else f"out of memory: {said} it could not be compared"
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_as_many_kernels_are_compared_at_once_as_the_gpu_has_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for free, number in ((None, 8), (80 << 30, 8), (9 << 30, 4), (1 << 20, 1)):
        monkeypatch.setattr(kernels, "available_memory", lambda device, free=free: free)
        assert kernels.at_once(CPU) == number


def test_a_wrong_kernel_ends_it_before_anything_is_measured(card: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    card.setattr(kernels, "check", lambda device: False)
    card.setattr(kernels, "time_kernels", lambda device, deadline: called.append("kernels") or [])
    card.setattr(gpu, "judge", lambda device: None)
    card.setattr(steps, "measure", lambda arms, deadline: called.append(" ".join(arms)))
    card.setattr(gpu, "write_tables", lambda: called.append("tables"))
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 1
    assert called == []
    gpu.main(["--arms", "exact"])
    assert called == ["TRL + PEFT limit of exact exact", "tables"]


def test_what_could_not_run_is_printed(
    card: pytest.MonkeyPatch, timed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card.setattr(kernels, "check", lambda device: True)
    card.setattr(
        kernels, "time_kernels", lambda device, deadline: [{"model": "1B", "operation": "pack_floats", "not_run": "no"}]
    )
    card.setattr(gpu, "judge", lambda device: None)
    card.setattr(steps, "measure", lambda arms, deadline: None)
    card.setattr(gpu, "write_tables", lambda: None)
    gpu.main([])
    assert "1B pack_floats: no\n" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_one_call_is_compared(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.wrong_attention(CPU, dtype) == ""

    def twice(module: object, query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        return scaled_dot_product_attention(query, key, 2 * value, is_causal=True, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(varlen, "attend", twice)
    without(monkeypatch, "c")  # on the CPU, our own kernel would compute it
    assert kernels.wrong_attention(CPU, dtype).startswith("output has an error of ")


@pytest.fixture
def timed(card: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Kernels are called once, and take 1 ms. Gives the path of their rows."""

    def interleaved(calls: Mapping[str, Callable[[], object]], **_: object) -> dict[str, dict[str, float]]:
        for call in calls.values():
            call()
        return {name: {"time_ms": 1.0} for name in calls}

    card.setattr(kernels, "interleaved", interleaved)
    card.setattr(proof, "contenders", lambda *_: {"triton": int, "torch": int})
    card.setattr(judged, "verdict", lambda device: judged.Verdict(frozenset({"pack_weight"})))
    card.setattr(kernels, "ROWS", tmp_path / "kernels.jsonl")
    return tmp_path / "kernels.jsonl"


def test_kernels_take_turns_with_torch_and_products_with_bfloat16(timed: Path) -> None:
    assert gpu_kernels() == rows.NOT_YET
    found = list(kernels.time_kernels(CPU, TINY, tokens=8))
    rows.replace(timed, found, ("operation", "model"))
    assert [row["operation"] for row in found] == [name for name in proof.OPERATIONS if name != "pack_floats"]
    for row in found:
        assert ("bfloat16" in row["times"]) == row["operation"].startswith("pack")
        assert row["used"] == (row["operation"] == "pack_weight")
        assert (row["out"], row["in"]) == (96 if row["operation"] == "softmax_rows" else 64, 32)
        assert {"commit", "cpu", "torch", "threads"} <= row.keys()
    assert "| tiny | pack_weight | 1,000 | 1,000 | 1,000 | yes |" in gpu_kernels()
    assert "| tiny | column_maxima | 1,000 | 1,000 |  | no |" in gpu_kernels()


def test_a_kernel_that_cannot_run_costs_no_other_its_row(timed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def contenders(operation: str, *_: object) -> dict[str, Callable[[], object]]:
        return {"triton": _refuse if operation == "quantise_rows" else int}

    monkeypatch.setattr(proof, "contenders", contenders)
    found = list(kernels.time_kernels(CPU, {"tiny": Llama(32, 64, blocks=1, heads=1, words=96)}, tokens=8))
    rows.replace(timed, found, ("operation", "model"))
    refused = [row for row in found if "times" not in row]
    assert [(row["operation"], row["not_run"]) for row in refused] == [
        ("quantise_rows", "RuntimeError: CUDA out of memory.")
    ]
    assert len(found) == len(proof.OPERATIONS) - 1
    assert "| tiny | quantise_rows | not run: RuntimeError: CUDA out of memory. |" in gpu_kernels()
    assert "| tiny | pack_weight | 1,000 |  | 1,000 | yes |" in gpu_kernels()


@pytest.mark.parametrize(("operation", "products"), [("pack_weight", [(4, 6)]), ("pack_both_ways", [(8, 10), (4, 6)])])
def test_bfloat16_multiplies_as_many_rows(
    operation: str, products: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, usual = [], Tensor.__matmul__

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        found = usual(a, b)
        seen.append(tuple(found.shape))
        return found

    monkeypatch.setattr(Tensor, "__matmul__", multiply)
    kernels._in_bfloat16(operation, CPU, 8, (10, 6))()
    assert seen == products


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(steps, "ROWS", tmp_path / "steps.jsonl")
    monkeypatch.setattr(steps, "REPEATS", 2)
    return tmp_path / "steps.jsonl"


@CHECKPOINTING
def test_every_arm_has_a_row_of_its_own(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fails costs no other's, and a second run replaces rows."""
    monkeypatch.setattr(celora, "quantise_base", _refuse)
    assert gpu_steps() == gpu_waits() == rows.NOT_YET
    for arms in (("exact", steps.INT8, "Unsloth", steps.LIGER, steps.AGAIN), ("exact",)):
        steps.measure(arms, time.monotonic() + 1000, (SMALL,))
    found = {row["arm"]: row for row in rows.read(measured)}
    assert len(rows.read(measured)) == len(found) == 5
    assert {arm: row["not_run"] for arm, row in found.items() if "not_run" in row} == {
        steps.LIGER: "needs a CUDA device",
        "Unsloth": "needs a CUDA device",
        steps.INT8: "RuntimeError: CUDA out of memory.",
    }
    for row in (row for row in found.values() if "not_run" not in row):
        assert row["forward_ms"] + row["backward_ms"] + row["optimizer_ms"] == pytest.approx(row["time_ms"], rel=0.5)
        assert row["peak_memory"] > 0
        assert row["by"]["softmax_rows"] in ("c", "torch")


def test_without_trl_every_row_says_so(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.importlib.util, "find_spec", lambda name: None)
    steps.measure((steps.BASE, "plan"), time.monotonic() + 1000, (SMALL,))
    assert [row["not_run"] for row in rows.read(measured)] == ["trl is not installed"] * 2


def _refuse(*_: object) -> NoReturn:
    raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB")


def _break(*_: object) -> NoReturn:
    raise RuntimeError("no such kernel\nof this name")


def test_what_there_is_no_time_for_is_named(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order: the baseline with Liger is first."""
    steps.measure(("plan", steps.INT8, steps.LIGER), time.monotonic() - 1, (SMALL,))
    assert capsys.readouterr().out.splitlines() == [
        "left out, for want of time: TRL + PEFT + Liger of h64-v1k instruct, fast, int8 base of h64-v1k instruct, plan "
        "of h64-v1k instruct; `python benchmarks/gpu.py --minutes 60 --arms 'fast, int8 base' 'TRL + PEFT + Liger' "
        "plan` measures these arms"
    ]
    assert not measured.exists()


def test_kernels_that_there_is_no_time_for_are_named(
    timed: Path, card: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0])  # there is time for the first one
    card.setattr(kernels, "time", SimpleNamespace(monotonic=lambda: next(times, 2.0)))
    found = list(kernels.time_kernels(CPU, TINY, tokens=8, deadline=1.0))
    first, *others = kernels.operations(CPU)
    assert [row["operation"] for row in found] == [first]
    names = ", ".join(f"{name} of tiny" for name in others)
    assert capsys.readouterr().out == (f"left out, for want of time: {names}; `--minutes 60` measures these kernels\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process must have the patch")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_plan_that_is_not_made_in_time_ends_at_the_deadline(
    measured: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its temporary folder goes with it. The row of the cell before is there, and other arms are measured."""
    other = Cell("h64-v1k", "full", "float32", 64)

    def steps_of(cell: Cell, arm: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            time.sleep(600 if cell == other else 0)
        return {"time_ms": 1.0, "peak_memory": 1}

    monkeypatch.setattr(steps, "steps_of", steps_of)
    monkeypatch.setattr(steps, "PROCESSES", multiprocessing.get_context("fork"))
    begun = time.monotonic()
    steps.measure(("plan",), begun + 3, (SMALL, other))
    assert 3 <= time.monotonic() - begun < 3 + steps._PATIENCE_S
    assert [(row["arm"], row["data"]) for row in rows.read(measured)] == [("plan", "instruct")]
    assert "left out, for want of time: plan of h64-v1k full; `python" in capfd.readouterr().out
    assert list(tmp_path.iterdir()) == [measured]


def test_tables_are_ratios_of_rows(measured: Path) -> None:
    row: dict[str, Any] = {"model": "llama-1b", "data": "full", "dtype": "bfloat16", "tokens": 2048}
    row |= {"device": "NVIDIA H100", "torch": "2.11.0", "commit": "abc", "tokens_per_second": 9.0}
    row |= {"trl": "1.16.0", "peft": "0.21.2", "transformers": "5.24.0"}
    for arm, time_ms, peak, waits in ((steps.BASE, 40.0, 4, 9), ("limit of exact", 20.0, 2, 1), ("fast", 25.0, 3, 1)):
        of = {"time_ms": time_ms, "p20_ms": time_ms, "p80_ms": time_ms, "peak_memory": peak << 30, "waits": waits}
        rows.append(measured, row | {"arm": arm} | of)
    rows.append(measured, row | {"arm": steps.LIGER, "not_run": "liger_kernel is not installed"})
    rows.append(measured, row | {"arm": steps.BASE, "commit": "other", "not_run": "no"})
    table, other = gpu_steps().split("\n\n| model")
    assert "| llama-1b | full | fast | 25.0 | 25.0 to 25.0 | 9 | 1.60 |  | 75% | 3.0 | 0.75 |" in table
    assert "| llama-1b | full | TRL + PEFT + Liger | not run: liger_kernel is not installed |" in table
    assert "NVIDIA H100, torch 2.11.0, commit abc, trl 1.16.0, peft 0.21.2, transformers 5.24.0." in table
    assert "1.60" not in other
    assert "| fast | 1 |" in gpu_waits()


def test_an_arm_measured_at_a_later_commit_has_a_table_with_its_own_baseline(
    measured: Path, card: pytest.MonkeyPatch
) -> None:
    """The table of the first commit keeps its baseline."""
    speed = {steps.BASE: 40.0, "limit of exact": 20.0, "fast": 30.0, "plan": 25.0}
    number = ("time_ms", "p20_ms", "p80_ms", "tokens_per_second", "peak_memory")
    card.setattr(steps, "steps_of", lambda cell, arm: dict.fromkeys(number, speed[arm]) | {"waits": 1})
    card.setattr(steps.measure, "__defaults__", ((SMALL,),))
    card.setattr(kernels, "check", lambda device: True)
    card.setattr(gpu, "judge", lambda device: None)
    card.setattr(gpu, "write_tables", lambda: None)
    card.setattr(steps, "ALONE", ())
    card.setenv("CELORA_COMMIT", "first")
    steps.measure((*steps.COMPARED, "fast"), time.monotonic() + 1000)
    card.setenv("CELORA_COMMIT", "second")
    gpu.main(["--arms", "plan"])
    first, second = gpu_steps().split("\n\n| model")
    assert "| fast | 30.0 | 30.0 to 30.0 | 30 | 1.33 |  | 50% |" in first
    assert "| plan | 25.0 | 25.0 to 25.0 | 25 | 1.60 |  | 75% |" in second
    assert "commit first," in first
    assert "commit second," in second


def test_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert steps.waits(call) == 1
    assert modes == ["warn", 0]


def test_its_arms_and_cells_are_those_of_the_bench() -> None:
    assert set(steps.ARMS) - ARMS.keys() == {steps.BASE, steps.LIGER, steps.INT8, steps.GRAPHS, steps.AGAIN}
    assert [(cell.model, cell.data) for cell in steps.CELLS] == [
        (f"llama-{size.lower()}", data) for size in reversed(MODELS) for data in ("full", "instruct")
    ]
