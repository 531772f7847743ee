from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel

import celora
from celora import CELoraConfig, CELoraError
from celora.runtime.attachment import require
from machine import refuses
from small import adapter, flat_gradient, head_outlier, make_batch, make_model, outlier, train

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=50)


def test_equals_the_comparison_made_by_hand(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    celora.attach(model, HALF)
    train(model, 3)
    plain = copy.deepcopy(model)
    celora.detach(plain)
    estimated, exact = flat_gradient(model, batch), flat_gradient(plain, batch)
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
    estimated, exact = (sum(flat_gradient(each, batch) for batch in batches) for each in (model, plain))
    report = celora.audit(model, batches)
    assert report.cosine == pytest.approx(torch.cosine_similarity(estimated, exact, dim=0).item(), abs=1e-6)
    assert report.relative_error == pytest.approx(((estimated - exact).norm() / exact.norm()).item(), rel=1e-5)
    assert report.loss == pytest.approx(sum(plain(**batch).loss.item() for batch in batches) / 3)
    assert celora.audit(model, batches[:1]) == celora.audit(model, batches[0])
    with pytest.raises(CELoraError, match="no batches to audit with"):
        celora.audit(model, [])


def test_as_adam_scales_it(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    """What is compared is what `AdamW.step` divides by, with its own second moments."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), eps=1e-6)
    celora.attach(model, HALF)
    with pytest.raises(CELoraError, match=r"no second moments of .*lora_A"):
        celora.audit(model, batch, optimizer=optimizer)
    for seed in range(3):
        model(**make_batch(seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        require(model).clock.advance()
    plain = copy.deepcopy(model)
    celora.detach(plain)
    moments = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in parameters])
    scale = (moments.double() / (1 - 0.99**3)).sqrt() + 1e-6
    estimated, exact = (flat_gradient(each, batch) / scale for each in (model, plain))
    report = celora.audit(model, batch, optimizer=optimizer)
    seen = report.preconditioned
    assert seen is not None
    assert seen.cosine == pytest.approx(torch.cosine_similarity(estimated, exact, dim=0).item(), abs=1e-5)
    assert seen.relative_error == pytest.approx(((estimated - exact).norm() / exact.norm()).item(), rel=1e-4)
    assert abs(seen.cosine - report.cosine) > 0.01
    assert "As Adam scales it: cosine" in str(report)
    assert celora.audit(model, batch).preconditioned is None


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
        model(**make_batch(1)).loss.backward()  # these gradients, of no step yet, must survive
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
    found = adapter(audited)
    for name, value in adapter(left_alone).items():
        assert value.equal(found[name])


def test_an_optimizer_in_the_backward_makes_no_step() -> None:
    """PyTorch's recipe: a hook of each parameter makes the step as soon as its gradient is there."""
    model = make_model()
    celora.attach(model, HALF)
    before, expected = adapter(model), celora.audit(model, make_batch(5)).cosine
    stepped = []

    def step(parameter: torch.Tensor) -> None:
        stepped.append(parameter)
        parameter.data -= parameter.grad
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(step) for p in model.parameters() if p.requires_grad]
    assert celora.audit(model, make_batch(5)).cosine == expected < 1
    assert not stepped
    assert all(value.equal(adapter(model)[name]) for name, value in before.items())
    model(**make_batch(5)).loss.backward()
    assert len(stepped) == len(hooks)


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
def test_before_a_training_it_leaves_that_training_untouched() -> None:
    """The head draws words by the number of the call, and its error is measured in the first steps."""
    eight_bit = {"forward": "int8", "head_forward": "int8", "labelled_head": True}
    drawing = CELoraConfig(estimator="int8", refresh_every=4, head_keep_ratio=0.5, **eight_bit)
    audited, left_alone = make_model(), make_model()
    for model in (audited, left_alone):
        celora.attach(model, drawing)
    celora.audit(audited, make_batch(5))
    errors = []
    for model in (audited, left_alone):
        train(model, 1)
        errors.append(require(model).relative_errors.copy())
        train(model, 2)
    assert errors[0] == errors[1]
    assert errors[0]["head"] > 0
    assert all(value.equal(adapter(audited)[name]) for name, value in adapter(left_alone).items())


def test_before_the_first_refresh_the_batch_itself_selects(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    celora.attach(model, HALF)
    report = celora.audit(model, batch)
    assert report.probed == len([g for n, g in require(model).grafts.items() if not _blind(n)])
    assert report.cosine < 0.99
    assert not any(g.estimator.ready for g in require(model).grafts.values())
    assert "selection made from this batch" in str(report)


def _blind(name: str) -> bool:
    """Whether the layer's input is the embedding: then it gets no gradient to select from."""
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
    with pytest.raises(
        CELoraError, match=r"celora is not attached to this model; call celora.attach\(model, 'auto'\) first"
    ):
        celora.audit(model, batch)
    celora.attach(model, HALF)
    with pytest.raises(CELoraError, match="returned no loss for this batch; add labels"):
        celora.audit(model, {"input_ids": batch["input_ids"]})
    model.requires_grad_(False)
    with pytest.raises(CELoraError, match="no trainable parameters"):
        celora.audit(model, batch)


def test_what_is_audited_is_training_whatever_the_mode(batch: dict[str, torch.Tensor]) -> None:
    """`from_pretrained` leaves a model in evaluation mode, in which it would compute its own loss."""
    model = make_model()
    celora.attach(model, CELoraConfig(estimator="dense", labelled_head=True, head_keep_ratio=0.3))
    for mode in (True, False):
        model.train(mode)
        assert celora.audit(model, batch).relative_error > 0
        assert all(module.training == mode for module in model.modules())


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
def test_a_forward_in_8_bits_is_judged_by_the_exact_forward(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    celora.attach(model, CELoraConfig(estimator="int8", forward="int8", refresh_every=50))
    train(model, 3)
    plain = copy.deepcopy(model)
    celora.detach(plain)
    found, exact = flat_gradient(model, batch), flat_gradient(plain, batch)
    with torch.no_grad():
        shift = float(model(**batch).loss - plain(**batch).loss)
    report = celora.audit(model, batch)
    assert report.cosine == pytest.approx(torch.cosine_similarity(found, exact, dim=0).item(), abs=1e-6)
    assert report.loss_shift == pytest.approx(shift, abs=1e-6) != 0
    assert f"The forward in 8 bits changes the loss by {shift:+.4f}." in str(report)
    assert flat_gradient(model, batch).equal(found)


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
@pytest.mark.parametrize("head", [{}, {"labelled_head": True, "head_forward": "int8"}])
def test_a_forward_in_8_bits_is_judged_with_the_scales_that_a_training_learns(
    batch: dict[str, torch.Tensor], head: dict[str, Any]
) -> None:
    """Before a training there are none. The audit learns them, and forgets them again."""
    model = make_model()
    outlier(model, 60)
    head_outlier(model, 60)
    celora.attach(model, CELoraConfig(estimator="int8", forward="int8", refresh_every=50, **head))
    assert len(require(model).forwards) == 14 + len(head) // 2
    products = [forward.product for forward in require(model).forwards.values()]
    before = celora.audit(model, batch)
    assert all(product.levels is None and product.take_sizes() is None for product in products)
    assert not require(model).forwards.errors
    assert all(forward.error.take_error() is None for forward in require(model).forwards.values())
    model.train()(**batch).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0).step()
    assert all(product.levels is not None for product in products)
    after = celora.audit(model, batch)
    assert before.cosine == after.cosine > 0.99
    assert before.loss_shift == after.loss_shift
