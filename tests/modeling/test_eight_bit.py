"""The forward of frozen layers in 8 bits: its results, when it is not used, and what it survives."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import io
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import celora
from celora import CELoraConfig, CELoraError
from celora.modeling.eight_bit import EightBitHead
from celora.numerics import reference
from celora.numerics.products.both_ways import Int8BothWays
from celora.runtime.attachment import require
from celora.settings.presets import PRESETS
from machine import refuses
from small import adapter, make_batch, make_model, train
from tiers import paired

BOTH = CELoraConfig(estimator="int8", forward="int8", refresh_every=3, fused=True)
pytestmark = pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")


def attached(config: CELoraConfig = BOTH, **model: object) -> PeftModel:
    made = make_model(**model)
    celora.attach(made, config)
    return made.train()


def gradients(model: nn.Module, *, autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**make_batch(0)).loss
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    pairs = [(found[name].flatten().double(), expected[name].flatten().double()) for name in expected]
    a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(7,), (2, 5), (2, 3, 4)])
def test_a_layer_computes_its_reference(dtype: torch.dtype, bias: bool, lead: tuple[int, ...]) -> None:
    model = attached(dtype=dtype, base_bias=bias)
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    x = torch.randn(*lead, 48).to(dtype)
    q, s = reference.quantise(x.reshape(-1, 48).double(), 1, paired=paired())
    w, t = reference.quantise(layer.weight.double(), 1)
    expected = (q * s) @ (w * t).T + (layer.bias.double() if bias else 0)
    found = layer(x)
    assert (found.shape, found.dtype) == ((*lead, 80), dtype)
    error = (found.reshape(-1, 80).double() - expected).norm() / expected.norm()
    # values half-way may round either way; bfloat16 rounds once more
    assert error < (3e-3 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_of_a_slightly_other_model(fused: bool) -> None:
    plain, model = make_model().train(), attached(dataclasses.replace(BOTH, fused=fused))
    expected, found = gradients(plain), gradients(model)
    assert found.keys() == expected.keys()
    assert 0.98 < cosine(found, expected) < 1
    train(model, 2)
    assert len(require(model).forwards) == 14


def test_the_backward_is_that_of_the_weight_the_forward_multiplied_with() -> None:
    """Both read one copy. The backward is the exact product with that copy, up to the rounding of rows."""
    model = attached()
    train(model, 1)
    layer = model.base_model.model.model.layers[1].mlp.down_proj.base_layer
    forward = require(model).forwards["base_model.model.model.layers.1.mlp.down_proj"]
    packed = forward.graft.estimator.product._multiplied_with(layer.weight)
    assert packed is forward.graft.estimator.product._packed
    g = torch.randn(9, 48)
    back = packed.rows(g, None, position=None, onto=None)
    expected = g @ packed.dense()
    assert (back - expected).norm() / expected.norm() < 0.02


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_gives_the_same_bits(reentrant: bool, autocast: bool) -> None:
    plain, checkpointed = attached(), attached()
    for model in (plain, checkpointed):
        model.enable_input_require_grads()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, found = (gradients(each, autocast=autocast) for each in (plain, checkpointed))
    assert all(found[name].equal(expected[name]) for name in expected)


def test_evaluation_and_generation_use_the_forward_that_was_trained() -> None:
    model, plain = attached(), make_model()
    batch = make_batch(0)
    trained = float(model(**batch).loss.detach())
    with torch.no_grad():
        assert float(model.eval()(**batch).loss) == pytest.approx(trained, rel=1e-5)
        assert float(plain.eval()(**batch).loss) != pytest.approx(trained, rel=1e-5)
        one = model(input_ids=batch["input_ids"][:, :4]).logits
    start = batch["input_ids"][:1, :4]
    ids = model.generate(
        input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert ids[0, 4] == one[0, -1].argmax()


def test_a_loop_that_trains_in_eval_mode_has_the_layers_own_forward_in_all_of_them() -> None:
    """Also where the input needs no gradient, as in the first block."""
    model, plain = attached().eval(), make_model().eval()
    assert model(**make_batch(0)).logits.equal(plain(**make_batch(0)).logits)


def test_detach_gives_the_model_back() -> None:
    model, plain = attached(), make_model()
    train(model, 2)
    for name, value in adapter(model).items():
        plain.get_parameter(name).data.copy_(value)
    celora.detach(model)
    with torch.no_grad():
        assert model.eval()(**make_batch(0)).logits.equal(plain.eval()(**make_batch(0)).logits)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_adapter_that_is_saved_is_plain_peft(tmp_path: Path) -> None:
    model = attached()
    train(model, 2)
    expected = set(make_model().state_dict())
    assert set(model.state_dict()) == expected
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_model().unload(), tmp_path)
    celora.detach(model)
    with torch.no_grad():
        assert again.eval()(**make_batch(0)).logits.equal(model.eval()(**make_batch(0)).logits)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_owns_its_forwards(how: str) -> None:
    model = attached()
    train(model, 2)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    batch = make_batch(0)
    assert other(**batch).loss.equal(model(**batch).loss)
    assert len(require(other).forwards) == 14
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    del model
    gc.collect()
    assert float(other(**batch).loss.detach()) > 0.1
    train(other, 1)


def test_a_dropped_model_is_gone_at_once() -> None:
    model = attached()
    train(model, 2)
    weight = weakref.ref(model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_forward_that_was_replaced_is_the_users() -> None:
    model = attached()
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.forward = lambda x: nn.functional.linear(x, 2 * layer.weight)
    x = torch.randn(3, 48)
    with torch.no_grad():
        assert layer(x).equal(nn.functional.linear(x, 2 * layer.weight))
    with pytest.warns(UserWarning, match="keeps PEFT's own backward: its forward was replaced"):
        train(model, 1)


def test_a_weight_that_trains_is_multiplied_exactly() -> None:
    model = attached()
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    layer.weight.requires_grad_()
    x = torch.randn(3, 48)
    assert layer(x).equal(nn.functional.linear(x, layer.weight))


def test_what_is_not_finite_reaches_the_loss() -> None:
    model = attached()
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.weight[make_batch(0)["input_ids"][0, 0]] = float("nan")
    assert not torch.isfinite(model(**make_batch(0)).loss)


def test_several_devices_under_one_process_are_refused() -> None:
    model = attached()
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.requires_grad_(False)
    with pytest.raises(CELoraError, match=r"under nn\.DataParallel: use one process a device, or forward='exact'"):
        layer(torch.ones(2, 48, device="meta"))


@pytest.mark.parametrize(
    "setting",
    [
        {"estimator": "tokens", "forward": "int8"},
        {"estimator": "int8", "forward": "int8", "weight_copy": False},
        {"estimator": "tokens", "forward": "int8", "precision": "fp8"},
    ],
)
def test_both_directions_need_one_copy(setting: dict[str, object]) -> None:
    with pytest.raises(CELoraError, match="both directions multiply with one 8-bit copy"):
        celora.attach(make_model(), CELoraConfig(**{"rank": 0, **setting}))


def test_the_report_says_so() -> None:
    assert "int8, forward too" in str(celora.attach(make_model(), BOTH))


@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload", "unload"])
def test_merged_and_unloaded_layers_are_exact(how: str) -> None:
    """PEFT merges without any sign that the weight has changed."""
    model, plain = attached(), make_model()
    batch = make_batch(0)
    with torch.no_grad():
        before = model.eval()(**batch).logits
        other, expected = getattr(model, how)(), getattr(plain, how)()
        found = (other or model).eval()(**batch).logits
        assert found.equal((expected or plain).eval()(**batch).logits)
        if how == "merge_adapter":
            model.unmerge_adapter()
            torch.testing.assert_close(model.eval()(**batch).logits, before, rtol=0.05, atol=0.05)
            assert not model.eval()(**batch).logits.equal(plain.eval()(**batch).logits)


def test_another_weight_at_the_same_place_is_noticed() -> None:
    model = attached().eval()
    tuner = model.base_model.model.model.layers[0].mlp.up_proj
    layer, x = tuner.base_layer, torch.randn(3, 48)
    with torch.no_grad():
        for scale in (1.0, 3.0, 0.5):
            weight = scale * torch.randn(80, 48)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            expected = nn.functional.linear(x, weight)
            assert (layer(x) - expected).norm() < 0.03 * expected.norm()
            del weight


@pytest.mark.parametrize("width", [8, 47, 49])
def test_an_input_of_another_width_or_dtype_is_torchs_error(width: int) -> None:
    layer = attached().base_model.model.model.layers[0].mlp.up_proj.base_layer
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(3, width))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(3, 48, dtype=torch.bfloat16))


def test_threads_share_no_input() -> None:
    layer = attached().eval().base_model.model.model.layers[0].mlp.up_proj.base_layer
    inputs = [torch.full((4, 48), float(i)) for i in range(1, 9)]
    with torch.no_grad(), ThreadPoolExecutor(4) as pool:
        expected = [layer(x) for x in inputs]
        for _ in range(20):
            assert all(a.equal(b) for a, b in zip(pool.map(layer, inputs), expected, strict=True))


def test_accelerates_forward_stays() -> None:
    model = make_model()
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
    own = layer.forward
    report = celora.attach(model, BOTH)
    assert layer.forward is own
    assert sorted({each.forward for each in report.layers}) == ["exact", "int8"]
    train(model, 1)
    celora.detach(model)
    assert layer.forward is own


def test_a_gradient_in_evaluation_is_the_models_own() -> None:
    model, plain = attached().eval(), make_model().eval()
    batch = make_batch(0)
    for each in (model, plain):
        each.zero_grad()
        each(inputs_embeds=each.get_input_embeddings()(batch["input_ids"]).requires_grad_(), labels=batch["labels"])
    x, y = (torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    for each, t in ((model, x), (plain, y)):
        each.base_model.model.model.layers[0].mlp.up_proj.base_layer(t).sum().backward()
    assert x.grad.equal(y.grad)


def test_a_refresh_under_selective_checkpointing_or_inference() -> None:
    model = attached()
    with torch.inference_mode():
        model(**make_batch(0))  # the model is in training mode, and this is a refresh
    policy = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    loss = checkpoint(lambda: model(**make_batch(0)).loss, use_reentrant=False, context_fn=policy)
    loss.backward()
    train(model, 2)
    assert require(model).forwards.errors


@pytest.mark.usefixtures("integers_may_pay")
def test_logits_in_8_bits() -> None:
    """The loss and the gradient are nearly those of exact logits; an audit and an evaluation have exact ones."""
    exact, model = make_model().train(), make_model().train()
    celora.attach(exact, "exact")
    celora.attach(model, dataclasses.replace(PRESETS["exact"], head_forward="int8"))
    expected, found = gradients(exact), gradients(model)
    assert 0.999 < cosine(found, expected) < 1
    batch = make_batch(0)
    losses = [float(each(**batch).loss.detach()) for each in (exact, model)]
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-3)
    with celora.original_base(model):
        assert float(model(**batch).loss.detach()) == losses[0]
    with torch.no_grad():
        assert model.eval()(**batch).logits.equal(exact.eval()(**batch).logits)
    again = copy.deepcopy(model.train())
    assert float(again(**batch).loss.detach()) == losses[1]


@pytest.mark.usefixtures("integers_may_pay")
def test_logits_of_any_number_of_words() -> None:
    """A sum over so many words could overflow 32 bits, and the forward has none: it sums over features."""
    torch.manual_seed(0)
    x, weight, head = torch.randn(4, 16), torch.randn(140_000, 16), EightBitHead(16)
    assert head.applies(weight)
    logits = head.product.project(x, weight, None, torch.empty(4, 140_000))
    assert (logits - x @ weight.t()).norm() < 0.02 * (x @ weight.t()).norm()


@pytest.mark.usefixtures("integers_may_pay")
def test_the_report_says_whether_logits_are_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(PRESETS["exact"], head_forward="int8")
    assert "its logits in 8 bits" in str(celora.attach(make_model(), config))
    monkeypatch.setattr(Int8BothWays, "forward_unavailable", lambda *_: "there are no such products here")
    assert "logits in 8 bits" not in str(celora.attach(make_model(), config))
