"""Layers whose weight is not an (out, in) tensor are read, estimated, trained and saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import celora
from celora.machine.memory import saved_for_backward
from celora.modeling.eight_bit import own_bytes
from celora.modeling.fused import FusedGraft
from celora.modeling.graft import LayerGraft
from celora.modeling.switch import Mode, Switch
from celora.modeling.trial import unlike
from celora.numerics import reference
from celora.numerics.estimators import Columns, Dense, Estimator, Int8, Tokens
from celora.runtime.attachment import require
from celora.weights.read import read, shape_of, unreadable
from celora.weights.stored import StoredWeight, rows_of
from layers import KINDS, MODELS, make_adapted, make_base, make_layer
from machine import refuses, refuses_config
from small import make_batch
from tiers import paired

pytestmark = pytest.mark.filterwarnings(
    "ignore:TorchaoLoraLinear was instantiated without:UserWarning",  # concerns merging only, which is not tested here
    "ignore:.*is an Enum subclass:UserWarning",
)
INDEX = torch.tensor([0, 3, 17, 40, 95])
BY_ROWS = [kind for kind in KINDS if kind not in ("GPT-2 Conv1D", "HQQ 2-bit")]


def backward(layer: nn.Module, x: Tensor, grad_output: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    layer(x).backward(grad_output)
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_is_what_the_layer_multiplies_with(kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, dtype=dtype)
    assert unreadable(layer) == ""
    assert shape_of(layer) == (96, 128)
    x, grad_output = torch.randn(2, 7, 128, dtype=dtype), torch.randn(2, 7, 96, dtype=dtype)
    expected = backward(layer, x, grad_output)
    weight = read(layer, dtype)
    assert weight.shape == (96, 128)
    assert weight.device == expected.device
    assert not weight.requires_grad
    # torchao multiplies by the scales after the product, not before it.
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(grad_output @ weight.to(dtype), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weight.to(dtype), weight.detach().to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_rows_of_the_whole(kind: str, dtype: torch.dtype) -> None:
    weight = read(make_layer(kind), torch.float32)
    expected = weight.to(torch.float32)[INDEX].to(dtype)
    torch.testing.assert_close(weight[INDEX].to(dtype), expected, rtol=0, atol=0)
    torch.testing.assert_close(rows_of(weight, INDEX, dtype), expected, rtol=0, atol=0)
    whole = torch.full((7, 128), 7.0, dtype=dtype)
    rows_of(weight, INDEX, dtype, out=whole[:5])
    torch.testing.assert_close(whole[:5], expected, rtol=0, atol=0)
    assert (whole[5:] == 7).all()


@pytest.mark.parametrize("kind", BY_ROWS)
def test_reading_rows_does_not_read_the_rest(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = read(make_layer(kind), torch.float32)
    assert isinstance(weight, StoredWeight)
    expected = weight.detach()[INDEX]

    def whole(*_: Any) -> Tensor:
        raise AssertionError("the whole weight was de-quantised")

    monkeypatch.setattr(type(weight), "dense", whole)
    assert torch.equal(weight[INDEX], expected)


def adapted(kind: str, *, fused: bool, rank: int) -> PeftModel:
    """A layer of this kind with LoRA. Its backward keeps half of its rows."""
    model: Any = nn.Sequential(nn.Linear(128, 96, bias=False) if kind == "Linear" else make_layer(kind))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = kind == "bitsandbytes 8-bit", "bitsandbytes 4" in kind
    lora = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, fan_in_fan_out=kind == "GPT-2 Conv1D")
    model = get_peft_model(model, lora)
    celora.attach(model, celora.CELoraConfig(estimator="columns", keep_ratio=0.5, rank=rank, fused=fused))
    return model


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("fused", [False, True], ids=["PEFT's adapter", "fused"])
@pytest.mark.parametrize("kind", ["Linear", "GPT-2 Conv1D", *BY_ROWS])
def test_an_estimated_backward_reads_the_kept_rows_alone(
    kind: str, fused: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rows may hold anything. Of a quantised weight only the kept rows are de-quantised."""
    model, x, grad_output = adapted(kind, fused=fused, rank=rank), torch.randn(2, 20, 128), torch.randn(2, 20, 96)
    base = model.base_model.model[0].get_base_layer()
    backward(model, x, grad_output)
    require(model).clock.advance()
    (graft,) = require(model).grafts.values()
    assert isinstance(graft, FusedGraft) is fused
    assert isinstance(graft.estimator, Columns)
    assert graft.mode is Mode.ESTIMATE
    index = graft.estimator.index
    assert index is not None
    expected = backward(model, x, grad_output)
    weight, asked = read(base, torch.float32), []
    if isinstance(weight, StoredWeight):
        stored, rows = type(weight), type(weight).rows

        def whole(*_: Any) -> Tensor:
            raise AssertionError("the whole weight was de-quantised")

        for name in ("dense", "detach", "to"):
            monkeypatch.setattr(stored, name, whole)
        monkeypatch.setattr(stored, "rows", lambda self, index: asked.append(index.tolist()) or rows(self, index))
    else:
        others = torch.ones(96, dtype=torch.bool).index_fill(0, index, False)
        weight.data[others] = float("nan")
    assert torch.equal(backward(model, x, grad_output), expected)
    assert asked == ([index.tolist()] if isinstance(weight, StoredWeight) else [])


