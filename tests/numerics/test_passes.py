"""RMS norms, gates and rotations in one pass, in each tier, compared with torch's operators. float64 is the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from celora.numerics.passes import gated, rms_norm, rotated
from tiers import TIERS, use_tier

DTYPES = [torch.float32, torch.bfloat16]
NORMS = {LlamaRMSNorm: (0.0, True), GemmaRMSNorm: (1.0, False), Olmo2RMSNorm: (0.0, False)}


@pytest.fixture(params=TIERS, autouse=True)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests here run with the kernels of each tier. Skipped without a compiler."""
    use_tier(monkeypatch, request.param)


def results(function: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
    """The function's result for these arguments, and their gradients for a fixed random gradient of the result."""
    given = tuple(t.detach().requires_grad_() for t in given)
    y = function(*given)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, given, grad)]


class _Summed(torch.autograd.Function):
    """A gradient that is on its way from other processes, as layers of Megatron's kind return it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return AsyncCollectiveTensor(grad)


PASSES: list[tuple[Callable[..., Tensor], list[Tensor]]] = [
    (lambda x: rms_norm(x, torch.ones(64), 1e-6), [torch.randn(5, 64)]),
    (gated, [torch.randn(5, 64), torch.randn(5, 64)]),
    (lambda x: rotated(x, torch.randn(1, 3, 64), torch.ones(1, 3, 64)), [torch.randn(2, 2, 3, 64)]),
]


@pytest.mark.parametrize(("function", "given"), PASSES, ids=["norm", "gate", "rotation"])
def test_gradients_on_their_way_are_waited_for(function: Callable[..., Tensor], given: list[Tensor]) -> None:
    torch.manual_seed(0)
    expected = results(function, *given)
    torch.manual_seed(0)
    for ours, theirs in zip(results(lambda *x: _Summed.apply(function(*x)), *given), expected, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize(("function", "given"), PASSES, ids=["norm", "gate", "rotation"])
def test_compiled_autograd(function: Callable[..., Tensor], given: list[Tensor]) -> None:
    """The forward is not traced, its backward is: the kernels run all the same."""
    torch.manual_seed(0)
    expected = results(function, *given)[1:]
    torch.manual_seed(0)
    given = [x.detach().requires_grad_() for x in given]
    y = function(*given)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    with compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(grad)
    for x, theirs in zip(given, expected, strict=True):
        assert x.grad is not None
        assert x.grad.equal(theirs)


def check(ours: list[Tensor], theirs: list[Tensor], exact: list[Tensor], *, terms: int = 0) -> None:
    """Check that our results are no further from float64 than theirs, apart from the order of a sum of `terms` terms.

    In bfloat16 the whole distance is the rounding of the result, which is the same on every CPU. In float32 a sum of n
    positive terms is off by at most n u, u = 2^-24, in this CPU's order. torch's own sum may happen to be exact.
    """
    for our, their, true in zip(ours, theirs, exact, strict=True):
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        error, allowed = ((result.double() - true).norm() for result in (our, their))
        if our.dtype == torch.bfloat16:
            assert error <= 1.3 * allowed + 1e-9
        else:
            assert error <= 2.0 * allowed + terms * 2**-24 * true.norm() + 1e-9


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 7, 33), (3, 5, 2, 16)])
def test_norms(shape: tuple[int, ...], kind: Any, dtype: torch.dtype) -> None:
    norm = kind(shape[-1]).to(dtype)
    nn.init.normal_(norm.weight)
    norm.weight.requires_grad_(False)
    offset, rounds = NORMS[kind]
    x = (3 * torch.randn(shape)).to(dtype)
    eps = 1e-6
    ours = results(lambda x: rms_norm(x, norm.weight, eps, offset=offset, rounds=rounds), x)
    true = results(lambda x: F.rms_norm(x, x.shape[-1:], offset + norm.weight.double(), eps), x.double())
    check(ours, results(norm, x), true, terms=shape[-1] // 4)  # the lowest tier adds in vectors of four


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 7, 33), (300, 64)])
def test_gates(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = (30 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    ours = results(gated, gate, up)
    check(ours, results(plain, gate, up), results(plain, gate.double(), up.double()))


@pytest.mark.parametrize("x", [float("nan"), float("inf"), -float("inf"), -100.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_at_the_ends(dtype: torch.dtype, x: float) -> None:
    gate, up = torch.full((2, 20), x, dtype=dtype), torch.ones(2, 20, dtype=dtype)
    ours = results(gated, gate, up)
    theirs = results(lambda gate, up: F.silu(gate) * up, gate, up)
    for our, their in zip(ours, theirs, strict=True):
        if x != float("inf"):  # torch's gradient at infinity is 0 times infinity
            torch.testing.assert_close(our, their, equal_nan=True, rtol=1e-2, atol=1e-30)
    norm = rms_norm(gate, up[0], 1e-6)
    assert bool(norm.isfinite().all()) is (abs(x) == 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "batch", "angles"), [(4, 1, 1), (3, 2, 2), (1, 2, 1)])
def test_rotations(heads: int, batch: int, angles: int, dtype: torch.dtype) -> None:
    q = torch.randn(batch, 9, heads, 16).to(dtype).transpose(1, 2)
    k = torch.randn(batch, 1, 9, 16).to(dtype)
    cosine, sine = torch.randn(2, angles, 9, 16).to(dtype)

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat(apply_rotary_pos_emb(q, k, cosine.to(q.dtype), sine.to(q.dtype)), 1)

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return torch.cat([rotated(q, cosine, sine), rotated(k, cosine, sine)], 1)

    found = results(ours, q, k)
    check(found, results(plain, q, k), results(plain, q.double(), k.double()))
    # Each result is a sum of two products. Both ways round at most three times. In bfloat16 they are always equal.
    largest = 2 * max(q.abs().max(), k.abs().max()) * max(cosine.abs().max(), sine.abs().max())
    allowed = 3 * torch.finfo(dtype).eps * float(largest) if dtype == torch.float32 else 0
    torch.testing.assert_close(found[0], plain(q, k), rtol=0, atol=allowed)
    whole = results(lambda q: ours(q, k)[:, :heads], q)
    assert whole[1].shape == q.shape


def test_contiguity_and_broadcasting_are_not_taken_for_granted() -> None:
    x, weight = torch.randn(9, 16).t(), torch.randn(9)
    expanded = torch.ones(()).expand(16, 9)
    for ours, plain in (
        (lambda x: rms_norm(x, weight, 1e-6), lambda x: F.rms_norm(x, (9,), weight, 1e-6)),
        (lambda x: gated(x, x + 1), lambda x: F.silu(x) * (x + 1)),
    ):
        found, expected = (function(x.requires_grad_()) for function in (ours, plain))
        torch.testing.assert_close(found, expected)
        gradient, true = (torch.autograd.grad(y, x, expanded)[0] for y in (found, expected))
        torch.testing.assert_close(gradient, true, rtol=1e-4, atol=1e-5)
    # With one token for each sequence, torch may call a tensor contiguous whatever its strides are.
    q, angles = torch.randn(2, 3, 1, 8), torch.randn(2, 2, 1, 8)
    found = rotated(q, *angles)
    torch.testing.assert_close(found, apply_rotary_pos_emb(q, q, *angles)[0])


def test_results_may_be_changed_in_place() -> None:
    x = torch.randn(1, 3, 5, 8).requires_grad_()
    angles = torch.rand(2, 1, 5, 8)
    for y in (
        rms_norm(x, torch.ones(8), 1e-6),
        gated(x, x),
        rotated(x, *angles),
    ):
        y.mul_(2).sum().backward()
