"""Finds out in one call how a model turns hidden states into logits and a loss.

The configuration alone does not tell. It may have a scale that the model does not use. The model may have a scale with
an unknown name. And if logits are small, a soft cap of 30 has no visible effect.

So in one call the head returns numbers of every size that logits can have (`sweep`), instead of its logits. celora then
knows

- the head, if its output was `W h + b` of the decoder's hidden states h;
- what the model does to logits, if this is bit for bit one of the forms that the numbers in its configuration allow
  (`celora.modeling.families` has their names), with a model's rounding;
- the loss, if it is the cross entropy of the next labels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from celora.kernels import widened
from celora.kernels.operations import linear
from celora.modeling.families import column
from celora.numerics.head import Logits
from celora.weights.sharded import whole

IGNORED = -100
POSITIONS = 4  # how many tokens of each row are compared
_LARGEST = 8.0  # sinh(8) = 1490; no row has more than 2300, which float16 can represent
_LOSS_ROUNDING = 1e-6  # of a loss near 1490: an expert's share of it, 0.004 and more, is seen


def settings(config: Any) -> dict[str, float]:
    """The numbers in a model's configuration that may scale or cap its logits, under the names of all families."""
    text = config.get_text_config()
    found = {name: getattr(text, name, None) for name in (*column("scale"), *column("cap"))}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float) and value}


@dataclass(frozen=True)
class _Form:
    """`cap tanh(x / cap)` of `x = factor z` or of `x = z / factor`, computed in the same order as in models."""

    factor: float = 1.0
    divides: bool = False
    cap: float | None = None

    def __call__(self, z: Tensor) -> Tensor:
        if self.factor != 1:
            z = z / self.factor if self.divides else z * self.factor
        return z if self.cap is None else (z / self.cap).tanh() * self.cap

    @property
    def scale(self) -> float:
        return 1 / self.factor if self.divides else self.factor


def _forms(numbers: dict[str, float], *, capped: bool) -> Iterator[_Form]:
    caps = [None, *(numbers[name] for name in column("cap") if name in numbers)] if capped else [None]
    factors = [(1.0, False), *itertools.product((numbers[n] for n in column("scale") if n in numbers), (False, True))]
    for (factor, divides), cap in itertools.product(factors, caps):
        yield _Form(factor, divides, cap)


class _Loss:
    """A model's loss function during a probe. If it fails on the probe's few labels, the loss is 0."""

    def __init__(self, usual: Callable[..., Any], device: torch.device) -> None:
        self.usual, self.device = usual, device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.usual(*args, **kwargs)
        except Exception:  # if it fails, it is not the loss that celora knows
            return torch.zeros((), device=self.device)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any]]:
        return _itself, (self.usual,)  # a copy of the model gets the usual loss


def _itself(of: Any) -> Any:
    return of


