"""The loss and the output on the original base: in a script, and as the second loss of a Trainer's evaluations."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import celora
import celora.fsdp
from celora import CELoraConfig, CELoraError
from celora.integrations.while_training import AttachWhileTraining
from celora.modeling.int8_base import held_in_8_bits
from celora.numerics.products.both_ways import Int8BothWays
from celora.runtime.attachment import require
from celora.settings.presets import PRESETS
from machine import refuses
from small import adapter, make_base, make_batch, make_model, train
from versions import before

BOTH = CELoraConfig(estimator="int8", forward="int8", refresh_every=3, fused=True)
pytestmark = pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[0] for key, value in make_batch(i).items()}


class Seen(TrainerCallback):
    """Stands for a reporter, which reads logs, and for early stopping, which reads metrics."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.evaluated: list[dict[str, Any]] = []
        self.expect: Callable[[], float] = lambda: 0.0
        self.expected: list[float] = []
        self.batches = 0

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.batches += 1

    def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
        self.logged.append(dict(logs))

    def on_evaluate(self, *_: Any, metrics: dict[str, Any], **__: Any) -> None:
        self.evaluated.append(dict(metrics))
        self.expected.append(self.expect())


def a_trainer(
    folder: Path, model: PeftModel, *callbacks: TrainerCallback, kind: type[Trainer] = Trainer, **arguments: Any
) -> Trainer:
    settings = {"max_steps": 4, "eval_steps": 2, "logging_steps": 1, "save_strategy": "no"}
    settings |= {"per_device_eval_batch_size": 3, **arguments}
    args = TrainingArguments(
        output_dir=str(folder),
        learning_rate=1e-2,
        eval_strategy="steps",
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to="none",
        seed=1,
        **settings,
    )
    trainer = kind(model=model, args=args, train_dataset=Rows(), eval_dataset=Rows())
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def evaluations(trainer: Trainer) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "eval_loss" in row]


def passes(model: PeftModel) -> list[bool]:
    """Grows with each batch that is evaluated."""
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: None if module.training else seen.append(True))
    return seen


def loss(model: PeftModel) -> float:
    with torch.no_grad():
        return float(model.eval()(**make_batch(0)).loss)


@pytest.mark.parametrize(
    "part", [lambda model: model, lambda model: model.base_model, lambda model: torch.nn.Sequential(model)]
)
def test_a_block_computes_on_the_original_base(part: Callable[[PeftModel], torch.nn.Module]) -> None:
    """Whatever of the model is given: itself, a part of it, or a wrapper around it."""
    model = make_model()
    celora.attach(model, dataclasses.replace(BOTH, labelled_head=True, head_forward="int8"))
    train(model, 2)
    trained = loss(model)
    with celora.original_base(part(model)):
        original = loss(model)
        train(model, 1, optimizer=torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0))
        with celora.original_base(part(model)):
            assert loss(model) == original
        assert loss(model) == original
    assert loss(model) == trained != original
    celora.detach(model)
    assert loss(model) == original
    with celora.original_base(model):
        assert loss(model) == original


def in_8_bits(folder: Path) -> PeftModel:
    make_base().save_pretrained(folder)
    base = LlamaForCausalLM.from_pretrained(folder, trust_remote_code=False)
    celora.quantise_base(base)
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))


def test_a_base_in_8_bits_is_read_again(tmp_path: Path) -> None:
    model = in_8_bits(tmp_path)
    celora.attach(model, BOTH)
    quantised = loss(model)
    with celora.original_base(model):
        original = loss(model)
        with celora.original_base(model):  # which does not end the outer block
            pass
        assert loss(model) == original
    assert loss(model) == quantised != original
    celora.detach(model)
    celora.restore_base(model)
    assert loss(model) == original


def by_hand(model: PeftModel) -> float:
    """The mean loss over all rows on the original base.

    Before version 5, Trainer divides by all labels, and the first of a row predicts nothing.
    """
    labels = make_batch(0)["labels"].shape[1]
    share = (labels - 1) / labels if before("transformers", "5") else 1.0
    with celora.original_base(model), torch.no_grad():
        batches = [{key: value[:1] for key, value in make_batch(i).items()} for i in range(len(Rows()))]
        return share * sum(float(model.eval()(**batch).loss) for batch in batches) / len(batches)


