"""No GPU uses a Triton kernel before it was found right and faster there. Nothing imports Triton before that."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from celora.kernels import plain
from celora.kernels.backends import TABLE, explain
from celora.kernels.triton import judged, proof
from celora.kernels.triton.judge import judge
from celora.kernels.triton.judged import Verdict

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Pretend a machine with an A100, Triton and an empty cache, as far as celora asks."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(judged, "device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(plain, "wrong_integers", lambda device: "")
    monkeypatch.setattr(judged.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(judged, "_OF_THIS_PROCESS", {})
    judged.verdict.cache_clear()
    yield monkeypatch
    judged.verdict.cache_clear()


def test_the_kernels_are_in_the_table_of_every_operation() -> None:
    assert {name for name, backends in TABLE.items() if "triton" in [b.name for b in backends]} == {
        *proof.OPERATIONS,
        "capped_softmax_rows",
        "hold_both_ways",  # judged with pack_both_ways: only where the bytes come from differs
    }


@pytest.mark.usefixtures("card")
def test_without_a_plan_a_gpu_uses_none_of_them() -> None:
    assert not judged.planned_on(GPU)
    assert judged.planned_on(CPU)
    assert not any(judged.takes(operation)(GPU) for operation in proof.OPERATIONS)
    said = "torch's integer product: Triton's kernels were not timed on this GPU, which python -m benchmarks.gpu does"
    assert explain("pack_weight", GPU) == said


@pytest.mark.usefixtures("card")
def test_what_was_right_and_faster_is_used_in_later_processes_too() -> None:
    wrong = {"softmax_rows": "was off by 1.0e+00 of the largest number (gradient)"}
    judged.remember(GPU, Verdict(frozenset({"pack_weight"}), {"int8, depth first": 4}, wrong))
    judged._OF_THIS_PROCESS.clear()  # as in a new process
    judged.verdict.cache_clear()
    assert judged.planned_on(GPU)
    found = judged.verdict(GPU)
    assert found is not None
    assert (found.tiles, found.wrong) == ({"int8, depth first": 4}, wrong)
    assert judged.takes("pack_weight")(GPU)
    assert not judged.takes("pack_both_ways")(GPU)
    assert not judged.takes("pack_weight")(CPU)
    assert explain("pack_weight", GPU) == "celora's own kernel, in Triton"
    assert judged.why_not("pack_both_ways")(GPU) == "Triton's kernel was slower here than torch"
    assert "off by" in judged.why_not("softmax_rows")(GPU)
    assert judged.why_not("softmax_rows")(CPU) == ""


def test_what_is_not_lasting_or_cannot_be_kept_is_of_this_process(card: pytest.MonkeyPatch) -> None:
    for lasting in (False, True):
        judged.remember(GPU, Verdict(frozenset({"pack_weight"})), lasting=lasting)
        assert judged.planned_on(GPU)
        judged.forget(GPU)
        assert not judged.planned_on(GPU)
        card.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # this folder cannot be created


def test_another_card_and_another_version_are_asked_again(card: pytest.MonkeyPatch) -> None:
    judged.remember(GPU, Verdict(frozenset({"pack_weight"})))
    card.setattr(judged, "device_name", lambda device: "NVIDIA GeForce RTX 3060")
    judged.verdict.cache_clear()
    assert judged.verdict(GPU) is None
    card.setattr(judged, "device_name", lambda device: "NVIDIA A100")
    card.setattr(torch, "__version__", "9.9")
    card.setattr(judged, "package_version", lambda package: "9.9")
    judged.verdict.cache_clear()
    assert judged.verdict(GPU) is None


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        (lambda card: card.setattr(judged.importlib.util, "find_spec", lambda name: None), "Triton is not installed"),
        (lambda card: card.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5)), "8.0 or above"),
        (lambda card: card.setattr(torch.version, "hip", "6.0"), "never tried on AMD"),
        (lambda card: card.setattr(torch.cuda, "is_available", lambda: False), "need an NVIDIA GPU"),
    ],
)
def test_why_they_cannot_run(card: pytest.MonkeyPatch, patch: Callable[[pytest.MonkeyPatch], None], said: str) -> None:
    patch(card)
    assert said in judged.cannot_run(GPU)
    if torch.cuda.is_available():
        assert said in judged.why_not("pack_weight")(GPU)
        assert judge(GPU) == Verdict()  # the kernels were judged, so a plan on this GPU goes on without them
        assert judged.planned_on(GPU)


@pytest.mark.usefixtures("card")
def test_tensors_that_the_kernels_do_not_take() -> None:
    judged.remember(GPU, Verdict(frozenset(proof.OPERATIONS)))
    taken = judged.takes("column_maxima")
    assert not taken(torch.ones(2, 3))
    assert not taken(torch.ones(2, 3, device="meta"))
    assert not taken(torch.ones(2, 3, dtype=torch.float64))


def test_importing_celora_does_not_import_triton() -> None:
    code = (
        "import sys, celora, celora.kernels.operations, celora.kernels.triton.proof; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
