"""NaN and infinity under every estimator: gradients are the exact backward's, and later estimates do not change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import celora
from celora import CELoraConfig
from celora.modeling.eight_bit import MOST_ERROR
from celora.modeling.graft import LayerGraft
from celora.modeling.switch import Mode
from celora.runtime.attachment import require
from celora.settings.presets import PRESETS
from every_estimator import MEMBERS, TOKENS, attach_ready, ordinary, plain_layer, possible, run_through
from machine import OUT, refuses_config
from small import adapter, make_batch, make_model

# Half of such a small layer is a poor estimate. celora warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:celora. at step . the relative error")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Any two of path, dtype and fused LoRA come in all their combinations; all three together would take twice as long.
PAIRS = [
    (path, dtype, (path == "compiled") is (dtype != torch.bfloat16))
    for path in ("compiled", "torch")
    for dtype in DTYPES
]


def _faulty(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Columns are hit in turn, so some of them are kept columns and some are not."""
    for bad in ("nan", "inf", "-inf"):
        for column in (0, 7, 20, 31):
            G = ordinary(dtype)
            G[3 * column // 4, column] = float(bad)
            yield f"{bad} in column {column}", G
        yield f"nothing but {bad}", torch.full((TOKENS, OUT), float(bad), dtype=dtype)
    G = ordinary(dtype)
    G[:30] = float("nan")
    yield "mostly nan", G


@pytest.mark.parametrize(("path", "dtype", "fused"), PAIRS, indirect=["path"])
def test_what_is_not_finite_arrives_as_in_the_exact_backward(path: str, dtype: torch.dtype, fused: bool) -> None:
    """Finite numbers beside it equal the exact backward's, up to rounding. What the estimator knows does not change."""
    faults = dict(_faulty(dtype))
    plain = plain_layer(dtype)
    expected = {fault: run_through(plain, G) for fault, G in faults.items()}
    for member in possible():
        model = plain_layer(dtype)
        graft = attach_ready(member, model, ordinary(dtype), fused=fused)
        assert graft.mode is Mode.ESTIMATE
        before = {key: value.clone() for key, value in graft.estimator.state_dict().items()}
        with pytest.warns(UserWarning, match=r"a gradient of base_model.model.0 is not finite") as said:
            found = {fault: run_through(model, G) for fault, G in faults.items()}
        assert len(said) == 1
        for fault in faults:
            for name, exact in expected[fault].items():
                assert found[fault][name].isfinite().equal(exact.isfinite()), (member, fault, name)
            finite = expected[fault]["x"].isfinite()
            rounding = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
            torch.testing.assert_close(found[fault]["x"][finite], expected[fault]["x"][finite], **rounding)
        after = graft.estimator.state_dict()
        assert all(after[key].equal(value) for key, value in before.items()), member


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_where_looking_would_wait_it_arrives_all_the_same(
    dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator nothing is checked. The code path is the same except for the device's name."""
    monkeypatch.setattr(LayerGraft, "mode_for", lambda self, mode, witness, weight: mode)
    faults = dict(_faulty(dtype))
    plain = plain_layer(dtype)
    expected = {fault: run_through(plain, G) for fault, G in faults.items()}
    for member in possible():
        model = plain_layer(dtype)
        attach_ready(member, model, ordinary(dtype), fused=fused)
        for fault, G in faults.items():
            found = run_through(model, G)
            for name, exact in expected[fault].items():
                if name == "x":
                    assert not found[name].isfinite()[~exact.isfinite()].any(), (member, fault)
                else:
                    assert found[name].isfinite().equal(exact.isfinite()), (member, fault, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_refresh_that_sees_nothing_finite_learns_nothing(path: str, dtype: torch.dtype) -> None:
    """As when a GradScaler repeats a step, the selection is the same as without the overflow."""
    bad = [G for _, G in _faulty(dtype)]
    for member in possible():
        states = []
        for faults in ([], bad):
            model = plain_layer(dtype)
            celora.attach(model, CELoraConfig(**{"rank": 0, **MEMBERS[member]}, fused=True))
            for G in [*faults, ordinary(dtype)]:
                run_through(model, G)
            torch.optim.SGD(model.parameters(), lr=0.0).step()
            (graft,) = require(model).grafts.values()
            assert graft.estimator.ready
            states.append(graft.estimator.state_dict())
            assert graft.squared_error is None
            error = require(model).relative_errors.get("base_model.model.0", 0.0)
            assert 0 <= error < 5
        for key, value in states[0].items():
            other = states[1][key]
            if key == "V":  # compare what V spans; its signs do not matter
                value, other = value.T @ value, other.T @ other
            if key != "draws":
                torch.testing.assert_close(other, value, rtol=1e-3, atol=8 * torch.finfo(dtype).eps)


SCALED = {
    "paper": "paper",
    "exact": "exact",
    "int8 x tokens": CELoraConfig(
        estimator="tokens", keep_ratio=0.95, rank=0, selection="energy", precision="int8", fused=True
    ),
    "fast, untimed": PRESETS["fast"],
    "sampled columns": CELoraConfig(keep_ratio=0.9, rank=4, selection="sampled"),
    "gradient factor": CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=4, factor="gradient", refresh_every=2),
}


@pytest.mark.parametrize("config", SCALED.values(), ids=SCALED)
@pytest.mark.filterwarnings("ignore:celora. a gradient of")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_an_overflow_under_a_grad_scaler_is_skipped_and_forgotten(config: Any) -> None:
    """float16 with a scale that is far too large: the scaler skips as often as with PEFT, and training continues."""
    if isinstance(config, CELoraConfig) and refuses_config(config):
        return
    scales = []
    for attach in (False, True):
        model = make_model(dtype=torch.float16)
        if attach:
            celora.attach(model, config)
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-8, growth_interval=3)
        taken = 0
        for step in range(12):
            if step == 8:
                scaler.update(2.0**40)  # one more overflow, in the middle of training
            before = adapter(model)
            scaler.scale(model(**make_batch(step)).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            taken += any(not value.equal(before[name]) for name, value in adapter(model).items())
            assert all(value.isfinite().all() for value in adapter(model).values())
        if attach:
            attachment = require(model)
            assert attachment.clock.step == taken
            assert 4 <= taken <= 9
            assert bool(attachment.forwards.errors) is bool(attachment.forwards)
            assert all(0 < error < MOST_ERROR for error in attachment.forwards.errors.values())
            for graft in attachment.grafts.values():
                assert all(value.isfinite().all() for value in graft.estimator.state_dict().values())
            assert all(0 <= error < 5 for error in attachment.relative_errors.values())
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]


def test_the_first_batch_not_finite_does_not_decide_about_the_head(model: PeftModel) -> None:
    """Logits that are not finite show nothing about the head. So the model's own loss is used, for that call alone."""
    celora.attach(model, "exact")
    model.train()
    head = model.base_model.model.lm_head
    weight = head.weight.data.clone()
    head.weight.data.fill_(float("nan"))
    found = model(**make_batch(0))
    assert found.loss.isnan()
    head.weight.data.copy_(weight)
    assert model(**make_batch(0)).logits is None
    forward = require(model).forward
    assert forward is not None
    assert not forward.refused


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_an_estimated_head_loses_nothing_beside_a_token_that_is_not_finite(bad: str, path: str) -> None:
    hidden, weight = torch.randn(9, 16), torch.randn(200, 16)
    hidden[4, 2] = float(bad)
    hidden.requires_grad_()
    rows, targets = torch.arange(9), torch.arange(9)
    grads = []
    for keep_ratio in (1.0, 0.1):
        hidden.grad = None
        celora.numerics.head.score_tokens(
            hidden, rows, targets, weight, keep_ratio=keep_ratio
        ).log_probs.sum().backward()
        grads.append(hidden.grad)
    assert grads[0].isfinite().all(1).tolist() == [i != 4 for i in range(9)]
    torch.testing.assert_close(grads[1], grads[0], equal_nan=True)


def test_one_process_alone_does_not_turn_exact_where_the_weight_is_sharded(model: PeftModel) -> None:
    """It would gather the whole weight.

    The others, whose gradients are finite, would not, and it would wait for ever.
    """
    celora.attach(model, CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=0))
    layer = next(iter(require(model).grafts.values()))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        weight = distribute_tensor(torch.ones(4, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
        poisoned = torch.full((3, 4), float("inf"))
        assert layer.mode_for(Mode.ESTIMATE, poisoned, weight) is Mode.ESTIMATE
        with pytest.warns(UserWarning, match="is not finite"):
            assert layer.mode_for(Mode.ESTIMATE, poisoned, torch.ones(4, 4)) is Mode.EXACT
    finally:
        dist.destroy_process_group()
