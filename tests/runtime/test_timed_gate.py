"""Presets auto and fast give each kind of layer, and the head, the fastest setting."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor

import celora
from celora.modeling.int8_linear import Int8Linear
from celora.modeling.survey import survey
from celora.runtime.attachment import require
from celora.runtime.gate import EXACT, _over_exact, gate
from celora.settings.config import LayerConfig
from celora.settings.presets import PRESETS, by_rule
from machine import refuses
from patching import patch_all
from small import make_base, make_model, train
from without import count_linear

FAST, AUTO = PRESETS["fast"], by_rule(PRESETS["auto"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture(autouse=True)
def _integers_may_pay(integers_may_pay: None) -> None:
    """Nothing but times decides."""


@pytest.fixture(autouse=True)
def _few_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 61 words were many."""
    patch_all(monkeypatch, "celora.runtime.gate:_LEAST_WORDS", 0)


def times(monkeypatch: pytest.MonkeyPatch, *milliseconds: float) -> list[int]:
    """Let timings take these milliseconds, in the order of the contenders. Returns the number of contenders each time.

    The order is exact, both ways, backward, native tokens. For auto it is exact, backward, native tokens; for the head,
    exact, drawn.
    """
    seen: list[int] = []

    def ratios(
        contenders: Mapping[str, Callable[[], object]], *, repeats: int, device: torch.device
    ) -> dict[str, float]:
        for call in contenders.values():
            call()
        seen.append(len(contenders))
        return {name: time / milliseconds[0] for name, time in zip(contenders, milliseconds, strict=False)}

    patch_all(monkeypatch, "celora.machine.timing:ratios", ratios)
    return seen


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
@pytest.mark.parametrize(
    ("took", "setting"),
    [
        ((10.0, 3.0, 6.0, 9.0), ("tokens", "int8", "int8")),
        ((10.0, 7.0, 6.0, 9.0), ("tokens", "int8", "exact")),
        ((10.0, 12.0, 11.0, 9.0), ("tokens", "native", "exact")),
        ((10.0, 12.0, 11.0, 9.9), ("dense",)),
    ],
)
def test_the_fastest_wins(took: tuple[float, ...], setting: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    seen = times(monkeypatch, *took)
    config = gate(survey(model), FAST).config
    assert seen == [4] * 4  # four kinds of layers: q and o, k and v, gate and up, down
    for name in survey(model).layers:
        layer = config.for_layer(name)
        assert (layer.estimator, layer.precision, layer.forward)[: len(setting)] == setting


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
def test_the_times_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, 10.0, 6.0, 9.0)
    told = gate(survey(make_model()), AUTO, tokens=100, labelled=20)
    dtype = "torch.float32"
    layers = {"dtype": dtype, "tokens": 64, "over_exact": {"tokens x int8": 0.6, "tokens x native": 0.9}}
    layers |= {"chosen": "tokens x int8"}
    assert told.timings[0] == {"layers": "q_proj, o_proj", "count": 4, "shape": [48, 48]} | layers
    assert [timing["count"] for timing in told.timings] == [4, 4, 4, 2, 1]
    head = {"layers": "head", "count": 1, "shape": [61, 48], "dtype": dtype, "tokens": 16}
    assert told.timings[-1] == head | {"over_exact": {"0.1 of the words": 0.6}, "chosen": "0.1 of the words"}
    times(monkeypatch, 10.0, 9.9, 12.0)
    told = gate(survey(make_model()), AUTO, tokens=1000, labelled=1000)
    assert {timing["chosen"] for timing in told.timings} == {"exact"}