class Probe:
    """One call in which a model's head returns `sweep`.

    Attributes:
        positions: the tokens of each row whose logits the model computes.
        labels: (B, POSITIONS), their labels. One of them has none.
    """

    def __init__(self, causal: Any, shape: torch.Size, items: Any, device: torch.device) -> None:
        rows, tokens = shape
        self.positions = [min(i, tokens - 1) for i in range(POSITIONS)]
        words = causal.get_output_embeddings().out_features
        place = torch.arange(rows * POSITIONS, device=device).view(rows, POSITIONS)
        self.labels = (words // 2 + (place % POSITIONS + 1) * (words // 16) + place // POSITIONS) % words
        self.labels[:, 2] = IGNORED
        self._items, self._attributes, self._tokens = items, vars(causal), tokens
        self._before: _Form | None = None  # the scale of the hidden states before the head
        self._shown: Tensor | None = None
        self._biased = causal.get_output_embeddings().bias is not None
        self._calls = 0

    def enter(self, causal: Any, hook: Callable[..., Any]) -> None:
        """Hook the head, before FSDP2's hook shards its weight, and wrap the loss function."""
        self._handle = causal.get_output_embeddings().register_forward_hook(hook, prepend=True)
        usual, before = causal.loss_function, dict(self._attributes)
        causal.loss_function = _Loss(usual, self.labels.device)
        self._changed = {
            key: before.get(key) for key, value in self._attributes.items() if before.get(key) is not value
        }

    @property
    def added(self) -> tuple[str, ...]:
        """The attributes that this probe has added to the model."""
        return tuple(key for key, value in self._changed.items() if value is None)

    def leave(self) -> None:
        """Undo `enter`."""
        self._handle.remove()
        for key, value in self._changed.items():
            del self._attributes[key]
            if value is not None:
                self._attributes[key] = value

    def answer(self, head: Any, given: Tensor, output: Tensor, hidden: Tensor, config: Any) -> Tensor:
        """The numbers that the head returns instead of its output: `sweep`, in the same shape.

        Args:
            given: the head's input.
            output: the head's own output.
            hidden: the decoder's hidden states, (B, T, n).
        """
        self._calls += 1
        weight, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
        with torch.no_grad():
            kept = hidden[:, self.positions].to(given.device)
            forms = _forms(settings(config), capped=False)
            self._before = next((form for form in forms if _same(form(kept), given)), None)
            if not _is_product(output, given.to(weight.device), weight, bias):
                self._before = None
            self._shown = sweep(output)
        return self._shown.clone()  # a model may change its logits in place

    def verdict(self, output: Any, config: Any) -> Logits | str:
        """What the model does to its logits, or the reason why celora cannot tell."""
        logits, loss = output.logits, output.loss
        if self._calls != 1 or self._before is None or self._shown is None or not isinstance(logits, Tensor):
            return "does not compute its logits as its head's product with the decoder's hidden states"
        more = [value.shape[:2] for name, value in output.items() if name != "logits" and isinstance(value, Tensor)]
        if self._tokens != POSITIONS and logits.shape[:2] in more:
            return "returns more than logits of the tokens whose logits are asked for"
        shown = self._shown.to(logits.device)
        if logits.shape != shown.shape:
            return "does something to its logits that is not known"
        for form in _forms(settings(config), capped=True):
            if all(_made_by(form, z, y) for z, y in zip(shown, logits, strict=True)):
                break
        else:
            return "does something to its logits that is not known"
        targets = self.labels[:, 1:].flatten().to(logits.device)
        # Not by F.cross_entropy, which somebody may have replaced, so that the model's loss is another one.
        each = logits[:, :-1].float().flatten(0, 1).log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        total = -each[targets != IGNORED].sum()
        items = (targets != IGNORED).sum() if self._items is None else self._items
        expected = float(total.detach() / float(items))  # by torch, which divides by 0, too
        if self._biased and self._before.scale != 1:
            return "scales what its head, which has a bias, is given"
        if not isinstance(loss, Tensor) or abs(float(loss.detach()) - expected) > _LOSS_ROUNDING * abs(expected):
            return "has a loss of its own"
        return Logits(form.scale * self._before.scale, form.cap)


def sweep(like: Tensor) -> Tensor:
    """Numbers of every size that logits can have, of both signs, different in each row; shape and dtype of `like`."""
    rows, words = like.shape[:-1].numel(), like.shape[-1]
    place = torch.linspace(-_LARGEST, _LARGEST, words, device=like.device, dtype=torch.float32)
    moved = 0.03 * (torch.arange(rows, device=like.device) % 15)[:, None]
    return (place + moved).sinh().view(like.shape).to(like.dtype)


def _made_by(form: _Form, z: Tensor, y: Tensor) -> bool:
    """Whether y is this form of z, computed in the dtype of z or in float32."""
    wide = form(z.float())
    return any(_same(found.to(y.dtype), y) for found in (form(z), wide, wide.to(z.dtype)))


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _is_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether y is `x W^T + b`. Under autocast, celora's own forward of the head may have left W as it is."""
    if _close(y, F.linear(x, weight, bias)):
        return True
    if not widened.autocasts():
        return False
    with torch.autocast(x.device.type, enabled=False):
        return _close(y, linear(x.to(y.dtype), weight, None if bias is None else bias.to(y.dtype)))


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two products of the same numbers differ by rounding only, row by row."""
    if _same(a, b):
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    typical = b.float().square().mean(-1, keepdim=True).sqrt()
    allowed = 2 * torch.finfo(a.dtype).eps * torch.maximum(b.float().abs(), typical)
    return bool(((a.float() - b.float()).abs() <= allowed).all())
