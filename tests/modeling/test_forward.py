"""What the model's forward returns while it trains, against Transformers' own loss and TRL's metrics."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GitConfig,
    GitForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers import TrainingArguments as Arguments
from transformers.modeling_outputs import CausalLMOutputWithPast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import celora
from celora import CELoraConfig
from celora.numerics import head
from celora.runtime.attachment import require
from small import make_batch, make_model, train
from tiny import save_tiny_model
from tolerances import OF_GRADIENT


def masked_batch(seed: int = 0) -> dict[str, Tensor]:
    batch = make_batch(seed)
    batch["labels"][:, :5] = -100
    batch["labels"][1, 8:] = -100
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 8:] = 0
    return batch


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def compare(model: nn.Module, batch: dict[str, Any], *, calls: int = 2) -> None:
    """Loss and gradient equal to what the model itself makes of this batch, to float32 rounding."""
    celora.detach(model)
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    expected = gradient(model)
    celora.attach(model, "exact")
    for _ in range(calls):  # the first of which is also compared with the model's own logits
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        assert output.logits is None
        assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert (gradient(model) - expected).norm() < OF_GRADIENT * expected.norm()


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)], ids=str)
def test_equals_transformers(items: Any) -> None:
    """`num_items_in_batch` is what Trainer divides by under accumulation."""
    extra = {} if items is None else {"num_items_in_batch": items}
    compare(make_model().train(), masked_batch() | extra)


def test_every_token_labelled_and_no_mask() -> None:
    compare(make_model().train(), make_batch(0))


def test_embeddings_instead_of_tokens() -> None:
    model, batch = make_model().train(), masked_batch()
    batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids"))
    compare(model, batch)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made."""

    def __init__(self, but: nn.Module) -> None:
        super().__init__()
        self.nbytes, self.there = 0, {p.untyped_storage().data_ptr() for p in but.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in (of.untyped_storage() for of in tree_leaves(made) if isinstance(of, Tensor)):
            if storage.data_ptr() not in self.there:
                self.nbytes = max(self.nbytes, storage.nbytes())
        return made


def test_nothing_as_large_as_the_head_is_made_of_it() -> None:
    """Not in the first call either, which is compared with the model's own logits in float32."""
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
    """Gemma caps its logits; the cap is small here so that it matters."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=61, final_logit_softcapping=0.5, sliding_window=64,
    )  # fmt: skip
    model = get_peft_model(Gemma3ForCausalLM(config), LoraConfig(target_modules="all-linear", init_lora_weights=False))
    compare(model.train(), masked_batch())
    assert require(model).forward.logits == head.Logits(1.0, 0.5)


def test_label_smoothing() -> None:
    """As Transformers' LabelSmoother, which wants all logits, defines it."""
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
    """Does to its logits what no configuration names."""

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


CHANGES = pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.base_model.model.lm_head.weight.requires_grad_(), "head is trained"),
        (lambda m: setattr(m.base_model.model, "loss_function", lambda **_: torch.zeros(())), "loss of its own"),
        (lambda m: m.base_model.model.lm_head.register_forward_hook(lambda *_: None), "as its head"),
    ],
    ids=["trained", "loss", "hooked"],
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


@CHANGES
def test_heads_that_change_after_attaching(change: Any, reason: str) -> None:
    model, batch = make_model().train(), masked_batch()
    celora.attach(model, "exact")
    assert model(**batch).logits is None
    change(model)
    with pytest.warns(UserWarning, match=f"celora: .*{reason}.* by now; its own loss is used"):
        output = model(**batch)
    again = model(**batch)  # said once
    celora.detach(model)
    assert output.logits is not None
    assert output.loss.equal(again.loss)
    torch.testing.assert_close(output.loss, model(**batch).loss)


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


def test_an_adapted_head_is_not_taken_over() -> None:
    model = make_model(target_modules=["q_proj", "lm_head"]).train()
    assert any("has an adapter on its head" in note for note in celora.attach(model, "exact").notes)
    assert model(**masked_batch()).logits is not None


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


@pytest.mark.parametrize("how", ["partitioned", "replica"])
def test_a_head_that_is_not_at_hand(how: str) -> None:
    model, batch = make_model().train(), masked_batch()
    celora.attach(model, "exact")
    if how == "partitioned":
        model.base_model.model.lm_head.weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks what it has taken apart
    else:
        for module in (model.base_model, model.base_model.model):
            module._is_replica = True  # as DataParallel marks its replicas, whose threads share their hooks
    assert model(**batch).logits is not None


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
    inner = copy.deepcopy(model.base_model.model)  # without the attachment, so without celora
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


# --- TRL ------------------------------------------------------------


