"""Training steps on a device that is not there, with fake tensors: they have shapes, dtypes, strides and a device.

They have no numbers. The device is of the kind that torch keeps for backends written in Python or, where
`pretended_cuda.c` is preloaded, "cuda". An operator that gets tensors of two devices raises, and so does a product in 8
bits whose operands do not lie as GPUs want them. A launch of Triton's checks its arguments and computes nothing. What a
step reads gets an answer, and what it copies from one device to another is noted. All of this changes the process, so
it needs one of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

import celora
from celora.kernels import plain
from celora.kernels.triton import judged, proof
from celora.machine import device as machine
from celora.modeling import varlen
from celora.modeling.call import Known
from celora.modeling.model_graft import ModelGraft
from celora.numerics.products.both_ways import Int8BothWays
from celora.weights import read as weights
from decoders import model_of
from labelled import masked_batch
from orders import Orders
from patching import patch_all
from reads import copy_between

ROUND, STEPS = 2, 6  # in the first two rounds, layers are refreshed in turns
NOTHING = Known((), frozenset())
NO_BACKWARD = 77  # status of a process whose torch cannot be talked into one on a GPU that is not there


@dataclass(frozen=True)
class Device:
    """A device that is not there. It has float64, as CUDA has.

    Attributes:
        kind: "other" or "cuda".
        one_call: whether it has an attention for all packed sequences.
        kernels: whether all of Triton's kernels were found right and faster on it.
    """

    kind: str = "other"
    one_call: bool = True
    kernels: bool = False


def take_steps(preset: str, dtype: torch.dtype, device: Device) -> None:
    """Take steps of a preset, and check each gradient. The last step, without a refresh, must read one thing.

    It must copy nothing from one device to another. What is timed takes half of the exact time.

    Args:
        dtype: of the base.
    """
    if device.kind == "other":
        _make_device(device.kind)
    launched: set[str] = set()
    numbers, probed = _read_on_cpu()
    read: list[str] = []
    model, batch = model_of("llama"), masked_batch()
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        if device.kind == "cuda":
            _pretend_cuda(patch)
        _pretend(patch, device, launched)
        patch.setattr(FakeTensor, "tolist", lambda asked: read.append("tolist") or numbers)
        patch.setattr(Int8BothWays, "look", lambda *_: None)  # the first steps read the sizes of features
        for operator in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            patch.setitem(op_implementations_dict, operator, functools.partial(_answer, read))
        _move(model, dtype, device.kind)
        report = celora.attach(model, preset)
        assert ("None of 14 frozen layers estimated" in str(report)) == (preset == "exact")
        graft = _graft_of(model)
        graft._known, graft.logits = NOTHING, probed.logits
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        given = {name: torch.empty(t.shape, dtype=t.dtype, device=device.kind) for name, t in batch.items()}
        for _ in range(STEPS):
            read.clear()
            with Copies(read):
                loss = model(**given).loss
                assert loss.device.type == device.kind
                loss.backward()
                for p in model.parameters():
                    assert (p.grad is not None) == p.requires_grad
                    assert p.grad is None or (p.grad.device, p.grad.dtype, p.grad.shape) == (p.device, p.dtype, p.shape)
                optimizer.step()
                optimizer.zero_grad()
    assert read == ["tolist"]
    assert launched == (LAUNCHED[preset] if device.kernels else set())


LAUNCHED = {
    "exact": {"softmax_row"},
    "paper": {"softmax_row", "reduce_columns"},
    "auto": {"softmax_row", "square_row", "quantise_row", "scaled_product", "reduce_columns"},
    "fast": {"softmax_row", "square_row", "quantise_row", "scaled_product"},
}


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


def _make_device(kind: str) -> None:
    backend_registration._setup_privateuseone_for_python_backend(kind)
    torch.get_device_module(kind).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
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


def _pretend_cuda(patch: pytest.MonkeyPatch) -> None:
    """There is an H100. While torch's engine runs, its count of GPUs is not that of the driver, which is not there."""
    gpus, run = ctypes.c_int.in_dll(ctypes.CDLL(None), "pretended_gpus"), torch.autograd._engine_run_backward

    def backward(*given: Any, **more: Any) -> Any:
        gpus.value = 100
        try:
            return run(*given, **more)
        finally:
            gpus.value = 0

    patch.setattr(torch.autograd, "_engine_run_backward", backward)
    try:
        torch.ones(2, device="cuda", requires_grad=True).sum().backward()
    except RuntimeError as error:
        if "hasPrimaryContext" not in str(error):
            raise
        print(error)
        raise SystemExit(NO_BACKWARD) from error
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    patch.setattr(torch.backends.cudnn, "version", lambda: 0)  # attention is not to be cuDNN's, which needs the driver


