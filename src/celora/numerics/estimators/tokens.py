"""Multiplies only the critical tokens: the rows of the gradient with the largest norms, chosen in every backward.

In: `grad_output: (T, out)` and the weight `(out, in)`. Out: `grad_input: (T, in)`, by `Tokens.estimate`.

`grad_input[t] = G[t] W` for the kept tokens. For the others it is `(G[t] U) V`, or zero without a factor. Few tokens
carry most of a gradient's norm. So with the same FLOPs, tokens keep far more of it than columns. A token whose gradient
is exactly zero (padding, a masked prompt) can be left out without loss.
Source: ours; skipping tokens in backward was also proposed by SEBP and TokenDrop.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor

from celora.kernels.operations import linear, squared_row_norms
from celora.machine.device import reads_freely
from celora.numerics.estimators.base import Estimator, Selection
from celora.numerics.estimators.more.gradient_factor import make_factor
from celora.numerics.select import energy_count, measurable, rounded_up


class Tokens(Estimator):
    """Keeps the tokens with the largest `||G[t]||`, at least one; `keep_ratio=1` is the dense product, bit for bit.

    `topk` keeps `round(keep_ratio * T)` tokens. `energy` keeps the fewest tokens that carry the share `keep_ratio` of
    `||G||^2`; a share of 1 leaves out only exact zeros. On accelerators, counting them would wait for the device in
    every layer. There `energy` keeps the share of tokens that the latest refresh needed.

    The first gradient brings the weight for the svd factor. It is stored in the weight's dtype: `rank * (out + in)`
    numbers.

    Cost relative to dense: `K / T + r0 (out + in) / (out in)`.
    """

    name = "tokens"
    uses = frozenset({"keep_ratio", "rank", "selection", "factor", "precision", "weight_copy", "forward", "seed"})
    selections: ClassVar[tuple[Selection, ...]] = ("topk", "energy")

    def __init__(self, out_features: int, in_features: int, **settings: Any) -> None:
        super().__init__(out_features, in_features, **settings)
        self.factor = make_factor(self.settings.factor, self.settings.rank, self.settings.seed)
        self._share: float | None = None  # share of the tokens that `energy` needed at the latest refresh
        self._needed: Tensor | None = None

    @property
    def cost(self) -> float:
        if self.keeps_all:
            return self.product.relative_cost
        low_rank = self.settings.rank * (1 / self.out_features + 1 / self.in_features)
        share = 1.0 if self.settings.selection == "energy" else self.keep_ratio
        return share * self.product.relative_cost + low_rank

    @property
    def ready(self) -> bool:
        return self.keeps_all or (self.factor.ready and not self._waits_for_a_share)

    @property
    def traceable(self) -> bool:
        chooses = self.settings.selection == "topk" and self.settings.precision == "native"
        return self.product.traceable and (self.keeps_all or chooses)

    @property
    def _waits_for_a_share(self) -> bool:
        of_a_refresh = self.settings.selection == "energy" and self.keep_ratio < 1 and not reads_freely(self.device)
        return of_a_refresh and self._share is None

    @property
    def keeps_all(self) -> bool:
        """Whether the estimate is the whole product."""
        return self.keep_ratio == 1 and self.settings.selection != "energy"

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        if self.keeps_all:
            return self.product(grad_output, weight)
        self.factor.prepare(weight)
        U, V = self.factor.U, self.factor.V
        kept = self._kept(len(grad_output), grad_output.device)
        onto = None if U is None or V is None else functools.partial(low_rank, grad_output, U, V)
        return self.product.critical_rows(grad_output, weight, kept=kept, share=self.keep_ratio, onto=onto)

    def _kept(self, tokens: int, device: torch.device) -> int | None:
        """How many of these tokens to keep; None if the kernel counts them by their norms."""
        if self.settings.selection == "topk":
            return max(1, round(self.keep_ratio * tokens))
        if reads_freely(device):
            return None
        self.device = device  # the model may have been moved; `ready` needs the device
        if self._share is None or self.keep_ratio == 1:  # another step's share might leave out nonzero tokens
            return tokens
        return rounded_up(round(self._share * tokens), tokens, self.product.grain(tokens, device))

    def observe(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        super().observe(grad_output, weight, grad_input)
        if self.settings.rank:
            self.factor.observe(weight, grad_input)
        if self.settings.selection == "energy":
            squared = squared_row_norms(grad_output)
            needed = energy_count(squared, self.keep_ratio) / len(grad_output)
            needed = torch.where(measurable(squared), needed, 0)  # 0 if nothing could be counted
            self._needed = needed if self._needed is None else torch.maximum(needed, self._needed)

    def select(self) -> None:
        self.factor.settle()
        if self._needed is not None:
            needed, self._needed = float(self._needed), None  # one synchronisation for each refresh
            self._share = needed or self._share  # 0: nothing could be counted

    @property
    def pooled_size(self) -> int:
        return 2 if self.settings.selection == "energy" else 0

    def pooled(self) -> Tensor | None:
        return None if self._needed is None else torch.stack([self._needed, self._needed > 0])

    def take_pooled(self, total: Tensor, weight: Tensor | None) -> None:
        if self.pooled_size:  # the mean over the processes that could count
            self._needed = total[0] / total[1].clamp(min=1)

    def state_dict(self) -> dict[str, Tensor]:
        state = self.factor.state_dict()
        if self._share is not None:
            state["share"] = torch.tensor(self._share, dtype=torch.float64, device="cpu")
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._share, self._needed = float(state.get("share", 0)) or None, None
        self.factor.load_state_dict(state, self.in_features)

    def memory(self, dtype: torch.dtype) -> int:
        factor = self.settings.rank * (self.out_features + self.in_features) * dtype.itemsize
        return super().memory(dtype) + factor


def low_rank(grad_output: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """`(G U) V` in the dtype of `grad_output`: (T, out), (out, r0), (r0, in) -> (T, in)."""
    return linear(linear(grad_output, U.to(grad_output.dtype).t()), V.to(grad_output.dtype).t())
