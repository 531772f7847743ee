"""RMS norms and gates by torch's operators: what the models' own give, from x, gate and up alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from celora.kernels import plain_passes

HALVES = [torch.bfloat16, torch.float16]


def test_on_accelerators_alone() -> None:
    assert not plain_passes.takes(torch.empty(1, device="cpu"))
    assert not plain_passes.takes(torch.empty(1, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_a_gate_is_the_models_own_bit_for_bit(dtype: torch.dtype) -> None:
    gate, up, grad = ((3 * torch.randn(5, 2, 33)).to(dtype) for _ in range(3))
    given = gate.clone().requires_grad_(), up.clone().requires_grad_()
    expected = F.silu(given[0]) * given[1]
    assert plain_passes.gated(gate, up).equal(expected)
    for found, wanted in zip(
        plain_passes.gated_backward(grad, gate, up), torch.autograd.grad(expected, given, grad), strict=True
    ):
        assert found.equal(wanted)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 64), (2, 7, 33)])
def test_a_norm(shape: tuple[int, ...], dtype: torch.dtype, kind: Any) -> None:
    """Float64 is the judge. Its own rounding of a result is half an ulp; float32 sums add some 1e-6."""
    norm = kind(shape[-1]).to(dtype)
    nn.init.normal_(norm.weight)
    weight, offset = norm.weight.detach(), float(kind is GemmaRMSNorm)
    x, grad = ((3 * torch.randn(shape)).to(dtype) for _ in range(2))
    y, inverse = plain_passes.rms_norm(x, weight, offset=offset, eps=norm_eps(norm), rounds=kind is LlamaRMSNorm)
    assert y.equal(norm(x))
    assert (inverse.shape, inverse.dtype) == (shape[:-1], torch.float32)
    exact = x.double().requires_grad_()
    true = F.rms_norm(exact, shape[-1:], offset + weight.double(), norm_eps(norm))
    (wanted,) = torch.autograd.grad(true, exact, grad.double())
    found = plain_passes.rms_norm_backward(grad, x, weight, inverse, offset=offset)
    assert found.dtype == dtype
    allowed = torch.finfo(dtype).eps / 2 + 2e-6
    assert (found.double() - wanted).norm() <= allowed * wanted.norm()


def test_the_inputs_stay() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    grad, gate = torch.randn(4, 8), torch.randn(4, 8)
    before: list[Tensor] = [t.clone() for t in (x, weight, grad, gate)]
    _, inverse = plain_passes.rms_norm(x, weight, offset=0.0, eps=1e-6, rounds=True)
    plain_passes.rms_norm_backward(grad, x, weight, inverse, offset=0.0)
    plain_passes.gated_backward(grad, gate, plain_passes.gated(gate, x))
    assert all(t.equal(then) for t, then in zip((x, weight, grad, gate), before, strict=True))


def norm_eps(norm: Any) -> float:
    return float(getattr(norm, "variance_epsilon", None) or norm.eps)
