"""Finds the LoRA adapters that can be computed together with their base layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners import lora
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from celora.modeling.graft import LayerGraft
from celora.modeling.hooks import hooks_of

# PEFT's LoRA layers that add `scaling lora_B lora_A dropout(x)` and nothing else, over any kind of base layer.
_KINDS = frozenset({"Linear", "Linear4bit", "Linear8bitLt", "TorchaoLoraLinear", "HqqLoraLinear"})


@dataclass(frozen=True)
class Adapter:
    """A vanilla LoRA adapter of one layer: `scaling lora_B lora_A dropout(x)`; A: (r, in), B: (out, r)."""

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float


def vanilla_adapter(module: Any) -> Adapter | str:
    """The one active adapter of a PEFT layer, or the reason why PEFT has to compute it."""
    kind = type(module)
    if kind.__name__ not in _KINDS or not kind.__module__.startswith(lora.__name__):
        return f"{kind.__name__} is not a LoRA linear layer"
    if module.disable_adapters or module.merged:
        return "its adapter is disabled or merged"
    if getattr(module, "_is_replica", False):
        return "it is a replica of DataParallel"  # its threads would share one graft
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1:
        return f"{len(active)} adapters are active"
    name = active[0]
    if not isinstance(getattr(module, "lora_variant", None), dict) or not hasattr(module, "cast_input_dtype_enabled"):
        return "this version of PEFT hands no layer over to a variant of LoRA"
    if name in module.lora_variant:
        return f"its adapter is a variant of LoRA ({type(module.lora_variant[name]).__name__})"
    parts = parts_of(module, name)
    *matrices, dropout = parts
    if any(type(matrix) is not nn.Linear or matrix.bias is not None for matrix in matrices):
        return "its adapter is not two linear layers without bias"
    if any(map(touched, parts)):
        return "its adapter has hooks of its own"
    if looked_at(module.get_base_layer()):
        return "its base layer has hooks of its own"
    if not isinstance(dropout, nn.Identity) and type(dropout) is not nn.Dropout:
        return f"its dropout is {type(dropout).__name__}"
    scaling = module.scaling[name]
    if not isinstance(scaling, (int, float)):  # torch 2.8 cannot trace a union here
        return "its scaling is not a number"
    return made_of(*parts, scaling)


def parts_of(module: Any, name: str) -> tuple[Any, Any, Any]:
    """A, B and dropout of an adapter."""
    A, B, dropout = (part._modules.get(name) for part in (module.lora_A, module.lora_B, module.lora_dropout))
    return A, B, dropout


def made_of(A: nn.Linear, B: nn.Linear, dropout: nn.Module, scaling: float) -> Adapter:
    """The adapter of these parts. In evaluation its dropout is 0."""
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Adapter(A.weight, B.weight, float(scaling), p)


def touched(module: nn.Module) -> bool:
    """Whether something else changes this module's forward (FSDP, DeepSpeed, offloading) or backward."""
    return bool(hooks_of(module)) or "forward" in module.__dict__


def looked_at(base: nn.Module) -> bool:
    """Whether other hooks get the base layer's output. They expect it without the adapter's part.

    So does a backward hook of `register_backward_hook`, which hangs on the output. A full one is called anyhow.
    """
    hooks = [*base._forward_hooks.values()]
    if base._is_full_backward_hook is False:
        hooks += base._backward_hooks.values()
    return not isinstance(base, FSDPModule) and not all(isinstance(hook, LayerGraft) for hook in hooks)
