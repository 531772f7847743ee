"""Only calls with packed batches use celora's attention, also when a checkpoint repeats them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationConfig

import celora
from celora.kernels.operations import available
from celora.modeling import attention, packing
from celora.modeling import call as forward
from celora.runtime.attachment import require
from decoders import model_of
from labelled import gradients, ragged
from patching import patch_all
from versions import before
from without import pretend


def implementation(model: nn.Module) -> str:
    return str(model.base_model.model.config._attn_implementation)


class Packed:
    """Counts the calls of celora's attention, and how many of them are packed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = self.packed = 0
        original = attention.attention

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.packed += kwargs.get("celora_lengths") is not None
            return original(*args, **kwargs)

        patch_all(patch, "celora.modeling.attention:attention", counted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_computes_the_same_attention_again(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint computes it again in backward, when the call that packed the batch has ended."""
    counted, batch = Packed(monkeypatch), ragged([11, 4, 7, 1])
    found = []
    for checkpointed in (False, True):
        model = model_of("llama")
        celora.attach(model, "exact")
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        counted.packed = 0
        for _ in range(2):
            found.append(gradients(model, batch))
        assert counted.packed == 2 * 2 * (1 + checkpointed)  # two calls, two layers
        assert implementation(model) == "sdpa"
    assert all(loss == found[0][0] for loss, _ in found)
    assert all(gradient.equal(found[0][1]) for _, gradient in found)


def test_outside_its_calls_the_configuration_is_the_models_own() -> None:
    model, batch = model_of("llama"), ragged([11, 4, 7])
    celora.attach(model, "exact")
    assert implementation(model) == "sdpa"
    seen: list[tuple[str, str]] = []
    inner = model.base_model.model
    for name, module in (("attention", inner.model.layers[0].self_attn.q_proj), ("gate", inner.model.layers[0].mlp)):
        module.register_forward_pre_hook(lambda *_, name=name: seen.append((name, implementation(model))))
    celora.detach(model)
    celora.attach(model, "exact")
    with pytest.warns(UserWarning, match=r"padding stays in batches: layers\.0\."):
        model(**batch)
    own = attention.ATTENTION if available("attention", torch.device("cpu")) else "sdpa"  # only while attention runs
    assert seen == [("attention", own), ("gate", "sdpa")]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_interrupted_attention_leaves_nothing_behind(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = model_of("llama"), ragged([11, 4, 7], left=True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        masked = model.base_model.model.model(**inputs)[0]
    celora.attach(model, "exact")
    expected = gradients(model, batch)
    original, armed = attention._sdpa, [where == "forward"]

    def fails() -> Callable[..., Any]:
        def raised(*_: Any, **__: Any) -> Any:
            raise error

        return raised if armed[0] else original()

    with monkeypatch.context() as patch:
        patch_all(patch, "celora.modeling.attention:_sdpa", fails)
        patch_all(patch, "celora.modeling.attention:plain", lambda: True)
        loss = None if armed[0] else model(**batch).loss
        armed[0] = True
        with pytest.raises(error):
            model(**batch) if loss is None else loss.backward()
    if error is ValueError:
        assert implementation(model) == "sdpa"
    with torch.no_grad():
        now = model.base_model.model.model(**inputs)[0]  # the decoder alone: none of the model's hooks sees this call
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(now[real], masked[real])
    assert implementation(model) == "sdpa"
    again = gradients(model, batch)
    assert again[0] == expected[0]
    assert again[1].equal(expected[1])
    celora.detach(model)
    assert implementation(model) == "sdpa"


def test_another_attention_refuses_what_was_packed_for_ours() -> None:
    """celora needs no mask. Without one, another attention would compute another model."""
    model, batch = model_of("llama"), ragged([11, 4, 7])
    celora.attach(model, "exact")
    layer = model.base_model.model.model.layers[1]
    layer.self_attn, old = type(layer.self_attn)(layer.self_attn.config, 1), layer.self_attn
    with pytest.warns(UserWarning, match=r"layers\.1\.self_attn was not there when celora was attached"):
        assert model(**batch).logits is None
    layer.self_attn = old
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.Lookup, "before", lambda *_: None)
        celora.detach(model)
        celora.attach(model, "exact")
        with pytest.raises(RuntimeError, match="mask"):
            model(**batch)


def test_an_attention_that_was_registered_anew_is_used() -> None:
    model, batch = model_of("llama"), ragged([11, 4, 7])
    original, calls = AttentionInterface()["sdpa"], [0]

    def own(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original(*args, **kwargs)

    celora.attach(model, "exact")
    AttentionInterface.register("sdpa", own)
    try:
        with pytest.warns(UserWarning, match="padding stays in batches: attn_implementation='sdpa' is not Transf"):
            model(**batch)
    finally:
        AttentionInterface.register("sdpa", original)
    assert calls == [2]


def test_an_operator_in_the_place_of_torchs_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), ragged([11, 4, 7])
    original, calls = nn.functional.scaled_dot_product_attention, [0]

    def own(*args: Any, **kwargs: Any) -> Tensor:
        calls[0] += 1
        return original(*args, **kwargs)

    celora.attach(model, "exact")
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", own)
    with pytest.warns(UserWarning, match="padding stays in batches: attn_implementation='sdpa' is not Transf"):
        model(**batch)
    assert calls == [2]


def test_tiles_do_not_take_the_place_of_an_attention_that_is_not_transformers_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads of 32 numbers have tiles where the machine has some. The batch has no padding to leave out."""
    model, batch = model_of("llama", head_dim=32), ragged([32, 32])
    original = nn.functional.scaled_dot_product_attention
    celora.attach(model, "exact")
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", lambda *a, **k: 0.5 * original(*a, **k))
    with pytest.warns(UserWarning, match="padding stays in batches"):
        found, gradient = gradients(model, {**batch, "attention_mask": None})
    celora.detach(model)
    expected, exact = gradients(model, {**batch, "attention_mask": None})
    assert found == pytest.approx(expected, rel=1e-6)
    assert (gradient - exact).norm() < 1e-5 * exact.norm()


def test_batches_that_are_not_packed_find_it_where_the_machine_has_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles, celora's attention also takes batches that are not packed, but only in calls that train on labels."""
    counted, batch = Packed(monkeypatch), ragged([32, 32, 32])
    model = model_of("llama")
    celora.attach(model, "exact")
    for attends in (True, False):
        pretend(monkeypatch, "attention", there=attends)
        patch_all(monkeypatch, "celora.modeling.attention:_tiles_pay", lambda *_: False)
        counted.calls = 0
        gradients(model, {**batch, "attention_mask": None})
        assert counted.calls == 2 * attends
        assert counted.packed == 0
    pretend(monkeypatch, "attention", there=True)
    counted.calls = 0
    model(input_ids=batch["input_ids"])
    with torch.no_grad():
        model(**batch)
    assert counted.calls == 0


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_generates_while_attached() -> None:
    model, batch = model_of("llama"), ragged([11, 4, 7])
    causal = model.base_model.model
    celora.attach(model, "exact")
    gradients(model, batch)
    settings = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=-1)
    causal.eval().init_continuous_batching(generation_config=settings)  # `generate_batch` begins like this

    def generated() -> str:
        try:
            return str(model.generate(batch["input_ids"][:1], generation_config=settings))
        except ValueError as error:  # some versions of Transformers then refuse to generate without a paged cache
            return str(error)

    attached = generated()
    celora.detach(model)
    assert attached == generated()


def test_what_is_added_after_attaching_is_seen() -> None:
    """celora does not keep a list of the model's modules."""
    model, batch = model_of("llama"), ragged([11, 4, 7])
    celora.attach(model, "exact")
    model(**batch)
    block = model.base_model.model.model.layers[1]
    block.extra = nn.Identity()
    block.extra.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"padding stays in batches: layers\.1\.extra has a forward hook"):
        model(**batch)


