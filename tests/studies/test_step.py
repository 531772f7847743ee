"""Every arm of the bench takes the same steps. Arms differ only in what they are named for."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from celora.modeling.switch import Mode
from celora.runtime.attachment import FIRST_ROUND, require
from celora.studies.cells import Cell, make_batches
from celora.studies.step import make_step
from patching import patch_all

SMALL = Cell("h64-v1k", "instruct", "float32", 64)


def test_every_arm_takes_the_same_steps(tmp_path: Path) -> None:
    """Exact arms train the same parameters; the limit does not."""
    batches = make_batches(SMALL)
    found = {}
    for arm in ("PEFT", "exact", "limit"):
        step = make_step(SMALL, arm, tmp_path, {})
        for batch in batches:
            step(batch)
        found[arm] = torch.cat([p.detach().flatten() for p in step.model.parameters() if p.requires_grad])
    torch.testing.assert_close(found["exact"], found["PEFT"], rtol=0, atol=1e-6)
    assert not torch.allclose(found["limit"], found["PEFT"], atol=1e-6)


def test_where_TRL_would_autocast_every_arm_computes_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's trainer does so on CUDA, for a base in bfloat16. Adapters are float32 everywhere."""
    cell, found = Cell("h64-v1k", "instruct", "bfloat16", 64), []
    batches = make_batches(cell)
    for autocasts in (False, True):
        patch_all(monkeypatch, "celora.studies.step:autocasts", lambda model, said=autocasts: said)
        step = make_step(cell, "PEFT", tmp_path, {})
        adapter = next(module for name, module in step.model.named_modules() if name.endswith("lora_A.default"))
        adapter.register_forward_hook(lambda module, inputs, output: found.append((module.weight.dtype, output.dtype)))
        step(batches[0])
    assert found == [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)]


def test_what_is_timed_comes_after_the_first_measurements(tmp_path: Path) -> None:
    batches = make_batches(SMALL)
    step = make_step(SMALL, "paper", tmp_path, {})
    step.settle(batches)
    attached = require(step.model)
    assert attached.clock.step == FIRST_ROUND
    assert {graft.mode for graft in attached.grafts.values() if graft.observed} == {Mode.ESTIMATE}


def test_arms_share_frozen_weights_and_no_others(tmp_path: Path) -> None:
    frozen: dict[str, torch.Tensor] = {}
    steps = [make_step(SMALL, arm, tmp_path, frozen) for arm in ("PEFT", "PEFT upper half", "exact")]
    kept, trained = (
        [{p.data_ptr() for p in step.model.parameters() if p.requires_grad is trains} for step in steps]
        for trains in (False, True)
    )
    assert kept[0] == kept[1] == kept[2] == {weight.data_ptr() for weight in frozen.values()}
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(trained, 2))
