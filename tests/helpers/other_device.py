"""Training steps on a device that is not there, with fake tensors: they have shapes, dtypes, strides and a device.

They have no numbers. The device is of the kind that torch keeps for backends written in Python. An operator that gets
tensors of two devices raises, and so does a product in 8 bits whose operands do not lie as GPUs want them. What a step
reads gets an answer, and what it copies from one device to another is noted. All of this changes the process, so it
needs one of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

import celora
from celora.kernels import plain
from celora.machine import device
from celora.modeling import varlen
from celora.modeling.call import Known
from celora.modeling.model_graft import ModelGraft
from celora.numerics.products.both_ways import Int8BothWays
from celora.settings.presets import PRESETS
from celora.weights import read as weights
from decoders import model_of
from labelled import masked_batch
from orders import Orders
from patching import patch_all
from reads import copy_between

DEVICE, ROUND, STEPS = "other", 2, 6  # in the first two rounds, layers are refreshed in turns
NOTHING = Known((), frozenset())


def take_steps(preset: str, dtype: torch.dtype, one_call: bool) -> None:
    """Take steps of a preset, and check each gradient. The last step, without a refresh, must read one thing.

    It must copy nothing from one device to another. The device has float64, as CUDA has.

    Args:
        dtype: of the base.
        one_call: whether the device has an attention for all packed sequences, as CUDA has.
    """
    _make_device()
    numbers, probed = _read_on_cpu()
    read: list[str] = []
    model, batch = model_of("llama"), masked_batch()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode() as mode:
        _pretend(patch, one_call=one_call)
        patch.setattr(FakeTensor, "tolist", lambda asked: read.append("tolist") or numbers)
        patch.setattr(Int8BothWays, "look", lambda *_: None)  # the first steps read the sizes of features
        for operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            patch.setitem(op_implementations_dict, operator, functools.partial(_answer, read))
        _move(model, dtype)
        report = celora.attach(model, PRESETS[preset])
        assert ("None of 14 frozen layers estimated" in str(report)) == (preset == "exact")
        graft = _graft_of(model)
        graft._known, graft.logits = NOTHING, probed.logits
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        given = {name: mode.from_tensor(t).to(DEVICE) for name, t in batch.items()}
        for _ in range(STEPS):
            read.clear()
            with Copies(read):
                loss = model(**given).loss
                assert loss.device.type == DEVICE
                loss.backward()
                for p in model.parameters():
                    assert (p.grad is not None) == p.requires_grad
                    assert p.grad is None or (p.grad.device, p.grad.dtype, p.grad.shape) == (p.device, p.dtype, p.shape)
                optimizer.step()
                optimizer.zero_grad()
    assert read == ["tolist"]


class Copies(Orders):
    """Notes in `read` what is copied from one kind of device to another, backward included."""

    def __init__(self, read: list[str]) -> None:
        super().__init__()
        self.read = read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if copied := copy_between(func, args, found):
            self.read.append(copied)
        return found


def _answer(read: list[str], mode: FakeTensorMode, operator: Any, asked: Tensor, *_: Any) -> float:
    read.append(operator.name())
    if operator is torch.ops.aten.equal.default or asked.dtype == torch.bool:
        return True
    return 1.0 if asked.dtype.is_floating_point else 1


def _make_device() -> None:
    backend_registration._setup_privateuseone_for_python_backend(DEVICE)
    torch.get_device_module(DEVICE).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    library = torch.library.Library("_", "IMPL")
    library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _KEPT.append(library)


_KEPT: list[Any] = []  # registrations last as long as their library


def _read_on_cpu() -> tuple[list[int], ModelGraft]:
    """What a step reads of the batch, and the graft of a model that has been probed."""
    model, seen = model_of("llama"), []
    celora.attach(model, "exact")
    usual = Tensor.tolist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "tolist", lambda asked: seen.append(usual(asked)) or seen[-1])
        model(**masked_batch())
    return seen[0], _graft_of(model)


def _pretend(patch: pytest.MonkeyPatch, *, one_call: bool) -> None:
    """What a trial finds out by looking at numbers is known; fake tensors are taken for plain ones."""
    patch.setattr(weights, "_PLAIN", (*weights._PLAIN, FakeTensor))
    patch_all(patch, "celora.modeling.trial:unlike", lambda module, seen=None: "")
    patch_all(patch, "celora.modeling.model_graft:known_by", lambda causal, given: NOTHING)
    patch_all(patch, "celora.modeling.graft:in_dispatch_mode", lambda: False)
    patch_all(patch, "celora.modeling.graft:has_numbers", lambda tensor: True)
    patch_all(patch, "celora.modeling.fused:_FEWEST_TOKENS", 0)
    patch_all(patch, "celora.runtime.attachment:FIRST_ROUND", ROUND)
    patch.setattr(plain, "why_no_integers", lambda device: "")
    patch.setattr(device, "_EXACT", device._EXACT | {DEVICE})
    patch_all(patch, "celora.numerics.sampling:uniform", _drawn)  # there is no generator for such a device
    if one_call:
        patch.setattr(varlen, "available", lambda device: device.type == DEVICE)
        patch_all(patch, "celora.modeling.attention:_say_one_by_one", _refuse)


def _drawn(seed: int, draw: int, where: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=where)


def _refuse(kind: str, dropout: float) -> None:
    raise AssertionError(f"sequences were computed one by one on {kind}")


def _move(model: nn.Module, dtype: torch.dtype) -> None:
    """Put fake tensors into the model, the frozen ones in this dtype."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype if p.requires_grad else dtype, device=DEVICE)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, t in module._buffers.items():
            module._buffers[name] = None if t is None else torch.empty(t.shape, dtype=t.dtype, device=DEVICE)


def _graft_of(model: nn.Module) -> ModelGraft:
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", hook) for hook in hooks)
    return next(owner for owner in owners if isinstance(owner, ModelGraft))