def sft(folder: Path, preset: str | None, **changes: Any) -> tuple[list[dict[str, float]], PeftModel]:
    save_tiny_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [
        {"prompt": " ".join(f"w{(i + j) % 40}" for j in range(2 + i % 4)), "completion": f" w{i} w{i + 1}"}
        for i in range(12)
    ]
    settings: dict[str, Any] = {
        "max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False, "eval_strategy": "steps", "eval_steps": 3,
    }  # fmt: skip
    trainer = SFTTrainer(
        LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=SFTConfig(str(folder / "out"), **settings | changes),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    if preset:
        celora.attach(trainer.model, preset)
    trainer.train()
    return trainer.state.log_history, trainer.model


@pytest.mark.parametrize(
    "changes",
    [{}, {"loss_type": "dft"}, {"padding_free": True, "max_length": None}, {"label_smoothing_factor": 0.1}],
    ids=["nll", "dft", "padding_free", "smoothing"],
)
@pytest.mark.filterwarnings("ignore")
def test_sft_trainer_logs_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    """Loss, gradient norm, token accuracy and entropy, in training and in evaluation."""
    plain, _ = sft(tmp_path / "a", None, **changes)
    exact, model = sft(tmp_path / "b", "exact", **changes)
    assert len(plain) == len(exact)
    for expected, found in zip(plain, exact, strict=True):
        for key in expected:
            if not any(word in key for word in ("runtime", "per_second", "flos")):
                assert found[key] == pytest.approx(expected[key], rel=2e-5, abs=1e-6), key
    assert require(model).forward.logits == head.Logits()  # it was taken over


def test_trl_is_only_served_what_is_computed() -> None:
    from trl.trainer.utils import add_fused_lm_head

    from celora.modeling import others

    model = make_model().base_model.model
    assert "no such head" in str(others.fused_head(model))
    for settings, served in (
        ({}, True),
        ({"outputs": ("log_probs", "is_top1", "entropy")}, True),
        ({"outputs": ("log_probs", "mean_logits")}, False),
        ({"temperature": 0.7}, False),
        ({"cast_lm_head_to_fp32": True}, False),
    ):
        model.__dict__.pop("forward", None)
        add_fused_lm_head(model, **settings)
        assert isinstance(others.fused_head(model), head.Logits) is served


@pytest.mark.filterwarnings("ignore")
def test_dpo_trainer_trains_the_same(tmp_path: Path) -> None:
    losses = []
    for preset in (None, "exact"):
        save_tiny_model(tmp_path / "model")
        rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2} w3", "rejected": f" w{i + 4}"} for i in range(8)]
        trainer = DPOTrainer(
            LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32),
            args=DPOConfig(
                str(tmp_path / "out"), max_steps=3, logging_steps=1, per_device_train_batch_size=2, report_to="none",
                use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "model"),
            peft_config=LoraConfig(target_modules="all-linear"),
        )  # fmt: skip
        if preset:
            celora.attach(trainer.model, preset)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("more", [{}, {"neftune_noise_alpha": 5.0}], ids=["usual", "NEFTune"])
def test_plain_trainer_with_accumulation_trains_the_same(more: dict[str, Any], tmp_path: Path) -> None:
    """NEFTune's noise depends on the shape of the batch, so that padding has to stay."""
    losses = []
    for preset in (None, "exact"):
        model = make_model(init_lora_weights=True)
        if preset:
            celora.attach(model, preset)
        rows = [{key: value[i % 3] for key, value in masked_batch(i // 3).items()} for i in range(24)]
        arguments = Arguments(
            str(tmp_path), max_steps=4, logging_steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=2,
            report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
            dataloader_pin_memory=False, remove_unused_columns=False, **more,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_error_of_the_head_is_measured_at_refreshes(tmp_path: Path) -> None:
    """Refresh steps are exact there, too; an audit sees the estimate even before one, and changes nothing."""
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


def test_words_are_drawn_anew_in_every_call_and_step() -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = make_model().train()
    add_fused_lm_head(model.base_model.model)
    celora.attach(model, CELoraConfig(estimator="dense", labelled_head=True, head_keep_ratio=0.6, seed=1))
    gradients = {}
    for step, calls in ((1, "ab"), (2, "c"), (1, "d"), (1, "e")):
        require(model).set_modes(step)
        if calls == "e":  # an evaluation between two steps, which a resumed run does not repeat
            with torch.no_grad():
                assert hasattr(model(**masked_batch(), fused_lm_head=True), "entropy")
        for call in calls:
            model.zero_grad()
            model(**masked_batch()).loss.backward()
            gradients[call] = gradient(model)
    assert not gradients["a"].equal(gradients["b"])  # micro-batches of one step
    assert not gradients["a"].equal(gradients["c"])
    assert gradients["a"].equal(gradients["d"])  # the same step, as a resumed run has it
    assert gradients["a"].equal(gradients["e"])


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


class Penalised(LlamaForCausalLM):
    """Adds a term of its own to the loss."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if output.loss is not None:
            output["loss"] = output.loss + 0.1 * output.logits.logsumexp(-1).square().mean()
        return output


class Smoothed(LlamaForCausalLM):
    """Computes its loss by itself, from its logits and the labels."""

    def forward(self, *args: Any, labels: Tensor | None = None, logits_to_keep: Any = 0, **kwargs: Any) -> Any:
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        if labels is not None:
            shifted = output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            output["loss"] = nn.functional.cross_entropy(*shifted, label_smoothing=0.1)
        return output


SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "a term of its own": lambda: Penalised(LlamaConfig(**SMALL, intermediate_size=48)),
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
    """torch calls no hooks then."""
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
