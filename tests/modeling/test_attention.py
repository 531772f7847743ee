"""Attention over packed sequences equals attention one by one. Forward and backward are compared with float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from celora.errors import CELoraError
from celora.kernels import operations
from celora.modeling import attention
from tiers import TIERS, use_tier
from without import pretend

LENGTHS = (5, 1, 200, 17)
needs_kernel = pytest.mark.skipif(not TIERS, reason="no compiled kernels")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def inputs(dtype: torch.dtype, kv_heads: int = 4, size: int = 16) -> list[Tensor]:
    n = sum(LENGTHS)
    shapes = ((1, 4, n, size), (1, kv_heads, n, size), (1, kv_heads, n, size))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale + mask) v over the packed row. The mask is causal inside each sequence."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(sequence))
    seen = (sequence[:, None] == sequence) & (place[:, None] >= place)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("size", [16, 32, 96])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula(dtype: torch.dtype, size: int, kv_heads: int, scaling: float | None) -> None:
    tensors = inputs(dtype, kv_heads, size)
    module = nn.Identity()
    module.num_key_value_groups = 4 // kv_heads  # type: ignore[assignment]
    grad = torch.randn(1, sum(LENGTHS), 4, size).to(dtype)
    found, _ = attention.attention(module, *tensors, None, scaling=scaling, celora_lengths=LENGTHS)
    found.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = plain(*exact, size**-0.5 if scaling is None else scaling)
    expected.backward(grad.double())
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.dtype == dtype
    assert (found - expected).norm() < allowed * expected.norm()
    for t, true in zip(tensors, exact, strict=True):
        assert (t.grad - true.grad).norm() < allowed * true.grad.norm()


@needs_kernel
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own tracing
def test_compiled_autograd() -> None:
    """The forward is not traced, its backward is: the kernel runs all the same."""
    tensors = inputs(torch.float32)
    grad = torch.randn(1, sum(LENGTHS), 4, 16)

    def gradients() -> list[Tensor]:
        output = attention._Tiled.apply(*tensors, LENGTHS, 0.2, False)  # type: ignore[no-untyped-call]
        output.backward(grad)
        found = [t.grad for t in tensors if t.grad is not None]
        for t in tensors:
            t.grad = None
        return found

    expected = gradients()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        found = gradients()
    assert len(found) == 3
    assert all(ours.equal(theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("what", ["float64", "dropout", "no gradient", "no kernel"])
def test_everything_else_is_transformers_own(what: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not this one")

    monkeypatch.setattr(attention._Tiled, "apply", refuse)
    tensors = inputs(torch.float64 if what == "float64" else torch.bfloat16, size=size)
    if what == "no gradient":
        tensors = [t.detach() for t in tensors]
    if what == "no kernel":
        pretend(monkeypatch, "attention", there=False)
    dropout = 0.1 if what == "dropout" else 0.0
    found, _ = attention.attention(nn.Identity(), *tensors, None, dropout=dropout, celora_lengths=LENGTHS)
    assert found.shape == (1, sum(LENGTHS), 4, size)


@needs_kernel
@each_dtype
@pytest.mark.parametrize("tokens", [2, 31, 32, 65, 300])
@pytest.mark.parametrize("size", [32, 64, 256])
def test_tiles_are_no_worse_than_torch(
    size: int, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches have the layouts of decoders: rows are transposed, and some have gaps between them.

    Torch's float32 errors come from sums in vectors, ours from sums of one number after another: of n terms, these are
    at most sqrt(n) as far off in the mean.
    """
    torch.manual_seed(2)
    wide = torch.randn(3, tokens, 8, size + 7).to(dtype)
    tensors = [wide[:, :, n : n + heads, 3 : 3 + size].transpose(1, 2) for n, heads in ((0, 4), (4, 2), (6, 2))]
    # its shape is (B, T, heads, d), but its layout in memory is another
    grad = torch.randn(3, 4, tokens, size).to(dtype)
    exact = [t.double().requires_grad_() for t in tensors]
    key, value = (t.repeat_interleave(2, 1) for t in exact[1:])
    truth = scaled_dot_product_attention(exact[0], key, value, is_causal=True)
    truth.backward(grad.double())
    module = nn.Identity()
    module.num_key_value_groups = 2  # type: ignore[assignment]

    def errors(*, tiles: bool) -> list[float]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        mask = None if tiles else torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
        found, _ = attention.attention(module, *leaves, mask)
        assert ("_Tiled" in str(found.grad_fn)) is tiles
        found.backward(grad.transpose(1, 2))
        pairs = [(found.transpose(1, 2), truth), *((t.grad, e.grad) for t, e in zip(leaves, exact, strict=True))]
        with torch.no_grad():
            return [float((one - of_truth).norm() / of_truth.norm()) for one, of_truth in pairs]

    torchs = errors(tiles=False)
    allowed = 1.1 if dtype == torch.bfloat16 else max(tokens, size) ** 0.5
    for tier in TIERS:
        use_tier(monkeypatch, tier)
        assert all(ours < allowed * torch_s for ours, torch_s in zip(errors(tiles=True), torchs, strict=True)), tier


