"""Attention of packed sequences against the same one by one, and its float32 backward against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from celora import attention
from celora.errors import CELoraError

LENGTHS = (5, 1, 200, 17)


def inputs(dtype: torch.dtype, kv_heads: int = 4) -> list[Tensor]:
    n = sum(LENGTHS)
    shapes = ((1, 4, n, 16), (1, kv_heads, n, 16), (1, kv_heads, n, 16))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale + mask) v over the packed row, with a mask that is causal inside each sequence."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    of = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(of))
    seen = (of[:, None] == of) & (place[:, None] >= place)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~seen, -torch.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_formula(dtype: torch.dtype, kv_heads: int, scaling: float | None) -> None:
    of = inputs(dtype, kv_heads)
    module = nn.Identity()
    module.num_key_value_groups = 4 // kv_heads  # type: ignore[assignment]
    grad = torch.randn(1, sum(LENGTHS), 4, 16).to(dtype)
    found, _ = attention.attention(module, *of, None, scaling=scaling, celora_lengths=LENGTHS)
    found.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in of]
    expected = plain(*exact, 0.25 if scaling is None else scaling)
    expected.backward(grad.double())
    allowed = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.dtype == dtype
    assert (found - expected).norm() < allowed * expected.norm()
    for t, true in zip(of, exact, strict=True):
        assert (t.grad - true.grad).norm() < allowed * true.grad.norm()


def test_the_float32_backward_is_taken_and_is_no_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = torch.randn(1, sum(LENGTHS), 4, 16).bfloat16()
    errors, outputs = {}, []
    for short in (0, 160):
        monkeypatch.setattr(attention, "_SHORT", short)
        torch.manual_seed(1)
        of = inputs(torch.bfloat16)
        assert attention._backward_pays(*of, LENGTHS) is (short > 0)
        found, _ = attention.attention(nn.Identity(), *of, None, celora_lengths=LENGTHS)
        found.backward(grad)
        exact = [t.detach().double().requires_grad_() for t in of]
        plain(*exact, 0.25).backward(grad.double())
        errors[short] = [float((t.grad - e.grad).norm() / e.grad.norm()) for t, e in zip(of, exact, strict=True)]
        outputs.append(found.detach())
    assert outputs[0].equal(outputs[1])
    assert all(new < 1.05 * old for new, old in zip(errors[160], errors[0], strict=True))


@pytest.mark.parametrize("what", ["float32", "dropout", "no gradient", "long"])
def test_everything_else_is_transformers_own(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not this one")

    monkeypatch.setattr(attention._Causal, "apply", refuse)
    of = inputs(torch.float32 if what == "float32" else torch.bfloat16)
    if what == "no gradient":
        of = [t.detach() for t in of]
    if what == "long":
        monkeypatch.setattr(attention, "_SHORT", 0)
    dropout = 0.1 if what == "dropout" else 0.0
    found, _ = attention.attention(nn.Identity(), *of, None, dropout=dropout, celora_lengths=LENGTHS)
    assert found.shape == (1, sum(LENGTHS), 4, 16)


def test_attention_refuses_what_it_was_not_packed_for() -> None:
    q = torch.randn(1, 2, 6, 4)
    with pytest.raises(CELoraError, match="6 queries and 6 keys for 5 packed tokens"):
        attention.attention(nn.Identity(), q, q, q, None, celora_lengths=(2, 3))