def test_large_weights_are_cut_and_tokens_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few tokens, any product takes the time of reading the weight, and a head of many words would stay exact."""
    times(monkeypatch, 10.0, 6.0, 9.0)
    patch_all(monkeypatch, "celora.runtime.gate:_MOST_NUMBERS", 512 * 48 * 32)
    patch_all(monkeypatch, "celora.runtime.gate:_FEWEST_ROWS", 16)
    timed: list[tuple[int, int]] = []

    def shares_of(weight: Tensor, tokens: int, shares: Sequence[float]) -> dict[str, Callable[[], object]]:
        timed.append((len(weight), tokens))
        return {str(share): lambda: None for share in shares}

    patch_all(monkeypatch, "celora.runtime.gate:shares_of", shares_of)
    told = gate(survey(make_model()), AUTO)
    assert timed == [(32, 512)]
    assert {timing["tokens"] for timing in told.timings} == {512}
    assert told.timings[-1]["shape"] == [61, 48]


def test_an_exact_forward_takes_what_the_exact_product_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    if refuses():
        return
    seen, cpu = count_linear(monkeypatch), torch.device("cpu")
    setting = LayerConfig("int8", rank=0, forward="int8")
    _over_exact([setting], (32, 48), 16, torch.float32, cpu, None, torch.float32)
    assert {*seen} == {((16, 48), (32, 48)), ((16, 32), (48, 32))}


@pytest.mark.parametrize(("bfloat16", "trains_in"), [(0.5, torch.bfloat16), (2.0, torch.float32)])
def test_on_an_accelerator_a_weight_in_float32_may_be_multiplied_in_bfloat16(
    bfloat16: float, trains_in: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast it is. Estimates must be faster than that."""
    monkeypatch.setattr("celora.runtime.gate.reads_freely", lambda device: False)
    monkeypatch.setattr("celora.runtime.gate.time_over_float32", lambda dtype, device: bfloat16)
    found: list[list[torch.dtype]] = []
    heads: list[torch.dtype] = []

    def ratios(contenders: Mapping[str, Callable[[], Any]], **_: object) -> dict[str, float]:
        found.append([call().dtype for call in contenders.values()])
        return dict.fromkeys(contenders, 1.0)

    def shares_of(weight: Tensor, tokens: int, shares: Sequence[float]) -> dict[str, Callable[[], Tensor]]:
        heads.append(weight.dtype)
        return {str(share): lambda: weight for share in shares}

    patch_all(monkeypatch, "celora.machine.timing:ratios", ratios)
    patch_all(monkeypatch, "celora.runtime.gate:shares_of", shares_of)
    gate(survey(make_model()), AUTO, tokens=16, labelled=16)
    assert [exact for exact, *_ in found] == [trains_in] * 5
    assert {dtype for _, *estimates in found[:4] for dtype in estimates} == {trains_in}
    assert heads == [trains_in]


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
def test_the_times_say_how_a_kind_of_layers_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the report shows two kinds alike."""
    times(monkeypatch, 10.0, 6.0, 9.0)
    base = make_base()
    base.model.layers[0].mlp.down_proj = Int8Linear.of(base.model.layers[0].mlp.down_proj)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["down_proj"]))
    told = gate(survey(model), AUTO, tokens=100, labelled=20)
    assert [timing["layers"] for timing in told.timings] == ["down_proj (Int8Linear)", "down_proj", "head"]


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
@pytest.mark.parametrize(
    ("took", "setting", "words"),
    [
        ((10.0, 6.0, 9.0), ("tokens", "int8"), 0.1),
        ((10.0, 12.0, 9.0), ("tokens", "native"), 1.0),
        ((10.0, 9.8, 9.9), ("dense",), 1.0),
    ],
)
def test_auto_keeps_the_exact_forward(
    took: tuple[float, ...], setting: tuple[str, ...], words: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    seen = times(monkeypatch, *took)
    config = gate(survey(model), AUTO).config
    assert seen == [3] * 4 + [2]
    assert config.head_keep_ratio == words
    for name in survey(model).layers:
        layer = config.for_layer(name)
        assert (layer.estimator, layer.precision)[: len(setting)] == setting
        assert layer.forward == "exact"


def test_on_a_gpu_auto_is_exact_and_fast_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What estimates gain on a GPU was not measured."""
    patch_all(monkeypatch, "celora.runtime.gate:_untried", lambda config, device: config.forward == "exact")
    model = make_model()
    seen = times(monkeypatch, 10.0, 3.0, 6.0, 9.0)
    config = gate(survey(model), AUTO).config
    assert seen == []
    assert config.head_keep_ratio == 1
    assert {config.for_layer(name).estimator for name in survey(model).layers} == {"dense"}
    assert (
        refuses() or gate(survey(model), FAST).config.for_layer(next(iter(survey(model).layers))).estimator == "tokens"
    )


