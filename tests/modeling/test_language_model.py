"""If celora cannot compute a model's head or loss, the model computes its own. celora says why."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from transformers import (
    GitConfig,
    GitForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import celora
from celora.modeling.language_model import find_language_model, pretrained
from labelled import gradient, masked_batch
from small import make_model


def _bias(head: nn.Linear) -> nn.Parameter:
    head.bias = nn.Parameter(torch.zeros(head.out_features), requires_grad=False)
    return head.bias


def z_loss(_: nn.Module, __: Any, output: Any) -> None:
    """A term that reads the logits."""
    if output.logits is not None:
        output.loss = output.loss + output.logits.logsumexp(-1).square().mean()


CHANGES = pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.base_model.model.lm_head.weight.requires_grad_(), "head is trained"),
        (lambda m: _bias(m.base_model.model.lm_head).requires_grad_(), "head is trained"),
        (lambda m: setattr(m.base_model.model, "loss_function", lambda **_: torch.zeros(())), "loss of its own"),
        (lambda m: m.base_model.model.lm_head.register_forward_hook(lambda *_: None), "as its head"),
        (lambda m: m.base_model.model.lm_head.register_full_backward_hook(lambda *_: None), "as its head"),
        (
            lambda m: m.base_model.model.register_forward_hook(lambda *_: None, with_kwargs=True),
            "would see celora's arguments or output",
        ),
        (lambda m: m.base_model.model.register_forward_hook(z_loss), "would see celora's arguments or output"),
    ],
    ids=["trained", "bias", "loss", "hooked", "hooked backward", "model hooked", "model hooked for its output"],
)


@CHANGES
def test_heads_that_are_not_taken_over(change: Any, reason: str) -> None:
    model, batch = make_model().train(), masked_batch()
    change(model)
    expected = model(**batch).loss
    report = celora.attach(model, "exact")
    assert any(reason in note for note in report.notes)
    output = model(**batch)
    assert output.logits is not None
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_that_changes_the_labels_works(when: str) -> None:
    """Before celora's own it gets the user's arguments. After that, the model computes its own loss."""

    def halve(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        labels = kwargs["labels"].clone()
        labels[:, ::2] = -100
        return args, kwargs | {"labels": labels}

    model, batch = make_model().train(), masked_batch()
    handle = model.base_model.model.register_forward_pre_hook(halve, with_kwargs=True)
    expected = model(**batch).loss
    if when == "after":
        handle.remove()
    celora.attach(model, "exact")
    if when == "before":
        output = model(**batch)
        assert output.logits is None
    else:
        model.base_model.model.register_forward_pre_hook(halve, with_kwargs=True)
        with pytest.warns(
            UserWarning, match=r"a hook \(halve\) that would see celora's arguments or output of a call by now"
        ):
            output = model(**batch)
    torch.testing.assert_close(output.loss, expected)


@CHANGES
def test_heads_that_change_after_attaching(change: Any, reason: str) -> None:
    model, batch = make_model().train(), masked_batch()
    celora.attach(model, "exact")
    assert model(**batch).logits is None
    change(model)
    with pytest.warns(UserWarning, match=f"celora: .*{reason}.* by now; its own loss is used"):
        output = model(**batch)
    again = model(**batch)  # the second time, nothing is said
    celora.detach(model)
    assert output.logits is not None
    assert output.loss.equal(again.loss)
    torch.testing.assert_close(output.loss, model(**batch).loss)


@pytest.mark.parametrize("caller", ["PEFT", "the model itself"])
def test_a_tuner_that_calls_the_models_forward_past_its_hooks_is_hooked(
    caller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like that of PEFT before 0.21."""
    monkeypatch.setattr(BaseTuner, "forward", lambda self, *args, **kwargs: self.model.forward(*args, **kwargs))
    model, batch = make_model().train(), masked_batch()
    called = model if caller == "PEFT" else model.base_model.model
    expected = called(**batch).loss
    expected.backward()
    wanted = gradient(model)
    celora.attach(model, "exact")
    for _ in range(2):  # the first call compares celora's head with the model's
        model.zero_grad()
        output = called(**batch)
        output.loss.backward()
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected)
        assert (gradient(model) - wanted).norm() < 1e-5 * wanted.norm()
    celora.detach(model)
    assert called(**batch).logits is not None


def test_a_decoder_that_the_model_names_otherwise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 of Transformers 4 has it as `model`, and says `language_model`."""
    model, batch = make_model().train(), masked_batch()
    expected = model(**batch).loss
    monkeypatch.setattr(LlamaForCausalLM, "base_model_prefix", "language_model")
    celora.attach(model, "exact")
    output = model(**batch)
    assert output.logits is None
    torch.testing.assert_close(output.loss, expected)


def test_an_adapted_head_is_not_taken_over() -> None:
    model = make_model(target_modules=["q_proj", "lm_head"]).train()
    assert any("has an adapter on its head" in note for note in celora.attach(model, "exact").notes)
    assert model(**masked_batch()).logits is not None


@pytest.mark.parametrize("how", ["partitioned", "replica"])
def test_a_head_that_is_not_at_hand(how: str) -> None:
    model, batch = make_model().train(), masked_batch()
    celora.attach(model, "exact")
    if how == "partitioned":
        model.base_model.model.lm_head.weight.ds_id = 0  # DeepSpeed ZeRO-3 marks split parameters like this
    else:
        for module in (model.base_model, model.base_model.model):
            module._is_replica = True  # DataParallel marks its replicas like this; their threads share hooks
    told = pytest.warns(UserWarning, match=r"nn\.DataParallel gives each device a copy.*; its own loss is used")
    with told if how == "replica" else contextlib.nullcontext():
        assert model(**batch).logits is not None
    assert model(**batch).logits is not None


class Penalised(LlamaForCausalLM):
    """Adds a term of its own to the loss."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output["loss"] = output.loss + 0.1 * output.logits.logsumexp(-1).square().mean()
        return output


