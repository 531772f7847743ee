"""The token estimator, compared with its reference; leaving out zeros changes nothing."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import celora
from celora import CELoraConfig
from celora.numerics import reference
from celora.numerics.estimators import Dense, Tokens
from celora.runtime.attachment import require
from machine import refuses
from patching import patch_all
from small import adapter, make_batch, make_model, train
from tiers import paired
from without import without


def _reference(G: torch.Tensor, W: torch.Tensor, estimator: Tokens) -> torch.Tensor:
    G, W = G.double(), W.double()
    U, V = estimator.factor.U, estimator.factor.V
    if U is None or V is None:
        U, V = G.new_zeros(W.shape[0], 1), G.new_zeros(1, W.shape[1])
    kept = max(1, round(estimator.keep_ratio * len(G)))
    return reference.tokens(G, W, reference.top_k(G.norm(dim=1), kept), U.double(), V.double())


@pytest.mark.parametrize("shape", [(12, 8), (13, 7), (31, 64)])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("keep_ratio", [0.01, 0.5, 0.9])
def test_equals_the_reference(shape: tuple[int, int], rank: int, keep_ratio: float) -> None:
    W, G = torch.randn(*shape, dtype=torch.float64), torch.randn(17, shape[0], dtype=torch.float64)
    estimator = Tokens(*shape, keep_ratio=keep_ratio, rank=rank)
    estimate = estimator.estimate(G, W)
    torch.testing.assert_close(estimate, _reference(G, W, estimator), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 14])
def test_low_precision_is_no_worse_than_the_naive_product(dtype: torch.dtype, rank: int) -> None:
    W, G = (torch.randn(192, 128) / 11).to(dtype), torch.randn(256, 192).to(dtype)
    estimator = Tokens(192, 128, keep_ratio=0.5, rank=rank)
    estimate, closed = estimator.estimate(G, W).double(), _reference(G, W, estimator)
    naive = ((G @ W).double() - G.double() @ W.double()).norm() / (G.double() @ W.double()).norm()
    assert (estimate - closed).norm() / closed.norm() <= naive + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_gradient_lose_nothing(dtype: torch.dtype) -> None:
    W, G = torch.randn(33, 20).to(dtype), torch.randn(16, 33).to(dtype)
    G[torch.randperm(16)[:9]] = 0
    exact = Dense(33, 20).estimate(G, W)
    # A smaller product may add up in another order, so results differ by at most one rounding.
    torch.testing.assert_close(Tokens(33, 20, keep_ratio=7 / 16).estimate(G, W), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeping_everything_is_dense_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onednn", "float32")
    W, G = torch.randn(33, 20).to(dtype), torch.randn(9, 33).to(dtype)
    assert Tokens(33, 20, keep_ratio=1.0, rank=4).estimate(G, W).equal(G @ W)


def test_one_token_and_non_contiguous_gradients() -> None:
    W = torch.randn(20, 9, dtype=torch.float64)
    single = torch.randn(1, 20, dtype=torch.float64)
    torch.testing.assert_close(Tokens(20, 9, keep_ratio=0.1).estimate(single, W), single @ W)
    G, estimator = torch.randn(20, 6, dtype=torch.float64).T, Tokens(20, 9, keep_ratio=0.5)
    torch.testing.assert_close(estimator.estimate(G, W), _reference(G, W, estimator))


def test_a_changed_weight_is_factored_anew_at_the_next_refresh() -> None:
    W, G = torch.randn(20, 9, dtype=torch.float64), torch.randn(6, 20, dtype=torch.float64)
    estimator = Tokens(20, 9, keep_ratio=0.5, rank=3)
    estimator.observe(G, W, G @ W)
    W.data.mul_(3)
    estimator.observe(G, W, G @ W)
    assert estimator.factor.U is not None
    assert estimator.factor.V is not None
    torch.testing.assert_close(estimator.factor.U @ estimator.factor.V, torch.matmul(*reference.truncated_svd(W, 3)))


def test_cost_counts_tokens_and_factor() -> None:
    assert Tokens(100, 50, keep_ratio=0.4, rank=2).cost == pytest.approx(0.4 + 2 / 100 + 2 / 50)


def test_keeps_more_of_the_lora_gradient_than_columns_at_the_same_cost(model: PeftModel) -> None:
    """Half of the labels are masked, as in instruction tuning. Tokens are made for this case."""
    batch = make_batch(0)
    batch["labels"][:, :6] = -100
    cosine = {}
    for name in ("columns", "tokens"):
        celora.attach(model, CELoraConfig(estimator=name, keep_ratio=0.5, rank=0))
        cosine[name] = celora.audit(model, batch).cosine
    assert cosine["tokens"] > cosine["columns"]


def test_trains_resumes_and_copies_like_any_other(tmp_path: object) -> None:
    config = CELoraConfig(estimator="tokens", keep_ratio=0.5, rank=2, refresh_every=3)
    first, second = make_model(), make_model()
    for model in (first, second):
        celora.attach(model, config)
    train(first, 4)
    optimizer = train(second, 2)
    celora.save_state(second, str(tmp_path))
    celora.attach(second, "off")
    celora.attach(second, config)
    celora.load_state(second, str(tmp_path))
    assert require(second).clock.step == 2
    train(second, 2, first=2, optimizer=optimizer)
    found = adapter(second)
    for name, value in adapter(first).items():
        assert value.equal(found[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_energy_keeps_the_tokens_that_hold_the_share(dtype: torch.dtype, share: float) -> None:
    W, G = torch.randn(20, 12).to(dtype), (torch.randn(200, 20) * torch.rand(200, 1).pow(6)).to(dtype)
    estimate = Tokens(20, 12, keep_ratio=share, selection="energy").estimate(G, W)
    needed = reference.energy(G.double().square().sum(1), share)
    kept = (estimate != 0).any(1).nonzero()[:, 0]
    assert set(needed.tolist()) <= set(kept.tolist())
    assert len(kept) == -(-len(needed) // 8) * 8
    torch.testing.assert_close(estimate[kept], G[kept] @ W)


@pytest.mark.parametrize("precision", ["native", "int8"])
def test_a_share_of_one_leaves_out_only_what_is_zero(precision: str) -> None:
    if precision != "native" and refuses(precision):
        return
    W, G = torch.randn(32, 24), torch.randn(200, 32)
    G[torch.randperm(200)[:150]] = 0
    estimate = Tokens(32, 24, keep_ratio=1.0, selection="energy", precision=precision).estimate(G, W)
    whole = Tokens(32, 24, keep_ratio=1.0, precision=precision).estimate(G, W)
    torch.testing.assert_close(estimate, whole)


def test_on_an_accelerator_energy_keeps_the_share_that_the_refresh_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, counting in every backward would wait for the device.

    The code path is the same except for the device's name.
    """
    W, G = torch.randn(20, 12), torch.randn(640, 20) * torch.rand(640, 1).pow(6)
    estimator = Tokens(20, 12, keep_ratio=0.9, selection="energy")
    patch_all(monkeypatch, "celora.machine.device:reads_freely", lambda device: False)
    assert estimator.estimate(G, W).equal(G @ W)  # nothing was observed yet, so the product is exact
    estimator.observe(G, W, G @ W)
    estimator.observe(G / 3, W, G @ W / 3)
    estimator.select()
    resumed = Tokens(20, 12, keep_ratio=0.9, selection="energy")
    resumed.load_state_dict(estimator.state_dict())
    needed = len(reference.energy(G.double().square().sum(1), 0.9))
    for tested in (estimator, resumed):
        kept = int((tested.estimate(G, W) != 0).any(1).sum())
        assert needed <= kept <= needed + 40


