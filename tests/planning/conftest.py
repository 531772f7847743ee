"""Batches to plan on, and times that do not depend on the machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from celora.planning import bench as bench_module
from costs import Costs
from patching import patch_all
from small import masked_batch


@pytest.fixture(autouse=True)
def _integers_may_pay(integers_may_pay: None) -> None:
    """Nothing but times decides."""


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    return [masked_batch(seed) for seed in range(3)]


@pytest.fixture
def free_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """On such small matrices nothing is faster than the dense product.

    Pretend that an estimate costs the share that it keeps.
    """
    costs = Costs()
    patch_all(monkeypatch, "celora.planning.planner:time_kinds", lambda layers: {layer.kind: costs for layer in layers})
    patch_all(monkeypatch, "celora.planning.planner:graft_overhead", lambda device, dtype: 0.0)
    monkeypatch.setattr(bench_module.Bench, "time", lambda bench, layers, settings: 0.5)


@pytest.fixture
def wide_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that the vocabulary is large enough for estimating its gradient to pay."""

    def times(calls: Any, repeats: int, device: Any) -> Any:
        return {call: {"time_ms": 10 * float(call)} for call in calls}

    patch_all(monkeypatch, "celora.machine.timing:interleaved", times)
    # the head has only 61 words
    patch_all(monkeypatch, "celora.planning.head_evidence:HEAD_SHARES", (0.9, 0.7, 0.5, 0.3))