def _pretend(patch: pytest.MonkeyPatch, device: Device, launched: set[str]) -> None:
    """What a trial finds out by looking at numbers is known; fake tensors are taken for plain ones."""
    patch.setattr(weights, "_PLAIN", (*weights._PLAIN, FakeTensor))
    patch.setattr(judged, "Tensor", FakeTensor)
    verdict = judged.Verdict(frozenset(proof.OPERATIONS if device.kernels else ()))
    patch_all(patch, "celora.kernels.triton.judged:verdict", lambda where: verdict)
    patch_all(patch, "celora.kernels.triton.launches:launch", functools.partial(_launch, launched))
    patch_all(patch, "celora.machine.timing:cannot_time", lambda where: "")
    patch_all(patch, "celora.machine.device:random_states", lambda where: contextlib.nullcontext())
    patch_all(patch, "celora.runtime.gate:_kept", lambda key, count, *_: [1.0, *[0.5] * (count - 1)])
    patch_all(patch, "celora.modeling.trial:unlike", lambda module, seen=None: "")
    patch_all(patch, "celora.modeling.model_graft:known_by", lambda causal, given: NOTHING)
    patch_all(patch, "celora.modeling.graft:in_dispatch_mode", lambda: False)
    patch_all(patch, "celora.modeling.graft:has_numbers", lambda tensor: True)
    patch_all(patch, "celora.modeling.fused:_FEWEST_TOKENS", 0)
    patch_all(patch, "celora.runtime.attachment:FIRST_ROUND", ROUND)
    patch.setattr(plain, "why_no_integers", lambda device: "")
    patch.setattr(machine, "_EXACT", machine._EXACT | {device.kind})
    patch_all(patch, "celora.numerics.sampling:uniform", _drawn)  # there is no generator for such a device
    if device.one_call:
        patch.setattr(varlen, "available", lambda where: where.type == device.kind)
        patch_all(patch, "celora.modeling.attention:_say_one_by_one", _refuse)


def _launch(launched: set[str], kernel: Any, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
    launched.add(kernel.fn.__name__)
    names = kernel.arg_names
    assert len(names) >= len(given)
    assert set(names[len(given) :]) <= constants.keys()
    tensors = [each for each in given if isinstance(each, Tensor)]
    assert {tensor.device for tensor in tensors} == {given[0].device}
    assert all(part > 0 for part in grid)


def _drawn(seed: int, draw: int, where: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=where)


def _refuse(kind: str, dropout: float) -> None:
    raise AssertionError(f"sequences were computed one by one on {kind}")


def _move(model: nn.Module, dtype: torch.dtype, kind: str) -> None:
    """Put fake tensors into the model, the frozen ones in this dtype."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype if p.requires_grad else dtype, device=kind)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, t in module._buffers.items():
            module._buffers[name] = None if t is None else torch.empty(t.shape, dtype=t.dtype, device=kind)


def _graft_of(model: nn.Module) -> ModelGraft:
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    owners = (getattr(hook, "__self__", hook) for hook in hooks)
    return next(owner for owner in owners if isinstance(owner, ModelGraft))


if __name__ == "__main__":  # where a library is preloaded
    take_steps(sys.argv[1], torch.bfloat16, Device("cuda", kernels=sys.argv[2:] == ["kernels"]))
