"""8-bit products in both directions from one copy of the weight. Layers with the same input share its 8-bit form.

    W ~= diag(s) q,    y = x W^T + b ~= diag(s_x) (q_x q^T) diag(s) + b,    G W ~= diag(s_G) q_(G diag(s)) q,

with one scale s per output channel of W, one s_x per token of x, and s folded into G before G is quantised. So the
forward is an estimate, too. The model that trains is a slightly different model, as with a quantised base (QLoRA).

A few features of x may be far larger than the rest. They would set the rounding step for all features. Once the root
mean squares of x's features are known, x_j is multiplied with u_j before rounding, and W's column j is divided by u_j:

    u_j = min(1, median(r) / r_j),    r_j = rms(x_j)^0.4 / rms(W_j)^0.6,    W ~= diag(s) q diag(u).

So a feature that is 60 times as large, with weights that are 60 times as small, is rounded like any other. rms(x_j) is
the largest of any micro-batch. Layers with the same input have one u; rms(W_j) is then the largest of theirs.

The adapter's gradient reads the same rounded x, and its weights are no smaller where W's are. So no u_j is so small
that x_j gets smaller than a quarter of the median feature, `u_j >= min(1, median(rms(x)) / (4 rms(x_j)))`.

The bytes of a base that is stored in 8 bits cannot be scaled. There the eight largest features J are left out of the
rounded x, and multiplied apart in the output's dtype:

    y = diag(s_x) (q_x q^T) diag(s) + x_J q_J^T diag(s) + b.

Sources: symmetric absmax quantisation as in LLM.int8 (arXiv 2208.07339), and features apart; scales moved from x
into W as in SmoothQuant (arXiv 2211.10438), which has largest numbers and the exponents 1/2; one copy for both
directions is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from celora.kernels.operations import pack_both_ways, skinny_product, squared_column_norms
from celora.kernels.packed import BothWays, QuantisedRows
from celora.kernels.plain import row_scales
from celora.kernels.recorded import Recorded, product_in_graph, product_of_gradients, recorded
from celora.machine.device import reads_freely
from celora.numerics.inputs import LatestInput
from celora.numerics.products.int8 import Int8Product, stored_bytes


class Int8BothWays(Int8Product):
    """`Int8Product` with a copy of the weight that also multiplies in the forward, by one scale per output channel.

    Attributes:
        levels: `32 log2 r_j` of each input feature, (in,) int32; None until it is known. For a base that is stored in 8
            bits, r_j counts no weights, `rms(x_j)^0.4`.
    """

    operation = "pack_both_ways"

    def __init__(self, *, copy: bool = True) -> None:
        self.levels: Tensor | None = None
        self._seen: Tensor | None = None  # mean squares of x_j and of W_j, (2, in)
        self._found: Tensor | None = None  # the features apart for these levels, on the device that asked for them
        super().__init__(copy=copy)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "levels": self.levels, "seen": self._seen}

    def __setstate__(self, state: dict[str, Any]) -> None:
        levels, seen = state.pop("levels", None), state.pop("seen", None)
        super().__setstate__(state)
        self.levels, self._seen = levels, seen

    def look(self, x: Tensor, weight: Tensor) -> None:
        """Record the sizes of the features of `x: (..., in)`, if the levels are not known."""
        if self.levels is not None:
            return
        of_input = _mean_squares(x.detach().reshape(-1, x.shape[-1]))
        stored = stored_bytes(weight) is not None
        of_weight = torch.ones_like(of_input) if stored else _mean_squares(weight.detach())
        found = torch.stack([of_input, of_weight])
        found = found.nan_to_num_(0, 0)  # a micro-batch that is not finite says nothing, and hides no other
        self._seen = found if self._seen is None else torch.maximum(self._seen, found)

    @property
    def traceable(self) -> bool:  # type: ignore[override]
        """Whether the tensors of the copy stand in a graph: on accelerators, where CUDA graphs record products."""
        return self._recorded is not None

    def forget(self) -> None:
        super().forget()
        self._recorded: Recorded | None = None

    def take_sizes(self) -> list[int] | None:
        """`32 log2` of rms(x_j)^0.4 of all inputs since the latest call, and then of rms(W_j)^0.6: 2 in numbers.

        Returns None if there was no input, or only zeros and what is not finite. Waits for an accelerator.
        """
        seen, self._seen = self._seen, None
        if seen is None:
            return None
        logarithms = seen.cpu().clamp(min=2.0**_UNKNOWN).log2()
        sizes: list[int] = (logarithms * torch.tensor(_PER_OCTAVE, device="cpu")).round().int().flatten().tolist()
        of_input = sizes[: len(sizes) // 2]
        return sizes if max(of_input) > _LEAST[0][0] else None

    def follow_levels(self, levels: Sequence[int] | None) -> None:
        """From now on, scale the features of inputs by these levels; None: all features alike."""
        self.levels = None if levels is None else torch.tensor(levels, dtype=torch.int32, device="cpu")
        self._found = None
        self.forget()

    def keep_up(self, weight: Tensor, *, anew: bool) -> None:
        """On an accelerator, whose graphs do not look at the weight, forget a copy that is not of this one.

        `anew`: make one of this weight, if inputs are multiplied with it. Without, torch would compile another graph.
        """
        if reads_freely(weight.device):
            return
        if anew and self.levels is not None:
            self._follow(weight)
        elif not self._made_of_this(weight):
            self.forget()

    def stay_on(self, device: torch.device) -> None:
        """Forget a copy for graphs that is on another device, as after the model has moved."""
        if self._recorded is not None and self._recorded.q.device != device:
            self.forget()

    def unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        return self.forward_unavailable(out_features, in_features, device) or super().unavailable(
            out_features, in_features, device
        )

    def forward_unavailable(self, out_features: int, in_features: int, device: torch.device) -> str:
        """Why `x W^T` alone cannot be computed for this shape on this device; '' if it can."""
        if device.type == "cuda" and out_features % 8:
            return f"int8 forwards on CUDA need out_features that are a multiple of 8, not {out_features}"
        return super().unavailable(in_features, out_features, device)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        """`x W^T + bias` of `x: (..., in)`, `weight: (out, in)`, `bias: (out,)` or None: (..., out).

        The result has this dtype, or x's. x itself is never cast: layers that share it share its 8-bit form.
        """
        packed = self._multiplied_with(weight)
        rows, out_features = _inputs.quantised(x, packed, self._apart(packed)), weight.shape[0]
        y = x.new_empty(*x.shape[:-1], out_features, dtype=dtype or x.dtype)  # not a view: FSDP2 cannot hook one
        _onto(packed, rows, bias, y.view(-1, out_features))
        return y

    def rows(
        self,
        grad_output: Tensor,
        weight: Tensor,
        index: Tensor | None,
        *,
        position: Tensor | None = None,
        onto: Tensor | None = None,
    ) -> Tensor:
        if self._recorded is None or not torch.compiler.is_compiling():
            return super().rows(grad_output, weight, index, position=position, onto=onto)
        assert index is None  # what is traced multiplies all rows
        assert onto is None
        y: Tensor = product_of_gradients(grad_output, *self._recorded)
        return y

    def forward_in_graph(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`forward` in a graph that records gradients, where the product is `traceable`."""
        assert self._recorded is not None
        return product_in_graph(x, self._recorded, bias, dtype)

    def in_graphs(self, weight: Tensor) -> Recorded | None:
        """The copy of this weight, as graphs take it; None if they cannot. It is up to date, unlike that of a layer."""
        self._multiplied_with(weight)
        return self._recorded

    def latest_input(self, x: Tensor, weight: Tensor) -> QuantisedRows | None:
        """x in 8 bits, if the latest `forward` of any product had the input x; else None."""
        packed = self._multiplied_with(weight)
        return _inputs.latest(x, packed, self._apart(packed))

    def project(self, x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """`forward` of `x: (T, in)`, written into `out: (T, out)`, which has the same dtype and is contiguous."""
        packed = self._multiplied_with(weight)
        return _onto(packed, packed.quantise(x), bias, out)

    def _scale_of(self, weight: Tensor) -> Tensor:
        scale = self._input_scale(weight.device)
        if scale is None:
            return row_scales(weight)
        return torch.cat([row_scales(rows / scale) for rows in weight.detach().split(1024)])  # no copy of all of them

    def _multiplied_with(self, weight: Tensor) -> BothWays:
        packed = super()._multiplied_with(weight)
        assert isinstance(packed, BothWays)
        return packed

    def _pack(self, weight: Tensor, scale: Tensor) -> BothWays:
        packed = pack_both_ways(weight, scale, self._input_scale(weight.device))
        self._recorded = None if reads_freely(weight.device) else recorded(packed)
        return packed

    def _apart(self, packed: BothWays) -> Tensor | None:
        """The features that are multiplied apart, because these bytes are not scaled by their levels."""
        if self.levels is None or packed.input_scale is not None:
            return None
        if self._found is None or self._found.device != packed.scale.device:
            self._found = _largest(tuple(self.levels.tolist()), packed.scale.device)
        return self._found

    def _input_scale(self, device: torch.device) -> Tensor | None:
        return None if self.levels is None else _input_scale(tuple(self.levels.tolist()), device)


_STEPS = 32
_MOST_APART = 8  # with 4, the squared error of a gradient is twice as large
_OF_INPUT = 0.4  # with 0.5 the forward's error is 0.96 of this, and the backward's 1.18
_MOST_BELOW = 2 * _STEPS  # two octaves below the median, a feature is off by some 3 %, and weights below 0.1 are used
_UNKNOWN = -100  # log2 of the squares of what is zero, or not finite
_PER_OCTAVE = [[_STEPS / 2 * _OF_INPUT], [_STEPS / 2 * (1 - _OF_INPUT)]]  # levels an octave of the squares of x_j, W_j
_LEAST = [[round(_UNKNOWN * levels)] for (levels,) in _PER_OCTAVE]


def _mean_squares(t: Tensor) -> Tensor:
    """The mean squares of the columns of `t: (n, in)`: (in,) float32."""
    return squared_column_norms(t).float() / len(t)


def levels_together(sizes: Iterable[Sequence[int]]) -> list[int]:
    """The levels for products with the same input, from what each one's `take_sizes` returned.

    Features that were never seen get the median of the others: they are not scaled. Those with no weight are scaled to
    the median size of features, if they are larger.
    """
    own = torch.tensor([*sizes], dtype=torch.float32, device="cpu").unflatten(1, (2, -1)).amax(0)
    seen, weighs = own > own.new_tensor(_LEAST)
    if not seen.any():
        return [0] * len(seen)
    known = seen & weighs
    levels, size = own[0] - own[1], own[0] / _OF_INPUT
    neutral = levels[known].median() if known.any() else levels.new_zeros(())
    to_median = neutral + (size - size[seen].median()).clamp(min=0)
    levels = levels.minimum(to_median + _MOST_BELOW).where(weighs, to_median).where(seen, neutral)
    found: list[int] = levels.round().int().tolist()
    return found


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)  # an evaluation may be the first to need it, but training saves it for backward
def _input_scale(levels: tuple[int, ...], device: torch.device) -> Tensor:
    """The scales u for these levels: (in,) float32. Layers with the same input get the same tensor."""
    known = torch.tensor(levels, dtype=torch.float32, device=device)
    return torch.exp2((known.median() - known).clamp(max=0) / _STEPS)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _largest(levels: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The features with the largest levels, an eighth of all at most: (k,) int64; None if they are too few.

    Layers with the same input get the same tensor.
    """
    most = min(_MOST_APART, len(levels) // 8)
    return torch.tensor(levels, device=device).topk(most).indices if most else None


def _onto(packed: BothWays, rows: QuantisedRows, bias: Tensor | None, out: Tensor) -> Tensor:
    """`rows W^T + bias`, written into `out`, even if the kernel lacks its dtype."""
    if out.shape[-1] != len(packed.scale):  # a kernel would write beside it
        raise RuntimeError(f"the copy has {len(packed.scale)} rows, and the weight {out.shape[-1]}: it is out of date.")
    packed.multiply_into(rows, bias, out)
    if rows.apart is None or rows.values is None:
        return out
    columns = packed.columns(rows.apart) * packed.scale[:, None]
    return skinny_product(rows.values.to(out.dtype), columns.to(out.dtype).t(), onto=out)


_inputs = LatestInput()
