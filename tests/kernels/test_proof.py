"""The proof finds what is wrong. Kernels that are wrong or slower are not used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from celora.kernels import floats, plain
from celora.kernels.triton import judged, launches, product, proof
from triton_here import DEVICE, needs_triton, quiet

__all__ = ["quiet"]
PLAIN = {name: getattr(plain, name) for name in ("squared_row_norms", "squared_column_norms", "column_maxima")}


@pytest.fixture
def as_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Kernels that compute with torch, so Triton is not needed."""
    for name, run in (*PLAIN.items(), ("softmax_rows", plain.softmax_rows)):
        monkeypatch.setattr(launches, name, run)
    return monkeypatch


def wrong(operation: str, *, finite: bool = True) -> str:
    return proof.wrong(operation, 9, 20, torch.float32, torch.device("cpu"), finite=finite)


@pytest.mark.usefixtures("as_torch")
@pytest.mark.parametrize("operation", [*PLAIN, "softmax_rows"])
@pytest.mark.parametrize("finite", [True, False])
def test_what_is_right_is_found_right(operation: str, finite: bool) -> None:
    assert wrong(operation, finite=finite) == ""


@pytest.mark.parametrize("operation", PLAIN)
def test_what_is_off_is_found(operation: str, as_torch: pytest.MonkeyPatch) -> None:
    as_torch.setattr(launches, operation, lambda x: PLAIN[operation](x) * 1.0001)
    assert wrong(operation)
    as_torch.setattr(launches, operation, lambda x: PLAIN[operation](x.nan_to_num(0, 0, 0)))
    assert not wrong(operation)
    assert wrong(operation, finite=False)


def test_a_softmax_that_is_off_is_found(as_torch: pytest.MonkeyPatch) -> None:
    def off(z: Tensor, targets: Tensor, **asked: object) -> None:
        plain.softmax_rows(z, targets, **asked)  # type: ignore[arg-type]
        z[3, 2] += 0.01

    as_torch.setattr(launches, "softmax_rows", off)
    assert "gradient" in wrong("softmax_rows")


@needs_triton
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out, index: out[1].fill_(0), "not asked for"),
        (lambda out, index: out[0].mul_(1.001), "was off by"),
    ],
)
def test_a_product_that_is_off_is_found(
    change: Callable[[Tensor, Tensor], object], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = product.scaled_product

    def off(*operands: Tensor, index: Tensor, **others: object) -> Tensor:
        out = right(*operands, index=index, **others)  # type: ignore[arg-type]
        change(out, index)
        return out

    monkeypatch.setattr(product, "scaled_product", off)
    assert said in proof.wrong("pack_weight", 9, 32, torch.float32, DEVICE, finite=True)


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU in name only: its tensors are on the CPU."""
    kept: list[judged.Verdict] = []
    monkeypatch.setattr(judged, "verdict", lambda device: kept[-1] if kept else None)
    monkeypatch.setattr(judged, "remember", lambda device, found, *, lasting=True: kept.append(found))
    monkeypatch.setattr(judged, "forget", lambda device: kept.clear())
    monkeypatch.setattr(judged, "cannot_run", lambda device: "")
    monkeypatch.setattr(floats, "has_floats", lambda device: False)
    monkeypatch.setattr(proof, "contenders", lambda *_: {"triton": int, "torch": int})
    monkeypatch.setattr(proof, "_fastest_tiles", lambda dtype, device, size: {"int8, depth first": 2})
    return monkeypatch


def test_what_is_right_and_faster_is_used(card: pytest.MonkeyPatch) -> None:
    times = iter([{"triton": 1.0, "torch": 2.0}, {"triton": 2.0, "torch": 2.0}, *[{"triton": 1.0, "torch": 2.0}] * 9])

    def interleaved(calls: Mapping[str, object], **_: object) -> dict[str, dict[str, float]]:
        return {name: {"time_ms": time} for name, time in next(times).items()}

    def said(operation: str, *_: object, **__: object) -> str:
        if operation == "softmax_rows":
            return "was off"
        if operation == "pack_weight":
            raise RuntimeError("out of resource: shared memory\nmore")
        return ""

    card.setattr(proof, "interleaved", interleaved)
    card.setattr(proof, "wrong", said)
    found = proof.judge(torch.device("cuda"))
    assert found.operations == {"quantise_rows", "squared_column_norms", "column_maxima", "pack_both_ways"}
    assert found.wrong == {
        "softmax_rows": "was off",
        "pack_weight": "failed: RuntimeError: out of resource: shared memory",
    }
    assert found.tiles == {"int8, depth first": 2}
    assert proof.judge(torch.device("cuda")) is found  # not measured again


@pytest.mark.parametrize("where", ["wrong", "interleaved"])
def test_what_ends_a_judgement_leaves_no_verdict(where: str, card: pytest.MonkeyPatch) -> None:
    """What had no memory may be right, and what was found before it is not all."""

    def full(*_: object, **__: object) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    card.setattr(proof, "wrong", lambda *_, **__: "")
    card.setattr(proof, "interleaved", lambda *_, **__: {"triton": {"time_ms": 1.0}, "torch": {"time_ms": 2.0}})
    with card.context() as patch:
        patch.setattr(proof, "OPERATIONS", ("pack_weight",) if where == "interleaved" else ("column_maxima",))
        patch.setattr(proof, where, full)
        with pytest.raises(torch.OutOfMemoryError):
            proof.judge(torch.device("cuda"))
    assert judged.verdict(torch.device("cuda")) is None
    assert "pack_weight" in proof.judge(torch.device("cuda")).operations


def test_there_is_nothing_to_judge_on_a_cpu() -> None:
    assert proof.judge(torch.device("cpu")) == judged.Verdict()


@needs_triton
@pytest.mark.parametrize("operation", proof.OPERATIONS)
def test_both_contenders_of_an_operation_run(operation: str) -> None:
    calls = proof.contenders(operation, DEVICE, 32, (32, 48))
    assert list(calls) == ["triton", "torch"]
    for call in calls.values():
        call()


@needs_triton
def test_the_fastest_tiles_are_chosen_for_each_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def interleaved(calls: Mapping[str, Callable[[], object]], **_: object) -> dict[str, dict[str, float]]:
        for call in calls.values():
            call()
        return {name: {"time_ms": abs(int(name) - 4)} for name in calls}

    monkeypatch.setattr(proof, "interleaved", interleaved)
    found = proof._fastest_tiles(torch.int8, DEVICE, 32)
    assert found == {"int8, columns first": 4, "int8, depth first": 4}
