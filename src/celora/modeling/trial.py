"""Checks that a frozen layer computes `x W^T + b` with the W that its backward reads: by a trial, then by a watch.

The trial gives the layer a few rows, and compares its output with their product with W. The watch checks in every
forward what could have changed since: the `forward`, other hooks, the weight. It takes a few lookups and no arithmetic.
A layer that fails one of the two keeps PEFT's own backward.
"""

from __future__ import annotations

import functools
import weakref
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm

from celora.borrowed import borrow
from celora.errors import first_line, out_of_memory
from celora.machine.precision import float32_roundoff
from celora.machine.processes import in_company, largest_of_all
from celora.modeling.hooks import has_another_s_forward, is_ours
from celora.weights.read import bias_of, plain_weight, read, shape_of, unreadable
from celora.weights.sharded import whole
from celora.weights.stored import StoredWeight, rows_of

_ROWS = 4
_STORED = 64  # rows of a quantised weight that are de-quantised for a trial
_ROUNDINGS = 4  # a product, a scale, a bias, and the product that it is compared with
# Hooks of these load weights, or count; they change no number.
_LET_THROUGH = ("torch.distributed.", "torch.utils.", "deepspeed.")
_GLOBAL = tuple(f"torch.nn.modules.module:_global_forward_{kind}" for kind in ("pre_hooks", "hooks"))
_GLOBAL_BACKWARD = tuple(f"torch.nn.modules.module:_global_backward_{kind}" for kind in ("pre_hooks", "hooks"))
# Layer -> weight and class's forward at the trial, and the outcome.
_outcomes: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], Any, str]] = weakref.WeakKeyDictionary()


def tampered(module: nn.Module, hook: object = None) -> str:
    """Which other code could change the output of this layer; '' if none.

    Args:
        hook: the layer's own graft, if it has one. Hooks after it change nothing that it sees.
    """
    own = module.__dict__
    forward = own.get("forward")
    if forward is not None and not _ours(forward, hook) and not _aligns_devices(module, forward):
        return "its forward was replaced"
    before, after = own.get("_forward_pre_hooks"), own.get("_forward_hooks")
    # Not under torch.compile: it looks at hooks once, and cannot trace the lookup of names.
    everywhere = [] if torch.compiler.is_compiling() else [borrow(name) for name in _GLOBAL]
    if before is None or after is None or None in everywhere:
        return "this version of torch does not tell which hooks it has"
    for others in (before, *everywhere):
        for other in others.values() if others else ():
            if not is_ours(other) and not _lets_through(other):
                return f"it has a forward hook of another's ({_name(other)})"
    for other in after.values() if hook is not None else ():
        if other is hook:
            break
        if not _lets_through(other):
            return f"another's hook comes before celora's ({_name(other)})"
    return ""


def watched_everywhere() -> bool:
    """Whether global hooks wait for a module's forward or backward. Hooks that change no number do not count."""
    hooks = [borrow(name) for name in (*_GLOBAL, *_GLOBAL_BACKWARD)]
    return None in hooks or any(not _lets_through(hook) for of_a_kind in hooks for hook in of_a_kind.values())


def _ours(forward: Any, graft: object) -> bool:
    """Whether this forward is celora's beside `graft`; of any graft, if celora is being attached again."""
    return is_ours(forward) and (graft is None or getattr(forward, "graft", None) is graft)


def identity(module: nn.Module) -> tuple[Any, ...]:
    """The objects that a trial of this layer depends on. If one is replaced, the layer is tried again."""
    own = module.__dict__
    stored = own["_parameters"]
    weight = stored.get("weight", stored.get("W_q"))
    state = getattr(weight, "quant_state", None)
    packed = getattr(state, "packing_format_for_cpu", None)  # an evaluation on CPU sets it
    return type(module).forward, weight, state, packed, own.get("meta"), own.get("state")


