"""`benchmarks/gpu.py` without a GPU: it says so, stops at what is wrong, and writes whole rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu
from celora.kernels import floats
from celora.kernels.triton import judged, proof
from celora.modeling import varlen
from celora.studies.bench import not_runnable
from celora.studies.step import ARMS
from patching import patch_all
from without import without

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.check(CPU)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "Triton's kernels need an NVIDIA GPU, not cpu; run this where there is one.\n"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(judged, "cannot_run", lambda device: "")
    monkeypatch.setattr(floats, "has_floats", lambda device: False)
    return monkeypatch


def test_the_first_kernel_that_is_wrong_stops_it(card: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    card.setattr(proof, "wrong_somewhere", lambda operation, device: "was off" if operation == "softmax_rows" else "")
    with pytest.raises(SystemExit) as ended:
        gpu.check(CPU)
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.err == "softmax_rows was off\n"
    assert said.out.splitlines()[-1] == "right: column_maxima"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_one_call_is_compared(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.wrong_attention(CPU, dtype) == ""

    def twice(module: object, query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
        return scaled_dot_product_attention(query, key, 2 * value, is_causal=True, enable_gqa=True).transpose(1, 2)

    monkeypatch.setattr(varlen, "attend", twice)
    without(monkeypatch, "c")  # on the CPU, our own kernel would compute it
    patch_all(monkeypatch, "celora.modeling.attention:_SHORT", 0)
    assert gpu.wrong_attention(CPU, dtype).startswith("output has an error of ")


def test_kernels_take_turns_with_torch_and_products_with_bfloat16(card: pytest.MonkeyPatch) -> None:
    def interleaved(calls: Mapping[str, Callable[[], object]], **_: object) -> dict[str, dict[str, float]]:
        return {name: {"time_ms": 1.0} for name in calls}

    card.setattr(gpu, "interleaved", interleaved)
    card.setattr(proof, "contenders", lambda operation, device, size: {"triton": int, "torch": int})
    found = gpu.time_kernels(CPU, (32,))
    assert [row["operation"] for row in found] == [name for name in proof.OPERATIONS if name != "pack_floats"]
    for row in found:
        assert ("bfloat16" in row["times"]) == row["operation"].startswith("pack")
        assert {"commit", "cpu", "torch", "threads"} <= row.keys()


def test_waits_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[object] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert gpu.waits(call) == 1
    assert modes == ["warn", 0]


def test_its_arms_and_cells_are_those_of_the_bench() -> None:
    assert set(gpu.ARMS) | set(gpu.WATCHED) <= ARMS.keys()
    assert "needs a CUDA device" in {not_runnable(arm) for arm in gpu.ARMS} or torch.cuda.is_available()
    assert len({(cell.model, cell.data) for cell in gpu.CELLS}) == 6
