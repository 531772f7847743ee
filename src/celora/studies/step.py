"""The training step of one arm of the bench, and the times of several arms that take their steps in turns.

In turns, a machine that slows down, or a neighbour on it, slows down all arms alike.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer, TrainingArguments

import celora
from celora.machine.device import accelerator
from celora.machine.memory import saved_for_backward
from celora.machine.timing import timed
from celora.modeling.graft import LayerGraft
from celora.modeling.survey import survey
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import Dense
from celora.planning.plan import Plan
from celora.studies.assets import demo_model
from celora.studies.cells import LINEAR, SMOLLM2, Batch, Cell, make_model

ARMS = {
    "PEFT": "Transformers' Trainer around a PEFT model, with their defaults",
    "PEFT + compile": "the same with torch.compile",
    "PEFT upper half": "the same with LoRA on the upper half of the layers only",
    "exact": "celora's preset exact",
    "exact + compile": "the same with torch.compile, which takes the fused adapters only",
    "paper": "celora's preset paper",
    "auto": "celora's preset auto, as it begins without a plan",
    "plan": "a plan of celora's at the default fidelity",
    "fast": "celora's preset fast",
    "limit": "PEFT with a free grad_input of its adapted layers (zeros: does not train)",
    "limit of exact": "preset exact with the same",
    "Liger": "PEFT with Liger's kernels",
    "Unsloth": "Unsloth's own LoRA",
}


class Step:
    """The training step of a model, as Trainer takes it: the loss, the gradients, their clipping, the update."""

    def __init__(self, model: Any, folder: Path, *, liger: bool = False, compiled: bool = False) -> None:
        """`folder` is what Trainer wants for its output; nothing is written."""
        self.model = model.train()
        arguments = TrainingArguments(
            str(folder),
            report_to="none",
            use_cpu=accelerator() is None,
            use_liger_kernel=liger,
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        self.trainer = Trainer(model, arguments)
        self.optimizer = self.trainer.create_optimizer()
        self.run = torch.compile(model) if compiled else model

    def __call__(self, batch: Batch) -> tuple[float, float, float]:
        """Milliseconds of forward, backward and optimizer."""
        loss: list[Tensor] = []
        return (
            timed(lambda: loss.append(self._forward(batch))),
            timed(lambda: self.trainer.accelerator.backward(loss[0])),
            timed(self._update),
        )

    def saved(self, batch: Batch) -> int:
        """Bytes that a forward saves for backward."""
        with saved_for_backward(self.model) as saved:
            self._forward(batch)
        return saved.nbytes

    def _forward(self, batch: Batch) -> Tensor:
        inputs = {key: value.to(self.model.device) for key, value in batch.items()}
        with self.trainer.compute_loss_context_manager():
            loss: Tensor = self.trainer.compute_loss(
                self.run, inputs, num_items_in_batch=(inputs["labels"] != -100).sum()
            )
        return loss

    def _update(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(parameters, self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def take_turns(
    steps: Mapping[str, Step], batches: Sequence[Batch], repeats: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Times of forward, backward and optimizer of `repeats` steps of each arm, after each has seen every batch."""
    times: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in steps}
    for turn, batch in zip(range(len(batches) + repeats), itertools.cycle(batches), strict=False):
        for arm, step in steps.items():
            parts = step(batch)
            if turn >= len(batches):
                times[arm].append(parts)
    return times


def make_step(cell: Cell, arm: str, batches: Sequence[Batch], plan_file: Path, frozen: dict[str, Tensor]) -> Step:
    """The step of an arm, with a model of its own.

    Arm `plan` makes its plan and writes it to `plan_file`, or takes the plan that is there. The model's frozen weights
    become those in `frozen`, which gets the ones that it lacks: so many arms of a large model fit into memory.
    """
    model: Any = _unsloth(cell) if arm == "Unsloth" else make_model(cell, upper=arm == "PEFT upper half")
    if arm != "Unsloth":  # which changes the weights it loads
        for name, p in model.named_parameters():
            if not p.requires_grad:
                p.data = frozen.setdefault(name.replace(".base_layer", ""), p.data)
    model.train()
    _attach(model, arm, batches, plan_file)
    return Step(model, plan_file.parent, liger=arm == "Liger", compiled=arm.endswith("+ compile"))


def _attach(model: PeftModel, arm: str, batches: Sequence[Batch], plan_file: Path) -> None:
    if arm == "plan":
        plan = Plan.load(plan_file) if plan_file.exists() else celora.make_plan(model, batches)
        plan.save(plan_file)
        celora.attach(model, plan)
    elif arm in ("auto", "exact", "exact + compile", "paper", "fast"):
        celora.attach(model, arm.removesuffix(" + compile"))
    elif arm in ("limit", "limit of exact"):
        if arm == "limit of exact":
            celora.attach(model, "exact")
        _make_free(model)


class _Free(Dense):
    """Leaves the whole product out."""

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        return grad_output.new_zeros(grad_output.shape[0], weight.shape[1])


def _make_free(model: PeftModel) -> None:
    for layer in survey(model).layers.values():
        base: Any = layer.base
        found = next((hook for hook in base._forward_hooks.values() if isinstance(hook, LayerGraft)), None)
        graft = found or LayerGraft(_Free(*layer.shape), Switch())
        graft.estimator, graft.mode = _Free(*layer.shape), Mode.ESTIMATE
        if found is None:
            base.register_forward_hook(graft)


def _unsloth(cell: Cell) -> Any:
    """Unsloth loads from a folder and patches what it loads."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        source = demo_model() if cell.model == SMOLLM2 else folder
        if cell.model != SMOLLM2:
            make_model(cell).get_base_model().save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(
            str(source),
            dtype=getattr(torch, cell.dtype),
            load_in_4bit=False,
            max_seq_length=cell.tokens,
            trust_remote_code=False,
        )
    return FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=8, target_modules=LINEAR, use_gradient_checkpointing=False
    )