def unlike(module: nn.Module, seen: tuple[Tensor, Tensor] | None = None) -> str | None:
    """Why this layer does not compute `x W^T + b`; '' if it does; None if its weight is not in memory, or not finite.

    Args:
        seen: input and output of its latest forward. A sharded layer is judged by them; any other layer is called.
    """
    if reason := unreadable(module):
        return reason
    weight = module._parameters.get("weight", module._parameters.get("W_q"))
    if weight is None:
        return "its weight is not a parameter"
    if (known := _outcome(module, weight)) is not None:
        return known
    here = plain_weight(module)  # with ZeRO-3 it is empty between two forwards
    if weight.is_meta or (here is not None and here.shape != shape_of(module)) or 0 in shape_of(module):
        return None
    if isinstance(weight, DTensor) and seen is None:
        return None
    try:
        different = _compared(module, seen if isinstance(weight, DTensor) else None)
    except Exception as error:  # the layer refuses such an input, for whatever reason
        if out_of_memory(error) and not isinstance(weight, DTensor):  # of a sharded layer, other processes wait below
            raise
        different = f"it cannot be tried: {type(error).__name__}, {first_line(error)[:120]}"
    if isinstance(weight, DTensor) and seen is not None:
        different = _agreed(different, seen[0].device)
    if different is not None and not has_another_s_forward(module):
        _outcomes[module] = weakref.ref(weight), type(module).forward, different
    return different


def was_tried(module: nn.Module) -> bool:
    """Whether a trial has shown that this layer, as it is now, computes `x W^T + b`. Tries nothing."""
    return _outcome(module, module._parameters.get("weight")) == ""


def _outcome(module: nn.Module, weight: object) -> str | None:
    """What the trial of this layer with this weight has shown; None if there was none, or its class has changed."""
    known = _outcomes.get(module)
    same = known is not None and known[0]() is weight and known[1] is type(module).forward
    return known[2] if known is not None and same else None


def _agreed(different: str | None, device: torch.device) -> str | None:
    """The verdict on a sharded layer for all processes, because one that tries it again alone would wait for ever.

    A process that has seen nothing finite takes the verdict of the others. One that refuses decides for all.
    """
    if not in_company():
        return different
    ((verdict,),) = largest_of_all([[0 if different is None else 1 + bool(different)]], device)
    return (None, "", different or "it does not compute x W^T + b, says another process")[verdict]


@torch.no_grad()
def _compared(module: nn.Module, seen: tuple[Tensor, Tensor] | None) -> str | None:
    """The trial. None if the weights are not finite: the real weights may be loaded later."""
    out_features, in_features = shape_of(module)
    weight, bias = read(module), bias_of(module)
    if seen is None:
        x, found = _tried(module, weight, in_features)
    else:
        x, found = (t.reshape(-1, t.shape[-1])[:_ROWS].detach() for t in seen)
        weight = whole(weight, found.dtype)
    with torch.autocast(found.device.type, enabled=False):
        if isinstance(weight, StoredWeight) and out_features > _STORED:
            chosen = torch.randperm(out_features, generator=_generator(), device="cpu")[:_STORED]
            index = chosen.sort().values.to(found.device)
            rows = rows_of(weight, index, found.dtype)
            found, bias = found.index_select(-1, index), None if bias is None else bias.index_select(0, index)
        else:
            rows = weight.detach().to(found.dtype)
        x = x.to(found.dtype)
        expected = x @ rows.t()
        expected = expected if bias is None else expected + bias.to(found.dtype)
    size, error = (vector_norm(t, dim=1) for t in (expected.float(), found.float() - expected.float()))
    if not bool(size.isfinite().all()):
        return None
    rounding, sums = _roundoff(weight, found)
    # With random signs, the terms are as long as their sum. With a batch's rows, terms may cancel.
    terms = size if seen is None else vector_norm(x.float(), dim=1) * vector_norm(rows.float())
    if bool((error <= _ROUNDINGS * rounding * size + 2 * in_features**0.5 * sums * terms).all()):
        return ""
    return f"it does not compute x W^T + b (relative error {float((error / size).max()):.2g})"