def test_what_was_measured_is_kept_for_the_machine_and_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = survey(make_model())
    seen = times(monkeypatch, 10.0, 6.0, 9.0)
    first = gate(found, AUTO, tokens=100, labelled=20).config
    measured = len(seen)
    assert measured == 5
    seen = times(monkeypatch, 10.0, 20.0, 20.0)
    # rounded to powers of two, these are the same numbers of tokens
    assert gate(found, AUTO, tokens=127, labelled=31).config == first
    assert seen == []
    assert gate(found, AUTO, tokens=100, labelled=40).config != first
    assert len(seen) == 1  # the head
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    gate(found, AUTO, tokens=100, labelled=20)
    assert len(seen) == 1 + measured
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # this folder cannot be created
    gate(found, AUTO, tokens=100, labelled=20)
    assert len(seen) == 1 + 2 * measured


def test_what_others_disturbed_is_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    found = survey(make_model())
    with monkeypatch.context() as patch:
        patch_all(patch, "celora.machine.timing:disturbed", lambda device: "other programs use 90% of the processors")
        slow = times(patch, 10.0, 20.0, 20.0)
        assert gate(found, AUTO).config == gate(found, AUTO).config
        assert len(slow) == 2 * 5
    seen = times(monkeypatch, 10.0, 6.0, 9.0)
    assert gate(found, AUTO).config == gate(found, AUTO).config
    assert len(seen) == 5


@pytest.mark.parametrize("variable", ["CELORA_KERNELS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"])
def test_other_instructions_are_timed_for_themselves(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = survey(make_model())
    seen = times(monkeypatch, 10.0, 6.0, 9.0)
    for value in ("a", "b", "a"):
        monkeypatch.setenv(variable, value)
        gate(found, AUTO)
    assert len(seen) == 2 * 5


@pytest.mark.parametrize("rank", ["balanced", "adapter"])
def test_a_rank_may_follow_the_adapters(rank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens without a kept share of 1 have a frozen factor. The gate times it with the rank that it will have."""
    times(monkeypatch, 10.0, 3.0, 6.0, 9.0)
    model = make_model()
    asked = dataclasses.replace(FAST, rank=rank, precision="native", forward="exact")
    config = gate(survey(model), asked).config
    assert {config.for_layer(name).rank for name in survey(model).layers} == {rank}


def test_only_the_layer_that_was_timed_gets_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may be the end of another one, where layers are not in a model of PEFT's."""

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.vision = torch.nn.Linear(32, 32), torch.nn.ModuleDict({"proj": torch.nn.Linear(64, 64)})

    model = inject_adapter_in_model(LoraConfig(target_modules=["proj"], r=2), Both().requires_grad_(False))
    slow = {"proj": True, "vision.proj": False}
    asked = dataclasses.replace(FAST, precision="native", forward="exact", head_forward="exact", head_keep_ratio=1.0)
    took = {32: (10.0, 30.0), 64: (10.0, 3.0)}

    def fastest(own: Any, layer: Any, *_: Any) -> Any:
        exact, estimate = took[layer.out_features]
        return (EXACT if estimate > exact else own), {}

    patch_all(monkeypatch, "celora.runtime.gate:_fastest", fastest)
    config = gate(survey(model), asked).config
    assert {name: config.for_layer(name).estimator == "dense" for name in slow} == slow


def test_what_the_user_says_of_a_layer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, 10.0, 30.0, 30.0, 30.0)
    asked = dataclasses.replace(FAST, overrides={"up_proj": {"keep_ratio": 0.9}})
    config = gate(survey(make_model()), asked).config
    for name in survey(make_model()).layers:
        expected = ("tokens", 0.9) if name.endswith("up_proj") else ("dense", 0.9997)
        layer = config.for_layer(name)
        assert (layer.estimator, layer.keep_ratio) == expected


def test_how_inputs_are_saved_keeps_no_layer_from_being_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, 10.0, 30.0, 30.0, 30.0)
    asked = dataclasses.replace(FAST, overrides={"*": {"saved_input": "native"}})
    config = gate(survey(make_model()), asked).config
    found = {(layer.estimator, layer.saved_input) for layer in map(config.for_layer, survey(make_model()).layers)}
    assert found == {("dense", "native")}


