"""Gradients that are not finite, zero, empty, huge or tiny, under every estimator: nothing lost, nothing invented."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import celora
from celora import CELoraConfig
from celora.kernels.c import build as build_module
from celora.kernels.c import library as library_module
from celora.kernels.operations import squared_row_norms
from celora.modeling.graft import LayerGraft
from celora.modeling.switch import Mode
from celora.numerics.products.base import Product
from celora.numerics.products.fp8 import Fp8
from celora.numerics.products.int8 import Int8
from celora.numerics.select import critical_rows
from celora.runtime.attachment import require
from machine import refuses, refuses_config
from small import adapter, make_batch, make_model
from without import without

# Half of this little is a poor estimate; one test below is about saying so.
pytestmark = pytest.mark.filterwarnings("ignore:celora. at step . the relative error")

OUT, IN, TOKENS = 32, 48, 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MEMBERS = {
    **{name: {"estimator": name} for name in ("int8", "fp8")},
    "int8, no copy": {"estimator": "int8", "weight_copy": False},
    **{
        f"{estimator}, {selection}, {factor or 'no factor'}, {precision}": {
            "estimator": estimator,
            "selection": selection,
            "precision": precision,
            "rank": 4 if factor else 0,
            "factor": factor or "svd",
        }
        for estimator, selection, factor, precision in itertools.product(
            ("columns", "tokens"), ("topk", "energy", "sampled"), ("", "svd", "gradient"), ("native", "int8", "fp8")
        )
    },
}


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and as on a machine without a compiler."""
    if request.param == "torch":
        without(monkeypatch, "c")
    elif library_module.library() is None:
        assert build_module.why_not()  # said; everything goes through torch here, too
    return str(request.param)


def _possible() -> list[str]:
    """The members that this machine does not refuse."""
    return [name for name, member in MEMBERS.items() if not refuses_config(CELoraConfig(**{"rank": 0, **member}))]


def _layer(dtype: torch.dtype, weight: Tensor | None = None) -> PeftModel:
    torch.manual_seed(0)
    model: Any = get_peft_model(
        nn.Sequential(nn.Linear(IN, OUT, bias=False)).to(dtype),
        LoraConfig(r=4, target_modules=["0"], init_lora_weights=False),
    )
    if weight is not None:
        model.base_model.model[0].base_layer.weight.data = weight.to(dtype)
    return model


def _run(model: PeftModel, G: Tensor) -> dict[str, Tensor]:
    """The gradients that reach the input and the adapter where `G: (T, out)` comes in."""
    model.zero_grad()
    x = torch.randn(len(G), IN, generator=torch.Generator().manual_seed(1)).to(G.dtype).requires_grad_()
    model(x).backward(G)
    assert x.grad is not None
    return {"x": x.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def _attached(member: str, model: PeftModel, seen: Tensor, *, fused: bool) -> LayerGraft:
    """The layer's graft, after one refresh that saw the gradient `seen`."""
    celora.attach(model, CELoraConfig(**{"rank": 0, **MEMBERS[member]}, fused=fused, refresh_every=10**6))
    _run(model, seen)
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    (graft,) = require(model).grafts.values()
    return graft


def _ordinary(dtype: torch.dtype) -> Tensor:
    return torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(2)).to(dtype)


