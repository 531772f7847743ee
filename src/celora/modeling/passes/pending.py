"""Stand-ins for tensors, which become one pass once it is known what is computed from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from celora.numerics.passes import gated, rotated


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
class Activated(_Pending):
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


def make_angles(cosine: Tensor, sine: Tensor) -> tuple[_Angle, _Angle]:
    both = _Angles(cosine, sine)
    return _Angle(both, "cosine"), _Angle(both, "sine")