# --- tokens that attend to later ones ------------------------------


def bidirectional(model: nn.Module, how: str) -> dict[str, Any]:
    """Let tokens attend to later ones. Returns the arguments that a call needs for it."""
    causal = model.base_model.model
    if how == "argument":
        return {"is_causal": False}
    if how == "modules":
        for layer in causal.model.layers:
            layer.self_attn.is_causal = False
    elif how == "is_causal":
        causal.config.is_causal = False
    else:
        causal.config.use_bidirectional_attention = True
    return {}


@pytest.mark.parametrize("after", [True, False], ids=["after attaching", "before attaching"])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, how) for kind in ("llama", "mistral", "qwen2") for how in ("is_causal", "argument")),
        ("llama", "modules"),
        ("gemma3_text", "use_bidirectional_attention"),
    ],
)
def test_attention_to_later_tokens_is_kept(kind: str, how: str, after: bool) -> None:
    model, batch = model_of(kind), ragged([11, 4, 7], prompt=0)
    if after:
        plain = model_of(kind)
        extra = bidirectional(plain, how)
        loss, expected = gradients(plain, batch | extra)
        celora.attach(model, "exact")
        causal, _ = gradients(model, batch)
        assert bidirectional(model, how) == extra
        if how == "is_causal" and not before("transformers", "5"):  # earlier, only attentions read it
            assert abs(causal - loss) > 1e-3
    else:
        extra = bidirectional(model, how)
        loss, expected = gradients(model, batch | extra)
        report = celora.attach(model, "exact")
        assert how == "argument" or any("Padding stays: its tokens attend to later" in note for note in report.notes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, gradient = gradients(model, batch | extra)
        gradients(model, batch | extra)
    assert found == pytest.approx(loss, rel=1e-6)
    assert (gradient - expected).norm() < 1e-5 * expected.norm()
    assert require(model).forward is not None
    said = [str(warning.message) for warning in caught if "padding stays in batches" in str(warning.message)]
    assert len(said) == int(after or how == "argument")


def test_an_argument_that_is_not_known_keeps_the_padding() -> None:
    model, batch = model_of("llama"), ragged([11, 4, 7])
    celora.attach(model, "exact")
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        pack = packing.pack
        patch_all(patch, "celora.modeling.packing:pack", lambda *args: seen.append(args) or pack(*args))
        model(**batch, token_type_ids=None)  # None is the same as no argument
        assert len(seen) == 1
        with pytest.warns(UserWarning, match="what 'new_thing' among the arguments does is not known"):
            assert model(**batch, new_thing=False).logits is None
        assert len(seen) == 1
    assert forward.unknown_arguments({"new_thing": False, "labels": 1, "other": None}) == {"new_thing": False}
