"""The paper's estimator: only the critical columns of the gradient, beside an exact low-rank part (Double-LoRA).

`grad_input ~= (G U) V + G[:, I] R[I, :]` with `W = U V + R`. R is never stored, because in real arithmetic

    (G U) V + G_I R_I  =  G_I W_I + (G U_off) V,      U_off = U with the rows I set to zero,

so one product of `[G_I, G U_off]` with `[W_I; V]` does it: K + r0 instead of `out` terms in every dot product.
Source: CE-LoRA, arXiv 2502.01378 (approximated matrix multiplication and Double-LoRA); the one-product form is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from celora.errors import CELoraError
from celora.machine.device import in_float64
from celora.numerics.estimators.base import Estimator
from celora.numerics.factor import make_factor, replaced
from celora.numerics.sampling import as_weights
from celora.numerics.select import (
    column_scores,
    columns_of,
    drawn,
    energy_count,
    measurable,
    squared_column_norms,
    top_k,
)
from celora.weights.sharded import RowGather, rows_alone
from celora.weights.stored import SelectedRows, rows_of


class Columns(Estimator):
    """Keeps the columns with the largest `||G[:, i]|| ||R[i, :]||` at the latest refresh.

    How many: `topk` and `sampled` keep `round(keep_ratio * out_features)`, `energy` as many as hold the share
    `keep_ratio` of the squared scores. `sampled` draws anew in every backward, column i with probability
    `p_i = min(1, lambda score_i)`, and weights it by `1 / p_i`: unbiased, given the scores.

    With `rank=0` there is no factor and R is W itself. `keep_ratio=1` is the dense product, bit for bit.
    The svd factor is built when celora is attached, or at the first refresh where the weight is not at hand before, and
    held in the weight's dtype: `rank * (2 * out + in)` numbers.

    Cost relative to dense: `K / out + r0 (out + in) / (out in)`.
    """

    name = "columns"
    uses = frozenset({"keep_ratio", "rank", "selection", "factor", "precision", "weight_copy", "seed"})

    def __init__(self, out_features: int, in_features: int, **settings: Any) -> None:
        super().__init__(out_features, in_features, **settings)
        self.factor = make_factor(self.settings.factor, self.settings.rank, self.settings.seed)
        self.index: Tensor | None = None
        self.U_off: Tensor | None = None
        self.scores: Tensor | None = None  # what `sampled` draws from
        self._draws = 0
        self._squared_norms: Tensor | None = None
        self._squared_scores: Tensor | None = None  # of all processes together
        self._gather: RowGather | None = None  # of the rows of a sharded weight

    @property
    def kept(self) -> int:
        """How many columns `topk` and `sampled` keep."""
        return max(1, round(self.keep_ratio * self.out_features))

    @property
    def cost(self) -> float:
        if self._keeps_all:
            return self.product.relative_cost
        low_rank = self.settings.rank * (self.out_features + self.in_features) / (self.out_features * self.in_features)
        if self.settings.selection == "energy":
            kept = self.out_features if self.index is None else len(self.index)
        else:
            kept = self.kept
        return kept / self.out_features * self.product.relative_cost + low_rank

    @property
    def ready(self) -> bool:
        return self._keeps_all or self.index is not None or self.scores is not None

    @property
    def traceable(self) -> bool:
        return self.product.traceable and self.settings.selection != "sampled"  # not super(): see Tokens

    @property
    def _keeps_all(self) -> bool:
        return self.settings.selection != "energy" and self.kept == self.out_features

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`G[:, I] W[I, :] + (G U_off) V`: (T, out) -> (T, in), equal to `(G U) V + G[:, I] R[I, :]`."""
        if self._keeps_all:
            return self.product(grad_output, weight)
        if self.settings.selection == "sampled":
            return self._sampled(grad_output, weight)
        if self.index is None:
            raise RuntimeError("columns: estimate() before the first select()")
        if self.index.device != grad_output.device:  # loaded from a checkpoint, or the model was moved
            self.index, self.U_off = self.index.to(grad_output.device), None
        if self.settings.rank and self.U_off is None:  # a selection loaded from a checkpoint
            self.factor.prepare(weight)
            self._use(self.index)
        if torch.compiler.is_compiling():  # the compiler fuses this; what follows is what it would have to be told
            return self._concatenated(grad_output, weight, self.index)
        if self.settings.precision != "native":
            return self._low_precision(grad_output, weight, self.index)
        if self.factor.V is None or self.U_off is None:
            return columns_of(grad_output, self.index) @ self._kept_rows(weight, self.index, grad_output.dtype)
        tokens, kept, rank = grad_output.shape[0], len(self.index), self.settings.rank
        # Both factors are written into one buffer each: concatenating afterwards would copy them once more.
        left = grad_output.new_empty(tokens, kept + rank)
        right = grad_output.new_empty(kept + rank, self.in_features)
        columns_of(grad_output, self.index, out=left[:, :kept])
        self._kept_rows(weight, self.index, grad_output.dtype, out=right[:kept])
        torch.mm(grad_output, self.U_off.to(grad_output.dtype), out=left[:, kept:])
        right[kept:] = self.factor.V
        return left @ right

    def _concatenated(self, grad_output: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        left, right = grad_output[:, index], self._kept_rows(weight, index, grad_output.dtype)
        if self.factor.V is not None and self.U_off is not None:
            left = torch.cat([left, grad_output @ self.U_off.to(grad_output.dtype)], dim=1)
            right = torch.cat([right, self.factor.V.to(grad_output.dtype)])
        return left @ right

    def _low_precision(self, grad_output: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        """Only the kept part in 8 bits; the factor is small and stays in the gradient's dtype."""
        # Of a sharded weight there is a copy, made when a refresh had it whole.
        rows = weight if isinstance(weight, DTensor) else SelectedRows(weight, index)
        result = self.product(columns_of(grad_output, index), rows)
        if self.factor.V is not None and self.U_off is not None:
            result += (grad_output @ self.U_off.to(grad_output.dtype)) @ self.factor.V.to(grad_output.dtype)
        return result

    def _sampled(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`(G U) V + sum over drawn i of G[:, i] R[i, :] / p_i`, with `G_I R_I = G_I W_I - (G_I U_I) V`."""
        assert self.scores is not None
        self.scores = self.scores.to(grad_output.device)
        self._draws += 1
        index, factors, _ = drawn(self.scores, self.kept, seed=self.settings.seed, draw=self._draws)
        left = grad_output.index_select(1, index).mul_(as_weights(factors, grad_output.dtype))
        result = self.product(left, rows_of(weight, index, weight.dtype))
        self.product.forget()  # the next draw's rows may lie where these did
        self.factor.prepare(weight)
        if self.factor.U is not None and self.factor.V is not None:
            U, V = self.factor.U.to(grad_output.dtype), self.factor.V.to(grad_output.dtype)
            result += (grad_output @ U - left @ U[index]) @ V
        return result

    def _kept_rows(self, weight: Tensor, index: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """`W[I]`, into `out` if that is given."""
        if not isinstance(weight, DTensor):
            return rows_of(weight, index, dtype, out=out)
        if self._gather is None:
            self._gather = RowGather(weight, index)
        rows = self._gather(weight, dtype)
        return rows if out is None else out.copy_(rows)

    def prepare(self, weight: Tensor) -> None:
        self.factor.prepare(weight)

    def needs_whole(self, weight: Tensor) -> bool:
        if not self.agreed:  # another process may have selected anew when this one saw no gradient
            return True
        if self.settings.precision != "native":
            return not self.product.holds_copy
        settled = self.index is not None and (self.U_off is not None or not self.settings.rank)
        return not (settled and self.settings.selection != "sampled" and rows_alone(weight))

    def observe(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        self.factor.observe(weight, grad_input)
        norms = squared_column_norms(grad_output)
        # An overflow under a GradScaler must not spoil the repetition of its step; `where` needs no synchronisation.
        norms = torch.where(measurable(norms), norms, 0)
        self._squared_norms = norms if self._squared_norms is None else self._squared_norms + norms

    @property
    def pooled_size(self) -> int:
        return self.out_features

    def pooled(self) -> Tensor | None:
        """The squared scores: sums of these are bit for bit the same everywhere, whatever each made of the weight."""
        if self._squared_norms is None or self.factor.residual_norms is None:
            return None
        return self._squared_norms * self.factor.residual_norms.square()

    def take_pooled(self, total: Tensor, weight: Tensor | None) -> None:
        self._squared_scores = total.clone()
        if weight is not None:
            self.factor.prepare(weight)

    def select(self) -> None:
        self.factor.settle()
        if self._squared_scores is not None:
            scores = self._squared_scores.sqrt()
        elif self._squared_norms is not None and self.factor.residual_norms is not None:
            scores = column_scores(self._squared_norms, self.factor.residual_norms)
        else:
            return
        self._squared_norms = self._squared_scores = None
        # Once a refresh, so the synchronisation is cheap: where no gradient was seen, the selection stays.
        if not bool((scores > 0).any() & torch.isfinite(scores).all()):
            if self.index is not None:
                self._use(self.index)
        elif self.settings.selection == "sampled":
            self.scores = scores
        elif self.settings.selection == "energy":
            self._use(top_k(scores, max(1, int(energy_count(in_float64(scores).square(), self.keep_ratio)))))
        else:
            self._use(top_k(scores, self.kept))

    def state_dict(self) -> dict[str, Tensor]:
        state = {"index": self.index, "scores": self.scores}
        if self.settings.selection == "sampled":
            state["draws"] = torch.tensor(self._draws)
        own = {name: value for name, value in state.items() if value is not None}
        return super().state_dict() | own | self.factor.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        index = state.get("index")
        if index is not None:
            fits = len(index) == self.kept or self.settings.selection == "energy"
            if index.dim() != 1 or not fits or not bool(((index >= 0) & (index < self.out_features)).all()):
                raise CELoraError(
                    f"saved selection of {index.numel()} columns does not fit a layer that keeps {self.kept} "
                    f"of {self.out_features}; resume with the configuration the state was made with."
                )
            index = index.to(torch.int64)
        scores = state.get("scores")
        if scores is not None and scores.shape != (self.out_features,):
            raise CELoraError(
                f"saved scores of {scores.numel()} columns for a layer of {self.out_features}; resume with the model "
                "the state was made with."
            )
        self.factor.load_state_dict(state, self.in_features)
        self.scores, self._draws = scores, int(state.get("draws", 0))
        self._squared_norms = self._squared_scores = None  # of a refresh that was interrupted
        # The factor follows with the first gradient, when the weight is at hand.
        self.index, self.U_off, self._gather = index, None, None
        self.product.forget()

    def _use(self, index: Tensor) -> None:
        """Switch to a selection, in place where there is one: compiled graphs hold on to these tensors."""
        self.index, self._gather = replaced(self.index, index), None
        self.product.forget()
        if self.factor.U is not None:
            self.U_off = replaced(self.U_off, self.factor.U.index_fill(0, index, 0))
