"""A steady training step reads one thing from the device: which tokens have labels, and which sequence each belongs to.

The test runs on a CPU that computes like an accelerator: without the C kernels, and without looking at what only a CPU
shows for free.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import celora
import reads
from celora.settings.presets import PRESETS, by_rule
from labelled import masked_batch
from machine import refuses
from patching import patch_all
from reads import Reads, Waits
from runs import go, on_build
from small import make_model
from tiny import save_rows, save_tiny_model
from without import without

PRESET = {
    "exact": PRESETS["exact"],
    "paper": PRESETS["paper"],
    "auto": by_rule(PRESETS["auto"]),
    "fast": PRESETS["fast"],
}
SETTLED = 22  # steps: auto looks at every layer in the first ten, fast in the ten that follow, too


@pytest.fixture
def as_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read nothing that only a CPU gives for free. Fuse layers even if a dispatch mode is active."""
    patch_all(monkeypatch, "celora.machine.device:reads_freely", lambda device: False)
    patch_all(monkeypatch, "celora.modeling.graft:in_dispatch_mode", lambda: False)
    without(monkeypatch, "c")


@pytest.mark.usefixtures("as_accelerator")
@pytest.mark.parametrize("preset", PRESET)
def test_a_steady_step_reads_one_thing(preset: str) -> None:
    if refuses() and preset in ("auto", "fast"):
        return
    model = make_model().train()
    celora.attach(model, PRESET[preset])
    # SGD, because other optimizers keep their number of steps on the CPU, and read it there.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    reads, waits = Reads(), Waits()

    def step(seed: int) -> None:
        model(**masked_batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for seed in range(SETTLED):
        step(seed)
    with waits, reads:
        step(SETTLED)
    assert reads.seen == ["tolist"]
    assert waits.seen == []


class Readers(Waits):
    """Records the files whose code would wait, beside torch's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.seen)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.seen) > before:
            files = [Path(frame.filename) for frame in reversed(traceback.extract_stack())]
            self.seen[before:] = [next(file.name for file in files if "torch" not in file.parts and file not in OURS)]
        return result


OURS = [Path(__file__), Path(reads.__file__)]


@pytest.mark.usefixtures("as_accelerator")
def test_in_a_steady_step_of_celora_train_only_trl_reads_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads sums for its metrics. From one forward to the next, nobody else reads: neither celora nor Trainer."""
    modes: list[Readers] = []

    def watch(trainer: Any) -> None:
        usual = trainer.training_step

        def step(*args: Any, **kwargs: Any) -> Any:
            if modes:
                modes[0].__exit__(None, None, None)
            elif trainer.state.global_step == 2:
                modes.append(Readers())
                modes[0].__enter__()
            return usual(*args, **kwargs)

        trainer.training_step = step

    on_build(monkeypatch, watch)
    inputs = {"model": str(save_tiny_model(tmp_path / "model")), "data": str(save_rows(tmp_path / "rows.jsonl", 40))}
    go(inputs, tmp_path / "out", max_steps=4, save_steps=4, celora={}, preset="exact", optim="sgd", logging_steps=4)
    assert set(modes[0].seen) == {"sft_trainer.py"}


ONES = torch.ones(3, dtype=torch.int64)
READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "mask": lambda x: x[x > 0],
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "bincount": lambda x: x.bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(ONES),
    "repeats": lambda x: x.repeat_interleave(repeats=ONES),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_read_is_noticed(read: Any) -> None:
    reads = Reads()
    with reads:
        read(ONES)
    assert reads.seen


def test_what_waits_for_nothing_is_not_noticed() -> None:
    reads, waits = Reads(), Waits()
    with waits, reads:
        ONES.repeat_interleave(2)
        ONES.repeat_interleave(ONES, output_size=3)
    assert reads.seen == waits.seen == []


def test_a_read_in_backward_is_noticed() -> None:
    x, waits = torch.ones(3, requires_grad=True), Waits()
    x.register_hook(lambda grad: grad * float(grad.sum()))
    with waits:
        x.sum().backward()
    assert waits.seen == ["_local_scalar_dense"]


@pytest.mark.parametrize("name", ["bincount", "repeat_interleave"])
def test_an_operator_that_counts_waits(name: str) -> None:
    with (waits := Waits()):
        READS[name](ONES)
    assert waits.seen == [name]


SQUARE = torch.eye(3)
WAITS = {
    "copy from cpu to meta": [lambda: ONES.to("meta"), lambda: torch.empty(3, device="meta").copy_(SQUARE[0])],
    "_unique2": [lambda: ONES.unique()],
    "unique_dim": [lambda: SQUARE.unique(dim=0)],
    "unique_consecutive": [lambda: ONES.unique_consecutive()],
    "_linalg_check_errors": [lambda: torch.linalg.inv(SQUARE), lambda: torch.linalg.cholesky(SQUARE)],
    "_linalg_eigh": [lambda: torch.linalg.eigh(SQUARE)],
    "_linalg_svd": [lambda: torch.linalg.svdvals(SQUARE), lambda: torch.linalg.matrix_rank(SQUARE)],
    "linalg_eig": [lambda: torch.linalg.eigvals(SQUARE)],
    "linalg_lstsq": [lambda: torch.linalg.lstsq(SQUARE, SQUARE)],
    "linalg_pinv": [lambda: torch.linalg.pinv(SQUARE)],
}


@pytest.mark.parametrize("name", WAITS)
def test_operators_that_wait_on_cuda_are_noticed(name: str) -> None:
    """Of copies, this shows those between two devices; the device `meta` stands for an accelerator."""
    for call in WAITS[name]:
        with (waits := Waits()):
            call()
        assert waits.seen == [name]


def test_copies_within_a_device_and_norms_wait_for_nothing() -> None:
    with (waits := Waits()):
        SQUARE.clone().copy_(SQUARE.double()).to(torch.bfloat16)
        torch.linalg.vector_norm(SQUARE)
    assert waits.seen == []
