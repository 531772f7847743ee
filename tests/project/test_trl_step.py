"""The step of TRL's trainer in the GPU benchmark: its loss, its metrics, and Liger's kernels without Liger's head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer

import celora
from benchmarks.steps import gpu as steps
from celora.runtime.attachment import find
from celora.studies.cells import Cell, make_batches
from celora.studies.step import make_step

SMALL = Cell("h64-v1k", "instruct", "float32", 64)
# transformers 5.24 has renamed it; TRL and the versions that celora supports have the old name.
CHECKPOINTING = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("arm", ["TRL + PEFT", "exact"])
@CHECKPOINTING
def test_the_loss_of_each_arm_is_that_of_trls_trainer(arm: str, tmp_path: Path) -> None:
    """Its fused head computes it, and its metrics are collected. Weights move as Transformers' Trainer moves them."""
    batches = make_batches(SMALL)
    step = steps._step(SMALL, arm, batches, tmp_path)
    usual = make_step(SMALL, "PEFT", batches, tmp_path / "plan.json", {})
    usual.optimizer.param_groups[0]["lr"] = step.optimizer.param_groups[0]["lr"]  # defaults differ
    asked: list[object] = []
    step.model.register_forward_pre_hook(lambda *given: asked.append(given[2].get("fused_lm_head")), with_kwargs=True)
    for batch in batches[:2]:
        step(batch)
        usual(batch)
    assert isinstance(step.trainer, SFTTrainer)
    assert not step.trainer.args.gradient_checkpointing
    assert asked == [True, True]
    assert len(step.trainer._metrics["train"]["entropy"]) == 2
    moved = [
        torch.cat([p.detach().flatten() for p in of.model.parameters() if p.requires_grad]) for of in (step, usual)
    ]
    torch.testing.assert_close(*moved, rtol=0, atol=1e-6)
    assert (find(step.model) is None) == (arm == steps.BASE)


@CHECKPOINTING
def test_the_arm_of_cuda_graphs_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(celora, "compile_model", lambda model, **options: asked.append((find(model), options)))
    step = steps._step(SMALL, steps.GRAPHS, make_batches(SMALL), tmp_path)
    assert asked == [(find(step.model), {"mode": "reduce-overhead", "fullgraph": True})]


@CHECKPOINTING
@pytest.mark.filterwarnings("ignore:`use_liger_kernel=True` is deprecated:FutureWarning")
def test_liger_leaves_the_head_to_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    given: list[tuple[Any, Any]] = []
    monkeypatch.setattr("transformers.integrations.liger.apply_liger_kernel", lambda *args: given.append(args))
    step = steps._step(SMALL, steps.LIGER, make_batches(SMALL), tmp_path)
    assert given == [(step.model, {"fused_linear_cross_entropy": False})]
