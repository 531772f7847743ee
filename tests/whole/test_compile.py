"""Whole models under torch.compile: one graph without a break, no new graph at a refresh, the same result."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._guards import TracingContext
from torch._inductor.utils import run_and_get_code
from torch.nn.functional import scaled_dot_product_attention

import celora
from celora import CELoraConfig
from celora.modeling import packing, varlen
from celora.modeling.graft import LayerGraft
from celora.modeling.packing import measure, pack
from celora.modeling.switch import Mode, Switch
from celora.numerics import head
from celora.numerics.estimators import Columns
from celora.numerics.head_in_graph import score_chunk
from celora.numerics.products import both_ways
from celora.numerics.select import grain
from celora.runtime.attachment import require
from labelled import ragged
from machine import refuses
from patching import patch_all
from small import adapter, make_base, make_batch
from tolerances import OF_GRADIENT
from without import pretend, without

# While Dynamo traces a Function, it instantiates the class. torch itself warns about that.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")

# Dynamo asks the decoder's output for its gradient. It hides torch's warning about that, but not an error.
asks_for_gradients = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

# On a CPU inductor writes C++. Everything else here is checked without a compiler, too.
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=4)
EACH_SHAPE = ["k_proj", "o_proj", "up_proj", "down_proj"]  # tracing takes a second for each layer
FEW = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Newer versions keep the stack of each side effect for a message.
    quiet = (
        {"side_effect_replay_policy": "silent"} if hasattr(torch._dynamo.config, "side_effect_replay_policy") else {}
    )
    with torch._dynamo.config.patch(quiet):
        yield
    torch._dynamo.reset()


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _model(
    config: CELoraConfig | None, dtype: torch.dtype = torch.float64, layers: list[str] = EACH_SHAPE
) -> PeftModel:
    """A model in float64, in which rounding changes no choice and no 8-bit step."""
    base = make_base(layers=1, dtype=dtype)
    model = get_peft_model(base, LoraConfig(target_modules=layers, init_lora_weights=False))
    if config is not None:
        celora.attach(model, config)
    return model.train()


def _train(model: PeftModel, forward: nn.Module, steps: int) -> list[int]:
    """Train through `forward`. Returns the number of graphs after each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    counts = []
    for step in range(steps):
        forward(**make_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(_graphs())
    return counts


@pytest.mark.parametrize("fused", [False, True])
def test_one_graph_for_refreshes_and_one_for_estimates(fused: bool) -> None:
    config = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=4, fused=fused)
    eager, model = _model(config), _model(config)
    counts = _train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), 6)
    assert counts == [1, 2, 2, 2, 2, 2]  # refreshes at steps 0 and 4
    assert require(model).relative_errors
    _train(eager, eager, 6)
    found = adapter(model)
    for name, value in adapter(eager).items():
        torch.testing.assert_close(found[name], value)


IN_8_BITS = {
    "gate_proj": {"estimator": "columns"},
    "o_proj": {"estimator": "tokens", "rank": 0},
    "up_proj": {"estimator": "int8"},
    "down_proj": {"estimator": "tokens", "rank": 0, "forward": "int8"},
}


def _in_8_bits(*layers: str) -> CELoraConfig:
    """8-bit products, with another estimator in each of these layers."""
    overrides = {layer: {"keep_ratio": 0.5, "precision": "int8", **IN_8_BITS[layer]} for layer in layers}
    return CELoraConfig(estimator="dense", refresh_every=3, fused=True, overrides=overrides)


def test_8_bit_products_are_one_operator_to_the_graph() -> None:
    if refuses():
        return
    layers = ["gate_proj", "o_proj", "up_proj"]
    model = _model(_in_8_bits(*layers), layers=layers)
    counts = _train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), 5)
    assert counts[1:] == [counts[1]] * 4
    assert all(graft.estimator.ready for graft in require(model).grafts.values())


def _recorder() -> tuple[list[list[Any]], list[list[torch.dtype]], Any]:
    """A backend, the operators of each graph that it makes, and the dtypes that a replay of a forward copies."""
    graphs: list[list[Any]] = []
    copied: list[list[torch.dtype]] = []

    def record(graph: fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append([node.target for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)])
        return make_boxed_func(graph.forward)

    def record_forward(graph: fx.GraphModule, inputs: object) -> Callable[..., object]:
        static = TracingContext.get().fw_metadata.static_input_indices
        given = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        copied.append([t.dtype for i, t in enumerate(given) if isinstance(t, Tensor) and i not in static])
        return record(graph, inputs)

    cut = min_cut_rematerialization_partition
    return graphs, copied, aot_autograd(fw_compiler=record_forward, bw_compiler=record, partition_fn=cut)