@pytest.mark.parametrize("preset", ["auto", "fast"])
@pytest.mark.filterwarnings("ignore:celora. (at step|from step)")
def test_attached_in_inference_mode_it_trains(preset: str) -> None:
    model = make_model()
    with torch.inference_mode():
        celora.attach(model, preset)
    train(model, 2)


def test_random_numbers_stay_what_they_are() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    gate(survey(make_model()), FAST)
    torch.manual_seed(3)
    model = make_model()
    torch.manual_seed(3)
    gate(survey(model), FAST)
    assert torch.rand(1).equal(expected)


@pytest.mark.filterwarnings("ignore:celora. (at step|from step)")
def test_attach_measures_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    times(monkeypatch, 10.0, 3.0, 6.0, 9.0)
    model = make_model()
    report: Any = celora.attach(model, "fast")
    if not refuses():
        assert {layer.forward for layer in report.layers} == {"int8"}
    train(model, 2)


@pytest.mark.filterwarnings("ignore:celora. (at step|from step)")
def test_auto_needs_no_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule leaves alone what the user has set."""
    times(monkeypatch, 10.0, 6.0, 6.5)
    model = make_model()
    report = celora.attach(model, "auto", refresh_every=7)
    config = require(model).config
    assert {layer.estimator for layer in report.layers} == {"tokens"}
    assert (config.refresh_every, config.head_keep_ratio, config.forward) == (7, 0.1, "exact")
    assert celora.attach(model, "auto", refresh_every=7).layers == report.layers
    assert require(model).config == config
    train(model, 2)
    celora.attach(model, "auto", head_keep_ratio=1.0, most_error=None, zero_tokens=False)
    config = require(model).config
    assert (config.head_keep_ratio, config.most_error, config.zero_tokens) == (1.0, None, False)
    celora.attach(model, "auto", labelled_head=False, target_error=0.1)
    config = require(model).config
    assert (config.head_keep_ratio, config.most_error) == (1.0, None)


@pytest.mark.parametrize(("least", "share"), [(6, 0.1), (7, 0.3), (18, 0.3), (19, 1.0), (2048, 1.0)])
@pytest.mark.parametrize("config", [FAST, AUTO], ids=["fast", "auto"])
def test_a_small_vocabulary_keeps_more(
    config: celora.CELoraConfig, least: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head has 61 words. A draw of fewer than the targets is mostly noise."""
    times(monkeypatch, 10.0, 6.0, 6.5, 9.0)
    patch_all(monkeypatch, "celora.runtime.gate:_LEAST_WORDS", least)
    assert gate(survey(make_model()), config).config.head_keep_ratio == share
    assert gate(survey(make_model()), config, given=["head_keep_ratio"]).config.head_keep_ratio == 0.1  # the user's


def test_a_share_of_the_words_that_was_given_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine's times would decide otherwise, and a resumed training could not go on there."""
    seen, asked = times(monkeypatch, 10.0, 12.0, 9.0), dataclasses.replace(AUTO, head_keep_ratio=0.3)
    patch_all(monkeypatch, "celora.runtime.gate:_LEAST_WORDS", 1)
    assert gate(survey(make_model()), asked, given=["head_keep_ratio"]).config.head_keep_ratio == 0.3
    of_layers = len(seen)
    assert gate(survey(make_model()), asked).config.head_keep_ratio == 1.0
    assert len(seen) == of_layers + 1


@pytest.mark.parametrize("config", [FAST, AUTO], ids=["fast", "auto"])
def test_a_head_that_is_in_other_processes_has_the_rules_share(config: celora.CELoraConfig) -> None:
    """DeepSpeed's ZeRO-3 leaves an empty weight between two forwards."""
    model = make_model()
    weight: Any = model.get_output_embeddings().weight
    weight.data, weight.ds_id = torch.empty(0), 3
    found = survey(model)
    assert gate(found, config).config.head_keep_ratio == 0.1
