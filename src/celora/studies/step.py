"""Makes the training step of one arm of the bench, and times the steps of several arms in turns.

If the machine slows down, it slows down all arms alike, because they take turns.
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
from transformers import AutoTokenizer, Trainer, TrainingArguments

import celora
from celora.machine.device import accelerator
from celora.machine.memory import saved_for_backward
from celora.machine.timing import laps
from celora.modeling.graft import LayerGraft
from celora.modeling.survey import survey
from celora.modeling.switch import Mode, Switch
from celora.numerics.estimators import Dense
from celora.runtime.attachment import find
from celora.studies.assets import demo_model
from celora.studies.cells import LINEAR, SMOLLM2, Batch, Cell, make_model

ARMS = {
    "PEFT": "Transformers' Trainer around a PEFT model, with their defaults",
    "PEFT + compile": "the same with torch.compile",
    "PEFT upper half": "the same with LoRA on the upper half of the layers only",
    "exact": "celora's preset exact",
    "exact + compile": "the same with torch.compile, where only the fused adapters of exact remain",
    "paper": "celora's preset paper",
    "auto": "celora's preset auto, as a run begins",
    "fast": "celora's preset fast",
    "limit": "PEFT with a free grad_input of its adapted layers (zeros: does not train)",
    "limit of exact": "preset exact with the same free grad_input",
    "Liger": "PEFT with Liger's kernels",
    "Unsloth": "Unsloth's own LoRA",
}


PATCHING = ("Liger", "Unsloth")  # they replace parts of Transformers for the whole process


class Step:
    """A training step exactly as Trainer does it: loss, gradients, clipping, update.

    On CUDA a model in bfloat16 trains under autocast, as TRL's trainer does by default.
    """

    def __init__(self, model: Any, folder: Path, *, compiled: bool = False) -> None:
        """`folder`: Trainer needs an output folder, but nothing is written into it."""
        self.model = model.train()
        self.trainer = self.make_trainer(folder)
        self.optimizer = self.trainer.create_optimizer()
        self.run = torch.compile(model) if compiled else model

    def make_trainer(self, folder: Path) -> Any:
        """Transformers' Trainer of the model."""
        arguments = TrainingArguments(
            str(folder),
            report_to="none",
            use_cpu=accelerator() is None,
            bf16=autocasts(self.model),
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        return Trainer(self.model, arguments)

    def __call__(self, batch: Batch) -> tuple[float, float, float]:
        """Milliseconds of forward, backward and optimizer."""
        loss: list[Tensor] = []
        forward, backward, update = laps(
            (
                lambda: loss.append(self._forward(batch)),
                lambda: self.trainer.accelerator.backward(loss[0]),
                self._update,
            )
        )
        return forward, backward, update

    def settle(self, batches: Sequence[Batch]) -> None:
        """Take the first steps of a run, in which presets measure every layer. Later ones are those of a long run."""
        attached = find(self.model)
        while attached is not None and attached.grafts and attached.clock.step < attached.first_steps:
            self(batches[attached.clock.step % len(batches)])

    def saved(self, batch: Batch) -> int:
        """Bytes that a forward saves for backward."""
        with saved_for_backward(self.model) as saved:
            self._forward(batch)
        return saved.nbytes

    def _forward(self, batch: Batch) -> Tensor:
        inputs = {key: value.to(self.model.device) for key, value in batch.items()}
        with self.trainer.compute_loss_context_manager(), self.trainer.accelerator.autocast():
            loss: Tensor = self.trainer.compute_loss(
                self.run, inputs, num_items_in_batch=(inputs["labels"] != -100).sum()
            )
        return loss

    def _update(self) -> None:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(parameters, self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def autocasts(model: Any) -> bool:
    """Whether the model trains under autocast: in bfloat16 on CUDA."""
    return bool(model.device.type == "cuda" and model.dtype == torch.bfloat16)


def take_turns(
    steps: Mapping[str, Step], batches: Sequence[Batch], repeats: int
) -> dict[str, list[tuple[float, float, float]]]:
    """Milliseconds of forward, backward and optimizer for `repeats` steps of each arm, after a step on every batch."""
    times: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in steps}
    for turn, batch in zip(range(len(batches) + repeats), itertools.cycle(batches), strict=False):
        for arm, step in steps.items():
            parts = step(batch)
            if turn >= len(batches):
                times[arm].append(parts)
    return times


def make_step(cell: Cell, arm: str, folder: Path, frozen: dict[str, Tensor]) -> Step:
    """The step of an arm, with a model of its own.

    `folder`: Trainer needs an output folder. Models share their frozen weights through `frozen`, so that many arms of a
    large model fit into memory: the first fills it, the others use it.
    """
    model: Any = _unsloth(cell) if arm == "Unsloth" else make_model(cell, upper=arm == "PEFT upper half")
    if arm != "Unsloth":  # Unsloth changes the weights that it loads
        for name, p in model.named_parameters():
            if not p.requires_grad:
                p.data = frozen.setdefault(name.replace(".base_layer", ""), p.data)
    model.train()
    attach_arm(model, arm)
    return Step(model, folder, compiled=arm.endswith("+ compile"))


def attach_arm(model: PeftModel, arm: str) -> None:
    """Attach what an arm is named for to a PEFT model; nothing for arm `PEFT`."""
    if arm in ("auto", "exact", "exact + compile", "paper", "fast"):
        celora.attach(model, arm.removesuffix(" + compile"))
    elif arm in ("limit", "limit of exact"):
        if arm == "limit of exact":
            celora.attach(model, "exact")
        _make_free(model)
    elif arm == "Liger":  # Trainer does this at the beginning of `train`, which a step does not call
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, None)


class _Free(Dense):
    """An estimator that leaves out the whole product: `grad_input` is zero."""

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
    """Unsloth's own model. It loads from a folder only."""
    from unsloth import FastLanguageModel

    with tempfile.TemporaryDirectory() as folder:
        source = demo_model() if cell.model == SMOLLM2 else folder
        if cell.model != SMOLLM2:
            make_model(cell).unload().save_pretrained(folder)
            AutoTokenizer.from_pretrained(demo_model(), trust_remote_code=False).save_pretrained(folder)
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