@pytest.mark.parametrize("setting", ["exact", "8 bits both ways"])
def test_a_cuda_graph_may_record_a_whole_step(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On accelerators, an ordinary step has no operator that keeps out of a CUDA graph, and copies its batch alone."""
    without(monkeypatch, "c", "onednn")
    if refuses():
        return
    monkeypatch.setattr(both_ways, "reads_freely", lambda device: False)
    layers, config = ["q_proj", "k_proj", "down_proj"], CELoraConfig(estimator="dense", fused=True)
    if setting != "exact":
        config = CELoraConfig(estimator="int8", precision="int8", forward="int8", refresh_every=3, fused=True)
    eager, model = (_model(config, torch.float32, layers) for _ in range(2))
    graphs, copied, backend = _recorder()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    counts = _train(model, compiled, 5)  # refreshes at steps 0 and 3
    assert counts == [1, 2, 2, 2, 2] or setting == "exact"
    refresh, step = [*graphs[0], *graphs[1]], [*graphs[-2], *graphs[-1]]  # forward and backward
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    if setting != "exact" and unsafe is not None:
        assert any(unsafe in operator.tags for operator in refresh)
    assert not any(unsafe in operator.tags for operator in step)
    assert copied[-1] == [torch.int64] * 2  # words and labels
    ours = [str(operator).split(".")[1] for operator in step if operator.namespace == "celora"]
    # Query and key share an input. The backward of the one block ends at `down_proj`.
    expected = {} if setting == "exact" else {"input_in_graph": 2, "product_of_rows": 3, "product_of_gradients": 1}
    assert Counter(ours) == expected
    _train(eager, eager, 5)
    found = adapter(model)
    for name, value in adapter(eager).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-4)
    if setting != "exact":
        _changes_are_seen(model, compiled, eager)
        assert _graphs() == counts[-1] + 1  # for evaluation
        _moved(model)
        torch.testing.assert_close(compiled(**make_batch(0)).loss, eager(**make_batch(0)).loss, rtol=1e-4, atol=0)


def _changes_are_seen(model: PeftModel, compiled: nn.Module, eager: PeftModel) -> None:
    """A graph sees a frozen weight that changed in place, or was replaced, when the step ends; evaluation at once."""
    for change in ("in place", "replaced", "in evaluation"):
        before = eager(**make_batch(0)).loss
        for trained in (model, eager):
            layer = trained.get_base_model().model.layers[0].mlp.down_proj.base_layer
            if change == "replaced":
                layer.weight = nn.Parameter(layer.weight / 30, requires_grad=False)
            else:
                layer.weight.mul_(20)
            if change != "in evaluation":
                require(trained).clock.advance()
        for trained in (model, eager):
            trained.train(change != "in evaluation")
        with torch.inference_mode(change == "in evaluation"):
            found, expected = compiled(**make_batch(0)).loss, eager(**make_batch(0)).loss
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
        assert (expected - before).abs() > 1e-3 * before, change
    _train(model.train(), compiled, 1)  # goes on with the copies that inference mode made


def _moved(model: PeftModel) -> None:
    """As if the model had come from another device: the copies that graphs read are still there."""
    for forward in require(model).forwards.values():
        product: Any = forward.product
        product._recorded = product._recorded._replace(q=product._recorded.q.to("meta"))


@needs_compiler
@pytest.mark.parametrize("setting", ["columns", "8 bits"])
def test_inductor_gives_the_same_without_breaks_or_graphs_at_later_refreshes(setting: str) -> None:
    config = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3, fused=True)
    layers = EACH_SHAPE
    if setting == "8 bits":
        if refuses():
            return
        layers = ["o_proj", "down_proj"]
        config = _in_8_bits(*layers)
    # Not every version of inductor compiles attention in float64.
    eager, model = (_model(config, torch.float32, layers) for _ in range(2))
    counts = _train(model, torch.compile(model), 8)  # refreshes at steps 0, 3 and 6
    assert counts[1:] == [counts[1]] * 7
    assert not torch._dynamo.utils.counters["graph_break"]
    _train(eager, eager, 8)
    # Gradients are below 1, the learning rate is 0.1, and there are eight steps. In 8 bits, one of 33 x 48 numbers may
    # lie half-way between two of 127 steps: that is 127^-1 (33 x 48)^-1/2 = 2e-4 of a gradient, in some of the steps.
    allowed = 8 * 0.1 * OF_GRADIENT if setting == "columns" else 1e-4
    found = adapter(model)
    for name, value in adapter(eager).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=allowed)


@needs_compiler
@pytest.mark.parametrize("statistics", [False, True])
def test_inductor_gives_the_head_no_logits_in_float32(statistics: bool) -> None:
    words, hidden = nn.Parameter(torch.randn(1000, 32).bfloat16(), requires_grad=False), torch.randn(64, 32).bfloat16()
    compiled = torch.compile(score_chunk, fullgraph=True)
    given = {"scale": 1.0, "cap": None, "smoothing": 0.0, "statistics": statistics, "wanted": True}
    targets = torch.randint(0, 1000, (64,))
    found, sources = run_and_get_code(compiled, hidden, targets, words, None, None, **given)
    made = [line for source in sources for line in source.splitlines() if "empty_strided" in line and "1000" in line]
    assert made
    assert not any("torch.float32" in line for line in made)
    expected = score_chunk(hidden, targets, words, None, None, **given)
    torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=2**-8, atol=0)


@pytest.mark.parametrize("base", ["plain", "int8"])
def test_refreshes_that_take_turns_would_be_a_graph_each_so_all_refresh_at_once(base: str) -> None:
    model = _model(None)
    if base == "int8":  # celora's weights in 8 bits are read inside the graph's operators
        celora.quantise_base(model)
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=2, spread=True))
    counts = _train(model, torch.compile(model, fullgraph=True, backend="aot_eager"), 7)
    assert counts[3:] == [counts[3]] * 4  # refreshes are at steps 4 and 6; layers are ready from the first one on
    grafts = require(model).grafts
    assert len({graft.mode for graft in grafts.values() if graft.estimator.ready}) == 1
    assert sum(graft.estimator.ready for graft in grafts.values()) == 3  # all but k: its input needs no gradient
    assert len(require(model).relative_errors) == 3


def by_begins(query: Tensor, key: Tensor, value: Tensor, begins: Tensor, longest: int, scale: float) -> Tensor:
    """What `varlen.half_function` gives, in operators that a graph may contain."""
    place = torch.arange(len(query))
    sequence = torch.bucketize(place, begins[1:], right=True)
    seen = (sequence[:, None] == sequence) & (place[:, None] >= place)
    rows = (t.transpose(0, 1)[None] for t in (query, key, value))
    return scaled_dot_product_attention(*rows, seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)


def _on_batches(model: PeftModel, steps: int) -> tuple[list[float], list[int]]:
    """Losses of batches of different lengths, and the number of graphs after each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses, counts, lengths = [], [], random.Random(0)
    for step in range(steps):
        torch.manual_seed(step)
        batch = ragged([lengths.randint(20, 60) for _ in range(4)])
        batch["input_ids"] %= model.config.vocab_size
        batch["labels"] = torch.where(batch["labels"] < 0, -100, batch["input_ids"])
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        counts.append(_graphs())
    return losses, counts


@pytest.fixture
def _one_call_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, packed sequences are computed in one call."""
    monkeypatch.setattr(varlen, "available", lambda device: True)
    monkeypatch.setattr(varlen, "half_function", lambda: by_begins)
    patch_all(monkeypatch, "celora.modeling.varlen:_MULTIPLE", 4)  # heads of 12 numbers
    pretend(monkeypatch, "attention", there=False)


@asks_for_gradients
@pytest.mark.usefixtures("_one_call_attends")
def test_a_compiled_decoder_gets_packed_batches_and_the_head_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, packed batches share graphs. They have one for refreshes and one for estimates, for any lengths."""
    config = CELoraConfig(
        estimator="tokens", selection="energy", keep_ratio=0.9, rank=0, refresh_every=3, fused=True, labelled_head=True,
        padding_free=True, head_keep_ratio=0.5, **({} if refuses() else {"precision": "int8", "forward": "int8"}),
    )  # fmt: skip
    eager, model = (_model(config, torch.bfloat16, FEW) for _ in range(2))
    model.get_base_model().model.compile(backend="aot_eager", fullgraph=True)
    packed = []
    monkeypatch.setattr(packing, "pack", lambda *args: packed.append(pack(*args)) or packed[-1])
    losses, counts = _on_batches(model, 10)  # refreshes at steps 0, 3, 6 and 9
    assert counts[7:] == [counts[6]] * 3
    assert counts[6] <= 4  # refreshes and estimates, each for the first length and then for any
    assert all(inputs["input_ids"].shape[1] % grain(inputs["input_ids"].shape[1]) == 0 for inputs in packed)
    assert model.config._attn_implementation == "sdpa"
    assert losses == pytest.approx(_on_batches(eager, 10)[0], rel=2**-8)  # logits are rounded to bfloat16


@asks_for_gradients
@pytest.mark.usefixtures("_one_call_attends")
@pytest.mark.parametrize("setting", ["exact", "8 bits both ways"])
def test_graphs_hold_the_packed_decoder_and_the_head(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, `compile_model` makes a graph of the head, too. After the first lengths, no step makes another."""
    without(monkeypatch, "c", "onednn")
    if refuses():
        return
    for module in (both_ways, head):
        monkeypatch.setattr(module, "reads_freely", lambda device: False)
    chosen: dict[str, Any] = {"estimator": "dense"}
    if setting != "exact":
        both_ways_and_head = {"precision": "int8", "forward": "int8", "head_forward": "int8"}
        chosen = {"estimator": "int8", "refresh_every": 3, **both_ways_and_head}
    config = CELoraConfig(fused=True, labelled_head=True, padding_free=True, **chosen)
    eager, model = (_model(config, torch.bfloat16, FEW) for _ in range(2))
    graphs, copied, backend = _recorder()
    celora.compile_model(model, backend=backend, fullgraph=True)
    steps = 6 if setting == "exact" else 15  # an 8-bit head is measured in the first ten steps, by kernels
    losses, counts = _on_batches(model, steps)
    # Of the head and of each kind of step there is a graph for the first length, and one for any.
    assert counts[-3:] == [4 if setting == "exact" else 5] * 3
    # Replays copy words, positions and begins of sequences to the decoder, hidden states and labels to the head.
    assert copied[-1] == [torch.bfloat16, torch.int64]
    assert [dtypes for dtypes in copied if torch.bfloat16 in dtypes] == [copied[-1]] * 2
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    recorded = [graph for graph in graphs if not any(unsafe in operator.tags for operator in graph)]
    products = [sum(str(operator).startswith("celora.product_of_rows") for operator in graph) for graph in recorded]
    assert max(products) == (0 if setting == "exact" else len(FEW))  # the decoder's forward
    assert products[-1] == (0 if setting == "exact" else 1)  # the head
    assert losses == pytest.approx(_on_batches(eager, steps)[0], rel=2**-8)  # logits are rounded to bfloat16


@asks_for_gradients
def test_without_attention_in_one_call_a_compiled_decoder_keeps_its_padding() -> None:
    config = CELoraConfig(estimator="dense", labelled_head=True, padding_free=True)
    eager, model = (_model(config, torch.float32, FEW) for _ in range(2))
    causal, batch = model.get_base_model(), ragged([9, 3, 5])
    kept, numbers = measure(batch["labels"] != -100, batch["attention_mask"])
    assert pack(causal, batch["input_ids"], None, kept, numbers.tolist()) is not None
    causal.model.compile(backend="aot_eager", fullgraph=True)
    assert pack(causal, batch["input_ids"], None, kept, numbers.tolist()) is None
    losses, counts = _on_batches(model, 1)
    assert counts == [1]
    assert losses == pytest.approx(_on_batches(eager, 1)[0], rel=1e-5)


def test_blocks_compiled_one_by_one_are_quiet() -> None:
    """torch.compile warns of each `functools.cache` that it traces through; warnings are errors here."""
    eager, model = (_model(None, torch.float32, FEW) for _ in range(2))
    celora.attach(model, "exact")
    for block in model.get_base_model().model.layers:
        block.compile(backend="eager")
    torch.testing.assert_close(model(**make_batch(0)).loss, eager(**make_batch(0)).loss)


def test_attaching_to_a_model_that_was_compiled_before_is_said() -> None:
    """torch.compile does not check again whether a layer has new hooks."""
    model = _model(None, layers=FEW)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**make_batch(0)).loss.backward()
    celora.attach(model, HALF)
    with pytest.warns(UserWarning, match="no backward came through the base layer of any"):
        _train(model, compiled, 1)


def test_each_layers_mode_is_looked_at() -> None:
    """Dynamo takes equal enum members of two layers for one object, and once did not check the second layer's."""
    layers = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)).requires_grad_(False)
    grafts = [LayerGraft(Columns(*layer.weight.shape, keep_ratio=0.5, rank=2), Switch()) for layer in layers]
    for layer, graft in zip(layers, grafts, strict=True):
        layer.register_forward_hook(graft)
    compiled = torch.compile(layers, fullgraph=True, backend="aot_eager")
    for modes in ((Mode.EXACT, Mode.EXACT), (Mode.OBSERVE, Mode.EXACT), (Mode.OBSERVE, Mode.OBSERVE)):
        for graft, mode in zip(grafts, modes, strict=True):
            graft.mode, graft.observed = mode, 0
        compiled(torch.randn(5, 8, requires_grad=True)).sum().backward()
        assert [graft.observed for graft in grafts] == [mode is Mode.OBSERVE for mode in modes]