def _tried(module: nn.Module, weight: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """Rows for a trial, and the output of the layer's own forward for them.

    The numbers of a row are one power of two with random signs. They are exact in every format, because a layer may
    round its input to a format of its own.
    """
    bias = bias_of(module)
    dtype = weight.dtype
    if isinstance(weight, StoredWeight):
        dtype = bias.dtype if bias is not None else weight.compute_dtype or weight.dtype
    signs = torch.randint(2, (_ROWS, in_features), generator=_generator(), device="cpu") * 2.0 - 1
    x = (signs * torch.tensor([0.5, 1.0, 2.0, 4.0], device="cpu")[:, None]).to(weight.device, dtype)
    return x, trained_forward(module, x)


def trained_forward(module: nn.Module, x: Tensor) -> Tensor:
    """The output of the layer's own forward for `x: (T, in)`, in training mode and without hooks: (T, out)."""
    before = dict(module.__dict__)  # a layer may adopt the dtype of its first input
    module.training = True
    try:
        with torch.autocast(x.device.type, enabled=False):
            if is_ours(before.get("forward")):
                del module.__dict__["forward"]
            # Without a gradient, bitsandbytes takes its path for evaluation.
            found: Tensor = module.forward(x.detach().requires_grad_())
    finally:
        module.__dict__.update(before)
    return found.detach()


def _generator() -> torch.Generator:
    """A separate generator, so that no other random numbers change."""
    return torch.Generator("cpu").manual_seed(0)


def _roundoff(weight: Tensor, found: Tensor) -> tuple[float, float]:
    """The largest relative errors of rounding: of a number in this layer's output, and of a number in one of its sums.

    A sum of n products is rounded n times, in an unknown order. Its root mean square error is `sqrt(n) u` times the
    length of its terms (Higham and Mary 2019). The difference of two such sums has less than twice this error.
    """
    dtypes = [found.dtype, weight.dtype, getattr(weight, "compute_dtype", None) or found.dtype]
    rounding = max(torch.finfo(dtype).eps / 2 for dtype in dtypes)
    if found.dtype == torch.float64:
        return rounding, rounding
    # float32 products may use shorter numbers: on CPU if the user allows it, on other devices always.
    elsewhere = 2.0**-11 if found.device.type != "cpu" else 0.0
    return max(rounding, float32_roundoff(found.device), elsewhere), 2.0**-24


def _aligns_devices(module: nn.Module, forward: Any) -> bool:
    """Whether the module's `forward` is accelerate's wrapper around its class's, which only moves tensors."""
    inner = getattr(forward, "func", None)
    if getattr(inner, "__module__", "") != "accelerate.hooks" or getattr(inner, "__name__", "") != "new_forward":
        return False
    old, hook = module.__dict__.get("_old_forward"), module.__dict__.get("_hf_hook")
    own = isinstance(old, MethodType) and old.__self__ is module and old.__func__ is type(module).forward
    own = own or is_ours(old)  # it was attached before accelerate came
    hooks = getattr(hook, "hooks", (hook,))
    return own and forward.args == (module,) and all(_origin(type(one)) == _ALIGN for one in hooks)


_ALIGN = "accelerate.hooks.AlignDevicesHook"


def _origin(kind: Any) -> str:
    return f"{getattr(kind, '__module__', '')}.{getattr(kind, '__qualname__', '')}"


def _lets_through(hook: Any) -> bool:
    function = hook.func if isinstance(hook, functools.partial) else hook
    return (getattr(function, "__module__", None) or "").startswith(_LET_THROUGH) and not isinstance(
        function, nn.Module
    )


def _name(hook: Any) -> str:
    function = hook.func if isinstance(hook, functools.partial) else hook
    return str(getattr(function, "__qualname__", type(function).__name__))
