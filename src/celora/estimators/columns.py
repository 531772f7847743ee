"""The paper's estimator: only the critical columns of the gradient, beside an exact low-rank part (Double-LoRA).

`grad_input ~= (G U) V + G[:, I] R[I, :]` with `W = U V + R`. R is never stored, because in real arithmetic

    (G U) V + G_I R_I  =  G_I W_I + (G U_off) V,      U_off = U with the rows I set to zero,

so one product of `[G_I, G U_off]` with `[W_I; V]` does it: K + r0 instead of `out` terms in every dot product.
Source: CE-LoRA, arXiv 2502.01378 (approximated matrix multiplication and Double-LoRA); the one-product form is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from celora.errors import CELoraError
from celora.estimators.base import Estimator
from celora.factor import FrozenFactor
from celora.select import column_scores, squared_column_norms, top_k


class Columns(Estimator):
    """Keeps `round(keep_ratio * out_features)` columns, chosen by `||G[:, i]|| ||R[i, :]||` at each refresh.

    With `rank=0` there is no factor and R is W itself. `keep_ratio=1` is the dense product, bit for bit.
    The factor is built at the first refresh and held in the weight's dtype: `rank * (2 * out + in)` numbers.

    Cost relative to dense: `K / out + r0 (out + in) / (out in)`.
    """

    name = "columns"

    def __init__(
        self, out_features: int, in_features: int, *, keep_ratio: float = 1.0, rank: int = 0, seed: int = 0
    ) -> None:
        super().__init__(out_features, in_features, keep_ratio=keep_ratio, rank=rank, seed=seed)
        self.kept = max(1, round(keep_ratio * out_features))
        self.factor = FrozenFactor(rank, seed)
        self.index: Tensor | None = None
        self.U_off: Tensor | None = None
        self._squared_norms: Tensor | None = None

    @property
    def cost(self) -> float:
        if self.kept == self.out_features:
            return 1.0
        low_rank = self.rank * (self.out_features + self.in_features)
        return self.kept / self.out_features + low_rank / (self.out_features * self.in_features)

    @property
    def ready(self) -> bool:
        return self.index is not None or self.kept == self.out_features

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        if self.kept == self.out_features:
            return grad_output @ weight.to(grad_output.dtype)
        if self.index is None:
            raise RuntimeError("columns: estimate() before the first select()")
        if self.index.device != grad_output.device:  # loaded from a checkpoint, or the model was moved
            self.index, self.U_off = self.index.to(grad_output.device), None
        if self.rank and self.U_off is None:  # a selection loaded from a checkpoint
            self.factor.follow(weight)
            self._use(self.index)
        if torch.compiler.is_compiling():  # the compiler fuses this; what follows is what it would have to be told
            return self._concatenated(grad_output, weight, self.index)
        tokens, kept = grad_output.shape[0], self.kept
        # Both factors are written into one buffer each: concatenating afterwards would copy them once more.
        left = grad_output.new_empty(tokens, kept + self.rank)
        right = grad_output.new_empty(kept + self.rank, self.in_features)
        torch.gather(_bits(grad_output), 1, self.index.expand(tokens, -1), out=_bits(left)[:, :kept])
        right[:kept] = weight[self.index]
        if self.factor.V is not None and self.U_off is not None:
            torch.mm(grad_output, self.U_off.to(grad_output.dtype), out=left[:, kept:])
            right[kept:] = self.factor.V
        return left @ right

    def _concatenated(self, grad_output: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        left, right = grad_output[:, index], weight[index].to(grad_output.dtype)
        if self.factor.V is not None and self.U_off is not None:
            left = torch.cat([left, grad_output @ self.U_off.to(grad_output.dtype)], dim=1)
            right = torch.cat([right, self.factor.V.to(grad_output.dtype)])
        return left @ right

    def observe(self, grad_output: Tensor, weight: Tensor) -> None:
        norms = squared_column_norms(grad_output)
        # An overflow under a GradScaler must not spoil the repetition of its step; `where` needs no synchronisation.
        norms = torch.where(torch.isfinite(norms).all(), norms, 0)
        if self._squared_norms is None:
            self.factor.follow(weight)
            self._squared_norms = norms
        else:
            self._squared_norms += norms

    def select(self) -> None:
        if self._squared_norms is None or self.factor.residual_norms is None:
            return
        scores = column_scores(self._squared_norms, self.factor.residual_norms)
        self._squared_norms = None
        # Once a refresh, so the synchronisation is cheap: where no gradient was seen, the selection stays.
        if bool((scores > 0).any()):
            self._use(top_k(scores, self.kept))
        elif self.index is not None:
            self._use(self.index)

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.index is None else {"index": self.index}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        index = state.get("index")
        if index is not None:
            if index.shape != (self.kept,) or not bool(((index >= 0) & (index < self.out_features)).all()):
                raise CELoraError(
                    f"saved selection of {index.numel()} columns does not fit a layer that keeps {self.kept} "
                    f"of {self.out_features}; resume with the configuration the state was made with."
                )
            index = index.to(torch.int64)
        # The factor follows with the first gradient, when the weight is at hand.
        self.index, self.U_off = index, None

    def _use(self, index: Tensor) -> None:
        """Switch to a selection, in place where there is one: compiled graphs hold on to these tensors."""
        self.index = _replace(self.index, index)
        if self.factor.U is not None:
            self.U_off = _replace(self.U_off, self.factor.U.index_fill(0, index, 0))


def _replace(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None or old.device != new.device else old.copy_(new)


def _bits(tensor: Tensor) -> Tensor:
    """Half-precision numbers as integers: on CPU, `gather` moves those up to five times faster, and the same bits."""
    return tensor.view(torch.int16) if tensor.element_size() == 2 else tensor
