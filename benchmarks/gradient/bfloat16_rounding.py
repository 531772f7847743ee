"""Round one kind of operation of a float32 model to bfloat16, in its forward or in its backward: see `bfloat16.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: bool, backward: bool) -> Tensor:
        ctx.backward_too = backward
        return x.bfloat16().float() if forward else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.bfloat16().float() if ctx.backward_too else grad, None, None


# Kind of the innermost module -> names of the operations to round in it.
OPERATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "products": (("base layer",), ("linear",)),
    "adapters": (("adapter",), ("linear", "add", "__add__", "__radd__")),
    "norms": (("norm",), ("mul", "__mul__", "__rmul__")),
    "rotations": (("attention",), ("mul", "__mul__", "__rmul__", "add", "__add__")),
    "attention": (("attention",), ("scaled_dot_product_attention",)),
    "gates": (("gate", "block"), ("silu", "mul", "__mul__")),
    "residual stream": (("decoder layer",), ("add", "__add__")),
    "head": (("head",), ("linear",)),
}
BLOCKS = {"first three blocks": range(3), "other blocks": range(3, 1000)}
DIRECTIONS = {"forward": (True, False), "backward": (False, True), "both": (True, True)}


class Rounding(TorchFunctionMode):
    """Round the results of operations of these kinds, and in backward the gradients of their inputs, to bfloat16."""

    def __init__(
        self, model: nn.Module, operations: tuple[str, ...], direction: str, blocks: range = range(1000)
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.operations, (self.forward, self.backward) = operations, DIRECTIONS[direction]
        self.model, self.inside, self.handles = model, [""], []

    def __enter__(self) -> Any:
        for name, module in self.model.named_modules():
            block = next((int(part) for part in name.split(".") if part.isdigit()), 999)  # head and angles go last
            kind = _kind(name, module) if block in self.blocks else ""
            if kind == "angles":
                if self.forward and "rotations" in self.operations:
                    self.handles.append(
                        module.register_forward_hook(lambda *call: tuple(t.bfloat16().float() for t in call[2]))
                    )
            elif kind:
                before = module.register_forward_pre_hook(lambda *_, kind=kind: self.inside.append(kind))
                self.handles += [before, module.register_forward_hook(lambda *_: self._leave())]
        return super().__enter__()

    def _leave(self) -> None:
        self.inside.pop()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        chosen = any(
            self.inside[-1] in places and name in names
            for places, names in (OPERATIONS[operation] for operation in self.operations)
        )
        if not chosen:
            return func(*args, **kwargs)

        def rounded(forward: bool, backward: bool) -> Callable[[Tensor], Tensor]:
            return lambda x: x if x.is_leaf and x.requires_grad else _Rounded.apply(x, forward, backward)

        if self.backward:
            args = tree_map_only(Tensor, rounded(False, True), args)
        return (
            tree_map_only(Tensor, rounded(True, False), func(*args, **kwargs))
            if self.forward
            else func(*args, **kwargs)
        )


def _kind(name: str, module: nn.Module) -> str:
    """Where we are inside this module, if it matters."""
    last, called = name.rpartition(".")[2], type(module).__name__
    if isinstance(module, LoraLayer) or ".lora_A." in name:
        return "adapter"
    if ".lora_B." in name:
        return "neither"  # its input is in float32
    ends = {"base_layer": "base layer", "lm_head": "head", "self_attn": "attention", "act_fn": "gate", "mlp": "block"}
    if called.endswith("RMSNorm"):
        return "norm"
    if called.endswith("RotaryEmbedding"):
        return "angles"
    return "decoder layer" if called.endswith("DecoderLayer") else ends.get(last, "")
