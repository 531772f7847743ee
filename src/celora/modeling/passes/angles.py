"""Stand-ins for the cosine and the sine of a rotary embedding.

`q cos + half(q) sin` of them is one pass over q. To everything else that an attention does with them they are the
tensors that they stand for. (An attention's own `half(q)` is still computed, and not used.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from celora.numerics.passes import rotated


class StandIn(ABC):
    """Stands for a tensor until it is known what is made of it.

    Python's operators on it, products, sums and indices apart, are errors; no forward that was tried has others.
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
        if product and isinstance(args[1], StandIn) and isinstance(args[0], Tensor):
            return args[1].times(args[0])
        args, kwargs = _tensors((args, kwargs or {}))
        return function(*args, **kwargs)


def _tensors(value: Any) -> Any:
    """The same arguments of a torch function, with the tensor in the place of each stand-in."""
    if isinstance(value, StandIn):
        return value.tensor()
    if isinstance(value, dict):
        return {key: _tensors(inner) for key, inner in value.items()}
    return type(value)(map(_tensors, value)) if type(value) in (tuple, list) else value


@dataclass(eq=False)
class Angles:
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
        same = all(angle.dtype == q.dtype and angle.device == q.device for angle in (cosine, sine))
        return same and cosine.shape in ((1, tokens, size), (batch, tokens, size))


@dataclass(frozen=True, eq=False)
class Angle(StandIn):
    """The cosine or the sine in `q cos + half(q) sin`."""

    angles: Angles
    name: str
    dim: int | None = None  # at which the heads are

    def tensor(self) -> Tensor:
        found: Tensor = getattr(self.angles, self.name)
        return found if self.dim is None else found.unsqueeze(self.dim)

    def times(self, other: Tensor) -> _Turned:
        return _Turned(other, self)

    def matches(self, other: Angle) -> bool:
        """Whether these are the cosine and the sine of the same angles, with heads where the kernels have them."""
        both = (self.name, other.name) == ("cosine", "sine")
        return both and self.angles is other.angles and self.dim == other.dim == 1

    def unsqueeze(self, dim: int) -> Any:
        return Angle(self.angles, self.name, dim) if self.dim is None else self.tensor().unsqueeze(dim)


@dataclass(frozen=True, eq=False)
class _Turned(StandIn):
    """`q cos`, or `half(q) sin`."""

    x: Tensor
    angle: Angle

    def tensor(self) -> Tensor:
        return self.x * self.angle.tensor()

    def __add__(self, other: Any) -> Tensor:
        q, angles = self.x, self.angle.angles
        if isinstance(other, _Turned) and self.angle.matches(other.angle) and angles.fit(q):
            angles.taken += 1
            return rotated(q, angles.cosine, angles.sine)
        return self.tensor() + (other.tensor() if isinstance(other, StandIn) else other)


def make_angles(cosine: Tensor, sine: Tensor) -> tuple[Angle, Angle]:
    """Stand-ins for a cosine and a sine, (B or 1, T, d) each."""
    both = Angles(cosine, sine)
    return Angle(both, "cosine"), Angle(both, "sine")
