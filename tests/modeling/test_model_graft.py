"""The output of a model in training, compared with Transformers' own loss."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import celora
from celora import CELoraConfig
from celora.kernels import widened
from celora.numerics import head
from celora.runtime.attachment import require
from labelled import compare, gradient, masked_batch
from small import make_batch, make_model, train


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=str)
def test_equals_transformers(items: Any) -> None:
    """`num_items_in_batch` is the number that Trainer divides by under accumulation."""
    extra = {} if items is None else {"num_items_in_batch": items}
    compare(make_model().train(), masked_batch() | extra)


def test_every_token_labelled_and_no_mask() -> None:
    compare(make_model().train(), make_batch(0))


def test_embeddings_instead_of_tokens() -> None:
    model, batch = make_model().train(), masked_batch()
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    compare(model, batch)


class Largest(TorchDispatchMode):
    """Record the bytes of the largest tensor that is made."""

    def __init__(self, but: nn.Module) -> None:
        super().__init__()
        self.nbytes, self.there = 0, {p.untyped_storage().data_ptr() for p in but.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in (leaf.untyped_storage() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)):
            if storage.data_ptr() not in self.there:
                self.nbytes = max(self.nbytes, storage.nbytes())
        return made


def test_nothing_as_large_as_the_head_is_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for the first call, too, in which celora compares itself with the model's own logits in float32."""
    monkeypatch.setattr(widened, "_NUMBERS", 2**20)  # a part of this small head, too
    config = LlamaConfig(
        hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=20_000
    )
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    celora.attach(model, "exact")
    with Largest(model) as made:
        assert model(**make_batch(0)).logits is None
    assert 0 < made.nbytes < base.lm_head.weight.nbytes / 2


@pytest.mark.parametrize("first", [True, False], ids=["in the first call", "later"])
def test_another_label_to_be_ignored_is_the_models_own_business(first: bool) -> None:
    model, batch = make_model().train(), masked_batch()
    other = batch | {"labels": batch["labels"].masked_fill(batch["labels"] == -100, 0), "ignore_index": 0}
    expected = model(**other).loss
    celora.attach(model, "exact")
    if not first:
        assert model(**batch).logits is None
    torch.testing.assert_close(model(**other).loss, expected)
    assert model(**batch).logits is None


def test_logits_can_be_kept() -> None:
    model, batch = make_model().train(), masked_batch()
    expected = model(**batch).logits
    report = celora.attach(model, "exact", labelled_head=False)
    assert not any("labelled tokens" in note for note in report.notes)
    torch.testing.assert_close(model(**batch).logits, expected)


def test_positional_arguments() -> None:
    model, batch = make_model().train(), masked_batch()
    expected = model(**batch).loss
    celora.attach(model, "exact")
    output = model.base_model.model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"])
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)


def test_soft_capping() -> None:
    """Gemma caps its logits. Here the cap is small, so it matters."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=61, final_logit_softcapping=0.5, sliding_window=64,
    )  # fmt: skip
    model = get_peft_model(Gemma3ForCausalLM(config), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    compare(model.train(), masked_batch())
    assert require(model).forward.logits == head.Logits(1.0, 0.5)


def test_label_smoothing() -> None:
    """It is defined like Transformers' LabelSmoother, which needs all logits."""
    model, batch = make_model().train(), masked_batch()
    logits = model(**batch).logits[:, :-1]
    log_p, labels = logits.log_softmax(-1), batch["labels"][:, 1:]
    kept = labels != -100
    nll = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    expected = 0.9 * nll[kept].mean() + 0.1 * -log_p.mean(-1)[kept].mean()
    celora.attach(model, "exact")
    require(model).forward.smoothing = 0.1
    torch.testing.assert_close(model(**batch).loss, expected)


