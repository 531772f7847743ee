"""Columns and tokens drawn at random in every backward, with weights that make the estimate unbiased.

Item i is drawn with probability `p_i = min(1, lambda score_i)` and weighted by `1 / p_i`. A draw depends on the seed
and the number of draws before it, not on the global random state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from celora.errors import CELoraError
from celora.kernels.operations import linear, squared_row_norms
from celora.numerics.estimators.columns import Columns
from celora.numerics.estimators.tokens import Tokens, low_rank
from celora.numerics.sampling import as_weights
from celora.numerics.select import drawn
from celora.weights.stored import rows_of


class SampledColumns(Columns):
    """Draws `round(keep_ratio * out_features)` columns by the scores of the latest refresh; unbiased given these.

    Attributes:
        scores: the scores that the draw uses, (out,); None before the first refresh.
    """

    selections = ("sampled",)

    def __init__(self, out_features: int, in_features: int, **settings: Any) -> None:
        super().__init__(out_features, in_features, **settings)
        self.scores: Tensor | None = None
        self._draws = 0

    @property
    def ready(self) -> bool:
        return self.keeps_all or self.scores is not None

    @property
    def traceable(self) -> bool:
        return False

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`(G U) V + sum over drawn i of G[:, i] R[i, :] / p_i`, with `G_I R_I = G_I W_I - (G_I U_I) V`."""
        if self.keeps_all:
            return self.product(grad_output, weight)
        if self.scores is None:
            raise RuntimeError("columns: estimate() before the first select()")
        self.scores = self.scores.to(grad_output.device)
        self._draws += 1
        index, factors, _ = drawn(self.scores, self.kept, seed=self.settings.seed, draw=self._draws)
        left = grad_output.index_select(1, index).mul_(as_weights(factors, grad_output.dtype))
        result = self.product(left, rows_of(weight, index, weight.dtype))
        self.product.forget()  # the next draw's rows may have the same address
        self.factor.prepare(weight)
        if self.factor.U is not None and self.factor.V is not None:
            U, V = self.factor.U.to(grad_output.dtype), self.factor.V.to(grad_output.dtype)
            result += linear(linear(grad_output, U.t()) - linear(left, U[index].t()), V.t())
        return result

    def needs_whole(self, weight: Tensor) -> bool:
        return True

    def _choose(self, scores: Tensor) -> None:
        self.scores = scores

    def state_dict(self) -> dict[str, Tensor]:
        scores = {} if self.scores is None else {"scores": self.scores}
        return scores | {"draws": torch.tensor(self._draws)} | super().state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        scores = state.get("scores")
        if scores is not None and scores.shape != (self.out_features,):
            raise CELoraError(
                f"saved scores of {scores.numel()} columns for a layer of {self.out_features}; resume with the model "
                "the state was made with."
            )
        super().load_state_dict(state)
        self.scores, self._draws = scores, int(state.get("draws", 0))


class SampledTokens(Tokens):
    """Draws `round(keep_ratio * T)` tokens by `||G[t]||`. With a factor, it draws from the rest, `G W - (G U) V`."""

    selections = ("sampled",)

    def __init__(self, out_features: int, in_features: int, **settings: Any) -> None:
        super().__init__(out_features, in_features, **settings)
        self._draws = 0

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`G[t] W / p_t` for the drawn tokens t, 0 for the others.

        With a factor: `(G[t] U) V` for all tokens, and `+ (G[t] W - (G[t] U) V) / p_t` for the drawn ones.
        """
        if self.keeps_all:
            return self.product(grad_output, weight)
        self.factor.prepare(weight)
        scores = squared_row_norms(grad_output).sqrt()
        self._draws += 1
        kept = max(1, round(self.keep_ratio * len(scores)))
        index, factors, _ = drawn(scores, kept, seed=self.settings.seed, draw=self._draws)
        U, V, exact = self.factor.U, self.factor.V, self.product(grad_output[index], weight)
        weights = as_weights(factors, exact.dtype)[:, None]
        if U is None or V is None:
            return exact.new_zeros(len(grad_output), exact.shape[1]).index_copy_(0, index, exact.mul_(weights))
        factored = low_rank(grad_output, U, V)
        return factored.index_add_(0, index, (exact - factored[index]).mul_(weights))

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | {"draws": torch.tensor(self._draws)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._draws = int(state.get("draws", 0))
