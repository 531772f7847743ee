"""What a decoder does between its products, each in one pass over its numbers: RMS norms, gates and rotations, on CPU.

Operator by operator, an RMS norm and its backward read and write some twenty times what they are given, and keep
float32 copies of it; a SwiGLU gate and a rotary embedding do so more than ten times. Here, with
`r = 1 / sqrt(mean x^2 + eps)`,

    y = w x r,                  grad_x = r h - r^3 mean(h x) x,  h = w grad_y,
    y = silu(gate) up,          grad_up = silu(gate) grad_y,     grad_gate = silu'(gate) up grad_y,
    y = q cos + half(q) sin,    grad_q = grad_y cos + half^T(grad_y sin),  half(q1, q2) = (-q2, q1),

and x, gate and up are all that is saved. On accelerators Liger's kernels do the same.

Modules keep their class and their `forward`, which are never told:

- The pre-hook of a norm or an activation computes the result, or keeps the input, and lets the forward run on none of
  the tokens; the forward hook puts in its place what it would have returned.
- Of an activation, or of the cosine and sine that an attention gets, that is a stand-in (`_Pending`): multiplied as in
  the formulas it becomes the one pass, and in everything else the tensor that it stands for. (An attention's own
  `half(q)` is still computed, and not used.)

What a class computes is not known by its name but by trying it; what is none of these formulas is left alone.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from transformers.activations import SiLUActivation

from celora import kernels
from celora.graft import Switch


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


class _Pending:
    """Stands for a tensor until it is known what is made of it; for what was not foreseen, it is that tensor."""

    def tensor(self) -> Tensor:
        """The tensor itself, by torch's operators."""
        raise NotImplementedError

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
        args, kwargs = tree_map_only(_Pending, lambda pending: pending.tensor(), (args, kwargs or {}))
        return function(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Activated(_Pending):
    """`silu(gate)`."""

    gate: Tensor

    def tensor(self) -> Tensor:
        return F.silu(self.gate)

    def times(self, other: Tensor) -> Tensor:
        gate = self.gate
        same = other.dtype == gate.dtype and other.shape == gate.shape and other.device == gate.device
        return gated(gate, other) if same else self.tensor() * other


@dataclass(frozen=True, eq=False)
class _Angles:
    cosine: Tensor
    sine: Tensor

    def turn(self, q: Tensor) -> bool:
        """Whether the kernels can turn q by these."""
        batch, _, tokens, size = q.shape
        shapes = ((1, tokens, size), (batch, tokens, size))
        return all(
            of.dtype == q.dtype and of.shape in shapes and of.device == q.device for of in (self.cosine, self.sine)
        )


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
        if isinstance(other, _Turned) and angle.matches(other.angle) and q.dim() == 4 and angle.of.turn(q):
            return rotated(q, angle.of.cosine, angle.of.sine)
        return self.tensor() + (other.tensor() if isinstance(other, _Pending) else other)


def _angles(cosine: Tensor, sine: Tensor) -> tuple[_Angle, _Angle]:
    both = _Angles(cosine, sine)
    return _Angle(both, "cosine"), _Angle(both, "sine")


class Pass:
    """The hooks of one module, which give its forward nothing to do where they know better.

    Attributes:
        name: what the module computes, in the plural.
    """

    name = "passes"

    def __init__(self, switch: Switch) -> None:
        self.switch = switch

    def under(self, module: nn.Module) -> None:
        """Hook the module."""
        module.register_forward_pre_hook(self.before, with_kwargs=True)
        module.register_forward_hook(self.after)

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook (with kwargs)."""
        raise NotImplementedError

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook."""

    def takes(self, module: nn.Module, x: object) -> bool:
        """Whether the module trains, and the kernels can work on x."""
        known = isinstance(x, Tensor) and x.dim() > 1 and x.numel() > 0 and kernels.supported(x)
        return known and self.switch.on and module.training and "forward" not in module.__dict__


def _alone(module: nn.Module) -> bool:
    """Whether no hook but ours looks at what the module gets and returns."""
    backward = module._backward_hooks or module._backward_pre_hooks
    return not backward and len(module._forward_hooks) == len(module._forward_pre_hooks) == 1


@dataclass(frozen=True)
class _NormKind:
    """One of the RMS norms there are: the arguments of `rms_norm`."""

    offset: float
    rounds: bool


_NORMS = (_NormKind(0.0, rounds=True), _NormKind(0.0, rounds=False), _NormKind(1.0, rounds=False))


class Norm(Pass):
    """Of an RMS norm; which one it is, the first call tries."""

    name = "RMS norms"

    def __init__(self, switch: Switch) -> None:
        super().__init__(switch)
        self._kind: _NormKind | None = None
        self._unknown = False
        self._result: Tensor | None = None

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._result = None
        if self._unknown or kwargs or len(args) != 1 or not self.takes(module, args[0]) or not _alone(module):
            return None
        x, weight = args[0], module.weight
        if type(weight) is not nn.Parameter or weight.requires_grad or weight.dtype != x.dtype:
            return None
        if weight.device != x.device or weight.shape != x.shape[-1:] or not weight.is_contiguous():
            return None
        weight, eps = weight.detach(), _epsilon(module)
        if self._kind is None:
            self._kind = _recognise(module, weight, eps)
            self._unknown = self._kind is None
        if self._kind is None:
            return None
        self._result = rms_norm(x, weight, eps, offset=self._kind.offset, rounds=self._kind.rounds)
        return (x.detach()[:0],), {}

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        result, self._result = self._result, None
        return result


class Gate(Pass):
    """Of the activation in a SwiGLU block, whose result is multiplied with another projection's."""

    name = "gates"

    def __init__(self, switch: Switch) -> None:
        super().__init__(switch)
        self._gate: Tensor | None = None

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._gate = None
        if kwargs or len(args) != 1 or not self.takes(module, args[0]) or not _alone(module):
            return None
        self._gate = args[0]
        return (args[0].detach()[:0],), {}

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        gate, self._gate = self._gate, None
        return None if gate is None else _Activated(gate)


class Rotation(Pass):
    """Of an attention, whose queries and keys are turned by the angles that it is given."""

    name = "rotations"

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        angles, x = kwargs.get("position_embeddings"), kwargs.get("hidden_states")
        if not isinstance(angles, tuple) or len(angles) != 2 or not self.takes(module, x):
            return None
        if not all(isinstance(of, Tensor) and of.dim() == 3 and kernels.supported(of) for of in angles):
            return None
        if not all(of.is_contiguous() and not of.requires_grad and of.shape[-1] % 2 == 0 for of in angles):
            return None
        return args, kwargs | {"position_embeddings": _angles(*angles)}


def known(model: nn.Module) -> dict[nn.Module, type[Pass]]:
    """The modules under `model` that can be hooked, each with its hooks; none where there are no compiled kernels."""
    found: dict[nn.Module, type[Pass]] = {}
    for module in model.modules() if kernels.library() is not None else ():
        kind: Any = type(module)
        activation = getattr(module, "act_fn", None)
        if kind.__name__.endswith("RMSNorm") and _epsilon(module):
            if [name for name, _ in module.named_parameters()] == ["weight"]:
                found[module] = Norm
        elif isinstance(activation, nn.SiLU | SiLUActivation) and _multiplies(kind):
            found[activation] = Gate
        elif _turns(kind):
            found[module] = Rotation
    return found


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
def _multiplies(kind: Any) -> bool:
    """Whether this block computes `down_proj(act_fn(gate_proj(x)) * up_proj(x))`."""
    x, gate, up = _numbers(3, 2, 4)
    block: Any = SimpleNamespace(
        gate_proj=lambda _: gate, up_proj=lambda _: up, down_proj=lambda y: y, act_fn=_Activated
    )
    return _gives(lambda: kind.forward(block, x), F.silu(gate) * up)


@functools.cache
def _turns(kind: Any) -> bool:
    """Whether this attention is given angles, and turns queries and keys by them as the formula above says."""
    forward = inspect.unwrap(kind.forward)
    code = getattr(forward, "__code__", None)
    if code is None or "position_embeddings" not in code.co_varnames[: code.co_argcount]:
        return False
    if [name for name in code.co_names if "rotary" in name] != ["apply_rotary_pos_emb"]:
        return False
    turn = forward.__globals__.get("apply_rotary_pos_emb")
    q, k = _numbers(1, 2, 3, 4), _numbers(1, 1, 3, 4)
    cosine, sine = _numbers(2, 1, 3, 4)
    try:
        expected = torch.cat(turn(q, k, cosine, sine), 1)
    except Exception:  # of another kind than this
        return False
    return _gives(lambda: torch.cat(turn(q, k, *_angles(cosine, sine)), 1), expected)


def _numbers(*shape: int) -> Tensor:
    return torch.linspace(-2, 3, math.prod(shape), dtype=torch.float32, device="cpu").view(shape)


def _gives(tried: Callable[[], Any], expected: Tensor) -> bool:
    """Whether the trial ends, with this result."""
    try:
        found = tried()
    except Exception:  # what it computes is then something else
        return False
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
