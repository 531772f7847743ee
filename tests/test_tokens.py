"""The token estimator against its reference twin, and its promise to lose nothing that is zero."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import celora
from celora import CELoraConfig, reference
from celora.attach import require
from celora.estimators import Dense, Tokens
from conftest import adapter, make_batch, make_model, train


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
    # Smaller products may add up in another order: within one rounding of the result.
    torch.testing.assert_close(Tokens(33, 20, keep_ratio=7 / 16).estimate(G, W), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeping_everything_is_dense_bit_for_bit(dtype: torch.dtype) -> None:
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
    """Half of the labels masked, as in instruction tuning: the case tokens are made for."""
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
    for name, value in adapter(first).items():
        assert value.equal(adapter(second)[name])