@each_dtype
@pytest.mark.parametrize("tier", TIERS)
def test_tiles_do_not_depend_on_threads_or_company(
    tier: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sequence gets the same bits in any batch, in any order, and with any number of threads."""
    use_tier(monkeypatch, tier)
    tensors = [t.detach() for t in inputs(dtype, 2, 64)]
    sequences = torch.tensor([(0, 0, 5), (0, 5, 1), (0, 6, 200), (0, 206, 17)])
    whole, logs = operations.attention(*tensors, sequences, scale=0.125)
    grads = operations.attention_backward(whole, *tensors, whole, logs, sequences, scale=0.125)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    again, logs_again = operations.attention(*tensors, sequences.flip(0), scale=0.125)
    assert again.equal(whole)
    assert logs_again.equal(logs)
    for _, first, length in sequences.tolist():
        alone = [t[:, :, first : first + length] for t in tensors]
        one = torch.tensor([(0, 0, length)])
        out, sums = operations.attention(*alone, one, scale=0.125)
        assert out.equal(whole[:, first : first + length])
        assert sums.equal(logs[:, :, first : first + length])
        found = operations.attention_backward(out, *alone, out, sums, one, scale=0.125)
        assert all(g.equal(w[:, :, first : first + length]) for g, w in zip(found, grads, strict=True))


@needs_kernel
@each_dtype
@pytest.mark.parametrize("outlier", [0.0, 50.0])
def test_what_tiles_save_compactly_changes_gradients_a_little(outlier: float, dtype: torch.dtype) -> None:
    """Also where all keys have one number that is much larger than the rest, as in some models."""
    torch.manual_seed(3)
    tensors, found = inputs(dtype, 2, 32), {}
    with torch.no_grad():
        tensors[1][..., 5] += outlier
    for compactly in (False, True):
        output = attention._Tiled.apply(*tensors, LENGTHS, 0.2, compactly)  # type: ignore[no-untyped-call]
        grads = torch.autograd.grad(
            output, tensors, torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
        )
        found[compactly] = (output.detach(), *grads)
    exactly, rounded = found[False], found[True]
    assert rounded[0].equal(exactly[0])
    for grad, true in zip(rounded[1:], exactly[1:], strict=True):
        assert (grad - true).norm() <= (0.02 if dtype == torch.float32 else 0) * true.norm()
        assert grad.equal(true) is (dtype == torch.bfloat16)


@needs_kernel
@each_dtype
def test_tiles_take_every_row_of_a_batch(dtype: torch.dtype) -> None:
    rows = [inputs(dtype, 2, 32) for _ in range(2)]
    batch = [torch.cat(pair).detach().requires_grad_() for pair in zip(*rows, strict=True)]
    module = nn.Identity()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    found, _ = attention.attention(module, *batch, None, celora_lengths=LENGTHS)
    grad = torch.randn_like(found)
    found.backward(grad)
    for n, row in enumerate(rows):
        alone, _ = attention.attention(module, *row, None, celora_lengths=LENGTHS)
        alone.backward(grad[n : n + 1])
        assert alone.equal(found[n : n + 1])
        assert all(t.grad.equal(b.grad[n : n + 1]) for t, b in zip(row, batch, strict=True))


@needs_kernel
def test_checkpoints_get_what_the_forward_got() -> None:
    """The first forward of a checkpoint has no gradients.

    Only the keys need one, as with an adapter on `k_proj` alone.
    """
    query, key, value = inputs(torch.bfloat16, 4, 32)
    query, value = query.detach(), value.detach()
    outputs = []

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found, _ = attention.attention(nn.Identity(), query, key, value, None, celora_lengths=LENGTHS)
        outputs.append(found.detach().clone())
        return found

    result = checkpoint(run, query, key, value, use_reentrant=True)
    assert isinstance(result, Tensor)
    result.float().square().sum().backward()
    assert len(outputs) == 2
    assert outputs[0].equal(outputs[1])
    checkpointed = key.grad
    key.grad = None
    run(query, key, value).float().square().sum().backward()
    assert key.grad.equal(checkpointed)


@each_dtype
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_comes_out(
    bad: float, tier: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tier(monkeypatch, tier)
    tensors = inputs(dtype, 4, 32)
    with torch.no_grad():
        tensors[1][0, 0, 5 + 1 + 7, 3] = bad
    found, _ = attention.attention(nn.Identity(), *tensors, None, celora_lengths=LENGTHS)
    found.float().sum().backward()
    for of_a_head in (found[0, :, 0], tensors[0].grad[0, 0]):
        assert not of_a_head[5 + 1 + 7 :].isfinite().all()
        assert of_a_head[: 5 + 1].isfinite().all()
    assert found[0, 206:].isfinite().all()


@needs_kernel
def test_where_tiles_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = tensors = inputs(torch.bfloat16, 2, 32)
    module = nn.Identity()
    assert attention._tiles_pay(module, *tensors, 1)
    assert attention._tiles_pay(module, *(t.float() for t in tensors), 1)
    assert not attention._tiles_pay(module, *(t.half() for t in tensors), 1)
    assert not attention._tiles_pay(module, query, key, value.float(), 1)
    assert not attention._tiles_pay(module, *(t[..., :16] for t in tensors), 1)
    assert not attention._tiles_pay(module, query, key, value[..., :0], 1)
    assert not attention._tiles_pay(module, torch.cat([query, query]), key, value, 1)  # sdpa would repeat the keys
    assert not attention._tiles_pay(module, *(t.detach() for t in tensors), 1)
    assert not attention._tiles_pay(module, *(nn.Parameter(t) for t in tensors), 1)
    with torch.no_grad():
        assert attention._tiles_pay(module, *tensors, 1)  # the first forward of a checkpoint
        assert not attention._tiles_pay(nn.Identity().eval(), *tensors, 1)
    with FlopCounterMode(display=False):
        assert not attention._tiles_pay(module, *tensors, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    assert not attention._tiles_pay(module, *tensors, 1)  # two heads of keys for five threads
    assert attention._tiles_pay(module, *tensors, 2)


@pytest.mark.parametrize(
    "asked",
    [
        {"is_causal": False},
        {"position_bias": torch.zeros(1)},
        {"softcap": 30.0},
        {"output_attentions": True},
        {"mask": torch.ones(1)},
        {"keys": 3},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_is_more_than_causal_is_sdpas(asked: dict[str, Any]) -> None:
    asked = dict(asked)
    query, mask = torch.ones(1, 1, 2, 4), asked.pop("mask", None)
    key = torch.ones(1, 1, asked.pop("keys", 2), 4)
    changed = mask is not None or key.shape != query.shape or bool(asked)
    assert changed is not attention._only_causal(nn.Identity(), query, key, mask, **asked)
    assert attention._only_causal(nn.Identity(), query, query, None, sliding_window=None)
    module = nn.Identity()
    module.is_causal = False  # type: ignore[assignment]
    assert not attention._only_causal(module, query, query, None)


def test_attention_refuses_what_it_was_not_packed_for() -> None:
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(CELoraError, match="6 queries and 6 keys for 5 packed tokens"):
        attention.attention(nn.Identity(), q, q, q, None, celora_lengths=(2, 3))
