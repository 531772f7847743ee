"""TRL and other code that changes a model's forward. celora leaves alone what it cannot read, and drops nothing."""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Trainer
from trl.trainer.utils import add_fused_lm_head

import celora
from celora import CELoraConfig, CELoraError
from celora.modeling import others
from celora.modeling.float_forward import FloatForward
from celora.modeling.graft import LayerGraft
from celora.modeling.switch import Switch
from celora.numerics.estimators import Dense
from celora.numerics.head import Logits
from celora.runtime.attachment import require
from decoders import model_of
from labelled import gradient, masked_batch
from lora_layer import layer
from small import make_model


def fused(**settings: Any) -> tuple[PeftModel, Any]:
    model = make_model().train()
    add_fused_lm_head(model.base_model.model, **settings)
    return model, model.base_model.model


def renamed(causal: Any, **names: str) -> None:
    """TRL's fused head as another version might have it, with other names in its closure."""
    function = causal.forward.__func__
    code = function.__code__
    code = code.replace(co_freevars=tuple(names.get(name, name) for name in code.co_freevars))
    twin = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    causal.forward = types.MethodType(functools.wraps(type(causal).forward)(twin), causal)


FUSED = {"fused_lm_head": True}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_dpo_and_grpo_ask_of_a_fused_head(temperature: float) -> None:
    """Means of logits, which DPO and KTO log, and a temperature of GRPO's."""
    model, causal = fused()
    add_fused_lm_head(causal, temperature=temperature, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    expected = model(**masked_batch(), **FUSED)
    expected.log_probs.square().sum().backward()
    wanted = gradient(model)
    celora.attach(model, "exact")
    for _ in range(2):  # the second call is not compared with the model's own logits
        model.zero_grad()
        found = model(**masked_batch(), **FUSED)
        found.log_probs.square().sum().backward()
        for name in ("loss", "log_probs", "entropy", "mean_logits", "is_top1"):
            torch.testing.assert_close(found[name], expected[name])
        assert (gradient(model) - wanted).norm() < 1e-5 * wanted.norm()
    assert require(model).forward.logits == Logits()


def test_logits_with_a_cap_have_neither_means_nor_a_temperature() -> None:
    causal: Any = model_of("gemma2").base_model.model
    for settings, reason in (
        ({"temperature": 0.7}, "temperature=0.7 beside a cap"),
        ({"outputs": ("log_probs", "mean_logits")}, "mean_logits of capped logits"),
    ):
        causal.__dict__.pop("forward", None)
        add_fused_lm_head(causal, **settings)
        assert reason in str(others.fused_head(causal))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda causal: renamed(causal, outputs="fields"), "cannot read outputs from the fused head"),
        (lambda causal: renamed(causal, logit_scale="scale"), "cannot read logit_scale from the fused head"),
        (lambda causal: add_fused_lm_head(causal, cast_lm_head_to_fp32=True), "computes in float32"),
        (lambda causal: add_fused_lm_head(causal, outputs=("log_probs", "log_sum_sq_probs")), "computes log_sum_sq_p"),
    ],
    ids=["fields", "scale", "dtype", "outputs"],
)
def test_a_fused_head_that_cannot_be_served_is_trls_own(change: Callable[[Any], None], reason: str) -> None:
    model, causal = fused()
    celora.attach(model, "exact")
    change(causal)
    require(model).switch.on = False
    expected = model(**masked_batch(), **FUSED)
    expected.loss.backward()
    wanted = gradient(model)
    require(model).switch.on = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model.zero_grad()
            found = model(**masked_batch(), **FUSED)
            found.loss.backward()
    torch.testing.assert_close(found.log_probs, expected.log_probs)
    assert (gradient(model) - wanted).norm() < 1e-5 * wanted.norm()
    said = [str(warning.message) for warning in caught if "its own loss is used" in str(warning.message)]
    assert len(said) == 1
    assert reason in said[0]
    require(model).forward.smoothing = 0.1
    with pytest.raises(CELoraError, match="so its labels cannot be smoothed here"):
        model(**masked_batch(), **FUSED)
    celora.detach(model)
    report = celora.attach(model, "exact")  # the report says so, and does not say that padding is left out
    assert [reason in note for note in report.notes if "own loss" in note] == [True]
    assert not any("Padding" in note for note in report.notes)


def test_another_scale_than_the_models_is_trls_own() -> None:
    """TRL reads the scale from the configuration when it adds its head. The model reads it in every call, or never."""
    model, causal = fused()
    causal.config.logit_scale = 0.5
    add_fused_lm_head(causal)
    expected = model(**masked_batch(), **FUSED).log_probs
    celora.attach(model, "exact")
    with pytest.warns(UserWarning, match="has logits that TRL's fused head computes otherwise"):
        found = model(**masked_batch(), **FUSED)
    torch.testing.assert_close(found.log_probs, expected)


@pytest.mark.parametrize("how", ["refused before", "hidden states", "no dictionary", "not at hand"])
def test_smoothing_is_never_dropped(how: str) -> None:
    model, causal = fused()
    celora.attach(model, "exact")
    graft = require(model).forward
    batch = masked_batch() | FUSED
    plain = model(**batch).loss.item()
    graft.smoothing = 0.1
    assert abs(model(**batch).loss.item() - plain) > 1e-3
    if how == "refused before":
        graft.refused = True
        graft.begin(1)  # in the same step, a second call with the same labels is compared, too
    elif how == "not at hand":
        causal.lm_head.weight.ds_id = 0
    else:
        batch |= {"output_hidden_states": True} if how == "hidden states" else {"return_dict": False}
    with pytest.raises(CELoraError, match="labels cannot be smoothed"):
        model(**batch)
    del batch["labels"]
    assert model(**{k: v for k, v in batch.items() if k not in FUSED}) is not None


