"""The paper's estimator (Double-LoRA): only the critical columns of the gradient, and an exact low-rank part.

In: `grad_output: (T, out)` and the weight `(out, in)`. Out: `grad_input: (T, in)`, by `Columns.estimate`.

`grad_input ~= (G U) V + G[:, I] R[I, :]` with `W = U V + R`. R is never stored, because in real arithmetic

    (G U) V + G_I R_I  =  G_I W_I + (G U_off) V,      U_off = U with the rows I set to zero,

So one product of `[G_I, G U_off]` with `[W_I; V]` is enough: K + r0 instead of `out` terms in every dot product.
Source: CE-LoRA, arXiv 2502.01378 (approximated matrix multiplication and Double-LoRA); the one-product form is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from celora.errors import CELoraError
from celora.kernels.operations import linear
from celora.numerics.estimators.base import Estimator
from celora.numerics.estimators.more.gradient_factor import make_factor
from celora.numerics.factor import replaced
from celora.numerics.select import column_scores, columns_of, measurable, squared_column_norms, top_k
from celora.weights.sharded import RowGather, rows_alone
from celora.weights.stored import SelectedRows, rows_of


class Columns(Estimator):
    """Keeps the `round(keep_ratio * out_features)` columns with the largest `||G[:, i]|| ||R[i, :]||`, at least one.

    The latest refresh selects them. With `rank=0` there is no factor, and R is W itself. `keep_ratio=1` is the dense
    product, bit for bit. The svd factor is computed when celora is attached, or at the first refresh if the weight is
    not available before. It is stored in the weight's dtype: `rank * (2 * out + in)` numbers.

    Cost relative to dense: `K / out + r0 (out + in) / (out in)`.

    Attributes:
        index: the selected columns, ascending, (K,) int64; None before the first selection.
        U_off: U with the rows `index` set to zero, (out, r0).
    """

    name = "columns"
    uses = frozenset({"keep_ratio", "rank", "selection", "factor", "precision", "weight_copy", "seed"})

    def __init__(self, out_features: int, in_features: int, **settings: Any) -> None:
        super().__init__(out_features, in_features, **settings)
        self.factor = make_factor(self.settings.factor, self.settings.rank, self.settings.seed)
        self.index: Tensor | None = None
        self.U_off: Tensor | None = None
        self._squared_norms: Tensor | None = None
        self._squared_scores: Tensor | None = None  # summed over all processes
        self._gather: RowGather | None = None  # gathers rows of a sharded weight

    @property
    def kept(self) -> int:
        """How many columns the keep ratio asks for."""
        return max(1, round(self.keep_ratio * self.out_features))

    @property
    def cost(self) -> float:
        if self.keeps_all:
            return self.product.relative_cost
        low_rank = self.settings.rank * (self.out_features + self.in_features) / (self.out_features * self.in_features)
        return self._multiplied / self.out_features * self.product.relative_cost + low_rank

    @property
    def _multiplied(self) -> int:
        """How many columns the next estimate multiplies."""
        return self.kept

    @property
    def ready(self) -> bool:
        return self.keeps_all or self.index is not None

    @property
    def traceable(self) -> bool:
        return self.product.traceable

    @property
    def keeps_all(self) -> bool:
        """Whether the estimate is the whole product."""
        return self.kept == self.out_features

    def estimate(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """`G[:, I] W[I, :] + (G U_off) V`: (T, out) -> (T, in), equal to `(G U) V + G[:, I] R[I, :]`."""
        if self.keeps_all:
            return self.product(grad_output, weight)
        index = self._selected(grad_output, weight)
        if torch.compiler.is_compiling():  # the compiler fuses this by itself
            return self._concatenated(grad_output, weight, index)
        if self.settings.precision != "native":
            return self._low_precision(grad_output, weight, index)
        return self._native(grad_output, weight, index)

    def _selected(self, grad_output: Tensor, weight: Tensor) -> Tensor:
        """The selection on the gradient's device, after bringing `U_off` up to date."""
        if self.index is None:
            raise RuntimeError("columns: estimate() before the first select()")
        if self.index.device != grad_output.device:  # from a checkpoint, or the model was moved
            self.index, self.U_off = self.index.to(grad_output.device), None
        if self.settings.rank and self.U_off is None:  # the selection is from a checkpoint
            self.factor.prepare(weight)
            self._use(self.index)
        return self.index

    def _native(self, grad_output: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        """In the gradient's dtype."""
        if self.factor.V is None or self.U_off is None:
            return linear(columns_of(grad_output, index), self._kept_rows(weight, index, grad_output.dtype).t())
        tokens, kept, rank = grad_output.shape[0], len(index), self.settings.rank
        # Write each factor directly into a buffer of its own. Concatenating afterwards would copy them again.
        left = grad_output.new_empty(tokens, kept + rank)
        right = grad_output.new_empty(kept + rank, self.in_features)
        columns_of(grad_output, index, out=left[:, :kept])
        self._kept_rows(weight, index, grad_output.dtype, out=right[:kept])
        linear(grad_output, self.U_off.to(grad_output.dtype).t(), out=left[:, kept:])
        right[kept:] = self.factor.V
        return linear(left, right.t())

    def _concatenated(self, grad_output: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        left, right = grad_output[:, index], self._kept_rows(weight, index, grad_output.dtype)
        if self.factor.V is not None and self.U_off is not None:
            left = torch.cat([left, grad_output @ self.U_off.to(grad_output.dtype)], dim=1)
            right = torch.cat([right, self.factor.V.to(grad_output.dtype)])
        return left @ right

    def _low_precision(self, grad_output: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        """Only the kept part is in 8 bits. The factor is small, and stays in the gradient's dtype."""
        # For a sharded weight, a refresh made the copy when the weight was whole.
        rows = weight if isinstance(weight, DTensor) else SelectedRows(weight, index)
        result = self.product(columns_of(grad_output, index), rows)
        if self.factor.V is not None and self.U_off is not None:
            through = linear(grad_output, self.U_off.to(grad_output.dtype).t())
            result += linear(through, self.factor.V.to(grad_output.dtype).t())
        return result

    def _kept_rows(self, weight: Tensor, index: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """`W[I]`, written into `out` if given."""
        if not isinstance(weight, DTensor):
            return rows_of(weight, index, dtype, out=out)
        if self._gather is None:
            self._gather = RowGather(weight, index)
        rows = self._gather(weight, dtype)
        return rows if out is None else out.copy_(rows)

    def prepare(self, weight: Tensor) -> None:
        self.factor.prepare(weight)

    def needs_whole(self, weight: Tensor) -> bool:
        if not self.agreed:  # another process may have selected again while this one saw no gradient
            return True
        if self.settings.precision != "native":
            return not self.product.holds_copy
        settled = self.index is not None and (self.U_off is not None or not self.settings.rank)
        return not (settled and rows_alone(weight))

    def observe(self, grad_output: Tensor, weight: Tensor, grad_input: Tensor) -> None:
        self.factor.observe(weight, grad_input)
        norms = squared_column_norms(grad_output)
        # After an overflow, a GradScaler repeats the step, so the overflow must not count. `where` needs no
        # synchronisation.
        norms = torch.where(measurable(norms), norms, 0)
        self._squared_norms = norms if self._squared_norms is None else self._squared_norms + norms

    def select(self) -> None:
        self.factor.settle()
        if self._squared_scores is not None:
            scores = self._squared_scores.sqrt()
        elif self._squared_norms is not None and self.factor.residual_norms is not None:
            scores = column_scores(self._squared_norms, self.factor.residual_norms)
        else:
            return
        self._squared_norms = self._squared_scores = None
        # This synchronises once for each refresh, which is cheap. If no gradient was seen, the selection stays.
        if bool((scores > 0).any() & torch.isfinite(scores).all()):
            self._choose(scores)
        elif self.index is not None:
            self._use(self.index)

    def _choose(self, scores: Tensor) -> None:
        """Select by the scores of all columns, (out,), which are finite and not all zero."""
        self._use(top_k(scores, self.kept))

    def _use(self, index: Tensor) -> None:
        """Switch to a selection. Tensors change in place, because compiled graphs keep referring to them."""
        self.index, self._gather = replaced(self.index, index), None
        self.product.forget()
        if self.factor.U is not None:
            self.U_off = replaced(self.U_off, self.factor.U.index_fill(0, index, 0))

    @property
    def pooled_size(self) -> int:
        return self.out_features

    def pooled(self) -> Tensor | None:
        """The squared scores. Their sums are bit-identical in all processes, even if the factors are not."""
        if self._squared_norms is None or self.factor.residual_norms is None:
            return None
        return self._squared_norms * self.factor.residual_norms.square()

    def take_pooled(self, total: Tensor, weight: Tensor | None) -> None:
        self._squared_scores = total.clone()
        if weight is not None:
            self.factor.prepare(weight)

    def state_dict(self) -> dict[str, Tensor]:
        return ({} if self.index is None else {"index": self.index}) | self.factor.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        index = state.get("index")
        if index is not None:
            within = bool(((index >= 0) & (index < self.out_features)).all())
            if index.dim() != 1 or not within or not self._fits(len(index)):
                raise CELoraError(
                    f"saved selection of {index.numel()} columns does not fit a layer that keeps {self.kept} "
                    f"of {self.out_features}; resume with the configuration the state was made with."
                )
            index = index.to(torch.int64)
        self.factor.load_state_dict(state, self.in_features)
        self._squared_norms = self._squared_scores = None  # left by an interrupted refresh
        # The first gradient brings the weight, and then the factor is computed.
        self.index, self.U_off, self._gather = index, None, None
        self.product.forget()

    def _fits(self, columns: int) -> bool:
        """Whether this layer can have a selection of so many columns."""
        return columns == self.kept

    def memory(self, dtype: torch.dtype) -> int:
        copy = super().memory(dtype) * self.settings.keep_ratio  # of the kept rows
        return round(copy) + self.settings.rank * (2 * self.out_features + self.in_features) * dtype.itemsize
