"""Checkpointing is off unless memory is short, and the run says what was chosen."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import celora
from celora.cli import main as cli
from celora.machine.memory import saved_for_backward
from celora.train import checkpointing
from celora.train.prepare import prepared
from celora.train.request.arguments import make_request
from celora.train.request.fields import known_fields
from patching import patch_all
from tiny import save_rows, save_tiny_model


def run(folder: Path, capsys: pytest.CaptureFixture[str], *extra: str) -> str:
    save_tiny_model(folder / "model")
    save_rows(folder / "rows.jsonl")
    given = ["train", "--model", str(folder / "model"), "--data", str(folder / "rows.jsonl"), "--preset", "exact"]
    assert cli.main([*given, "--output", str(folder / "out"), "--max_steps", "2", *extra]) == 0
    return capsys.readouterr().err


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("free", "extra", "said", "on"),
    [
        (2**30, (), "Gradient checkpointing is off: a step keeps up to", False),
        (1000, (), "Gradient checkpointing is turned on: a step keeps up to", True),
        (1000, ("--gradient_checkpointing", "false"), "Gradient checkpointing is off: a step keeps up to", False),
        (1000, ("--activation_checkpointing", "false"), "Gradient checkpointing is off: a step keeps up to", False),
        (None, (), "Gradient checkpointing is off: a step keeps up to", False),
        (2**30, ("--gradient_checkpointing", "true"), "Gradient checkpointing is on: every forward", True),
    ],
)
def test_the_choice(
    free: int | None,
    extra: tuple[str, ...],
    said: str,
    on: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if extra and extra[0][2:] not in known_fields():
        pytest.skip("this version of Transformers has one name for it")
    patch_all(monkeypatch, "celora.machine.memory:available_memory", lambda device: free)
    seen: list[bool] = []
    original = checkpointing.choose_checkpointing

    def spy(trainer: Any, *, asked: bool) -> str:
        line = original(trainer, asked=asked)
        model = trainer.model.get_base_model()
        seen.append(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))
        return line

    patch_all(monkeypatch, "celora.train.checkpointing:choose_checkpointing", spy)
    assert said in run(tmp_path, capsys, *extra)
    if "true" not in extra:  # Trainer turns it on when it starts
        assert seen == [on]


def test_it_changes_nothing_that_is_learnt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for free in (2**40, 1):
        patch_all(monkeypatch, "celora.machine.memory:available_memory", lambda device, free=free: free)
        folder = tmp_path / str(free)
        folder.mkdir()
        run(folder, capsys)
        found.append(losses(folder))
    assert found[0] == found[1]


# --- how much a step keeps -------------------------------------------------------------------------------------------


def worded(path: Path, lengths: list[int]) -> str:
    """Conversations with these numbers of tokens."""
    rows = ([("user", "w1"), ("assistant", " ".join(["w2"] * (n - 5)))] for n in lengths)
    lines = (json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def kept(trainer: Any, batch: Any) -> int:
    """The bytes that a step on this batch really keeps."""
    with saved_for_backward(trainer.model.train()) as saved:
        trainer.compute_loss(trainer.model, batch)
    return saved.nbytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("kept") / "model", hidden=64))


LENGTHS = [12, 12, 12, 12, 12, 12, 13, 14, 16, 90, 95, 100]


@contextmanager
def trainer_of(model: str, folder: Path, preset: str, **more: Any) -> Iterator[Any]:
    """The trainer for rows of these lengths, the shortest first, with celora attached."""
    given = {"model": model, "data": worded(folder / "rows.jsonl", LENGTHS), "output": str(folder / "out")}
    with prepared(make_request(given | {"preset": preset} | more), None, None) as (trainer, config):
        if preset != "off":
            celora.attach(trainer.model, config)
        yield trainer


@pytest.mark.parametrize("preset", ["off", "exact"])
@pytest.mark.parametrize(
    "more",
    [
        {"per_device_train_batch_size": 4},
        {"packing": True, "max_length": 112},
        {"padding_free": True, "max_length": None, "per_device_train_batch_size": 4},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 50},
        {"per_device_train_batch_size": 1},
        {"per_device_train_batch_size": 50, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_no_batch_keeps_more_than_is_foreseen_and_the_largest_not_much_less(
    more: dict[str, Any], preset: str, model: str, tmp_path: Path
) -> None:
    with trainer_of(model, tmp_path, preset, **more) as trainer:
        foreseen = checkpointing.kept_by_a_step(trainer)
        assert max(kept(trainer, batch) for batch in trainer.get_train_dataloader()) <= foreseen
        rows = sorted(trainer.train_dataset, key=lambda row: -len(row["input_ids"]))
        most = kept(trainer, trainer.data_collator(rows[: trainer.args.per_device_train_batch_size]))
        assert most <= foreseen <= 1.3 * most


def test_finding_out_leaves_no_trace_and_takes_no_more_than_two_rows(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trainer_of(model, tmp_path, "exact", per_device_train_batch_size=12) as trainer:
        seen: list[tuple[int, ...]] = []
        collate = trainer.data_collator

        def spy(rows: Any) -> Any:
            batch = collate(rows)
            seen.append(tuple(batch["input_ids"].shape))
            return batch

        monkeypatch.setattr(trainer, "data_collator", spy)
        trainer.model.eval()
        metrics, state = copy.deepcopy(trainer._metrics), torch.get_rng_state()
        first = checkpointing.kept_by_a_step(trainer)
        assert checkpointing.kept_by_a_step(trainer) == first
        assert max(rows * tokens for rows, tokens in seen) <= 2 * max(LENGTHS)
        assert not any(module.training for module in trainer.model.modules())
        assert all(p.grad is None for p in trainer.model.parameters())
        assert torch.get_rng_state().equal(state)
        assert (trainer._metrics, trainer._total_train_tokens) == (metrics, 0)
        assert set(trainer.phases.seconds.values()) == {0.0}
