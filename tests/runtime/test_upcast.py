"""Turns a model to float32 for a while to get the reference gradient. Afterwards the model is the same as before."""

from __future__ import annotations

import copy
import statistics
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import celora
from celora import CELoraConfig, CELoraError
from celora.runtime.attachment import require
from celora.runtime.fidelity import Fidelity
from celora.runtime.upcast import in_float32
from patching import patch_all
from small import flat_gradient, make_base, make_batch, make_model

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=50)


def _in_bfloat16(**lora: Any) -> PeftModel:
    return make_model(dtype=torch.bfloat16, **lora).train()


def test_float32_is_the_reference_for_peft_and_for_what_is_attached(batch: dict[str, torch.Tensor]) -> None:
    model = _in_bfloat16()
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).float()
    celora.attach(model, "exact")
    ours, pefts, true = (flat_gradient(each, batch) for each in (model, plain, exact))
    found = celora.audit(model, batch, reference="float32").float32
    assert found is not None
    for fidelity, gradient in ((found.plain, pefts), (found.attached, ours)):
        assert fidelity.cosine == pytest.approx(torch.cosine_similarity(gradient, true, dim=0).item(), abs=1e-9)
        assert fidelity.relative_error == pytest.approx(((gradient - true).norm() / true.norm()).item(), rel=1e-6)
        assert 1e-3 < fidelity.relative_error < 0.1
    assert found.plain != found.attached
    said = str(celora.audit(model, batch, reference="float32")).splitlines()
    assert [line for line in said if line.startswith(f"Against float32, plain PEFT: cosine {found.plain.cosine:.4f}")]
    assert [line for line in said if line.startswith("Against float32, celora as attached: cosine")]
    assert celora.audit(model, batch).float32 is None


def test_exact_is_no_further_from_float32_than_peft() -> None:
    """A single model and batch may favour either side, so several of each decide."""
    errors: dict[str, list[float]] = {"plain": [], "attached": []}
    for seed in range(4):
        model = make_model(seed=seed, dtype=torch.bfloat16)
        celora.attach(model, "exact")
        for batch in (make_batch(2 * seed), make_batch(2 * seed + 1)):
            found = celora.audit(model, batch, reference="float32").float32
            assert found is not None
            for name, errors_of in errors.items():
                errors_of.append(getattr(found, name).relative_error)
    theirs, ours = (statistics.fmean(seen) for seen in errors.values())
    assert ours < 1.2 * theirs


def test_an_estimate_is_further_from_float32_than_peft(batch: dict[str, torch.Tensor]) -> None:
    model = _in_bfloat16()
    celora.attach(model, HALF)
    report = celora.audit(model, batch, reference="float32")
    assert report.float32 is not None
    assert report.float32.attached.cosine == pytest.approx(report.cosine, abs=0.01)
    assert report.float32.attached.cosine < report.float32.plain.cosine - 0.01


def test_dropout_is_left_out_of_the_comparison_with_float32(batch: dict[str, torch.Tensor]) -> None:
    model = make_model(lora_dropout=0.5)
    celora.attach(model, "exact")
    found = celora.audit(model, batch, reference="float32").float32
    assert found is not None
    assert found.plain == Fidelity(pytest.approx(1), 0, 1)
    assert found.attached.relative_error < 1e-5
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}


class _InterruptedError(Exception):
    pass


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_model_is_itself_again_after_float32(interrupted: bool, batch: dict[str, torch.Tensor]) -> None:
    """Adapters are in bfloat16, too, so they are replaced, and they hold gradients at that moment."""
    base = make_base(dtype=torch.bfloat16)
    base.lm_head.weight = base.model.embed_tokens.weight
    base.register_buffer("scale", torch.ones(2, dtype=torch.float16))
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1, init_lora_weights=False)
    model = get_peft_model(base, config, autocast_adapter_dtype=False).train()
    celora.attach(model, "exact")
    model(**batch).loss.backward()
    torch.set_float32_matmul_precision("medium")
    tensors = [*model.parameters(), *model.buffers()]

    def state() -> list[object]:
        grads = [None if t.grad is None else (t.grad.data_ptr(), t.grad.dtype) for t in tensors]
        hooks = [len(m._forward_hooks) for m in model.modules()]
        rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
        here = [(t.data_ptr(), t.dtype, t.stride()) for t in tensors]
        here += [(p._version,) for p in model.parameters()]
        return [here, grads, hooks, rates, torch.get_float32_matmul_precision(), require(model).switch.on]

    before, values = state(), [t.clone() for t in tensors]
    dtypes = set()

    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        dtypes.add(base.model.embed_tokens.weight.dtype)
        if interrupted and torch.float32 in dtypes:
            raise _InterruptedError
        return model(**batch).loss

    try:
        with pytest.raises(_InterruptedError) if interrupted else nullcontext():
            celora.audit(model, batch, loss=loss, reference="float32")
        assert dtypes == {torch.bfloat16, torch.float32}
        assert state() == before
        assert all(t.equal(value) for t, value in zip(tensors, values, strict=True))
    finally:
        torch.set_float32_matmul_precision("highest")


def _quantise(model: PeftModel) -> None:
    q = torch.zeros(2, 2, dtype=torch.int8)
    model.base_model.model.model.norm.weight = torch.nn.Parameter(q, requires_grad=False)


def _autocast_inside(model: PeftModel) -> None:
    own = model.base_model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return own(*args, **kwargs)

    model.base_model.model.forward = forward


REFUSED = {
    "quantised": (_quantise, r"norm.weight' is a Parameter of torch.int8, quantised or sharded"),
    "said to be quantised": (lambda model: setattr(model.base_model.model, "is_quantized", True), "are quantised"),
    "offloaded": (lambda model: model.base_model.model.lm_head.to("meta"), "lm_head.weight' is offloaded or sharded"),
    "autocast": (_autocast_inside, "own forward computes in torch.bfloat16; audit the model before"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_no_float32_reference_where_it_would_be_none(what: str, batch: dict[str, torch.Tensor]) -> None:
    change, reason = REFUSED[what]
    model = _in_bfloat16()
    change(model)
    with pytest.raises(CELoraError, match=f"reference='float32', but .*{reason}"), in_float32(model):
        model(**batch)
    assert {p.dtype for p in model.parameters()} >= {torch.bfloat16}


def test_float32_that_does_not_fit_is_refused(batch: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = _in_bfloat16()
    celora.attach(model, "exact")
    patch_all(monkeypatch, "celora.machine.memory:available_memory", lambda _: 1000)
    with pytest.raises(
        CELoraError, match=r"needs 0\.\d GB on cpu for float32 copies of the weights, and 0\.0 GB are free"
    ):
        celora.audit(model, batch, reference="float32")
    with pytest.raises(CELoraError, match="reference='float16'; expected 'float32'"):
        celora.audit(model, batch, reference="float16")  # type: ignore[arg-type]
