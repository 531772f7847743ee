"""What a decoder does between its products, each in one pass over its numbers: RMS norms, gates and rotations, on CPU.

Operator by operator, an RMS norm and its backward read and write some twenty times what they are given, and keep
float32 copies of it; a SwiGLU gate and a rotary embedding do so more than ten times. Here, with
`r = 1 / sqrt(mean x^2 + eps)`,

    y = w x r,                  grad_x = r h - r^3 mean(h x) x,  h = w grad_y,
    y = silu(gate) up,          grad_up = silu(gate) grad_y,     grad_gate = silu'(gate) up grad_y,
    y = q cos + half(q) sin,    grad_q = grad_y cos + half^T(grad_y sin),  half(q1, q2) = (-q2, q1),

and of all that is as large as x, only x, gate and up are saved. (On GPUs this is what Liger is for; celora does not do
it there.)

Modules keep their class and their `forward`; hooks do everything:

- The pre-hook of a norm or an activation computes the result, or keeps the input, and lets the forward run on none of
  the tokens. The forward hook then puts the result in the place of what the forward returned.
- For an activation, and for the cosine and sine that an attention is given, what is put in place is a stand-in
  (`_Pending`). Multiplied as in the formulas it becomes the one pass; torch's functions, and whoever asks for an
  attribute, get the tensor that it stands for. (An attention's own `half(q)` is still computed, and not used.)

What a class computes is not known by its name but by trying it; what is none of these formulas is left alone.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from celora import kernels
from celora.borrowed import borrow
from celora.graft import Switch, in_dispatch_mode


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds: bool = True) -> Tensor:
    """`(offset + weight) x / sqrt(mean x^2 + eps)` along the last dimension of `x: (..., n)`; no gradient of `weight`.

    Args:
        x: on CPU, of a dtype that the kernels know; computed in float32.
        weight: (n,), contiguous, of the same dtype, frozen.
        rounds: whether the normalised x is rounded to its dtype before it is multiplied.
    """
    result: Tensor = _RMSNorm.apply(x, weight, eps, offset, rounds)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounds: bool) -> Tensor:
        x = x.contiguous()
        y, inverse = kernels.rms_norm(x, weight, offset=offset, eps=eps, rounds=rounds)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = kernels.rms_norm_backward(grad.contiguous(), *ctx.saved_tensors, offset=ctx.offset)
        return found, None, None, None, None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) up`, (..., n) each, on CPU, of one dtype that the kernels know."""
    result: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    return result


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return kernels.gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.gated_backward(grad.contiguous(), *ctx.saved_tensors)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """`x cosine + (-x2, x1) sine` of `x = (x1, x2): (B, heads, T, d)`, on CPU, of a dtype that the kernels know.

    `cosine` and `sine`: (B or 1, T, d) of the same dtype, contiguous, without gradient.
    """
    tokens: Tensor = _Rotated.apply(x.transpose(1, 2), cosine, sine)  # type: ignore[no-untyped-call]
    return tokens.transpose(1, 2)


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return kernels.rotate(x.contiguous(), cosine, sine, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return kernels.rotate(grad.contiguous(), *ctx.saved_tensors, transposed=True), None, None


_TURN = "apply_rotary_pos_emb"  # in every decoder of Transformers that has rotary embeddings


class _Pending(ABC):
    """Stands for a tensor until it is known what is made of it.

    Python's operators on it, products and sums apart, are errors; no forward that was tried has others.
    """

    @abstractmethod
    def tensor(self) -> Tensor:
        """The tensor itself, by torch's operators."""

    def times(self, other: Tensor) -> Any:
        """The product with a tensor."""
        return self.tensor() * other

    def __mul__(self, other: Any) -> Any:
        return self.times(other) if isinstance(other, Tensor) else self.tensor() * other

    def __add__(self, other: Any) -> Any:
        return self.tensor() + other

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python asks objects for, not users
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Any:
        product = function in (Tensor.mul, Tensor.__mul__) and not kwargs
        if product and isinstance(args[1], _Pending) and isinstance(args[0], Tensor):
            return args[1].times(args[0])
        args, kwargs = _without_pending((args, kwargs or {}))
        return function(*args, **kwargs)


def _without_pending(value: Any) -> Any:
    """The same arguments of a torch function, with the tensor in the place of each stand-in."""
    if isinstance(value, _Pending):
        return value.tensor()
    if isinstance(value, dict):
        return {key: _without_pending(of) for key, of in value.items()}
    return type(value)(map(_without_pending, value)) if type(value) in (tuple, list) else value


@dataclass(frozen=True, eq=False)
class _Activated(_Pending):
    """`silu(gate)`."""

    gate: Tensor

    def tensor(self) -> Tensor:
        return F.silu(self.gate)

    def times(self, other: Tensor) -> Tensor:
        gate = self.gate
        same = other.dtype == gate.dtype and other.shape == gate.shape and other.device == gate.device
        return gated(gate, other) if same and type(other) is Tensor else self.tensor() * other


@dataclass(eq=False)
class _Angles:
    """What one attention turns by: (B or 1, T, d) each; `taken` counts what was turned in one pass."""

    cosine: Tensor
    sine: Tensor
    taken: int = 0

    def fit(self, q: Tensor) -> bool:
        """Whether the kernels can turn q by these."""
        cosine, sine = self.cosine, self.sine
        if type(q) is not Tensor or q.dim() != 4 or cosine.shape != sine.shape:
            return False
        batch, _, tokens, size = q.shape
        same = all(of.dtype == q.dtype and of.device == q.device for of in (cosine, sine))
        return same and cosine.shape in ((1, tokens, size), (batch, tokens, size))


@dataclass(frozen=True, eq=False)
class _Angle(_Pending):
    """The cosine or the sine in `q cos + half(q) sin`."""

    of: _Angles
    name: str
    dim: int | None = None  # at which the heads are

    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.of, self.name)
        return found if self.dim is None else found.unsqueeze(self.dim)

    def times(self, other: Tensor) -> _Turned:
        return _Turned(other, self)

    def matches(self, other: _Angle) -> bool:
        """Whether these are the cosine and the sine of the same angles, with heads where the kernels have them."""
        return self.of is other.of and (self.name, other.name) == ("cosine", "sine") and self.dim == other.dim == 1

    def unsqueeze(self, dim: int) -> Any:
        return _Angle(self.of, self.name, dim) if self.dim is None else self.tensor().unsqueeze(dim)


