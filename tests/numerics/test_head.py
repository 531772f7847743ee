"""The loss over labelled tokens, compared with its formula in float64, and its memory."""

from __future__ import annotations

import statistics
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from celora.numerics import head, reference
from celora.numerics.head import Logits, score_tokens
from celora.numerics.sampling import inclusion_probabilities, sample, uniform
from largest import Largest
from patching import patch_all
from tiers import TIERS, use_tier
from without import count_linear, without


@pytest.fixture(params=[*TIERS, "operators"], autouse=True)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here run with the compiled passes of each tier, and without them."""
    if request.param == "operators":
        without(monkeypatch, "c")
    else:
        use_tier(monkeypatch, request.param)


def inputs(
    dtype: torch.dtype = torch.float32, *, n: int = 50, words: int = 777
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = torch.randn(2, 40, 32).to(dtype).requires_grad_()
    weight = torch.randn(words, 32).to(dtype)
    rows = torch.randperm(80)[:n].sort().values
    return hidden, rows, torch.randint(0, words, (n,)), weight


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@pytest.mark.parametrize("chunk", [7, 512])
def test_scores_and_gradient(
    scale: float, cap: float | None, smoothing: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_ROWS", chunk)
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_NUMBERS", 1)
    patch_all(monkeypatch, "celora.kernels.plain:_BLOCK_NUMBERS", 3000)
    hidden, rows, targets, weight = inputs(words=97)
    of_each = torch.rand(len(rows))
    found = score_tokens(hidden, rows, targets, weight, logits=Logits(scale, cap), smoothing=smoothing, statistics=True)
    (found.log_probs * of_each).sum().backward()

    twin = hidden.detach().double().requires_grad_()
    chosen = twin.reshape(80, 32)[rows]
    expected = reference.token_log_probs(chosen, weight.double(), targets, scale=scale, cap=cap, smoothing=smoothing)
    (expected * of_each).sum().backward()
    assert (found.log_probs - expected).abs().max() < 1e-6 * expected.abs().max()
    # Rounded terms are summed over 97 words in float32. Their roundings are a random walk; allow twice that.
    assert (hidden.grad - twin.grad).norm() < 2 * 97**0.5 * torch.finfo(torch.float32).eps * twin.grad.norm()
    every = [torch.full_like(targets, word) for word in range(97)]
    log_p = torch.stack([reference.token_log_probs(chosen, weight.double(), t, scale=scale, cap=cap) for t in every], 1)
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(1).float(), rtol=1e-4, atol=1e-5)
    assert found.top1.equal(log_p.argmax(1) == targets)


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("chunk", [7, 512])
def test_gradient_of_the_entropy(cap: float | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO's entropy bonus trains with it. Compared with autograd in float64."""
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_ROWS", chunk)
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_NUMBERS", 1)
    hidden, rows, targets, weight = inputs(words=97)
    bias, of_each, of_others = torch.randn(97), torch.rand(len(rows)), torch.rand(len(rows))
    found = score_tokens(hidden, rows, targets, weight, bias, logits=Logits(0.3, cap), statistics=True)
    (found.entropy * of_each + found.log_probs * of_others).sum().backward()

    twin = hidden.detach().double().requires_grad_()
    y = 0.3 * (twin.reshape(80, 32)[rows] @ weight.double().T + bias)
    log_p = (y if cap is None else cap * torch.tanh(y / cap)).log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    (entropy * of_each + log_p.gather(1, targets[:, None])[:, 0] * of_others).sum().backward()
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=1e-4, atol=1e-5)
    assert (hidden.grad - twin.grad).norm() < 2 * 97**0.5 * torch.finfo(torch.float32).eps * twin.grad.norm()


def test_a_bonus_of_nothing_and_words_that_are_masked() -> None:
    hidden, rows, targets, weight = inputs(words=97)
    bias = torch.zeros(97)
    bias[90:] = -torch.inf
    targets = targets.clamp(max=89)
    for factor, expected in ((0.0, False), (1.0, True)):
        hidden.grad = None
        (factor * score_tokens(hidden, rows, targets, weight, bias, statistics=True).entropy).sum().backward()
        assert hidden.grad.isfinite().all()
        assert bool(hidden.grad.any()) is expected