class Balanced(LlamaForCausalLM):
    """Adds a term as small as the one that balances experts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output["loss"] = output.loss + 0.004
        return output


class Looking(LlamaModel):
    """Attends otherwise if there are labels, as PaliGemma does in Transformers 4."""

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs | ({} if labels is None else {"attention_mask": None}))


class Smoothed(LlamaForCausalLM):
    """Computes its loss itself, from its logits and the labels."""

    def forward(self, *args: Any, labels: Tensor | None = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        if labels is not None:
            shifted = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output["loss"] = nn.functional.cross_entropy(*shifted, label_smoothing=0.1)
        return output


SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a term of its own": lambda: Penalised(LlamaConfig(**SMALL, intermediate_size=48)),
    "a small term of its own": lambda: Balanced(LlamaConfig(**SMALL, intermediate_size=48)),
    "a loss of its own": lambda: Smoothed(LlamaConfig(**SMALL, intermediate_size=48)),
    "a decoder within the decoder": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, pad_token_id=60)
    ),
    "labels that are not shifted": lambda: XLNetLMHeadModel(
        XLNetConfig(vocab_size=61, d_model=32, n_layer=1, n_head=2, d_inner=48, dropout=0.0, loss_type="ForCausalLM")
    ),
    "tokens that are no text": lambda: GitForCausalLM(
        GitConfig(
            **SMALL,
            intermediate_size=48,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            vision_config={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "image_size": 32},
        )
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore:celora. .*its own loss is used")
def test_models_with_another_loss_keep_it(kind: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model, batch = get_peft_model(OTHERS[kind](), config).train(), masked_batch()
    model.config.use_cache = False
    if "text" in kind:
        batch["pixel_values"] = torch.randn(len(batch["labels"]), 3, 32, 32)
    loss = model(**batch).loss
    loss.backward()
    expected = gradient(model)
    celora.attach(model, "exact")
    for _ in range(2):
        model.zero_grad()
        found = model(**batch).loss
        found.backward()
        torch.testing.assert_close(found, loss)
        torch.testing.assert_close(gradient(model), expected)


class Raised(LlamaForCausalLM):
    """Adds a term of its own to the loss, with a weight that the training raises from 0."""

    weight = 0.0

    def forward(self, *args: Any, labels: Tensor | None = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = super().forward(*args, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        if output.loss is not None:
            output["loss"] = output.loss + self.weight * output.logits.logsumexp(-1).square().mean()
        return output


class More(LlamaForCausalLM):
    """Adds to the hidden states and to the logits; both are nothing at first, and are trained."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.extra = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.heat = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.extra.weight)

    def forward(self, input_ids: Tensor, labels: Tensor, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        hidden = self.model(input_ids, attention_mask=kwargs.get("attention_mask"))[0]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head((hidden + self.extra(hidden))[:, keep]) * self.heat.exp()
        return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, self.config.vocab_size), logits=logits)


@pytest.mark.parametrize("name", ["extra", "heat"])
def test_a_part_that_trains_beside_the_head_gets_its_gradient(name: str) -> None:
    torch.manual_seed(0)
    base = More(LlamaConfig(**SMALL, intermediate_size=48))
    model, batch = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"])).train(), masked_batch()
    for part in getattr(base, name).parameters() if name == "extra" else [base.heat]:
        part.requires_grad_()
    report = celora.attach(model, "exact")
    assert f"More trains its {name!r}, which may change logits or loss" in str(report)
    model(**batch).loss.backward()
    assert (base.extra.weight if name == "extra" else base.heat).grad.norm() > 0


def test_a_part_that_the_models_forward_does_not_use_may_train() -> None:
    model = make_model().train()
    model.get_base_model().value_head = nn.Linear(2, 2)
    celora.attach(model, "exact")
    assert model(**masked_batch()).logits is None


def test_a_term_that_is_zero_at_first() -> None:
    torch.manual_seed(0)
    base = Raised(LlamaConfig(**SMALL, intermediate_size=48))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).train()
    plain, batch = copy.deepcopy(model), masked_batch()
    celora.attach(model, "exact")
    assert model(**batch).logits is None  # celora computes the loss
    for each in (model, plain):
        each.get_base_model().weight = 0.5
    with pytest.warns(UserWarning, match="Raised changes 'weight' while it trains"):
        found = model(**batch).loss
    torch.testing.assert_close(found, plain(**batch).loss)


def test_experts_of_the_text_part_have_a_part_of_the_loss() -> None:
    """A model of text and images has a configuration for each."""
    model = make_model().train()
    text = LlamaConfig(**SMALL, intermediate_size=48)
    model.config.text_config = text
    celora.attach(model, "exact")
    assert model(**masked_batch()).logits is None
    text.output_router_logits = True
    assert model(**masked_batch()).logits is not None
    assert find_language_model(model) == "a part of it is for its experts"


def test_a_decoder_that_looks_at_the_labels_needs_them() -> None:
    causal = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48))
    causal.model = Looking(causal.config)
    causal.requires_grad_(False)
    assert find_language_model(causal) == "LlamaForCausalLM looks at the labels before its head"


def test_of_several_models_the_one_with_an_adapter_is_found() -> None:
    """As where a student learns from a teacher."""
    teacher, student = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=48)), make_model()
    both = nn.ModuleDict({"teacher": teacher, "student": student})
    assert pretrained(both) is student.get_base_model()
    assert pretrained(nn.ModuleDict({"teacher": teacher})) is teacher
