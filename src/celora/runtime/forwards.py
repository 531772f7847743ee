"""The 8-bit forwards of one model, its head's included: the error of each, and which ones are exact again."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from celora.machine.processes import in_company, largest_of_all
from celora.modeling.eight_bit import MOST_ERROR, EightBitForward, EightBitHead
from celora.numerics.products.both_ways import levels_together
from celora.runtime.agreement import largest_errors

_ERROR, _EXACT, _LEVELS = "forward_error", "forward_exact", "forward_levels"
_UNSEEN = -(10**6)


class Forwards(dict[str, EightBitForward | EightBitHead]):
    """Layer -> its forward in 8 bits; `head` is the vocabulary projection.

    Attributes:
        errors: the relative error of each layer's output at its latest refresh.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, float] = {}

    @property
    def made_exact(self) -> set[str]:
        """The layers that compute their own forward again, because the error was too large."""
        return {name for name, forward in self.items() if forward.exact}

    @property
    def read_stored_bytes(self) -> bool:
        """Whether the base of some layer that computes in 8 bits is held in them."""
        return any(forward.reads_stored_bytes for forward in self.values())

    def end_refresh(self, step: int, device: torch.device) -> None:
        """Take the errors measured since the latest call. A layer with an error of `MOST_ERROR` or more becomes exact.

        If several processes train together, all of them call this at the same steps. They decide by the largest error
        of any process, with one reduction.
        """
        new = self.follow_inputs(device)
        seen = [forward.error.take_error() for forward in self.values()]
        largest = zip(self, largest_errors(seen, device), strict=True)
        found = {name: error for name, error in largest if error is not None}
        self.errors |= found
        lossy = [name for name, error in found.items() if error >= MOST_ERROR and not self[name].exact | (name in new)]
        for name in lossy:
            self[name].give_up()
        if lossy:
            worst = max(lossy, key=lambda name: found[name])
            names = ", ".join(sorted(lossy))
            warnings.warn(
                f"celora: from step {step} on, the forward of {names} is exact: in 8 bits the output of {worst} was "
                f"off by {found[worst]:.0%}, and less than {MOST_ERROR:.0%} is accepted.",
                stacklevel=2,
            )

    def keep_up(self) -> None:
        """After an optimizer step: see to the copies of weights that compiled graphs multiply with."""
        for name in self:
            self._keep_up(name)

    def _keep_up(self, name: str) -> None:
        if isinstance(forward := self[name], EightBitForward):  # the head stays outside of graphs
            forward.keep_up()

    def follow_inputs(self, device: torch.device | None) -> set[str]:
        """Tell each product the levels of its input features, if it does not know them. Returns the layers concerned.

        They come from the layer's first refresh, over all processes, so that copies of a weight are the same
        everywhere. If `device` is None, this process decides alone.
        """
        products = {name: forward.product for name, forward in self.items()}
        unknown = {name: product for name, product in products.items() if product.levels is None}
        seen = {name: product.take_sizes() for name, product in unknown.items()}
        if device is not None and seen and in_company():
            seen = self._largest(seen, device)
        told = {name: sizes for name, sizes in seen.items() if sizes is not None}
        with_input: dict[tuple[int, ...], list[str]] = {}
        for name, sizes in told.items():
            with_input.setdefault(tuple(sizes[: len(sizes) // 2]), []).append(name)
        for names in with_input.values():
            levels = levels_together(told[name] for name in names)
            for name in names:
                unknown[name].follow_levels(levels)
        return set(told)

    def _largest(self, seen: Mapping[str, list[int] | None], device: torch.device) -> dict[str, list[int] | None]:
        """The largest sizes that any process has seen, of the layers that one has seen."""
        # Layers that nobody has seen may be many: one that is exact again is never looked at.
        by_any = largest_of_all([[int(sizes is not None) for sizes in seen.values()]], device)[0]
        names = [name for name, found in zip(seen, by_any, strict=True) if found]
        if not names:
            return {}
        counts = [2 * self[name].in_features for name in names]
        given = zip(names, counts, strict=True)
        row = [size for name, count in given for size in seen[name] or [_UNSEEN] * count]
        most = iter(largest_of_all([row], device)[0])
        return {name: list(itertools.islice(most, count)) for name, count in zip(names, counts, strict=True)}

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """The state of one layer in a checkpoint."""
        state = {_EXACT: torch.tensor(self[name].exact)}
        product = self[name].product
        if product.levels is not None:
            state[_LEVELS] = product.levels
        if name in self.errors:
            state[_ERROR] = torch.tensor(self.errors[name], dtype=torch.float64, device="cpu")
        return state

    def load_state_dict(self, name: str, state: dict[str, Tensor]) -> None:
        """Restore one layer from what `state_dict` returned."""
        exact, error, levels = (state.get(key) for key in (_EXACT, _ERROR, _LEVELS))
        self[name].exact = exact is not None and bool(exact)
        self[name].error.take_error()
        product = self[name].product
        product.take_sizes()
        product.follow_levels(None if levels is None else levels.tolist())
        self._keep_up(name)
        self.errors.pop(name, None)
        if error is not None:
            self.errors[name] = float(error)