def test_bias_and_no_gradient() -> None:
    hidden, rows, targets, weight = inputs()
    bias = torch.randn(777)
    wide = torch.cat([weight, bias[:, None]], 1)
    ones = torch.cat([hidden.detach(), torch.ones(2, 40, 1)], 2)
    expected = reference.token_log_probs(ones.reshape(80, 33)[rows].double(), wide.double(), targets)
    with torch.no_grad():
        found = score_tokens(hidden, rows, targets, weight, bias)
    assert not found.log_probs.requires_grad
    assert found.entropy is None
    torch.testing.assert_close(found.log_probs, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """As good as the plain way to write it in the same dtype. float64 is the judge."""
    hidden, rows, targets, weight = inputs(dtype)
    truth = hidden.detach().double().requires_grad_()
    reference.token_log_probs(truth.reshape(80, 32)[rows], weight.double(), targets).mean().backward()
    score_tokens(hidden, rows, targets, weight).log_probs.mean().backward()
    ours, hidden.grad = hidden.grad, None
    logits = (hidden.reshape(80, 32)[rows] @ weight.T).float()
    logits.log_softmax(1).gather(1, targets[:, None]).mean().backward()
    theirs = hidden.grad
    errors = [(grad.double() - truth.grad).norm() / truth.grad.norm() for grad in (ours, theirs)]
    assert errors[0] < 1.5 * errors[1] + 1e-3


def test_tokens_without_label_get_exactly_nothing() -> None:
    hidden, rows, targets, weight = inputs()
    score_tokens(hidden, rows, targets, weight).log_probs.sum().backward()
    others = torch.ones(80, dtype=torch.bool)
    others[rows] = False
    assert (hidden.grad.reshape(80, 32)[others] == 0).all()
    assert (hidden.grad.reshape(80, 32)[rows] != 0).any(1).all()


def test_no_labelled_tokens() -> None:
    hidden, rows, targets, weight = inputs()
    found = score_tokens(hidden, rows[:0], targets[:0], weight, statistics=True)
    found.log_probs.sum().backward()
    assert found.log_probs.shape == found.entropy.shape == (0,)
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("keep", [0.2, 0.4])
def test_gradient_through_part_of_the_vocabulary(keep: float) -> None:
    hidden, rows, targets, weight = inputs()
    grad = torch.rand(len(rows))
    found = score_tokens(hidden, rows, targets, weight, keep_ratio=keep, seed=5)
    (found.log_probs * grad).sum().backward()
    chosen = hidden.detach().reshape(80, 32)[rows].double()
    of_logits = torch.nn.functional.one_hot(targets, len(weight)) - (chosen @ weight.double().T).softmax(1)
    kept, offset = round(keep * len(weight)), uniform(5, 0, hidden.device)
    index, factors = sample(inclusion_probabilities(of_logits.abs().amax(0), kept), kept, offset)
    assert (factors == 1).any()
    assert (factors > 1).any()
    expected = reference.estimated_head_gradient(chosen, weight.double(), targets, grad.double(), index, factors)
    assert (hidden.grad.reshape(80, 32)[rows] - expected).norm() < 1e-5 * expected.norm()
    whole = reference.token_log_probs(chosen, weight.double(), targets)
    assert (found.log_probs - whole).abs().max() < 1e-6 * whole.abs().max()  # the loss itself is exact


@pytest.mark.parametrize("how", [*TIERS[-1:], "operators"], indirect=True)  # a second each
def test_what_is_drawn_of_the_vocabulary_averages_out() -> None:
    hidden, rows, targets, weight = inputs()
    grads = []
    for keep, seed in [(1.0, 0), *((0.3, seed) for seed in range(300))]:
        h = hidden.detach().clone().requires_grad_()
        score_tokens(h, rows, targets, weight, keep_ratio=keep, seed=seed).log_probs.sum().backward()
        grads.append(h.grad)
    exact, errors = grads[0], [(grad - grads[0]) / grads[0].norm() for grad in grads[1:]]
    one = statistics.fmean(float(error.norm()) for error in errors)
    assert 0.01 < one < 0.2
    assert sum(errors).norm() / len(errors) < 0.1 * one  # 300 seeds average to 1 / sqrt(300) = 0.06
    assert not grads[1].equal(grads[2])
    assert exact.isfinite().all()


@pytest.mark.parametrize("multiple", [8, 128], ids=["", "chunks of padding"])
def test_measuring_an_estimate_leaves_the_gradient_exact(multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_ROWS", 21)
    monkeypatch.setattr(head, "grain", lambda _: multiple)
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_NUMBERS", 1)
    hidden, rows, targets, weight = inputs()
    grads = []
    for keep in (1.0, 0.2):
        h = hidden.detach().clone().requires_grad_()
        score_tokens(h, rows, targets, weight, keep_ratio=keep).log_probs.sum().backward()
        grads.append(h.grad.reshape(80, 32)[rows])
    measured: list[tuple[Tensor, Tensor]] = []
    found = score_tokens(hidden, rows, targets, weight, keep_ratio=0.2, measure=lambda *both: measured.append(both))
    found.log_probs.sum().backward()
    estimate, exact = map(torch.cat, zip(*measured, strict=True))
    assert hidden.grad.reshape(80, 32)[rows].equal(grads[0])
    assert exact.equal(grads[0])
    assert estimate.equal(grads[1])


def test_the_gradient_of_a_trained_head_sits_in_few_words() -> None:
    """Each hidden state points to one word. Less than a third of the vocabulary keeps nearly all of the gradient."""
    _, rows, targets, weight = inputs()
    weight = torch.nn.functional.normalize(weight, dim=1)
    hidden = torch.zeros(80, 32)
    hidden[rows] = 12 * weight[targets] + torch.randn(50, 32)
    grads = []
    for keep in (1.0, 0.3):
        h = hidden.clone().requires_grad_()
        score_tokens(h, rows, targets, weight, keep_ratio=keep).log_probs.sum().backward()
        grads.append(h.grad)
    assert torch.cosine_similarity(grads[0].flatten(), grads[1].flatten(), dim=0) > 0.97


@pytest.mark.parametrize("cap", [None, 5.0])
def test_words_that_are_left_out_keep_what_they_have_in_common(cap: float | None) -> None:
    """All rows of a head share a direction. The targets and all other words use it with opposite signs."""
    hidden, rows, targets, weight = inputs()
    weight = 0.02 * weight + torch.randn(weight.shape[1])
    logits = head.Logits(0.5, cap)
    grads = []
    for keep in (1.0, 0.2):
        h = hidden.detach().clone().requires_grad_()
        score_tokens(h, rows, targets, weight, logits=logits, keep_ratio=keep).log_probs.sum().backward()
        grads.append(h.grad)
    exact, estimate = grads
    assert (estimate - exact).norm() < 0.15 * exact.norm()


def test_more_targets_than_words_that_are_kept_do_no_harm_together() -> None:
    """Then no word is certain, and tokens must not share an error: it would outgrow what they learn."""
    tokens, words = 300, 400
    targets = torch.randint(0, words, (tokens,))
    grad = -torch.softmax(torch.randn(words) + 0.1 * torch.randn(tokens, words), 1)
    grad[torch.arange(tokens), targets] += 1
    weight = torch.randn(words, 32)
    kept = 0.5
    assert targets.unique().numel() > kept * words
    exact, found = grad @ weight, torch.empty(tokens, 32)
    errors = []
    for seed in range(10):
        head.through_the_head(grad, weight, targets, kept, found, seed)
        errors.append(float((found - exact).sum(0).norm()))
    alone = float((found - exact).norm())  # what independent errors would add up to
    assert statistics.fmean(errors) < 2 * alone


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_ROWS", 10)
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_NUMBERS", 1)
    hidden, rows, targets, weight = inputs(words=5000)
    with Largest() as seen:
        score_tokens(hidden, rows, targets, weight).log_probs.sum().backward()
    assert seen.numbers == max(10 * 5000, weight.numel())


def test_a_library_that_cannot_write_into_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are new for each chunk. Those of the chunk before are gone by then."""
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_ROWS", 20)
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_NUMBERS", 1)
    hidden, rows, targets, weight = inputs()

    def scored() -> tuple[Tensor, ...]:
        found = score_tokens(hidden, rows, targets, weight, statistics=True)
        assert found.entropy is not None
        loss = found.log_probs.sum() + found.entropy.sum()
        return found.log_probs.detach(), *torch.autograd.grad(loss, hidden)

    expected, project = scored(), head._project
    seen, logits = count_linear(monkeypatch), list[weakref.ref[Tensor]]()

    def remembered(*given: Any) -> Tensor:
        assert all(ref() is None for ref in logits[:3])
        logits.append(weakref.ref(z := project(*given)))
        return z

    patch_all(monkeypatch, "celora.numerics.head:_project", remembered)
    for found, one in zip(scored(), expected, strict=True):
        torch.testing.assert_close(found, one)
    assert len(logits) > 6
    assert len(seen) == 2 * len(logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    hidden, rows, targets, weight = inputs()
    with torch.no_grad():
        hidden.view(80, 32)[rows[3]] = bad
    found = score_tokens(hidden, rows, targets, weight)
    assert torch.isfinite(found.log_probs).tolist() == [i != 3 for i in range(50)]
    found.log_probs.sum().backward()
    assert not torch.isfinite(hidden.grad.reshape(80, 32)[rows[3]]).any()


def test_the_first_chunk_is_compared_before_its_logits_are_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_ROWS", 20)
    patch_all(monkeypatch, "celora.numerics.head:_CHUNK_NUMBERS", 1)
    hidden, rows, targets, weight = inputs(words=97)
    bias, seen = torch.randn(97), list[Tensor]()

    def compare(x: Tensor, logits: Tensor, w: Tensor, b: Tensor | None) -> None:
        seen.extend(t.clone() for t in (x, logits, torch.nn.functional.linear(x, w, b)))

    score_tokens(hidden, rows, targets, weight, bias, compare=compare)
    x, logits, exact = seen
    assert x.equal(hidden.detach().reshape(80, 32)[rows[: len(x)]])
    assert 0 < len(x) <= 20
    torch.testing.assert_close(logits, exact)
