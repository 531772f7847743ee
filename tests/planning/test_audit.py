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
from celora.planning.fidelity import Fidelity
from celora.planning.upcast import in_float32
from celora.runtime.attachment import require
from patching import patch_all
from small import adapter, make_base, make_batch, make_model, train

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=50)


def _gradient(model: PeftModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    model(**batch).loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).double()
    model.zero_grad()
    return flat


def test_equals_the_comparison_made_by_hand(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    celora.attach(model, HALF)
    train(model, 3)
    plain = copy.deepcopy(model)
    celora.detach(plain)
    estimated, exact = _gradient(model, batch), _gradient(plain, batch)
    report = celora.audit(model, batch)
    assert report.cosine == pytest.approx(torch.cosine_similarity(estimated, exact, dim=0).item(), abs=1e-6)
    assert report.relative_error == pytest.approx(((estimated - exact).norm() / exact.norm()).item(), rel=1e-5)
    assert report.norm_ratio == pytest.approx((estimated.norm() / exact.norm()).item(), rel=1e-5)
    assert 0.2 < report.cosine < 0.99
    assert report.probed == 0
    assert report.loss == pytest.approx(plain(**batch).loss.item())


def test_several_batches_are_judged_by_their_sum(model: PeftModel) -> None:
    celora.attach(model, HALF)
    train(model, 3)
    plain = copy.deepcopy(model)
    celora.detach(plain)
    batches = [make_batch(seed) for seed in range(3)]
    estimated, exact = (sum(_gradient(of, batch) for batch in batches) for of in (model, plain))
    report = celora.audit(model, batches)
    assert report.cosine == pytest.approx(torch.cosine_similarity(estimated, exact, dim=0).item(), abs=1e-6)
    assert report.relative_error == pytest.approx(((estimated - exact).norm() / exact.norm()).item(), rel=1e-5)
    assert report.loss == pytest.approx(sum(plain(**batch).loss.item() for batch in batches) / 3)
    assert celora.audit(model, batches[:1]) == celora.audit(model, batches[0])
    with pytest.raises(CELoraError, match="no batches to audit with"):
        celora.audit(model, [])


def test_judges_every_layer_by_its_own_adapter(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    celora.attach(model, HALF)
    train(model, 1)
    report = celora.audit(model, batch)
    assert set(report.per_layer) == {layer.name for layer in require(model).report.layers}
    # Nothing is estimated between the loss and the last down projection.
    assert report.per_layer["base_model.model.model.layers.1.mlp.down_proj"].cosine == pytest.approx(1, abs=1e-9)
    assert min(f.cosine for f in report.per_layer.values()) < 0.95


def test_keeping_everything_audits_as_exact(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    celora.attach(model, CELoraConfig(keep_ratio=1.0))
    report = celora.audit(model, batch)
    assert (report.cosine, report.relative_error, report.norm_ratio) == (pytest.approx(1), 0, 1)


def test_leaves_everything_untouched() -> None:
    audited, left_alone = make_model(lora_dropout=0.2), make_model(lora_dropout=0.2)
    for model in (audited, left_alone):
        celora.attach(model, HALF)
    optimizers = []
    for model in (audited, left_alone):
        torch.manual_seed(3)
        optimizers.append(train(model, 2))
        model(**make_batch(1)).loss.backward()  # gradients in flight must survive
    rng, clock = torch.get_rng_state(), require(audited).clock.step
    modes = [g.mode for g in require(audited).grafts.values()]
    report = celora.audit(audited, make_batch(5))
    assert report.cosine < 1
    assert torch.get_rng_state().equal(rng)
    assert require(audited).clock.step == clock
    assert [g.mode for g in require(audited).grafts.values()] == modes
    for model, optimizer in zip((audited, left_alone), optimizers, strict=True):
        torch.manual_seed(4)
        optimizer.step()
        optimizer.zero_grad()
        train(model, 3, first=2, optimizer=optimizer)
    for name, value in adapter(left_alone).items():
        assert value.equal(adapter(audited)[name])


def test_before_the_first_refresh_the_batch_itself_selects(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    celora.attach(model, HALF)
    report = celora.audit(model, batch)
    assert report.probed == len([g for n, g in require(model).grafts.items() if not _blind(n)])
    assert report.cosine < 0.99
    assert not any(g.estimator.ready for g in require(model).grafts.values())
    assert "selection made from this batch" in str(report)


def _blind(name: str) -> bool:
    """Layers whose input is the embedding: they get no gradient to select from."""
    return any(name.endswith(f"layers.0.self_attn.{kind}") for kind in ("q_proj", "k_proj", "v_proj"))


def test_dropout_is_the_same_in_both_passes() -> None:
    model = make_model(lora_dropout=0.5)
    celora.attach(model, "off")
    assert celora.audit(model, make_batch(1)).relative_error == 0


def test_a_loss_of_the_users_own(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    celora.attach(model, HALF)
    train(model, 1)
    report = celora.audit(
        model, {"input_ids": batch["input_ids"]}, loss=lambda m, b: m(**b).logits.float().square().mean()
    )
    assert 0 < report.cosine < 1


def test_clear_errors(model: PeftModel, batch: dict[str, Any]) -> None:
    with pytest.raises(CELoraError, match=r"celora is not attached to this model; call celora.attach\(model\) first"):
        celora.audit(model, batch)
    celora.attach(model, HALF)
    with pytest.raises(CELoraError, match="returned no loss for this batch; add labels"):
        celora.audit(model, {"input_ids": batch["input_ids"]})
    model.requires_grad_(False)
    with pytest.raises(CELoraError, match="no trainable parameters"):
        celora.audit(model, batch)


def test_fidelity_of_zero_gradients() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert Fidelity.of([(zero, zero)]) == Fidelity(1.0, 0.0, 1.0)
    assert Fidelity.of([(zero, one)]) == Fidelity(0.0, 1.0, 0.0)
    assert Fidelity.of([(one, zero)]).relative_error == float("inf")


def test_what_is_audited_is_training_whatever_the_mode(batch: dict[str, torch.Tensor]) -> None:
    """`from_pretrained` leaves a model in evaluation mode, where its own loss would be taken."""
    model = make_model()
    celora.attach(model, CELoraConfig(estimator="dense", labelled_head=True, head_keep_ratio=0.3))
    for mode in (True, False):
        model.train(mode)
        assert celora.audit(model, batch).relative_error > 0
        assert all(module.training == mode for module in model.modules())


def _in_bfloat16(**lora: Any) -> PeftModel:
    return make_model(dtype=torch.bfloat16, **lora).train()


def test_float32_is_the_reference_for_peft_and_for_what_is_attached(batch: dict[str, torch.Tensor]) -> None:
    model = _in_bfloat16()
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).float()
    celora.attach(model, "exact")
    ours, pefts, true = (_gradient(of, batch) for of in (model, plain, exact))
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
    """One model and batch may fall to either side, so several of each decide."""
    errors: dict[str, list[float]] = {"plain": [], "attached": []}
    for seed in range(4):
        model = make_model(seed=seed, dtype=torch.bfloat16)
        celora.attach(model, "exact")
        for batch in (make_batch(2 * seed), make_batch(2 * seed + 1)):
            found = celora.audit(model, batch, reference="float32").float32
            assert found is not None
            for name, errors_of in errors.items():
                errors_of.append(getattr(found, name).relative_error)
    theirs, ours = (statistics.fmean(of) for of in errors.values())
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


@pytest.mark.fault(
    "models",
    '`celora.audit(..., reference="float32")` ends early, or is interrupted while weights are float32',
    sees="the exception itself",
    kept="every weight, gradient and setting: the very ones that they were",
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_model_is_itself_again_after_float32(interrupted: bool, batch: dict[str, torch.Tensor]) -> None:
    """Adapters are in bfloat16 too, so that they are replaced, with gradients in flight."""
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