@pytest.mark.parametrize("attach", ["callback", "while training"])
def test_an_evaluation_has_both_losses_wherever_they_are_read(attach: str, tmp_path: Path) -> None:
    model, seen = make_model(), Seen()
    if attach == "callback":
        celora.attach(model, BOTH)
    seen.expect = lambda: by_hand(model)
    callback = celora.Callback() if attach == "callback" else AttachWhileTraining(BOTH.to_dict())
    trainer = a_trainer(tmp_path, model, seen, callback)
    trainer.train()
    rows = evaluations(trainer)
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["eval_base_loss"] != row["eval_loss"] == pytest.approx(row["eval_base_loss"], rel=0.05)
    losses = [row["eval_base_loss"] for row in rows]
    assert losses == pytest.approx(seen.expected, rel=1e-5)
    for told in (seen.evaluated, [row for row in seen.logged if "eval_loss" in row]):
        assert [row["eval_base_loss"] for row in told] == losses
    assert not [row for row in seen.logged if "train_base_loss" in row]


def test_the_second_evaluation_changes_no_training(tmp_path: Path) -> None:
    """It draws nothing, although a data loader and dropout draw; the model trains on in the forward that it trains."""
    found = []
    for callbacks in ([], [celora.Callback(), celora.Callback()]):
        model, seen = make_model(lora_dropout=0.2), Seen()
        celora.attach(model, BOTH)
        trainer = a_trainer(tmp_path, model, seen, *callbacks)
        count = passes(model)
        trainer.train()
        assert ["eval_base_loss" in row for row in evaluations(trainer)] == [bool(callbacks)] * 2
        assert len(count) == 2 * 3 * (1 + bool(callbacks))  # once more, even with two callbacks
        assert seen.batches == 2 * 3  # a progress bar ends where the first evaluation ends
        found.append((adapter(model), [row["eval_loss"] for row in evaluations(trainer)]))
    assert found[0][1] == found[1][1]
    assert all(value.equal(found[1][0][name]) for name, value in found[0][0].items())


class Collecting(Trainer):
    """As TRL's ORPOTrainer, whose logs have the means of what evaluation has collected since the latest logs."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._stored_metrics: dict[str, list[float]] = defaultdict(list)

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(*args, **kwargs)
        self._stored_metrics["eval_collected"].append(float(found[0]))
        return found

    def log(self, logs: dict[str, float], *args: Any) -> None:
        for name in [*self._stored_metrics]:
            logs[name] = len(self._stored_metrics.pop(name))
        super().log(logs, *args)


def test_the_second_evaluation_adds_nothing_to_what_the_trainer_collects(tmp_path: Path) -> None:
    """The next logs would mix it with an evaluation of other weights."""
    model = make_model()
    celora.attach(model, BOTH)
    trainer = a_trainer(tmp_path, model, celora.Callback(), kind=Collecting)
    trainer.train()
    history = trainer.state.log_history
    assert [row["eval_collected"] for row in history if "eval_collected" in row] == [3, 3]
    assert ["eval_base_loss" in row for row in evaluations(trainer)] == [True, True]


class Accurate(Trainer):
    """As TRL's SFTTrainer, whose logs have the mean accuracy of the batches; here the loss stands for it."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        found = super().prediction_step(*args, **kwargs)
        self._metrics["eval"]["mean_token_accuracy"].append(float(found[0]))
        return found

    def log(self, logs: dict[str, float], *args: Any) -> None:
        mode = "train" if self.model.training else "eval"
        seen = [*self._metrics[mode].get("mean_token_accuracy", ())]
        logs |= {"eval_mean_token_accuracy": sum(seen) / len(seen)} if seen else {}
        super().log(logs, *args)
        assert [*self._metrics[mode].get("mean_token_accuracy", ())] == seen
        self._metrics[mode].clear()


@pytest.mark.parametrize("exact", [False, True])
def test_the_second_evaluation_has_an_accuracy_of_its_own(exact: bool, tmp_path: Path) -> None:
    model = make_model()
    celora.attach(model, BOTH)
    for forward in require(model).forwards.values():
        forward.exact = exact
    trainer = a_trainer(tmp_path, model, celora.Callback(), kind=Accurate, per_device_eval_batch_size=1)
    trainer.train()
    for row in evaluations(trainer):
        for name in ("", "_base"):
            assert row[f"eval{name}_mean_token_accuracy"] == pytest.approx(row[f"eval{name}_loss"])
        assert (row["eval_base_mean_token_accuracy"] == row["eval_mean_token_accuracy"]) is exact


