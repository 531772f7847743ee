"""Finds other people's code in a decoder that may depend on a batch's shape. With any, batches keep their padding."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

from torch import nn

from celora.modeling.attention import Lookup, is_attention
from celora.modeling.hooks import hooks_of, is_ours
from celora.modeling.others import function_of, name_of

# The hooks of these packages do not depend on the shape of a batch, except for NEFTune's.
_BLIND = ("torch", "bitsandbytes", "deepspeed", "accelerate", "transformers", "trl")


def _may_look(hook: Any) -> str:
    """The name of a hook, if it may depend on the shape of a batch; else ''."""
    function = inspect.unwrap(getattr(hook, "func", hook))
    called: str = getattr(function, "__name__", type(function).__name__)
    origin = (getattr(function, "__module__", None) or type(function).__module__).partition(".")[0]
    blind = origin in _BLIND and called != "neftune_post_forward_hook"
    return "" if blind or called.startswith("make_inputs_require_grad") else called


# Forwards of these packages know packed sequences where celora packs, or compute every token alone.
_QUANTISE = ("aqlm", "auto_gptq", "auto_round", "awq", "compressed_tensors", "eetq", "fp_quant", "gptqmodel", "hqq",
             "neural_compressor", "optimum", "sinq", "torchao", "vptq")  # fmt: skip
_KNOWN = {*_BLIND, *_QUANTISE, "celora", "liger_kernel", "peft"}


def _unknown(forward: Callable[..., Any] | None) -> str:
    """The name of a forward that is none of these packages' own; else ''.

    `kernels` puts one around an attention, which hands it its functions and calls it: the inner one counts.
    """
    found = name_of(forward)
    if found.startswith("kernels.") and (inner := getattr(forward, "__wrapped__", None)) is not None:
        return _unknown(inner)
    return "" if found.partition(".")[0] in _KNOWN else found


def _is_method(own: Any, module: nn.Module) -> bool:
    """Whether the forward is one of a class: the module's, or that of a kernel that `kernels` has bound to it."""
    of = getattr(own, "__qualname__", "").rpartition(".")[0]
    return own is None or (getattr(own, "__self__", None) is module and bool(of) and not of.endswith("<locals>"))


_unknown_of_class = functools.cache(_unknown)  # never of a function that holds a model


def unknown_forward(module: nn.Module) -> str:
    """Why batches keep their padding because of this module's forward, with {} in place of its name; or ''.

    A layer whose kernel Transformers takes from the hub computes each token by itself.
    """
    own = vars(module).get("forward")
    of_class = getattr(type(module), "forward", None)  # TorchScript's modules have none
    found = _unknown_of_class(of_class) if own is None else _unknown(function_of(own))
    if not found or (hasattr(type(module), "kernel_layer_name") and _is_method(own, module)):
        return ""
    return f"the forward of {{}} is {found}, which may depend on a batch's shape"


def may_look_at_shapes(module: nn.Module) -> str:
    """Why batches keep their padding because of this module, with {} in place of its name; '' if they need not.

    NEFTune's noise depends on the number of tokens, PEFT's aLoRA on the rows of the batch. The hooks of users may do
    anything.
    """
    first = module._forward_pre_hooks.values()
    if is_attention(module) and not any(isinstance(getattr(hook, "__self__", None), Lookup) for hook in first):
        return "{} was not there when celora was attached"
    forward = *module._forward_hooks.values(), *first
    for hook in hooks_of(module):
        if not is_ours(hook) and (called := _may_look(hook)):
            kind = "forward" if hook in forward else "backward"
            return f"{{}} has a {kind} hook ({called}) that may depend on a batch's shape"
    return ""


def would_see(module: nn.Module) -> str:
    """The name of a hook that would get celora's arguments or output in place of the model's; '' if there is none.

    A pre-hook gets what the hooks before it returned. celora hands all arguments on by name, so only one with `kwargs`
    sees them. A forward hook gets an output without logits, and in the call that probes the loss of a few tokens.
    """
    later = itertools.dropwhile(lambda item: not is_ours(item[1]), module._forward_pre_hooks.items())
    hooks = [hook for key, hook in later if key in module._forward_pre_hooks_with_kwargs]
    hooks += module._forward_hooks.values()
    return next((name for hook in hooks if not is_ours(hook) and (name := _may_look(hook))), "")
