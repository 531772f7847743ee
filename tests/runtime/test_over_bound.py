"""An estimate whose relative error stays at 1 or more is given up, because convergence is proven only below 1."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import celora
from celora import CELoraConfig
from celora.modeling.switch import Mode
from celora.runtime.attachment import require
from small import make_batch, make_model

OVER = CELoraConfig(keep_ratio=0.05, rank=0, selection="sampled", refresh_every=1)


def _steps(model: PeftModel, first: int, count: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for step in range(first, first + count):
        model(**make_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_estimate_that_stays_over_the_bound_is_given_up_for_good(tmp_path: Path) -> None:
    model = make_model()
    celora.attach(model, OVER)
    with pytest.warns(UserWarning, match="celora") as said:
        _steps(model, 0, 8)
    messages = [str(warning.message) for warning in said]
    assert sum("Convergence is proven for errors below 1" in text for text in messages) == 1
    ended = [text for text in messages if "exact: the relative error was 1 or more at 2 refreshes in a row" in text]
    made_exact = require(model).made_exact
    assert len(made_exact) >= 3
    assert all(sum(f"{name}, " in text or f"{name} " in text for text in ended) == 1 for name in made_exact)
    assert {name for name, graft in require(model).grafts.items() if graft.mode is Mode.EXACT} == made_exact

    celora.save_state(model, tmp_path)
    over_bound = dict(require(model).over_bound)
    resumed = make_model()
    celora.attach(resumed, OVER)
    celora.load_state(resumed, tmp_path)
    assert require(resumed).over_bound == over_bound
    assert {name for name, graft in require(resumed).grafts.items() if graft.mode is Mode.EXACT} == made_exact
    with warnings.catch_warnings(record=True) as later:
        warnings.simplefilter("always")
        _steps(resumed, 8, 2)
    assert not [name for name in made_exact for warning in later if f"{name}, " in str(warning.message)]

    logs = {"loss": 1.0}
    state: Any = type("State", (), {"log_history": []})
    celora.Callback().on_log(None, state, None, model=model, logs=logs)
    assert logs["celora/layers_made_exact"] == len(made_exact)


def test_an_error_below_the_bound_in_between_counts_anew() -> None:
    model = make_model()
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=0))
    attachment = require(model)
    name = next(iter(attachment.grafts))
    with pytest.warns(UserWarning, match=r"the relative error of .* is 1.50"):
        attachment._monitor(name, 1.5, 1)
    for error in (0.5, 1.5, 0.9, float("inf")):
        attachment._monitor(name, error, 1)
    assert attachment.over_bound == {name: 1}
    attachment._monitor(name, 1.0, 2)
    assert attachment.made_exact == {name}
