"""Finds other changes of a model's forward: replaced and split ones, TRL's fused head, trainers that read logits."""

from __future__ import annotations

import functools
import inspect
import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from celora.modeling.hooks import has_another_s_forward
from celora.numerics.head import Logits

# The outputs of TRL's fused head that celora computes.
_TRL_FIELDS = {"log_probs", "entropy", "is_top1", "mean_logits"}
_TRAINERS = ("transformers", "trl")
# Modules of the wrappers that accelerate puts around a forward. `functools.wraps` names them after what they wrap.
_WRAPPERS = {"accelerate.hooks", "accelerate.utils.operations", "torch.amp.autocast_mode"}
# Variables in the closure of TRL's fused head (`trl.trainer.utils.add_fused_lm_head`): its outputs and settings.
_TRL_SETTINGS = {"outputs", "temperature", "cast_lm_head_to_fp32", "final_logit_softcapping", "logit_scale"}


@dataclass(frozen=True)
class FusedHead:
    """A head that TRL has fused with the loss.

    Attributes:
        logits: what the model does to its head's output.
        temperature: what the result is divided by.
        outputs: the names of what it computes.
    """

    logits: Logits
    temperature: float
    outputs: frozenset[str]

    @property
    def scored(self) -> Logits:
        """What is done to the head's output before the softmax. Only logits without a cap have a temperature."""
        return self.logits if self.temperature == 1 else Logits(self.logits.scale / self.temperature)


def function_of(forward: Any) -> Any:
    """The function inside a method, a partial, and what accelerate wraps around a forward: hooks, and autocast."""
    while True:
        if isinstance(forward, functools.partial):
            forward = forward.func
        elif hasattr(forward, "__func__"):
            forward = forward.__func__
        elif hasattr(forward, "__wrapped__") and {_written_in(forward), type(forward).__module__} & _WRAPPERS:
            forward = forward.__wrapped__
        else:
            return forward


def name_of(function: Any) -> str:
    """The name of a function, after that of the module with its code."""
    return f"{_written_in(function)}.{getattr(getattr(function, '__code__', None), 'co_name', type(function).__name__)}"


def _written_in(function: Any) -> str:
    """The name of the module with its code. After `functools.wraps`, `__module__` is another one."""
    names = getattr(function, "__globals__", None)
    found = names.get("__name__") if names is not None else getattr(function, "__module__", None)
    return str(found or type(function).__module__)


def replaced(module: nn.Module) -> str:
    """What has replaced the forward of this module; '' if nothing. accelerate does not count: it calls the original."""
    forward = vars(module).get("forward")
    found = function_of(forward)
    own = found is type(module).forward and not isinstance(forward, functools.partial)  # which may hold arguments
    if forward is None or own:
        return ""
    name = name_of(found)
    return "" if name.partition(".")[0] == "accelerate" else name  # it casts, or moves tensors between devices


def is_split(module: nn.Module) -> bool:
    """Whether this layer's product is split over processes (tensor parallelism).

    Transformers replaces the forward of such layers; FSDP2 does not. PEFT marks the layers that it adapts.
    """
    sharded = isinstance(getattr(module, "weight", None), DTensor)
    return (sharded and has_another_s_forward(module)) or bool(getattr(module, "_hf_tp_plan", None))


def is_fused_head(causal: nn.Module) -> bool:
    """Whether `add_fused_lm_head` of TRL 1.15 or later has replaced the model's forward."""
    function = function_of(vars(causal).get("forward"))
    code = getattr(function, "__code__", None)
    return code is not None and code.co_name == "_fused_forward" and _written_in(function).startswith("trl.")


def fused_head(causal: nn.Module) -> FusedHead | str:
    """TRL's fused head of this model, or why celora cannot do the same."""
    if not is_fused_head(causal):
        return "it is called with fused_lm_head=True, and has no such head that celora knows"
    known: Any = inspect.getclosurevars(function_of(vars(causal)["forward"])).nonlocals
    if missing := sorted(_TRL_SETTINGS - known.keys()):
        return f"celora cannot read {missing[0]} from the fused head of this version of TRL"
    if unknown := sorted(set(known["outputs"]) - _TRL_FIELDS):
        return f"TRL's fused head computes {unknown[0]}"
    if known["cast_lm_head_to_fp32"] is not False:
        return "TRL's fused head computes in float32"
    logits = Logits(float(known["logit_scale"]), known["final_logit_softcapping"])
    if logits.cap is not None and known["temperature"] != 1:
        return f"TRL's fused head has temperature={known['temperature']} beside a cap on logits"
    if logits.cap is not None and "mean_logits" in known["outputs"]:
        return "TRL's fused head computes mean_logits of capped logits"
    return FusedHead(logits, known["temperature"], frozenset(known["outputs"]))


def trainer_wants_logits() -> str:
    """Why the model's caller will read its logits: a trainer of TRL, or a user's `compute_loss`; '' if none does."""
    if "transformers.trainer" not in sys.modules:
        return ""
    frame: FrameType | None = sys._getframe(1)
    asked = False
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        # Only there: a frame whose variables were asked for keeps them alive.
        if name.startswith("trl.") and "model" in frame.f_locals:
            caller = frame.f_locals.get("self")
            who = name if caller is None else type(caller).__name__
            return f"{who} looks at the logits of every step (with TRL 1.15 or later it does not)"
        # Whoever calls the model may read its logits. A method that calls Trainer's gets the loss from there.
        if not asked and frame.f_code.co_name == "compute_loss":
            own = name.partition(".")[0] not in _TRAINERS
            # In a step, Trainer asks its own for no outputs. Whoever does so wants to read them.
            asked = own or not frame.f_locals.get("return_outputs")
            if own and isinstance(frame.f_locals.get("self"), sys.modules["transformers.trainer"].Trainer):
                return f"compute_loss of {name} calls the model, and may look at its logits"
        frame = frame.f_back
    return ""