def test_on_an_accelerator_a_share_of_one_leaves_out_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refresh saw padding that later batches do not have."""
    W, G = torch.randn(20, 12), torch.randn(64, 20)
    padded = G * (torch.arange(64) < 16)[:, None]
    estimator = Tokens(20, 12, keep_ratio=1.0, selection="energy")
    patch_all(monkeypatch, "celora.machine.device:reads_freely", lambda device: False)
    estimator.observe(padded, W, padded @ W)
    estimator.select()
    assert estimator.estimate(G, W).equal(G @ W)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("selection", ["topk", "energy"])
def test_int8_x_tokens_equals_the_reference_composition(dtype: torch.dtype, selection: str) -> None:
    if refuses():
        return
    W, G = (torch.randn(32, 24) / 6).to(dtype), (torch.randn(200, 32) * torch.rand(200, 1).pow(4)).to(dtype)
    estimator = Tokens(32, 24, keep_ratio=0.64, selection=selection, precision="int8")
    estimate = estimator.estimate(G, W).double()
    kept = (estimate != 0).any(1)
    needed, step = len(reference.energy(G.double().square().sum(1), 0.64)), estimator.product.grain(200, G.device)
    assert int(kept.sum()) == (128 if selection == "topk" else -(-needed // step) * step)
    closed = torch.zeros_like(estimate)
    closed[kept] = reference.int8(G[kept].double(), W.double(), paired=paired())
    assert (estimate - closed).norm() / closed.norm() < (3e-3 if dtype == torch.float32 else 6e-3)
    assert estimator.cost == pytest.approx(0.32 if selection == "topk" else 0.5)


def test_on_an_accelerator_energy_waits_for_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    W, G = torch.randn(20, 12), torch.randn(64, 20) * torch.rand(64, 1).pow(6)
    patch_all(monkeypatch, "celora.machine.device:reads_freely", lambda device: device.type == "cpu")
    estimator = Tokens(20, 12, keep_ratio=0.9, selection="energy")
    assert estimator.ready
    patch_all(monkeypatch, "celora.machine.device:reads_freely", lambda device: False)
    assert not estimator.ready
    assert Tokens(20, 12, keep_ratio=1.0, selection="energy").ready
    for gradient in (G * torch.inf, G):  # the first gradient tells nothing
        estimator.observe(gradient, W, gradient @ W)
        estimator.select()
        assert estimator.ready == (gradient is G)
    share = estimator.state_dict()["share"]
    estimator.observe(G * torch.nan, W, G @ W)
    estimator.select()
    assert estimator.state_dict()["share"] == share


def test_where_a_model_has_been_moved_to_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model moves to a device that does not count tokens. All are kept until a refresh says how many are needed."""
    W, G = torch.randn(20, 12), torch.randn(64, 20)
    estimator = Tokens(20, 12, keep_ratio=0.9, selection="energy")
    estimator.device = torch.device("meta")
    patch_all(monkeypatch, "celora.machine.device:reads_freely", lambda device: device.type == "meta")
    assert estimator.ready
    assert estimator.estimate(G, W).equal(G @ W)
    assert not estimator.ready
    assert not estimator.clone().ready


def test_processes_that_select_alike_keep_the_mean_of_their_shares() -> None:
    W, total = torch.randn(20, 12), torch.zeros(2)
    estimators = [Tokens(20, 12, keep_ratio=0.5, selection="energy") for _ in range(3)]
    for estimator, alive in zip(estimators, (8, 16, 0), strict=True):
        G = torch.ones(32, 20) * (torch.arange(32) < alive)[:, None]
        estimator.observe(G, W, G @ W)
        pooled = estimator.pooled()
        assert pooled is not None
        assert len(pooled) == estimator.pooled_size
        total += pooled
    for estimator in estimators:
        estimator.take_pooled(total, None)
        estimator.select()
        assert estimator.state_dict()["share"] == pytest.approx((4 + 8) / 2 / 32)
