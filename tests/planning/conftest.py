"""Batches to plan on, and times that do not depend on the machine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from celora.planning import bench as bench_module
from celora.planning.candidates import EXACT
from celora.settings.config import LayerConfig
from patching import patch_all
from small import masked_batch


class Costs(dict[LayerConfig, float]):
    """Milliseconds of a setting, as if its estimate took no more than what it keeps."""

    def __missing__(self, setting: LayerConfig) -> float:
        if setting == EXACT:
            return 1.0
        if setting.estimator in ("int8", "fp8"):
            return 0.6 if setting.weight_copy else 0.8
        cheaper = 1.0 if setting.precision == "native" else 0.5
        return cheaper * setting.keep_ratio * (1.0 if setting.weight_copy else 1.2)


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    return [masked_batch(seed) for seed in range(3)]


@pytest.fixture
def free_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """On matrices this small nothing is faster than the dense product: pretend that what is kept is what it costs."""
    costs = Costs()
    patch_all(
        monkeypatch, "celora.planning.evidence:time_kinds", lambda layers: {layer.kind: costs for layer in layers}
    )
    patch_all(monkeypatch, "celora.planning.evidence:graft_overhead", lambda device, dtype: 0.0)
    monkeypatch.setattr(bench_module.Bench, "time", lambda bench, layers, settings: 0.5)


@pytest.fixture
def wide_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the vocabulary were large enough for its gradient to be worth leaving out."""

    def times(calls: Any, repeats: int, device: Any) -> Any:
        return {call: {"time_ms": 10 * float(call)} for call in calls}

    patch_all(monkeypatch, "celora.machine.timing:interleaved", times)
    patch_all(monkeypatch, "celora.planning.head_evidence:HEAD_SHARES", (0.9, 0.7, 0.5, 0.3))  # it has 61 words