def test_blocks_that_reach_across_rows() -> None:
    weight = read(make_layer("bitsandbytes 4-bit", out=96, inp=80))
    assert torch.equal(weight[INDEX], weight.detach()[INDEX])


def test_the_layout_that_evaluation_leaves_behind() -> None:
    layer = make_layer("bitsandbytes 4-bit nested")
    before = read(layer).detach()
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(4, 128))
    weight = read(layer)
    # On CPUs with bf16 products, bitsandbytes rounds its scales to bfloat16.
    torch.testing.assert_close(weight.detach(), before, rtol=2**-8, atol=0)
    assert torch.equal(weight[INDEX], weight.detach()[INDEX])


@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_those_of_the_reference(kind: str) -> None:
    layer = make_layer(kind)
    weight, G = read(layer, torch.float32), torch.randn(40, 96)
    W = weight.detach().double()
    for estimator in (Columns(96, 128, keep_ratio=0.5, rank=6), Columns(96, 128, keep_ratio=0.25, precision="int8")):
        if estimator.settings.precision == "int8" and refuses():
            continue
        estimator.observe(G, weight, G @ W.float())
        estimator.select()
        index = reference.top_k(reference.column_scores(G.double(), W), 24)
        if estimator.settings.rank:
            assert estimator.index is not None
            U, V = estimator.factor.U, estimator.factor.V
            assert U is not None
            assert V is not None
            expected = reference.double_lora(G.double(), W, U.double(), V.double(), estimator.index)
        else:
            assert estimator.index is not None
            assert estimator.index.tolist() == index.tolist()
            expected = reference.int8(G[:, index].double(), W[index], paired=paired())
        assert_same(estimator, G, weight, expected)
    for copied in (True, False):
        if refuses(copy=copied):
            continue
        own = own_bytes(layer)
        multiplied = reference.int8(G.double(), W, paired=paired() and copied)  # without a copy, torch multiplies
        multiplied = folded(G.double(), weight) if own else multiplied
        assert_same(Int8(96, 128, weight_copy=copied), G, weight, multiplied)
    kept = reference.top_k(G.double().square().sum(1), 20)
    nothing = torch.zeros(96, 0, dtype=torch.float64), torch.zeros(0, 128, dtype=torch.float64)
    assert_same(Tokens(96, 128, keep_ratio=0.5), G, weight, reference.tokens(G.double(), W, kept, *nothing))


def folded(G: Tensor, weight: Any) -> Tensor:
    """`G W` for a W with one scale for each output channel. The scale is multiplied into G before G is quantised."""
    q, s = (t.double() for t in weight.integers or reference.quantise(weight.detach().double(), 1))
    # Of another's bytes torch's product makes full use; celora's own layer is multiplied by celora's kernel.
    q_grad, s_grad = reference.quantise(G * s.view(1, -1), 1, paired=paired() and weight.integers is None)
    return s_grad * (q_grad @ q)


