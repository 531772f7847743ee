"""The scores of chunks that a graph may record: those of the kernels, in few sizes, where nothing is measured."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from celora.kernels import widened
from celora.numerics import head
from celora.numerics.head import Logits, TokenScores, score_tokens
from celora.numerics.head_in_graph import ChunkScores, score_chunk, sizes
from celora.numerics.products import both_ways
from celora.numerics.products.both_ways import Int8BothWays
from celora.numerics.select import grain
from machine import refuses
from patching import patch_all
from without import without

WORDS, HIDDEN = 96, 32


@pytest.fixture(autouse=True)
def _on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "c", "onednn")
    for module in (head, both_ways):
        monkeypatch.setattr(module, "reads_freely", lambda device: False)
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_ROWS", 16)
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_NUMBERS", 1)


class Counted:
    """`score_chunk`, and the sizes of the chunks that it was called with."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, hidden: Tensor, *args: Any, **settings: Any) -> ChunkScores:
        self.sizes.append(len(hidden))
        return score_chunk(hidden, *args, **settings)


def scores(count: int, **settings: Any) -> tuple[TokenScores, Tensor]:
    """The scores of `count` of 80 tokens, and the gradient of their weighted sum by the hidden states."""
    drawn = torch.Generator().manual_seed(count)
    hidden = torch.randn(2, 40, HIDDEN, generator=drawn).requires_grad_()
    weight = nn.Parameter(torch.randn(WORDS, HIDDEN, generator=drawn), requires_grad=False)
    rows = torch.randperm(80, generator=drawn)[:count].sort().values
    targets = torch.randint(0, WORDS, (count,), generator=drawn)
    if (product := settings.get("product")) is not None:
        product.look(hidden, weight)
    found = score_tokens(hidden, rows, targets, weight, **{"statistics": True, **settings})
    (found.log_probs * torch.rand(count, generator=drawn)).sum().backward()
    assert hidden.grad is not None
    return found, hidden.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_they_are_those_of_the_kernels(biased: bool, scale: float, cap: float | None, smoothing: float) -> None:
    counted = Counted()
    settings = {"logits": Logits(scale, cap), "smoothing": smoothing}
    settings["bias"] = torch.linspace(-1, 1, WORDS) if biased else None
    (found, gradient), (expected, exact) = (scores(50, compiled=how, **settings) for how in (counted, None))
    # Sums over 96 words in float32, in another order.
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    assert found.top1 is not None
    assert expected.top1 is not None
    assert found.top1.equal(expected.top1)
    assert (gradient - exact).norm() < 1e-5 * exact.norm()
    assert counted.sizes == [13] * 4  # 50 tokens in chunks of 16 at most, and two more


def test_logits_in_8_bits() -> None:
    if refuses():
        return
    counted = Counted()
    product, other = Int8BothWays(), Int8BothWays()
    (found, gradient), (expected, exact) = (
        scores(50, compiled=counted, product=product), scores(50, product=other)
    )  # fmt: skip
    assert counted.sizes
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-5)
    assert (gradient - exact).norm() < 1e-5 * exact.norm()
    assert not torch.equal(found.log_probs, scores(50)[0].log_probs)


def test_few_sizes_serve_all_batches() -> None:
    rng, seen = random.Random(0), set()
    for _ in range(2000):
        tokens = rng.randint(1, 5000)
        chunk = head.chunk_size(tokens, 49152)
        size, more = sizes(tokens, chunk)
        assert size % grain(chunk) == 0
        assert (tokens + more) % size == 0
        assert more < tokens / 4 + 1  # of the last chunk, and an eighth of each
        seen.add(size)
    assert max(seen) <= 16 * 1.125
    assert len(seen) <= 17


def test_no_labels_are_no_chunk() -> None:
    counted = Counted()
    hidden, weight = torch.randn(1, 4, HIDDEN, requires_grad=True), nn.Parameter(torch.randn(WORDS, HIDDEN))
    none = torch.zeros(0, dtype=torch.int64)
    assert len(score_tokens(hidden, none, none, weight, compiled=counted).log_probs) == 0
    assert counted.sizes == []


def measure(estimate: Tensor, exact: Tensor) -> None:
    assert estimate.shape == exact.shape


def compare(hidden: Tensor, logits: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    assert logits.shape == (len(hidden), len(weight))


@pytest.mark.parametrize(
    "settings",
    [
        {"keep_ratio": 0.5},
        {"keep_ratio": 0.5, "measure": measure},
        {"compare": compare},
        {"autocast": True},
        {"cpu": True},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_kernels_compute_what_a_graph_should_not(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counted, settings = Counted(), dict(settings)
    monkeypatch.setattr(widened, "autocasts", lambda: False)  # a CPU without bfloat16 would cast nothing
    if settings.pop("cpu", False):
        monkeypatch.setattr(head, "reads_freely", lambda device: True)
    with torch.autocast("cpu", enabled=settings.pop("autocast", False)):
        found, gradient = scores(50, compiled=counted, **settings)
        expected, exact = scores(50, **settings)
    assert counted.sizes == []
    assert torch.equal(found.log_probs, expected.log_probs)
    assert torch.equal(gradient, exact)


def test_a_weight_that_is_gathered_is_read_by_kernels() -> None:
    counted = Counted()
    hidden, weight = torch.randn(1, 4, HIDDEN), torch.randn(WORDS, HIDDEN)
    score_tokens(hidden, torch.arange(4), torch.arange(4), weight, compiled=counted)
    assert counted.sizes == []
