"""The graft on one linear layer: gradients, dtypes, shapes, memory, torch.compile, and when it does nothing."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import celora
from celora import CELoraConfig
from celora.modeling.graft import LayerGraft, graft
from celora.modeling.switch import Mode, Switch
from celora.numerics import reference
from celora.numerics.estimators import Columns, Dense, make_estimator
from celora.runtime.attachment import require
from machine import refuses
from small import make_batch, make_model, train
from without import without

HALF = CELoraConfig(estimator="columns", keep_ratio=0.5, rank=0, refresh_every=3, fused=True)
PRESETS = {"exact": "exact", "estimated": HALF}


def _linear(out: int = 12, inp: int = 8, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(inp, out, bias=bias, dtype=dtype).requires_grad_(False)


def _ready(linear: nn.Linear, *, keep_ratio: float = 0.5, rank: int = 2) -> LayerGraft:
    estimator = Columns(*linear.weight.shape, keep_ratio=keep_ratio, rank=rank)
    seen = torch.randn(9, linear.out_features, dtype=linear.weight.dtype)
    estimator.observe(seen, linear.weight, seen @ linear.weight)
    estimator.select()
    layer = LayerGraft(estimator, Switch())
    layer.mode = Mode.ESTIMATE
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (8,)])
@pytest.mark.parametrize("keep", ["dense", "columns"])
def test_gradcheck_with_everything_kept(bias: bool, shape: tuple[int, ...], keep: str) -> None:
    linear = _linear(bias=bias)
    estimator = Dense(12, 8) if keep == "dense" else Columns(12, 8, keep_ratio=1.0, rank=3)
    layer = LayerGraft(estimator, Switch())
    layer.mode = Mode.ESTIMATE
    if bias:
        linear.bias.requires_grad_(True)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, bias: Tensor | None) -> Tensor:
        return graft(x, nn.functional.linear(x, linear.weight, bias), linear.weight, bias, layer)

    assert torch.autograd.gradcheck(f, (x, linear.bias))


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (1, 1, 8), (8,)])
def test_a_kept_subset_gives_the_closed_form(shape: tuple[int, ...]) -> None:
    linear = _linear()
    layer = _ready(linear)
    linear.register_forward_hook(layer)
    x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    y = linear(x)
    G = torch.randn_like(y)
    y.backward(G)
    assert isinstance(layer.estimator, Columns)
    assert layer.estimator.index is not None
    U, V = layer.estimator.factor.U, layer.estimator.factor.V
    assert U is not None
    assert V is not None
    expected = reference.double_lora(G.reshape(-1, 12), linear.weight, U, V, layer.estimator.index).reshape(shape)
    torch.testing.assert_close(x.grad, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [Mode.OBSERVE, Mode.EXACT])
@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 33)])
def test_refresh_and_exact_modes_are_autograd_bit_for_bit(
    dtype: torch.dtype, mode: Mode, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "onednn")
    plain = _linear(20, 33, dtype=dtype)
    plain.bias.requires_grad_(True)
    grafted = copy.deepcopy(plain)
    layer = LayerGraft(Columns(20, 33, keep_ratio=0.5, rank=2), Switch())
    layer.mode = mode
    grafted.register_forward_hook(layer)
    results = []
    for linear in (plain, grafted):
        torch.manual_seed(1)
        x = torch.randn(*shape).to(dtype).requires_grad_()
        y = linear(x)
        y.backward(torch.randn(*y.shape).to(dtype))
        results.append((y.detach(), x.grad, linear.bias.grad))
    for expected, got in zip(*results, strict=True):
        assert got.equal(expected)


def test_the_forward_is_the_layers_own_and_may_be_changed_in_place() -> None:
    linear = _linear()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    expected = linear(x).detach()
    linear.register_forward_hook(_ready(linear))
    y = linear(x)
    assert y.equal(expected)
    y += 1
    y.sum().backward()
    assert x.grad is not None


def test_non_contiguous_gradient_reaches_the_estimator_whole() -> None:
    linear = _linear()
    layer = _ready(linear)
    linear.register_forward_hook(layer)
    x = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
    linear(x).transpose(0, 1).sin().sum().backward()
    transposed, x.grad = x.grad, None
    linear(x).sin().sum().backward()
    torch.testing.assert_close(x.grad, transposed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_inputs_dtype(dtype: torch.dtype) -> None:
    linear = _linear(dtype=torch.float32)
    layer = _ready(linear)
    linear.register_forward_hook(layer)
    x = torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = linear(x)
        y.sum().backward()  # inside the context, which would cast matrix products
    assert y.dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    G = torch.ones(5, 12)
    assert isinstance(layer.estimator, Columns)
    torch.testing.assert_close(x.grad, layer.estimator.estimate(G, linear.weight), rtol=2e-2, atol=2e-2)


def test_a_refresh_inside_autocast_factors_in_full_precision() -> None:
    linear = _linear(dtype=torch.float32)
    layer = LayerGraft(Columns(12, 8, keep_ratio=0.5, rank=2), Switch())
    linear.register_forward_hook(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear(torch.randn(5, 8, requires_grad=True)).sum().backward()
    layer.estimator.select()
    assert layer.estimator.ready


@pytest.mark.parametrize("case", ["no_grad", "frozen input", "trained weight", "switched off", "exact"])
def test_falls_back_to_plain_autograd(case: str) -> None:
    linear = _linear()
    layer = _ready(linear)
    linear.register_forward_hook(layer)
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=case != "frozen input")
    if case == "trained weight":
        linear.weight.requires_grad_(True)
    if case == "switched off":
        layer.switch.on = False
    if case == "exact":
        layer.mode = Mode.EXACT
    with torch.set_grad_enabled(case != "no_grad"):
        y = linear(x)
    assert "Graft" not in type(y.grad_fn).__name__
    if case == "trained weight":
        y.sum().backward()
        torch.testing.assert_close(linear.weight.grad, torch.ones(5, 12, dtype=torch.float64).T @ x)


def test_saves_nothing_for_backward_that_the_layer_does_not() -> None:
    linear = _linear()
    x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)

    def saved() -> int:
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            linear(x)
        return total

    plain = saved()
    linear.register_forward_hook(_ready(linear))
    assert plain > 0
    assert saved() <= plain


def test_the_measured_error_is_that_of_the_selection_in_use() -> None:
    linear = _linear()
    layer = _ready(linear)
    G = torch.randn(7, 12, dtype=torch.float64)
    estimate = layer.grad_input(G, linear.weight, Mode.ESTIMATE)
    exact = layer.grad_input(G, linear.weight, Mode.OBSERVE)
    assert layer.squared_error is not None
    assert layer.squared_norm is not None
    measured = (layer.squared_error / layer.squared_norm).sqrt().item()
    assert measured == pytest.approx(((estimate - exact).norm() / exact.norm()).item(), rel=1e-5)


def test_copies_of_a_part_are_exact_and_say_so() -> None:
    linear = _linear()
    layer = _ready(linear)
    linear.register_forward_hook(layer)
    for copied in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        with torch.no_grad():
            copied(torch.randn(5, 8, dtype=torch.float64))  # a reference model is used like this, and nothing is lost
        x = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
        with pytest.warns(UserWarning, match="a copy of a part of the model .* so its backward is exact"):
            y = copied(x)
        y.sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(5, 12, dtype=torch.float64) @ linear.weight)
        copied(x)  # the second time, nothing is said
    assert layer.switch.on


# While Dynamo traces a Function, it instantiates the class. torch itself warns about that.
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
def test_compiles_to_one_graph_a_mode_without_breaks() -> None:
    linear = _linear(dtype=torch.float32)
    layer = LayerGraft(Columns(12, 8, keep_ratio=0.5, rank=2), Switch())
    linear.register_forward_hook(layer)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for step in range(6):
        layer.mode = Mode.OBSERVE if step % 3 == 0 else Mode.ESTIMATE
        x = torch.randn(5, 8, requires_grad=True)
        G = torch.randn(5, 12)
        compiled(x).backward(G)
        expected = layer.estimator.estimate(G, linear.weight) if step % 3 else G @ linear.weight
        torch.testing.assert_close(x.grad, expected)
        if step % 3 == 0:
            layer.estimator.select()
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"estimator": "int8"},
        {"estimator": "tokens", "keep_ratio": 0.9, "selection": "energy", "precision": "int8"},
        {"estimator": "tokens", "keep_ratio": 0.5, "selection": "sampled"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_what_torch_compile_cannot_trace_is_one_operator_to_it(settings: dict[str, object]) -> None:
    if "int8" in settings.values() and refuses():
        return
    linear = _linear(24, 16, dtype=torch.float32)
    name = str(settings["estimator"])
    eager, traced = (LayerGraft(make_estimator(name, 24, 16, settings), Switch()) for _ in range(2))
    x, G = torch.randn(9, 16), torch.randn(9, 24)
    gradients = []
    for layer, backend in ((eager, None), (traced, "aot_eager")):
        layer.mode = Mode.ESTIMATE
        handle = linear.register_forward_hook(layer)
        torch._dynamo.reset()
        run = torch.compile(linear, fullgraph=True, backend=backend) if backend else linear
        inputs = x.clone().requires_grad_()
        run(inputs).backward(G)
        gradients.append(inputs.grad)
        handle.remove()
    assert gradients[0].equal(gradients[1])


@pytest.mark.parametrize("at", ["a refresh", "an estimate"])
def test_gradients_in_eval_are_pefts_own(at: str) -> None:
    plain, model = make_model(), make_model()
    celora.attach(model, HALF)
    train(plain, 2), train(model, 2)
    if at == "a refresh":
        train(plain, 1, first=2), train(model, 1, first=2)
    model.load_state_dict(plain.state_dict())
    attachment = require(model)
    grafts = attachment.grafts.values()
    before = [(graft.observed, graft.mode, graft.squared_error) for graft in grafts], attachment.clock.step
    x = model.get_input_embeddings()(make_batch(5)["input_ids"]).detach()
    saliency = []
    for each in (plain.eval(), model.eval()):
        inputs = x.clone().requires_grad_()
        saliency.append(torch.autograd.grad(each(inputs_embeds=inputs).logits.square().sum(), inputs)[0])
    assert saliency[1].equal(saliency[0])
    assert ([(graft.observed, graft.mode, graft.squared_error) for graft in grafts], attachment.clock.step) == before


@pytest.mark.parametrize("preset", PRESETS)
def test_training_in_eval_mode_is_exact_and_said_once(preset: str) -> None:
    plain, model = make_model().eval(), make_model().eval()
    celora.attach(model, PRESETS[preset], padding_free=False)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (plain, model)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            for each, optimizer in zip((plain, model), optimizers, strict=True):
                each(**make_batch(step)).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert [str(one.message) for one in caught if "in eval mode" in str(one.message)] == [
        "celora: this model trains in eval mode, where celora leaves forward and backward to PEFT; call model.train()."
    ]
    assert len(caught) == 1
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert p.equal(q)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_recomputed_in_training_mode(reentrant: bool) -> None:
    """The recomputed forward finds every layer in its original mode, so the backward is the same."""
    model = make_model()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    celora.attach(model, HALF)
    train(model, 4)
    assert min(graft.observed for graft in require(model).grafts.values()) == 2  # refreshes are steps 0 and 3