class Rewarding(Trainer):
    """Evaluates as TRL's GRPO does: it generates answers, and judges them."""

    reward_funcs = (len,)


def test_a_trainer_that_generates_is_evaluated_once(tmp_path: Path) -> None:
    model = make_model()
    celora.attach(model, BOTH)
    trainer = a_trainer(tmp_path, model, celora.Callback(), kind=Rewarding)
    trainer.train()
    assert ["eval_base_loss" in row for row in evaluations(trainer)] == [False, False]


def test_a_model_without_8_bits_is_evaluated_once(tmp_path: Path) -> None:
    model = make_model()
    celora.attach(model, "exact")
    trainer, count = a_trainer(tmp_path, model, celora.Callback()), passes(model)
    trainer.train()
    assert len(count) == 2 * 3
    assert not [row for row in trainer.state.log_history if "eval_base_loss" in row]


@pytest.mark.parametrize("part", ["layers", "head"])
def test_what_no_longer_computes_in_8_bits_is_evaluated_once(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All forwards have given up, or only the head would be in 8 bits and never pays. The second loss is the first."""
    model = make_model()
    celora.attach(model, BOTH if part == "layers" else dataclasses.replace(PRESETS["exact"], head_forward="int8"))
    trainer, count = a_trainer(tmp_path, model, celora.Callback()), passes(model)
    if part == "layers":
        for forward in require(model).forwards.values():
            forward.give_up()
    else:
        monkeypatch.setattr(Int8BothWays, "forward_unavailable", lambda *_: "not here")
    trainer.train()
    assert len(count) == 2 * 3
    assert [row["eval_base_loss"] == row["eval_loss"] for row in evaluations(trainer)] == [True, True]


def test_the_best_model_may_be_that_on_the_original_base(tmp_path: Path) -> None:
    """Several sets of rows have a second loss each."""
    model = make_model()
    celora.attach(model, BOTH)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_few_base_loss", "save_strategy": "steps"}
    trainer = a_trainer(tmp_path, model, celora.Callback(), save_steps=2, greater_is_better=True, **best)
    trainer.eval_dataset = {"few": Rows(), "same": Rows()}
    trainer.train()
    history = trainer.state.log_history
    few, same = ([row[key] for row in history if key in row] for key in ("eval_few_base_loss", "eval_same_base_loss"))
    assert few == same
    assert trainer.state.best_metric == max(few)


def test_an_original_weight_that_is_gone_is_said(tmp_path: Path) -> None:
    model = in_8_bits(tmp_path / "base")
    trainer = a_trainer(tmp_path / "out", model, celora.Callback(), max_steps=2)
    trainer.train()
    assert [row["eval_base_loss"] != row["eval_loss"] for row in evaluations(trainer)] == [True]
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="the loss on the original base is not measured: .*original"):
        found = trainer.evaluate()
    assert "eval_base_loss" not in found
    with pytest.raises(CELoraError), celora.original_base(model):
        pass
    assert all(layer.on_original is None for layer in held_in_8_bits(model).values())


def test_bytes_that_are_split_are_compared_where_they_are_whole(tmp_path: Path) -> None:
    """FSDP2 gathers them for a layer's forward. Elsewhere nothing may replace them."""
    model = in_8_bits(tmp_path)
    with celora.original_base(model):
        original = loss(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        try:
            celora.fsdp.shard(model)
        except CELoraError:  # torch 2.11, for one
            if not before("torch", "2.13"):
                raise
            return
        celora.attach(model, BOTH)
        quantised = loss(model)
        with celora.original_base(model):
            assert loss(model) == original
        assert loss(model) == quantised != original
        with pytest.raises(CELoraError, match="FSDP2 has split its bytes"):
            celora.restore_base(model)
        (layer, *_) = held_in_8_bits(model).values()
        assert layer.origin is not None
        layer.origin = dataclasses.replace(layer.origin, name=layer.origin.name.replace("layers.0", "layers.1"))
        with pytest.raises(CELoraError, match="is not the weight that was quantised"), celora.original_base(model):
            loss(model)
    finally:
        dist.destroy_process_group()