def _faulty(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every column is hit in turn, so that some are kept and some are not."""
    for bad in ("nan", "inf", "-inf"):
        for column in (0, 7, 20, 31):
            G = _ordinary(dtype)
            G[3 * column // 4, column] = float(bad)
            yield f"{bad} in column {column}", G
        yield f"nothing but {bad}", torch.full((TOKENS, OUT), float(bad), dtype=dtype)
    G = _ordinary(dtype)
    G[:30] = float("nan")
    yield "mostly nan", G


@pytest.mark.fault(
    "numbers",
    "NaN or infinity in a gradient, in training",
    sees="`a gradient of ... is not finite, or nearly so; its backward is exact this time`, once; on accelerators, "
    "under torch.compile and with sharded weights, where looking would mean waiting, what plain LoRA shows: the "
    "adapter's own gradient is not finite",
    kept="the exact backward's result, bit for bit where it is finite up to rounding; the selection and its statistics",
)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_arrives_as_in_the_exact_backward(path: str, dtype: torch.dtype, fused: bool) -> None:
    """And what is finite beside it is the exact backward's; the next estimate is as if nothing had happened."""
    faults = dict(_faulty(dtype))
    plain = _layer(dtype)
    expected = {fault: _run(plain, G) for fault, G in faults.items()}
    for member in _possible():
        model = _layer(dtype)
        graft = _attached(member, model, _ordinary(dtype), fused=fused)
        assert graft.mode is Mode.ESTIMATE
        before = {key: value.clone() for key, value in graft.estimator.state_dict().items()}
        with pytest.warns(UserWarning, match=r"a gradient of base_model.model.0 is not finite") as said:
            found = {fault: _run(model, G) for fault, G in faults.items()}
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
    """On an accelerator nothing is checked. The path is the same but for the device's name."""
    monkeypatch.setattr(LayerGraft, "mode_for", lambda self, mode, witness, weight: mode)
    plain = _layer(dtype)
    for member in _possible():
        model = _layer(dtype)
        _attached(member, model, _ordinary(dtype), fused=fused)
        for fault, G in _faulty(dtype):
            found = _run(model, G)
            for name, exact in _run(plain, G).items():
                if name == "x":
                    assert not found[name].isfinite()[~exact.isfinite()].any(), (member, fault)
                else:
                    assert found[name].isfinite().equal(exact.isfinite()), (member, fault, name)


@pytest.mark.fault(
    "numbers",
    "NaN or infinity in a gradient that a refresh looks at",
    sees="nothing: its backward is exact anyway",
    kept="the statistics: the next selection is what it would have been without",
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_refresh_that_sees_nothing_finite_learns_nothing(path: str, dtype: torch.dtype) -> None:
    """As when a GradScaler repeats a step: what is selected is what it would be without the overflow."""
    for member in _possible():
        states = []
        for faults in ([], [G for _, G in _faulty(dtype)]):
            model = _layer(dtype)
            celora.attach(model, CELoraConfig(**{"rank": 0, **MEMBERS[member]}, fused=True))
            for G in [*faults, _ordinary(dtype)]:
                _run(model, G)
            torch.optim.SGD(model.parameters(), lr=0.0).step()
            (graft,) = require(model).grafts.values()
            assert graft.estimator.ready
            states.append(graft.estimator.state_dict())
            assert graft.squared_error is None
            error = require(model).relative_errors.get("base_model.model.0", 0.0)
            assert 0 <= error < 5
        for key, value in states[0].items():
            other = states[1][key]
            if key == "V":  # what it spans; a sign is nothing to it
                value, other = value.T @ value, other.T @ other
            if key != "draws":
                torch.testing.assert_close(other, value, rtol=1e-3, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.fault(
    "numbers",
    "gradients of any scale, from below the smallest normal number to near the largest",
    sees="nothing",
    kept="the estimate: finite where the exact backward is, and never larger than an estimate may be",
)
@pytest.mark.parametrize("scale", [0.0, 1e-43, 1e-39, 1e-30, 1e-25, 1e-18, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:celora. (a gradient of|by step)")
def test_no_scale_invents_or_loses(path: str, dtype: torch.dtype, scale: float) -> None:
    """Finite where exact is, nowhere larger than an estimate may be, and lost only below the smallest normal number."""
    plain = _layer(dtype)
    G = (_ordinary(torch.float32) * scale).to(dtype)
    exact = _run(plain, G)["x"].double()
    for member in _possible():
        model = _layer(dtype)
        _attached(member, model, _ordinary(dtype), fused=False)
        found = _run(model, G)["x"].double()
        assert found.isfinite().all(), member
        if "sampled" not in member:
            assert (found - exact).norm() <= exact.norm() + 1e-36, member


@pytest.mark.fault(
    "numbers",
    "weights that are zero, of rank 1, tiny or huge",
    sees="nothing",
    kept="the estimate, and statistics that are finite",
)
@pytest.mark.parametrize("how", ["zero", "of rank 1", "tiny", "huge"])
@pytest.mark.filterwarnings("ignore:celora. by step")
def test_weights_that_are_degenerate(path: str, how: str) -> None:
    W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(5))
    W = {"zero": W * 0, "of rank 1": W[:, :1] @ W[:1], "tiny": W * 1e-39, "huge": W * 1e30}[how]
    G = _ordinary(torch.float32) * (1e-3 if how == "huge" else 1)
    exact = _run(_layer(torch.float32, W), G)["x"]
    for member in _possible():
        model = _layer(torch.float32, W)
        graft = _attached(member, model, G, fused=True)
        found = _run(model, G)["x"]
        assert found.isfinite().all(), member
        assert (found - exact).norm() <= (4 if "sampled" in member else 1) * exact.norm() + 1e-30, member
        assert all(value.isfinite().all() for value in graft.estimator.state_dict().values()), member


@pytest.mark.fault(
    "numbers",
    "a batch of one token, or a layer that no token reaches",
    sees="nothing",
    kept="the shapes of PEFT; without tokens nothing is learnt from",
)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tokens", [0, 1])
def test_one_token_and_none(path: str, tokens: int, fused: bool) -> None:
    """A layer may get no tokens at all, as an expert does that no token chose."""
    G = _ordinary(torch.float32)[:tokens]
    exact = _run(_layer(torch.float32), G)
    for member in _possible():
        model = _layer(torch.float32)
        graft = _attached(member, model, G, fused=fused)
        _run(model, _ordinary(torch.float32))
        found = _run(model, G)
        assert found["x"].shape == exact["x"].shape
        assert found["x"].isfinite().all()
        if tokens == 1 and member.startswith("tokens") and "native" in member:
            torch.testing.assert_close(found["x"], exact["x"])
        if tokens == 0:
            assert not graft.observed or not graft.estimator.ready


@pytest.mark.fault(
    "numbers",
    "gradients that are all zero",
    sees="`... has seen no gradient to select from ... It stays exact until it sees one.`, once",
    kept="the exact backward; estimated as soon as there is something to select from",
)
def test_gradients_that_say_nothing_are_said_once() -> None:
    """Nothing can be selected from zeros: exact, and said; selected as soon as there is something to select from."""
    model = _layer(torch.float32)
    celora.attach(model, CELoraConfig(rank=0, keep_ratio=0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    (graft,) = require(model).grafts.values()
    for warned in (1, 0, 0):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            _run(model, torch.zeros(TOKENS, OUT))
            optimizer.step()
        assert len(said) == warned
        assert all("by step 1, base_model.model.0 has seen no gradient to select" in str(of.message) for of in said)
    assert graft.mode is Mode.OBSERVE
    _run(model, _ordinary(torch.float32))
    optimizer.step()
    assert graft.mode is Mode.ESTIMATE


SCALED = {
    "paper": "paper",
    "exact": "exact",
    "int8 x tokens": CELoraConfig(
        estimator="tokens", keep_ratio=0.95, rank=0, selection="energy", precision="int8", fused=True
    ),
    "sampled columns": CELoraConfig(keep_ratio=0.9, rank=4, selection="sampled"),
    "gradient factor": CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=4, factor="gradient", refresh_every=2),
}


@pytest.mark.fault(
    "numbers",
    "float16 overflows under a GradScaler",
    sees="nothing: the scaler skips the step, as with PEFT",
    kept="parameters, statistics and the clock: the same scale as with PEFT, and a skipped step counts for nothing",
)
@pytest.mark.parametrize("config", SCALED.values(), ids=SCALED)
@pytest.mark.filterwarnings("ignore:celora. a gradient of")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_an_overflow_under_a_grad_scaler_is_skipped_and_forgotten(config: Any) -> None:
    """float16, a scale far too large: the scaler skips as often as with PEFT, and training goes on."""
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
                scaler.update(2.0**40)  # and once more, in the middle of training
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
            for graft in attachment.grafts.values():
                assert all(value.isfinite().all() for value in graft.estimator.state_dict().values())
            assert all(0 <= error < 5 for error in attachment.relative_errors.values())
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]


@pytest.mark.fault(
    "numbers",
    "the logits of the first batch are not finite",
    sees="the loss that the model itself computes, for that call alone",
    kept="the head over labelled tokens, from the next call on",
)
def test_the_first_batch_not_finite_does_not_decide_about_the_head(model: PeftModel) -> None:
    """Nothing can be said of logits that are not numbers, so the model's own loss is used for that call alone."""
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


sizes = st.tuples(st.integers(1, 70), st.integers(1, 40))
exponents = st.integers(-148, 120)


@given(sizes, exponents, st.integers(-20, 20), st.sampled_from([0.3, 0.9, 0.999, 1.0]), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_rows_kept_hold_their_share_at_any_scale(
    shape: tuple[int, int], exponent: int, spread: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    G = torch.randn(shape).mul(torch.rand(shape[0], 1).pow(abs(spread))).double().mul(2.0**exponent).float()
    index, _ = critical_rows(squared_row_norms(G), kept=None, share=share)
    assert len(index) >= 1
    energies = G.double().square().sum(1)
    # Sums in float32, and what of them may underflow: a share of 1e-14 at the most.
    assert energies[index].sum() >= share * energies.sum() * (1 - 1e-5)


@given(sizes, exponents, exponents, st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 2**31))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_eight_bits_are_as_good_as_they_are_at_any_scale(
    shape: tuple[int, int], g: int, w: int, dtype: torch.dtype, seed: int
) -> None:
    if g + w > 100:
        g = 100 - w
    torch.manual_seed(seed)
    tokens, inner = shape
    G = torch.randn(tokens, 16 * (1 + inner // 16)).double().mul(2.0**g).to(dtype)
    W = torch.randn(G.shape[1], 16).double().mul(2.0**w).to(dtype)
    exact = G.double() @ W.double()
    product: Product
    for product, error in ((Int8(), 0.04), (Int8(copy=False), 0.04), (Fp8(), 0.12)):
        if refuses(product.name, copy=product.copy):
            continue
        found = product(G, W).double()
        assert found.isfinite().all()
        # Numbers below the smallest normal one are kept to its multiples, of either factor and of the result.
        tiny = torch.finfo(torch.float32).tiny
        lost = tiny * (G.double().abs().sum() + W.double().abs().sum() + len(G) * W.numel() * (tiny + 1))
        assert (found - exact).norm() <= error * exact.norm() + lost


OVER = CELoraConfig(keep_ratio=0.05, rank=0, selection="sampled", refresh_every=1)


def _steps(model: PeftModel, first: int, count: int) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for step in range(first, first + count):
        model(**make_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.fault(
    "numbers",
    "a relative error of 1 or more, where convergence is not proven",
    sees="a warning; at two refreshes in a row, `from step ... on, ... is exact`; `celora/layers_made_exact`",
    kept="training, with that layer exact from then on, after resuming, too",
)
def test_an_estimate_that_stays_over_the_bound_is_given_up_for_good(tmp_path: Path) -> None:
    model = make_model()
    celora.attach(model, OVER)
    with pytest.warns(UserWarning, match="celora") as said:
        _steps(model, 0, 8)
    messages = [str(of.message) for of in said]
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
    assert not [name for name in made_exact for of in later if f"{name}, " in str(of.message)]

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


def test_one_process_alone_does_not_turn_exact_where_the_weight_is_sharded(model: PeftModel) -> None:
    """It would gather the whole weight, and the others, whose gradients are finite, would not."""
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
