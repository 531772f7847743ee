"""Only the critical tokens of the gradient: the rows that carry it, chosen anew in every backward.

`grad_input[t] = G[t] W` for the K tokens with the largest `||G[t]||`, and `(G[t] U) V` for the others, or nothing
without a factor. Most of a gradient's norm sits in few tokens, so the same FLOPs keep far more of it than columns do;
and a token whose gradient is exactly zero (padding, a masked prompt) costs nothing to leave out.
Source: ours; skipping tokens in backward was also proposed by SEBP and TokenDrop.
"""

from __future__ import annotations

from torch import Tensor

from celora.estimators.base import Estimator
from celora.factor import FrozenFactor
from celora.select import squared_row_norms, top_k


class Tokens(Estimator):
    """Keeps `round(keep_ratio * T)` tokens, at least one. `keep_ratio=1` is the dense product, bit for bit.

    The factor is built with the first gradient and held in the weight's dtype: `rank * (out + in)` numbers.

    Cost relative to dense: `K / T + r0 (out + in) / (out in)`.
    """

    name = "tokens"

    def __init__(
        self, out_features: int, in_features: int, *, keep_ratio: float = 1.0, rank: int = 0, seed: int = 0
    ) -> None:
        super().__init__(out_features, in_features, keep_ratio=keep_ratio, rank=rank, seed=seed)
        self.factor = FrozenFactor(rank, seed)

    @property
    def cost(self) -> float:
        if self.keep_ratio == 1:
            return 1.0
        return self.keep_ratio + self.rank * (1 / self.out_features + 1 / self.in_features)

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        tokens, dtype = grad_output.shape[0], grad_output.dtype
        kept = max(1, round(self.keep_ratio * tokens))
        if kept >= tokens:
            return grad_output @ weight.to(dtype)
        if self.rank and self.factor.V is None:
            self.factor.follow(weight)
        index = top_k(squared_row_norms(grad_output), kept)
        exact = grad_output.index_select(0, index) @ weight.to(dtype)
        if self.factor.U is None or self.factor.V is None:
            result = grad_output.new_zeros(tokens, self.in_features)
        else:
            result = (grad_output @ self.factor.U.to(dtype)) @ self.factor.V.to(dtype)
        return result.index_copy_(0, index, exact)

    def observe(self, grad_output: Tensor, weight: Tensor) -> None:
        if self.rank:
            self.factor.follow(weight)