def test_words_are_drawn_anew_in_every_call_and_step() -> None:
    model, _ = fused()
    celora.attach(model, CELoraConfig(estimator="dense", labelled_head=True, head_keep_ratio=0.6, seed=1))
    gradients = {}
    for step, calls in ((1, "ab"), (2, "c"), (1, "d"), (1, "e")):
        require(model).set_modes(step)
        if calls == "e":  # an evaluation between two steps; a resumed run does not repeat it
            with torch.no_grad():
                assert hasattr(model(**masked_batch(), fused_lm_head=True), "entropy")
        for call in calls:
            model.zero_grad()
            model(**masked_batch()).loss.backward()
            gradients[call] = gradient(model)
    assert not gradients["a"].equal(gradients["b"])  # two micro-batches of one step
    assert not gradients["a"].equal(gradients["c"])
    assert gradients["a"].equal(gradients["d"])  # the same step, in a resumed run
    assert gradients["a"].equal(gradients["e"])


def test_what_is_read_of_trl() -> None:
    _, causal = fused(outputs=("log_probs", "entropy", "is_top1"))
    assert others.fused_head(causal).logits == Logits()
    assert others.is_fused_head(causal)
    causal.forward = functools.partial(type(causal).forward, causal)
    assert not others.is_fused_head(causal)
    assert "no such head" in str(others.fused_head(causal))
    assert others.replaced(causal).startswith("transformers.")
    del causal.forward
    assert others.replaced(causal) == ""


@pytest.mark.parametrize("calls", ["for its logits", "with the fused head"])
def test_a_trainer_of_trl_that_wants_logits_gets_them(calls: str) -> None:
    """TRL before 1.15 logs the entropy and the accuracy of each step, and computes them from the logits."""
    source = (
        "class SFTTrainer:\n"
        "    def compute_loss(self, model, inputs):\n"
        "        output = model(**inputs)\n"
        "        return output.loss, getattr(output, 'logits', None)\n"
    )
    names = {"__name__": "trl.trainer.sft_trainer"}
    exec(compile(source, "sft_trainer.py", "exec"), names)
    model, _ = fused()
    trainer: Any = names["SFTTrainer"]()
    inputs = masked_batch() | (FUSED if "fused" in calls else {})
    loss, logits = trainer.compute_loss(model, inputs)
    celora.attach(model, "exact")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, given = trainer.compute_loss(model, inputs)
        trainer.compute_loss(model, inputs)
    said = [
        str(warning.message)
        for warning in caught
        if "SFTTrainer looks at the logits of every step" in str(warning.message)
    ]
    assert len(said) == (calls == "for its logits")
    torch.testing.assert_close(found, loss)
    if calls == "for its logits":
        torch.testing.assert_close(given, logits)
        assert model(**inputs).logits is None  # nobody looks at the logits now


@pytest.mark.parametrize("calls", ["the model", "Trainer's", "Trainer's for its output"])
def test_a_compute_loss_of_ones_own_that_calls_the_model_gets_logits(calls: str) -> None:
    """One that calls Trainer's gets the loss from there, as those of LLaMA-Factory do."""

    class Own(Trainer):  # type: ignore[misc]
        def __init__(self) -> None:  # a whole Trainer would need folders and a device
            self.seen: list[Any] = []

        def compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            output = model(**inputs)
            self.seen.append(output.logits)
            loss: Tensor = output.loss
            return loss

    names: dict[str, Any] = {"__name__": "transformers.trainer"}
    source = (
        "def compute_loss(self, model, inputs, return_outputs=False):\n"
        "    output = model(**inputs)\n"
        "    return (output.loss, output) if return_outputs else output.loss\n"
    )
    exec(source, names)
    trainer, (model, _) = Own(), fused()
    if calls == "Trainer's":
        Own.compute_loss = lambda self, model, inputs: names["compute_loss"](self, model, inputs)
    if calls == "Trainer's for its output":

        def compute_loss(self: Own, model: Any, inputs: dict[str, Any]) -> Tensor:
            loss, output = names["compute_loss"](self, model, inputs, return_outputs=True)
            self.seen.append(output.logits)
            assert isinstance(loss, Tensor)
            return loss

        Own.compute_loss = compute_loss
    loss = trainer.compute_loss(model, masked_batch())
    celora.attach(model, "exact")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(trainer.compute_loss(model, masked_batch()), loss)
    said = [str(warning.message) for warning in caught if "may look at its logits" in str(warning.message)]
    assert len(said) == (calls != "Trainer's")
    if said:
        assert said[0].startswith("celora: compute_loss of test_others calls the model")
        assert len(trainer.seen) == 3
        torch.testing.assert_close(trainer.seen[1], trainer.seen[0])


def test_a_sharded_layer_is_split_if_somebody_else_replaced_its_forward() -> None:
    """Transformers does so for tensor parallelism. FSDP2 shards, and celora's own forwards may come before it."""
    model = layer(dtype=torch.float32)
    base = model.base_model.model[0].base_layer
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(base.weight.detach(), init_device_mesh("cpu", (1,)), [Shard(0)])
        base.weight = nn.Parameter(sharded, requires_grad=False)
        assert not others.is_split(base)
        FloatForward(LayerGraft(Dense(20, 12), Switch())).under(base)
        assert not others.is_split(base)
        base.forward = functools.partial(nn.Linear.forward, base)
        assert others.is_split(base)
    finally:
        dist.destroy_process_group()
