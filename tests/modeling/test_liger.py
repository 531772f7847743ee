"""Liger's kernels in a model with celora: its norms, gates and rotations stay Liger's, head and packing are celora's.

Liger's own patches are applied. Its Triton kernels need a GPU, so torch computes what they would.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import celora
from celora.modeling.model_graft import packing
from celora.modeling.passes import known as passes
from celora.modeling.passes.norm import Norm
from decoders import model_of
from labelled import gradients, ragged
from tolerances import OF_GRADIENT
from without import as_on_accelerators, without

pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
CALLS: list[str] = []


def norm(x: Tensor, weight: Tensor, eps: float, offset: float, *_: Any) -> Tensor:
    CALLS.append("norm")
    return nn.functional.rms_norm(x, weight.shape, weight + offset, eps)


def gate(gated: Tensor, up: Tensor, *_: float) -> Tensor:
    CALLS.append("gate")
    return nn.functional.silu(gated) * up


@pytest.fixture
def apply(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What Trainer does with `use_liger_kernel=True` and TRL's settings, undone after the test."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance, rms_norm, rope, swiglu

    usual = modeling_llama.apply_rotary_pos_emb

    def rotated(name: str, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        CALLS.append(name)
        found: tuple[Tensor, Tensor] = usual(q, k, cosine, sine)
        return found

    CALLS.clear()
    without(monkeypatch, "c")  # celora's own norms, gates and rotations are for CPUs
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", SimpleNamespace(apply=norm))
    monkeypatch.setattr(swiglu, "LigerSiLUMulFunction", SimpleNamespace(apply=gate))
    monkeypatch.setattr(rope, "dispatch", rotated)
    return lambda model: _apply_liger_kernel_to_instance(
        model=model.get_base_model(), fused_linear_cross_entropy=False, cross_entropy=False
    )


def test_norms_of_a_patched_class_stay_ligers_where_torch_would_compute_them(
    apply: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On accelerators, with a base in 8 bits: there celora saves the inputs of the model's own norms in 8 bits."""
    from liger_kernel.transformers import LigerRMSNorm

    as_on_accelerators(monkeypatch)
    assert list(passes.known(model_of("llama"), compact=True).values()).count(Norm) == 5
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", LigerRMSNorm)
    assert Norm not in passes.known(model_of("llama"), compact=True).values()


@pytest.mark.parametrize("first", ["Liger", "celora"])
def test_gradients_are_the_models_own(first: str, apply: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, packed = model_of("llama").train(), ragged([9, 20, 14]), []
    loss, expected = gradients(model, batch)
    if first == "Liger":
        apply(model)
    celora.attach(model, "exact")
    if first == "celora":
        apply(model)
    pack = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *args: packed.append(pack(*args)) or packed[-1])
    CALLS.clear()
    for _ in range(2):
        found, gradient = gradients(model, batch)
        assert found == pytest.approx(loss, rel=1e-6)
        assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()
    assert all(packed)
    assert model(**batch).logits is None
    blocks = model.config.num_hidden_layers
    assert {name: CALLS.count(name) for name in ("norm", "gate", "rope")} == {
        "norm": 3 * (2 * blocks + 1), "gate": 3 * blocks, "rope": 3 * blocks,
    }  # fmt: skip
    celora.detach(model)
    assert torch.equal(gradients(model, batch)[1], gradients(model, batch)[1])
    assert CALLS.count("norm") == 5 * (2 * blocks + 1)