def assert_same(estimator: Estimator, grad_output: Tensor, weight: Tensor, expected: Tensor) -> None:
    # Divided by their 8-bit scale, numbers of a quantised weight lie half-way, and float32 may round them another way.
    tolerance = 1e-5 if estimator.settings.precision == "native" else 2e-3
    error = torch.linalg.vector_norm(estimator.estimate(grad_output, weight).double() - expected)
    assert error <= tolerance * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("GPT-2 Conv1D", "celora int8")])
def test_the_8_bit_copy_is_made_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if refuses():
        return
    layer = make_layer(kind)
    assert unlike(layer) == ""  # the trial reads the weight once, before reads are counted
    graft = LayerGraft(Int8(96, 128), Switch())
    graft.mode = Mode.ESTIMATE
    layer.register_forward_hook(graft)
    read_whole = []
    stored = type(read(layer))
    dense = stored.dense
    monkeypatch.setattr(stored, "dense", lambda self: read_whole.append(1) or dense(self))
    x, grad_output = torch.randn(32, 128), torch.randn(32, 96)
    first = backward(layer, x, grad_output)
    made = len(read_whole)
    # One for its scales, one for its numbers; none if its own bytes are multiplied.
    assert made == 0 if own_bytes(layer) else 0 < made <= 2
    assert torch.equal(backward(layer, x, grad_output), first)
    assert len(read_whole) == made


@pytest.mark.parametrize("how", ["replaced", "overwritten"])
@pytest.mark.parametrize("kind", ["GPT-2 Conv1D", "bitsandbytes 4-bit", "bitsandbytes 8-bit"])
def test_the_8_bit_copy_follows_the_weight(kind: str, how: str) -> None:
    if refuses():
        return
    layer, other = make_layer(kind), make_layer(kind, seed=1)
    estimator, grad_output = Int8(96, 128), torch.randn(32, 96)
    before = estimator.estimate(grad_output, read(layer, torch.float32))
    if how == "replaced":
        layer.weight = other.weight
    else:
        with torch.no_grad():
            layer.weight.copy_(other.weight)
    after = estimator.estimate(grad_output, read(layer, torch.float32))
    assert not torch.equal(after, before)
    assert torch.equal(after, Int8(96, 128).estimate(grad_output, read(layer, torch.float32)))


