"""Only the critical tokens of the gradient: the rows that carry it, chosen anew in every backward.

`grad_input[t] = G[t] W` for the kept tokens, and `(G[t] U) V` for the others, or nothing without a factor. Most of a
gradient's norm sits in few tokens, so the same FLOPs keep far more of it than columns do; and a token whose gradient is
exactly zero (padding, a masked prompt) costs nothing to leave out.
Source: ours; skipping tokens in backward was also proposed by SEBP and TokenDrop.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from celora.kernels.operations import squared_row_norms
from celora.numerics.estimators.base import Estimator
from celora.numerics.factor import make_factor
from celora.numerics.sampling import as_weights
from celora.numerics.select import drawn, energy_count, measurable, rounded_up


class Tokens(Estimator):
    """Keeps the tokens with the largest `||G[t]||`, at least one; `keep_ratio=1` is the dense product, bit for bit.

    How many: `topk` and `sampled` keep `round(keep_ratio * T)`. `energy` keeps as many as hold the share `keep_ratio`
    of `||G||^2`, so that 1 leaves out only what is exactly zero; on accelerators, where counting would wait for the
    device in every layer, it keeps the share of tokens that the latest refresh needed.
    `sampled` draws token t with probability `min(1, lambda ||G[t]||)` and weights it by the inverse: unbiased.

    The svd factor is built with the first gradient and held in the weight's dtype: `rank * (out + in)` numbers.

    Cost relative to dense: `K / T + r0 (out + in) / (out in)`.
    """

    name = "tokens"
    uses = frozenset({"keep_ratio", "rank", "selection", "factor", "precision", "weight_copy", "seed"})

    def __init__(self, out_features: int, in_features: int, **settings: Any) -> None:
        super().__init__(out_features, in_features, **settings)
        self.factor = make_factor(self.settings.factor, self.settings.rank, self.settings.seed)
        self._draws = 0
        self._share: float | None = None  # of the tokens that `energy` needed at the latest refresh
        self._needed: Tensor | None = None

    @property
    def cost(self) -> float:
        if self._keeps_all:
            return self.product.relative_cost
        low_rank = self.settings.rank * (1 / self.out_features + 1 / self.in_features)
        share = 1.0 if self.settings.selection == "energy" else self.keep_ratio
        return share * self.product.relative_cost + low_rank

    @property
    def ready(self) -> bool:
        factored = self.settings.factor == "svd" or not self.settings.rank or self.factor.V is not None
        return self._keeps_all or (factored and not self._waits_for_a_share)

    @property
    def traceable(self) -> bool:
        # Not super().traceable, which is true for Dynamo whatever it says: it gets the property itself there.
        return self.product.traceable and self.settings.selection == "topk"

    @property
    def _waits_for_a_share(self) -> bool:
        of_a_refresh = self.settings.selection == "energy" and self.keep_ratio < 1 and not _counts_freely(self.device)
        return of_a_refresh and self._share is None

    @property
    def _keeps_all(self) -> bool:
        return self.keep_ratio == 1 and self.settings.selection != "energy"

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        if self._keeps_all:
            return self.product(grad_output, weight)
        self.factor.prepare(weight)
        U, V = self.factor.U, self.factor.V
        if self.settings.selection == "sampled":
            index, factors = self._sample(squared_row_norms(grad_output).sqrt())
            if U is None or V is None:
                return self.product.rows(grad_output, weight, index, factors=factors)
            # The rest is what is sampled: G U V + (G W - G U V)_sampled.
            return self._sampled_residual(grad_output, weight, index, factors, _low_rank(grad_output, U, V))
        kept = self._kept(len(grad_output), grad_output.device)
        onto = None if U is None or V is None else functools.partial(_low_rank, grad_output, U, V)
        return self.product.critical_rows(grad_output, weight, kept=kept, share=self.keep_ratio, onto=onto)

    def observe(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        super().observe(grad_output, weight, grad_input)
        if self.settings.rank:
            self.factor.observe(weight, grad_input)
        if self.settings.selection == "energy":
            squared = squared_row_norms(grad_output)
            needed = energy_count(squared, self.keep_ratio) / len(grad_output)
            needed = torch.where(measurable(squared), needed, 0)  # what cannot be counted says nothing of later steps
            self._needed = needed if self._needed is None else torch.maximum(needed, self._needed)

    @property
    def pooled_size(self) -> int:
        return 2 if self.settings.selection == "energy" else 0

    def pooled(self) -> Tensor | None:
        return None if self._needed is None else torch.stack([self._needed, self._needed > 0])

    def take_pooled(self, total: Tensor, weight: Tensor | None) -> None:
        if self.pooled_size:  # the mean of the processes that could count
            self._needed = total[0] / total[1].clamp(min=1)

    def select(self) -> None:
        self.factor.settle()
        if self._needed is not None:
            needed, self._needed = float(self._needed), None  # one synchronisation a refresh
            self._share = needed or self._share  # 0 where nothing could be counted

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        if self.settings.selection == "sampled":
            state["draws"] = torch.tensor(self._draws)
        if self._share is not None:
            state["share"] = torch.tensor(self._share, dtype=torch.float64, device="cpu")
        return state | self.factor.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._draws = int(state.get("draws", 0))
        self._share, self._needed = float(state.get("share", 0)) or None, None
        self.factor.load_state_dict(state, self.in_features)

    def _kept(self, tokens: int, device: torch.device) -> int | None:
        """How many of these tokens to keep; None if that is to be counted from their norms."""
        if self.settings.selection == "topk":
            return max(1, round(self.keep_ratio * tokens))
        if _counts_freely(device):
            return None
        self.device = device  # to which the model may have been moved: `ready` tells whether a share is missing
        if self._share is None or self.keep_ratio == 1:  # the share of another step might leave out what is not zero
            return tokens
        return rounded_up(round(self._share * tokens), tokens, self.product.grain(tokens, device))

    def _sample(self, norms: Tensor) -> tuple[Tensor, Tensor]:
        kept = max(1, round(self.keep_ratio * len(norms)))
        self._draws += 1
        index, factors, _ = drawn(norms, kept, seed=self.settings.seed, draw=self._draws)
        return index, factors

    def _sampled_residual(
        self, grad_output: Tensor, weight: Tensor, index: Tensor, factors: Tensor, low_rank: Tensor
    ) -> Tensor:
        exact = self.product(grad_output[index], weight)
        residual = (exact - low_rank[index]).mul_(as_weights(factors, exact.dtype)[:, None])
        return low_rank.index_add_(0, index, residual)


def _low_rank(grad_output: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return (grad_output @ U.to(grad_output.dtype)) @ V.to(grad_output.dtype)


def _counts_freely(device: torch.device) -> bool:
    """Whether a number can be read from the device without waiting for all the work queued before it."""
    return device.type == "cpu"