class Odd(LlamaForCausalLM):
    """Changes its logits in a way that no configuration names."""

    def forward(self, *args: Any, labels: Tensor | None = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        logits = output.logits + torch.linspace(-1, 1, output.logits.shape[-1])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_head_that_is_not_understood_stays_as_it_is_and_it_is_said_once() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=61, use_cache=False
    )
    model = get_peft_model(Odd(config), LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()
    batch = masked_batch()
    expected = model(**batch).loss
    celora.attach(model, "exact")
    with pytest.warns(UserWarning, match="Odd does something to its logits that is not known"):
        output = model(**batch)
    torch.testing.assert_close(output.loss, expected)
    assert output.logits.shape == (3, 11, 61)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("how", ["int32", "too short", "negative", "too large"])
def test_labels_that_do_not_fit_are_an_error(how: str) -> None:
    model, batch = make_model().train(), masked_batch()
    if how == "int32":
        batch["labels"] = batch["labels"].int()
    elif how == "too short":
        batch["labels"] = batch["labels"][:, :-3]
    else:
        batch["labels"][0, -1] = -1 if how == "negative" else 61
    for preset in ("off", "exact"):
        celora.attach(model, preset)
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            model(**batch)


def test_hidden_states_that_the_configuration_asks_for_are_the_models_own() -> None:
    model, batch = make_model().train(), masked_batch()
    model.base_model.model.config.output_hidden_states = True
    expected = model(**batch).hidden_states[-1]
    celora.attach(model, "exact")
    torch.testing.assert_close(model(**batch).hidden_states[-1], expected)


@pytest.mark.parametrize(
    "how",
    ["eval", "no_grad", "no labels", "hidden states", "tuple", "nothing labelled"],
)
def test_everything_but_training_on_labels_is_the_models_own(how: str) -> None:
    model, batch = make_model().train(), masked_batch()
    extra: dict[str, Any] = {"output_hidden_states": True} if how == "hidden states" else {}
    extra |= {"return_dict": False} if how == "tuple" else {}
    if how == "no labels":
        del batch["labels"]
    if how == "nothing labelled":
        batch["labels"][:] = -100
    model.train(how != "eval")
    with torch.set_grad_enabled(how != "no_grad"):
        expected = model(**batch, **extra)
        celora.attach(model, CELoraConfig(estimator="dense", labelled_head=True, padding_free=True))
        found = model(**batch, **extra)
    logits = (expected[1], found[1]) if how == "tuple" else (expected.logits, found.logits)
    assert logits[0].equal(logits[1])


def test_generation_and_padded_evaluation_do_not_change() -> None:
    model, batch = make_model().eval(), masked_batch()
    expected = model(**batch).logits
    tokens = model.generate(
        batch["input_ids"][:1], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    celora.attach(model, "exact")
    assert model(**batch).logits.equal(expected)
    again = model.generate(batch["input_ids"][:1], max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert again.equal(tokens)


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    model, batch = make_model().train(), masked_batch()
    celora.attach(model, "exact")
    expected = model(**batch).loss
    with pytest.raises(IndexError):
        model(**{**batch, "input_ids": batch["input_ids"] + 1000})
    assert require(model).forward._call is None
    torch.testing.assert_close(model(**batch).loss, expected)


def test_copies_and_detaching() -> None:
    model, batch = make_model().train(), masked_batch()
    expected = model(**batch).loss
    celora.attach(model, "exact")
    copied = copy.deepcopy(model)
    assert copied(**batch).logits is None
    inner = copy.deepcopy(model.base_model.model)  # the copy has no attachment, so no celora
    with pytest.warns(UserWarning, match="a copy of a part of the model"):
        torch.testing.assert_close(inner(**batch).loss, expected)
    assert inner(**batch).logits is not None
    celora.detach(model)
    assert model.config._attn_implementation == "sdpa"
    assert model(**batch).loss.equal(expected)


def test_checkpointing() -> None:
    model, batch = make_model(), masked_batch()
    for reentrant in (True, False):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        compare(model.train(), batch)


def test_the_error_of_the_head_is_measured_at_refreshes(tmp_path: Path) -> None:
    """The head is exact in refresh steps, too.

    An audit sees the estimate even before the first one, and changes nothing.
    """
    config = CELoraConfig(estimator="dense", labelled_head=True, head_keep_ratio=0.6, refresh_every=3)
    model = make_model().train()
    celora.attach(model, dataclasses.replace(config, head_keep_ratio=1))
    model(**masked_batch()).loss.backward()
    exact = gradient(model)
    model.zero_grad()
    celora.attach(model, config)
    attachment = require(model)
    assert 0.01 < celora.audit(model, masked_batch()).relative_error < 1
    model(**masked_batch()).loss.backward()
    assert gradient(model).equal(exact)
    model.zero_grad()
    errors: list[float] = []
    optimizer = None
    for step in range(4):
        optimizer = train(model, 1, first=step, optimizer=optimizer)
        errors.append(attachment.relative_errors["head"])
    assert 0.01 < errors[0] == errors[1] == errors[2] < 1
    assert errors[3] != errors[2]
    celora.save_state(model, tmp_path)
    celora.attach(model, "off")
    celora.attach(model, config)
    celora.load_state(model, tmp_path)
    assert require(model).relative_errors == {"head": errors[3]}


def test_a_head_whose_estimate_is_none_becomes_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    celora.attach(model, CELoraConfig(estimator="dense", labelled_head=True, head_keep_ratio=0.5, refresh_every=1))
    attachment = require(model)
    monkeypatch.setattr(attachment.forward, "take_error", lambda: 1.5)
    with pytest.warns(UserWarning, match="error of head is 1.50.*raise head_keep_ratio"):
        optimizer = train(model, 1)
    with pytest.warns(UserWarning, match="from step 2 on, head is exact"):
        train(model, 1, first=1, optimizer=optimizer)
    assert celora.audit(model, make_batch(9)).relative_error == 0


def test_the_loss_function_is_the_models_own_again_after_the_first_call() -> None:
    model, batch = make_model().train(), masked_batch()
    celora.attach(model, "exact")
    inner = model.base_model.model
    with pytest.raises(IndexError):
        model(**{**batch, "input_ids": batch["input_ids"] + 1000})
    assert "_loss_function" not in vars(inner)
    assert model(**batch).logits is None
    assert "_loss_function" not in vars(inner)


@pytest.mark.filterwarnings("ignore:celora. padding stays")
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_ctrl_c_in_the_first_forward_leaves_the_loss_alone(copied: Callable[[nn.Module], Any]) -> None:
    """After Ctrl-C torch calls no hooks."""
    model, batch = make_model().train(), masked_batch()
    inner = model.base_model.model
    expected = model(**batch).loss
    celora.attach(model, "exact")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = inner.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**batch)
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(copied(inner)(**batch).loss, expected)
    torch.testing.assert_close(inner(**batch).loss, expected)
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.filterwarnings("ignore:celora. this is a copy of a part of the model")
@pytest.mark.filterwarnings("ignore:celora. nn.DataParallel gives each device a copy")
def test_a_replica_computes_with_its_own_weights() -> None:
    """A replica of `nn.DataParallel` shares the original's attributes, also a forward that celora put there."""
    model, batch = make_model().train(), make_batch(0)
    celora.attach(model, "exact")
    model(**batch)
    replica = model.base_model.model._replicate_for_data_parallel()
    for name, part in replica._modules.items():
        replica._modules[name] = copy.deepcopy(part)
        for parameter in replica._modules[name].parameters():
            parameter.data.zero_()
    assert replica(**batch).loss.item() == pytest.approx(math.log(61))