@pytest.mark.parametrize("kind", MODELS)
def test_at_full_budget_the_gradient_is_exact(kind: str) -> None:
    plain, model = make_adapted(kind), make_adapted(kind)
    config = celora.CELoraConfig(estimator="tokens", keep_ratio=1.0, selection="energy", rank=0)
    report = celora.attach(model, config)
    assert not report.skipped
    assert len(require(model).grafts) == len(report.layers)
    expected, found = gradients(plain, make_batch(0)), gradients(model, make_batch(0))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def gradients(model: PeftModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("setting", ["exact", "columns", "int8", "tokens x int8"])
def test_training_saves_an_ordinary_adapter(kind: str, setting: str, tmp_path: Path) -> None:
    """Training also keeps no more for backward than plain PEFT."""
    model, plain = make_adapted(kind), make_adapted(kind)
    config: Any = {
        "exact": "exact",
        "columns": celora.CELoraConfig(estimator="columns", keep_ratio=0.5, rank=4, refresh_every=3, fused=False),
        "int8": celora.CELoraConfig(estimator="int8", rank=0, refresh_every=3, fused=False),
        "tokens x int8": celora.CELoraConfig(estimator="tokens", precision="int8", keep_ratio=0.5, rank=0, fused=True),
    }[setting]
    if setting != "exact" and refuses_config(config):
        return
    report = celora.attach(model, config)
    assert not report.skipped
    with saved_for_backward(plain) as by_plain:
        plain(**make_batch(0)).loss.backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.train()
    for step in range(4):
        with saved_for_backward(model) as saved:
            loss = model(**make_batch(step)).loss
        assert saved.nbytes <= by_plain.nbytes
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(
        torch.isfinite(p).all() and not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before
    )
    errors = require(model).relative_errors
    assert all(error < 1 for error in errors.values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_base(kind), tmp_path)
    celora.detach(model)
    with torch.no_grad():
        inputs = {"input_ids": make_batch(9)["input_ids"]}
        assert torch.equal(again.eval()(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize("kind", MODELS)
def test_fused_adapters_give_the_same_gradient(kind: str) -> None:
    plain, model = make_adapted(kind), make_adapted(kind)
    report = celora.attach(model, celora.CELoraConfig(estimator="dense", rank=0, fused=True))
    assert any("LoRA fused with its base layer in 14 of 14" in n or "8 of 8" in n for n in report.notes), report.notes
    expected, found = gradients(plain, make_batch(0)), gradients(model, make_batch(0))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["GPT-2 Conv1D", "bitsandbytes 4-bit nested", "bitsandbytes 8-bit", "torchao int8"])
def test_compiles_without_breaks(kind: str) -> None:
    layer = make_layer(kind)
    graft = LayerGraft(Columns(96, 128, keep_ratio=0.5), Switch())
    graft.under(layer)
    torch._dynamo.reset()
    compiled = torch.compile(nn.Sequential(layer), fullgraph=True, backend="aot_eager")
    weight = read(layer, torch.float32)
    for step in range(4):
        graft.mode = Mode.OBSERVE if step % 2 == 0 else Mode.ESTIMATE
        x, grad_output = torch.randn(32, 128), torch.randn(32, 96)
        found = backward(compiled, x, grad_output)
        if graft.mode is Mode.OBSERVE:
            expected = grad_output @ weight.detach()
            graft.estimator.select()
        else:
            expected = graft.estimator.estimate(grad_output, weight)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_4_bit_layer_multiplies_in_its_compute_dtype() -> None:
    layer = make_layer("bitsandbytes 4-bit", dtype=torch.bfloat16)
    x, grad_output = torch.randn(32, 128), torch.randn(32, 96)
    expected = backward(layer, x, grad_output)
    layer.register_forward_hook(graft := LayerGraft(Dense(96, 128), Switch()))
    graft.mode = Mode.ESTIMATE
    found = backward(layer, x, grad_output)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_training_goes_on_after_evaluation_on_a_4_bit_base() -> None:
    """Evaluation may leave the weights in a layout for which bitsandbytes itself has no backward."""
    if refuses():
        return
    model = make_adapted("bitsandbytes 4-bit nested")
    celora.attach(model, celora.CELoraConfig(estimator="int8", rank=0, refresh_every=1000))
    before = gradients(model, make_batch(0))
    require(model).set_modes(1)
    model.eval()
    with torch.no_grad():
        model(**make_batch(0))
    after = gradients(model, make_batch(0))
    for name, tensor in before.items():
        assert torch.nn.functional.cosine_similarity(after[name].flatten(), tensor.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("kind", ["bitsandbytes 4-bit", "bitsandbytes 8-bit", "GPT-2 Conv1D"])
def test_a_copy_of_the_model_estimates_its_own_weights(kind: str) -> None:
    if refuses():
        return
    model = make_adapted(kind)
    celora.attach(model, celora.CELoraConfig(estimator="int8", rank=0, refresh_every=1000))
    require(model).set_modes(1)
    expected = gradients(model, make_batch(0))
    copied = copy.deepcopy(model)
    del model
    for name, tensor in gradients(copied, make_batch(0)).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


def test_a_plain_layer_is_read_as_it_is() -> None:
    layer = nn.Linear(4, 3)
    assert read(layer) is layer.weight
    assert shape_of(layer) == (3, 4)
    assert unreadable(layer) == ""


def test_what_cannot_be_read_says_why() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    assert "not quantised yet" in unreadable(bnb.nn.Linear4bit(64, 64))
    assert "not quantised yet" in unreadable(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False))
    assert "anew in every forward" in unreadable(bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=True))
    assert unreadable(nn.Conv2d(3, 3, 1)) == "Conv2d is not a linear layer"
