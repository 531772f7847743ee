"""Calls of a model inside one another, calls that were interrupted, and calls of users' own model classes."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from operator import attrgetter, itemgetter
from typing import Any

import pytest
import torch
from accelerate.utils import convert_to_fp32, send_to_device
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import celora
from celora import CELoraError
from celora.modeling.attention import ATTENTION
from celora.modeling.hooks import remove
from labelled import masked_batch
from small import make_batch, make_model, train

pytestmark = pytest.mark.filterwarnings("ignore:celora. padding stays in batches")  # for the sake of the hooks


CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def test_a_cache_that_was_left_out_is_not_taken_for_none() -> None:
    """Training in segments would lose what came before, and say nothing."""
    model, ids = make_model(), make_batch(3)["input_ids"]
    model.config.use_cache = True
    first, second = ({"input_ids": part, "labels": part} for part in (ids[:, :6], ids[:, 6:]))

    def losses(**more: Any) -> list[Tensor]:
        one = model(**first, **more)
        return [one.loss, model(**second, **{CACHE: getattr(one, CACHE)}).loss]

    expected = losses()
    celora.attach(model, "exact")
    with pytest.raises(CELoraError, match="leaves the cache of keys and values out of its output; call the model with"):
        losses()
    torch.testing.assert_close(losses(use_cache=True), expected)
    output = model(**first)
    left_out = getattr(output, CACHE)
    for use in (list, len, itemgetter(0), attrgetter("layers")):
        with pytest.raises(CELoraError, match="use_cache=True"):
            use(left_out)
    assert isinstance(copy.deepcopy(left_out), type(left_out))
    assert not hasattr(left_out, "dtype")  # accelerate asks whatever it meets
    assert convert_to_fp32(output).keys() == send_to_device(output, "cpu").keys() == output.keys() == {"loss"}
    for without in ({"use_cache": False}, {}):
        model.config.use_cache = bool(without)
        assert getattr(model(**first, **without), CACHE) is None


@pytest.mark.parametrize("tokens", [7, 20])
def test_a_mask_of_another_length_is_the_models_own(tokens: int) -> None:
    """With a cache, Transformers pads it or crops it."""
    model, batch = make_model(), make_batch(3)
    model.config.use_cache = True
    batch["attention_mask"] = torch.ones(len(batch["labels"]), tokens, dtype=torch.int64)
    expected = model(**batch).loss
    celora.attach(model, "exact")
    torch.testing.assert_close(model(**batch).loss, expected)


def reference(model: PeftModel) -> None:
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=make_batch(9)["input_ids"][:, :5])


def evaluation(model: PeftModel) -> None:
    with torch.no_grad():
        model(**make_batch(8))


def another_loss(model: PeftModel) -> None:
    model(**make_batch(8)).loss.backward()


@pytest.mark.parametrize("inner", [reference, evaluation, another_loss])
@pytest.mark.parametrize("where", ["layers.1", "layers.1.self_attn.q_proj", "norm"])
def test_a_call_inside_a_call_is_the_models_own(where: str, inner: Callable[[PeftModel], None]) -> None:
    found = {}
    for attached in (False, True):
        model = make_model().train()
        if attached:
            celora.attach(model, "exact")
        inside: list[nn.Module] = []

        def call_again(module: nn.Module, _: Any, inside: list[nn.Module] = inside, model: PeftModel = model) -> None:
            if not inside:
                inside.append(module)
                inner(model)
                inside.clear()

        model.get_base_model().model.get_submodule(where).register_forward_pre_hook(call_again)
        train(model, 3)
        found[attached] = model(**make_batch(0)).loss.detach()
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=0)


@pytest.mark.parametrize("where", ["layers.0.self_attn.o_proj", "layers.0.self_attn.k_proj"])
def test_after_an_interruption_the_decoder_alone_sees_its_padding(where: str) -> None:
    """torch calls no hook after `KeyboardInterrupt`. Transformers makes no mask for an attention of another name."""
    model, batch = make_model().train(), masked_batch()
    tokens = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}
    decoder = model.get_base_model().model
    with torch.no_grad():
        expected = decoder.eval()(**tokens)[0]
    model.train()
    celora.attach(model, "exact")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    layer = decoder.get_submodule(where)
    handle = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    with torch.no_grad():
        found: Tensor = decoder.eval()(**tokens)[0]
    assert found.equal(expected)
    assert model.config._attn_implementation != ATTENTION


def test_a_copy_of_an_interrupted_model_is_settled_in_any_order() -> None:
    model, batch = make_model().train(), masked_batch()
    celora.attach(model, "exact")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    for order in (1, -1):
        copied = copy.deepcopy(model)
        for module in [*copied.modules()][::order]:
            remove(module)
        assert "_loss_function" not in vars(copied.get_base_model())


class Weighted(LlamaForCausalLM):
    """Weights rows by an argument. With weights of 1, or with none, the loss is the usual one."""

    def forward(self, labels: Any = None, logits_to_keep: Any = 0, row_weights: Any = None, **more: Any) -> Any:
        output = super().forward(labels=labels, logits_to_keep=logits_to_keep, **more)
        if row_weights is not None:
            output["loss"] = output.loss * row_weights.mean()
        return output


class OfTokens(LlamaForCausalLM):
    """Weights tokens by an argument."""

    def forward(self, labels: Any = None, logits_to_keep: Any = 0, weights: Any = None, **more: Any) -> Any:
        output = super().forward(logits_to_keep=logits_to_keep, **more)
        each = nn.functional.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
        output["loss"] = (each * (1 if weights is None else weights[:, 1:])).mean()
        return output


class TwoAhead(LlamaForCausalLM):
    """Also predicts the token after the next, from all logits, however few are asked for."""

    def forward(self, labels: Any = None, logits_to_keep: Any = 0, **more: Any) -> Any:
        output = super().forward(**more)
        logits = output.logits[:, :-2].flatten(0, 1)
        output["loss"] = self.loss_function(output.logits, labels, self.config.vocab_size)
        output["loss"] = output.loss + nn.functional.cross_entropy(logits, labels[:, 2:].flatten())
        return output


class Counting(LlamaForCausalLM):
    """Weights its loss by a number among its arguments, and keeps what its calls were made with."""

    def forward(self, labels: Any = None, logits_to_keep: Any = 0, weight: float = 1.0, **more: Any) -> Any:
        self.seen.append((torch.is_grad_enabled(), sorted(more)))
        output = super().forward(labels=labels, logits_to_keep=logits_to_keep, **more)
        output["loss"] = output.loss * weight
        return output


def test_a_users_own_model_class_is_tried_once() -> None:
    """Whatever changes later, as an argument of each call may. The trial gets what the call gets that follows."""
    torch.manual_seed(0)
    model = get_peft_model(Counting(LlamaConfig(**SMALL)), LoraConfig(target_modules="all-linear")).train()
    seen = model.get_base_model().seen = []
    celora.attach(model, "exact")
    for number in range(3):
        model(**make_batch(number), weight=1.0, step=number)
    assert [with_gradients for with_gradients, _ in seen] == [False, True, True, True]
    assert seen[0][1] == seen[1][1]


ROWS = [{"row_weights": torch.tensor(weights)} for weights in ([1.0] * 3, [0.2, 3, 1], [0.0, 0, 1])]
TOKENS = [{"weights": torch.full((3, 8), weight)} for weight in (1.0, 0.2, 3.0)]
ITS_OWN = {
    "rows, from the first call on": (Weighted, ROWS, "Weighted may compute its loss with 'row_weights'"),
    "rows, later": (Weighted, [{}, *ROWS], "Weighted may compute its loss with 'row_weights'"),
    "tokens": (OfTokens, TOKENS, "OfTokens may compute its loss with 'weights'"),
    "tokens, later": (OfTokens, [{}, *TOKENS], "OfTokens "),
    "two tokens": (TwoAhead, [{}, {}], "TwoAhead cannot compute the loss of a few tokens"),
}


@pytest.mark.parametrize("case", ITS_OWN)
def test_a_loss_of_the_users_own_model_class_is_its_own(case: str) -> None:
    kind, calls, said = ITS_OWN[case]
    torch.manual_seed(0)
    model = get_peft_model(
        kind(LlamaConfig(**SMALL)), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    ).train()
    plain = copy.deepcopy(model)
    celora.attach(model, "exact")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, more in enumerate(calls):
            ids = make_batch(number)["input_ids"][:, :8]
            found, expected = (each(input_ids=ids, labels=ids.clone(), **more).loss for each in (model, plain))
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert len([warning for warning in caught if said in str(warning.message)]) == 1