@dataclass(frozen=True, eq=False)
class _Turned(_Pending):
    """`q cos`, or `half(q) sin`."""

    x: Tensor
    angle: _Angle

    def tensor(self) -> Tensor:
        return self.x * self.angle.tensor()

    def __add__(self, other: Any) -> Tensor:
        q, angle = self.x, self.angle
        if isinstance(other, _Turned) and angle.matches(other.angle) and angle.of.fit(q):
            angle.of.taken += 1
            return rotated(q, angle.of.cosine, angle.of.sine)
        return self.tensor() + (other.tensor() if isinstance(other, _Pending) else other)


def _angles(cosine: Tensor, sine: Tensor) -> tuple[_Angle, _Angle]:
    both = _Angles(cosine, sine)
    return _Angle(both, "cosine"), _Angle(both, "sine")


class Pass(ABC):
    """The hooks of one module, which give its forward nothing to do where they know better.

    Attributes:
        name: what the module computes, in the plural.
        held: what takes the place of the output of the forward that is under way, if anything does.
    """

    name = "passes"

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self.held: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "held": None}

    def under(self, module: Any) -> None:
        """Hook the module."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook (with kwargs)."""
        if torch.compiler.is_compiling():
            return None
        self.held = None
        return self.instead(module, args, kwargs)

    @abstractmethod
    def instead(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments that the forward is given instead of these; None for these."""

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook; returns None for the output as it is."""
        if torch.compiler.is_compiling():
            return None
        held, self.held = self.held, None
        return held

    def takes(self, module: nn.Module, x: object) -> bool:
        """Whether the module trains, and the kernels can work on x."""
        if type(x) is not Tensor or x.dim() < 2 or not x.numel() or not kernels.supported(x):
            return False
        # Modes look at every operator, and selective checkpointing counts them.
        return self.switch.on and module.training and "forward" not in module.__dict__ and not in_dispatch_mode()


def _alone(module: nn.Module) -> bool:
    """Whether no hook but ours looks at what the module gets and returns."""
    everywhere = borrow("torch.nn.modules.module:_has_any_global_hook")
    others = module._backward_hooks or module._backward_pre_hooks or everywhere is None or everywhere()
    return not others and len(module._forward_hooks) == len(module._forward_pre_hooks) == 1


@dataclass(frozen=True)
class _NormKind:
    """One of the RMS norms there are: the arguments of `rms_norm`."""

    offset: float
    rounds: bool


_NORMS = (_NormKind(0.0, rounds=True), _NormKind(0.0, rounds=False), _NormKind(1.0, rounds=False))


class Norm(Pass):
    """Of an RMS norm; which one it is, the first call in each dtype tries."""

    name = "RMS norms"

    def __init__(self, switch: Switch) -> None:
        super().__init__(switch)
        self._tried: dict[torch.dtype, _NormKind | None] = {}

    def instead(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs or len(args) != 1 or not self.takes(module, args[0]) or not _alone(module):
            return None
        x, weight = args[0], module.weight
        if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype != x.dtype:
            return None
        if weight.device != x.device or weight.shape != x.shape[-1:] or not weight.is_contiguous():
            return None
        weight, eps = weight.detach(), _epsilon(module)
        if x.dtype not in self._tried:
            self._tried[x.dtype] = _recognise(module, weight, eps)
        kind = self._tried[x.dtype]
        if kind is None:
            return None
        self.held = rms_norm(x, weight, eps, offset=kind.offset, rounds=kind.rounds)
        return (x.detach()[:0],), {}


class Gate(Pass):
    """Of the activation in a SwiGLU block, whose result is multiplied with another projection's."""

    name = "gates"

    def __init__(self, switch: Switch) -> None:
        super().__init__(switch)
        self._inside = False  # of a block that multiplies

    def under(self, module: Any) -> None:
        """Hook the activation, and the block around it, whose own forward may be replaced."""
        super().under(module.act_fn)
        module.register_forward_pre_hook(self.entered)

    def entered(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of the block."""
        if torch.compiler.is_compiling():
            return
        self._inside = "forward" not in module.__dict__ and _multiplies(type(module).forward)

    def instead(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inside, self._inside = self._inside, False
        if not inside or kwargs or len(args) != 1 or not self.takes(module, args[0]) or not _alone(module):
            return None
        self.held = _Activated(args[0])
        return (args[0].detach()[:0],), {}


class Rotation(Pass):
    """Of an attention, whose queries and keys are turned by the angles that it is given."""

    name = "rotations"

    def under(self, module: Any) -> None:
        """Hook the attention; its output stays what it is."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)

    def instead(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        angles, x = kwargs.get("position_embeddings"), kwargs.get("hidden_states")
        if not isinstance(angles, tuple) or len(angles) != 2 or not self.takes(module, x):
            return None
        if len(module._forward_pre_hooks_with_kwargs) > 1 or module._forward_hooks_with_kwargs:
            return None  # who else is given the angles
        if not all(_usable(of) for of in angles) or not _turns(type(module).forward, _turn_of(type(module).forward)):
            return None
        return args, kwargs | {"position_embeddings": _angles(*angles)}


def _usable(angle: Any) -> bool:
    """Whether the kernels can turn by this cosine or sine, if it fits the queries."""
    if type(angle) is not Tensor or angle.dim() != 3 or angle.requires_grad or angle.shape[-1] % 2:
        return False
    return angle.is_contiguous() and kernels.supported(angle)


def known(model: nn.Module) -> dict[nn.Module, type[Pass]]:
    """The modules under `model` that can be hooked, each with its hooks; none where there are no compiled kernels."""
    found: dict[nn.Module, type[Pass]] = {}
    for module in model.modules() if kernels.library() is not None else ():
        kind = type(module)
        if any(p.device.type != "cpu" for p in itertools.islice(module.parameters(), 1)):
            continue
        if kind.__name__.endswith("RMSNorm") and _epsilon(module):
            if [name for name, _ in module.named_parameters()] == ["weight"]:
                found[module] = Norm
        elif _is_silu(getattr(module, "act_fn", None)) and _multiplies(kind.forward):
            found[module] = Gate
        elif _turns(kind.forward, _turn_of(kind.forward)):
            found[module] = Rotation
    return found


def _is_silu(activation: object) -> bool:
    """Whether this is torch's own SiLU, or the one of Transformers."""
    kind = type(activation)
    return kind is nn.SiLU or (kind.__name__ == "SiLUActivation" and kind.__module__.startswith("transformers."))


def _epsilon(module: nn.Module) -> float:
    """Of an RMS norm; 0 if it has none that is known."""
    found = next((value for name in ("variance_epsilon", "eps") if (value := getattr(module, name, None))), 0.0)
    return found if isinstance(found, float) else 0.0


def _recognise(module: nn.Module, weight: Tensor, eps: float) -> _NormKind | None:
    """Which RMS norm this is, by its own forward; None if it is none of those that are known."""
    x = _numbers(4, len(weight)).to(weight.dtype)
    with torch.no_grad():
        try:
            expected, nothing = module.forward(x), module.forward(x[:0])
        except Exception:  # not of such a shape
            return None
        if not isinstance(expected, Tensor) or (expected.dtype, expected.shape) != (x.dtype, x.shape) or len(nothing):
            return None
        found = {kind: rms_norm(x, weight, eps, offset=kind.offset, rounds=kind.rounds) for kind in _NORMS}
        errors = {kind: (of - expected).abs() for kind, of in found.items()}
        nearest = min(_NORMS, key=lambda kind: float(errors[kind].sum()))
        allowed = 4 * torch.finfo(x.dtype).eps * expected.abs()
        return nearest if bool((errors[nearest] <= allowed).all()) else None


@functools.cache
def _multiplies(forward: Callable[..., Any]) -> bool:
    """Whether this, a block's forward, computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))`."""
    x, gate, up = _numbers(3, 2, 4)
    block = SimpleNamespace(gate_proj=lambda _: gate, up_proj=lambda _: up, down_proj=lambda y: y, act_fn=_Activated)
    return _gives(lambda: forward(block, x), F.silu(gate) * up)


@functools.cache
def _turns(forward: Callable[..., Any], turn: Callable[..., Any] | None) -> bool:
    """Whether this, an attention's forward, is given angles, and by `turn` turns queries and keys by them as above."""
    code = getattr(inspect.unwrap(forward), "__code__", None)
    if code is None or turn is None or "position_embeddings" not in code.co_varnames[: code.co_argcount]:
        return False
    if [name for name in code.co_names if "rotary" in name] != [_TURN]:
        return False
    q, k = _numbers(1, 2, 3, 4), _numbers(1, 1, 3, 4)
    cosine, sine = _numbers(2, 1, 3, 4)
    angles = _angles(cosine, sine)
    try:
        expected = torch.cat(turn(q, k, cosine, sine), 1)
    except Exception:  # of another kind than this
        return False
    return _gives(lambda: torch.cat(turn(q, k, *angles), 1), expected) and angles[0].of.taken == 2


def _turn_of(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """The function by which an attention turns, if it is one that is not a part of it."""
    found: Callable[..., Any] | None = getattr(inspect.unwrap(forward), "__globals__", {}).get(_TURN)
    return found


def _numbers(*shape: int) -> Tensor:
    return torch.linspace(-2, 3, math.prod(shape), dtype=torch.float32, device="cpu").view(shape)


def _gives(tried: Callable[[], Any], expected: Tensor) -> bool:
    """Whether the trial ends, with this result."""
    try:
        found = tried()
    except Exception:  # what it computes is then something else
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
