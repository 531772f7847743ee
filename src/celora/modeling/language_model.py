"""Finds the causal language model in a model, or says why celora cannot compute its loss."""

from __future__ import annotations

import dis
import inspect
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from celora.borrowed import borrow
from celora.errors import CELoraError
from celora.modeling.hooks import has_another_s_forward, hooks_of, is_ours
from celora.modeling.onlookers import would_see
from celora.modeling.others import fused_head, is_fused_head, is_split, replaced
from celora.modeling.packing import cannot_pack


@dataclass(frozen=True)
class LanguageModel:
    """The causal language model around the adapted layers. celora can compute its loss.

    Attributes:
        causal: the model with the head.
        tuner: the PEFT tuner that calls the model's forward past its hooks, as PEFT before 0.21 does; else None.
        cannot_pack: why padding stays in its batches, or ''.
    """

    causal: PreTrainedModel
    tuner: nn.Module | None
    cannot_pack: str

    @property
    def decoder(self) -> Any:
        """The model under the head."""
        return decoder_of(self.causal)

    @property
    def head(self) -> Any:
        """The linear layer that projects hidden states onto the vocabulary."""
        return self.causal.get_output_embeddings()


def find_language_model(model: nn.Module) -> LanguageModel | str:
    """The causal language model in `model`, or the reason why the model must compute its own loss."""
    tuner = next((m for m in model.modules() if isinstance(m, BaseTuner)), None)
    causal = pretrained(model)
    if causal is None:
        return f"{type(model).__name__} is not a model of Transformers"
    if reason := not_ours(causal):
        return reason
    takes = {"labels", "logits_to_keep"} <= inspect.signature(type(causal).forward).parameters.keys()
    if not (takes and any(map(_asks_for_the_loss, type(causal).__mro__))):
        return f"{type(causal).__name__} has a loss of its own"
    if tuner is not None and type(tuner).forward is not BaseTuner.forward:
        return f"{type(tuner).__name__} has a forward of its own, which may add to the loss"
    if any(
        getattr(config, "output_router_logits", False) for config in (causal.config, causal.config.get_text_config())
    ):
        return "a part of it is for its experts"
    if decoder_of(causal) is causal:
        return f"{type(causal).__name__} has no decoder under its head"
    if _reads_labels(decoder_of(causal)):
        return f"{type(causal).__name__} looks at the labels before its head"
    if is_fused_head(causal) and isinstance(found := fused_head(causal), str):
        return found
    return LanguageModel(causal, _past_hooks(tuner, causal), cannot_pack(causal))


def _reads_labels(decoder: nn.Module) -> bool:
    """Whether a decoder does something with labels: PaliGemma of Transformers 4 attends otherwise if there are some."""
    code = getattr(inspect.unwrap(type(decoder).forward), "__code__", None)
    steps = () if code is None else dis.get_instructions(code)
    return any("labels" in step.argrepr.split(", ") for step in steps if step.opname.startswith("LOAD_FAST"))


def pretrained(model: nn.Module) -> PreTrainedModel | None:
    """The outermost model of Transformers in this one; if there are several, the first with an adapter."""
    found = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    adapted = (causal for causal in found if any(isinstance(module, BaseTunerLayer) for module in causal.modules()))
    return next(adapted, next(iter(found), None))


def decoder_of(causal: Any) -> Any:
    """The model under the head. Transformers 4 names that of Gemma 3 in another way than `base_model` expects."""
    return getattr(causal, "model", causal) if causal.base_model is causal else causal.base_model


def _past_hooks(tuner: Any, causal: PreTrainedModel) -> Any:
    """The tuner, if it calls `causal.forward` and not `causal`; else None."""
    calls_forward = "forward" in BaseTuner.forward.__code__.co_names
    return tuner if calls_forward and tuner is not None and tuner.model is causal else None


def not_ours(causal: PreTrainedModel) -> str:
    """Why celora cannot compute logits and loss of this model in its current state; '' if it can."""
    head: Any = causal.get_output_embeddings()
    if type(head) is not nn.Linear:
        which = "no head" if head is None else f"a {type(head).__name__} as its head"
        return f"{type(causal).__name__} has {'an adapter on its head' if isinstance(head, BaseTunerLayer) else which}"
    # FSDP2's own hooks, which gather a sharded head, are allowed.
    if not isinstance(head.weight, DTensor) and not all(map(is_ours, hooks_of(head))):
        return f"{type(causal).__name__} has a Linear with hooks as its head"
    if is_split(head):
        return "its head is split by tensor parallelism"
    if any(p.requires_grad for p in head.parameters()) or not head.weight.is_floating_point():
        return "its head is trained or quantised"
    if name := _trained_beside(causal, head):
        return f"{type(causal).__name__} trains its {name!r}, which may change logits or loss"
    if (by := replaced(causal)) and not is_fused_head(causal):
        return f"the forward of {type(causal).__name__} was replaced by {by}"
    if has_another_s_forward(head) and (by := replaced(head)):
        return f"the forward of its head was replaced by {by}"
    if by := would_see(causal):
        return f"{type(causal).__name__} has a hook ({by}) that would see celora's arguments or output of a call"
    usual = borrow("transformers.loss.loss_utils:ForCausalLMLoss")
    if usual is None or causal.loss_function is not usual:
        return f"{type(causal).__name__} has a loss of its own"
    return ""


def of_transformers(causal: Any) -> bool:
    """Whether the forward of this model's class is one of Transformers."""
    module: str = inspect.unwrap(type(causal).forward).__module__
    return module.partition(".")[0] == "transformers"


def _trained_beside(causal: PreTrainedModel, head: nn.Module) -> str:
    """The name of a part that trains beside decoder and head, and that its forward may use; '' if there is none.

    A first call need not show what the part does: it may begin at zero.
    """
    known = (decoder_of(causal), head)
    parts = {name: part.parameters() for name, part in causal.named_children() if part not in known}
    parts |= {name: iter([own]) for name, own in causal.named_parameters(recurse=False)}
    trained = (name for name, found in parts.items() if any(p.requires_grad for p in found))
    used = inspect.unwrap(type(causal).forward).__code__.co_names if of_transformers(causal) else None
    return next((name for name in trained if used is None or name in used), "")


def _asks_for_the_loss(kind: type) -> bool:
    """Whether the forward of this class reads `loss_function`. Only a call shows how it uses it."""
    code = getattr(inspect.unwrap(vars(kind).get("forward", object)), "__code__", None)
    return code is not None and "loss_function" in code.co_names


def check_module(model: object) -> None:
    """Raise CELoraError for what is no model, such as the Trainer around one."""
    if not isinstance(model, nn.Module):
        raise CELoraError(f"{type(model).__name__} is not a model; give the model itself, for example trainer.model.")


def language_model(module: nn.Module) -> Any:
    """The causal language model that this hooked module is, or wraps."""
    return module.model if isinstance(module, BaseTuner) else module


def at_hand(head: Any) -> bool:
    """Whether the head's weight is in memory: neither offloaded nor partitioned by DeepSpeed."""
    weight = getattr(head, "weight", None)
    return weight is None or (weight.device.type != "meta" and not hasattr(weight, "ds_id"))
