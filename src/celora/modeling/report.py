"""The report of `attach`: what it did, layer by layer."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from celora.settings.config import LayerConfig

# This setting only leaves out tokens whose gradient is zero.
LOSSLESS = LayerConfig("tokens", keep_ratio=1.0, rank=0, selection="energy")

# What a label adds where an input is saved otherwise than the forward multiplied it, by `forward` and `saved_input`.
SAVED = {("exact", "int8"): ", input saved in 8 bits", ("int8", "native"): ", input saved in its own dtype"}


_RUNS = 4  # of consecutive blocks; a table names so many


@dataclass(frozen=True)
class LayerReport:
    """One frozen layer: how its backward is computed, its cost relative to dense, and why it is not estimated.

    `saved_input` is the setting of its adapter, which says how `lora_A` saves the layer's input.
    """

    name: str
    out_features: int
    in_features: int
    estimator: str
    cost: float
    keep_ratio: float = 1.0
    rank: int = 0
    reason: str = ""
    selection: str = ""
    precision: str = "native"
    forward: str = "exact"
    saved_input: str = "forward"

    @property
    def label(self) -> str:
        """The estimator in words: `tokens (energy) x int8`."""
        how = f" ({self.selection})" if self.selection not in ("", "topk") else ""
        bits = f" x {self.precision}" if self.precision not in ("native", self.estimator) else ""
        both = ", forward too" if self.forward != "exact" else ""
        product = "dense, without zero tokens" if self._lossless else f"{self.estimator}{how}{bits}{both}"
        return product + SAVED.get((self.forward, self.saved_input), "")

    @property
    def rounds_input(self) -> bool:
        """Whether `lora_A`'s gradient reads an input in 8 bits that its layer's exact forward did not round."""
        return self.forward == "exact" and self.saved_input == "int8"

    @property
    def exact(self) -> bool:
        """Whether the gradient is the dense product's. Leaving out tokens whose gradient is zero changes nothing."""
        return self.estimator == "dense" or self._lossless

    @property
    def _lossless(self) -> bool:
        names = "estimator", "keep_ratio", "rank", "selection", "precision"
        return all(getattr(self, name) == getattr(LOSSLESS, name) for name in names)


@dataclass(frozen=True)
class AttachReport:
    """What `attach` did, layer by layer. Prints as a table."""

    layers: tuple[LayerReport, ...]
    refresh_every: int
    notes: tuple[str, ...] = ()  # what else celora does, what it cannot do and why, settings that cost time
    exact_head: bool = True  # whether the loss and its gradient are exact

    @property
    def estimated(self) -> dict[str, LayerReport]:
        """The layers whose backward is estimated, by name."""
        return {layer.name: layer for layer in self.layers if not layer.exact}

    @property
    def dense(self) -> dict[str, LayerReport]:
        """The layers left exact because the configuration says so."""
        return {layer.name: layer for layer in self.layers if layer.exact and not layer.reason}

    @property
    def skipped(self) -> dict[str, str]:
        """The layers that cannot be estimated, each with the reason."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason}

    @property
    def besides(self) -> str:
        """What of the gradient is estimated besides layers, as half a sentence; '' if nothing is."""
        if not any(layer.rounds_input for layer in self.layers):
            return "" if self.exact_head else "only the head's gradient is"
        return "only lora_A's gradient is" if self.exact_head else "only the head's and lora_A's gradients are"

    @property
    def cost(self) -> float:
        """FLOPs of all frozen `grad_input` products relative to exact LoRA's, without refresh steps."""
        size = [layer.out_features * layer.in_features for layer in self.layers]
        return sum(s * layer.cost for s, layer in zip(size, self.layers, strict=True)) / max(1, sum(size))

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], list[LayerReport]] = {}
        for layer in self.layers:
            kind = layer.name.rpartition(".")[2]
            key = (kind, layer.label, layer.keep_ratio, layer.rank, layer.reason, layer.out_features)
            groups.setdefault(key, []).append(layer)
        rows, placed = [("layers", "", "shape", "estimator", "keep", "rank", "FLOPs / dense")], counts(groups)
        rows += [
            (kind, count, f"{like[0].out_features} x {like[0].in_features}", estimator, f"{keep:.4g}",
             str(rank), f"{like[0].cost:.2f}" + (f"  ({reason})" if reason else ""))
            for ((kind, estimator, keep, rank, reason, _), like), count in zip(groups.items(), placed, strict=True)
        ]  # fmt: skip
        if self.estimated:
            summary = (
                f"{len(self.estimated)} of {len(self.layers)} frozen layers estimated; their products cost "
                f"{self.cost:.2f} of exact LoRA's FLOPs, refreshed every {self.refresh_every} optimizer steps."
            )
        else:
            then = self.besides or "the gradient is exact LoRA's"
            summary = f"None of {len(self.layers)} frozen layers estimated: {then}."
        return "\n".join([*aligned(rows), summary, *self.notes])


def counts(groups: Mapping[tuple[Any, ...], Sequence[Any]]) -> list[str]:
    """How many layers each group has, and the blocks that they are in if several groups are of one kind.

    The first part of a group's key is the kind. A kind with several rows of blocks (of an encoder and a decoder, say)
    gets no numbers.
    """
    blocks = {key: [re.match(r"(.*?)\.(\d+)\.", layer.name) for layer in like] for key, like in groups.items()}
    kinds = Counter(key[0] for key in groups)
    rows = {kind: {match and match[1] for key in groups if key[0] == kind for match in blocks[key]} for kind in kinds}
    numbered = {kind for kind in kinds if kinds[kind] > 1 and len(rows[kind]) == 1}
    return [
        f"x{len(like)}" + (_numbers({int(match[2]) for match in blocks[key] if match}) if key[0] in numbered else "")
        for key, like in groups.items()
    ]


def _numbers(found: Iterable[int]) -> str:
    """Numbers of blocks in words: ", block 0" or ", blocks 1-3, 7"; '' for none."""
    numbers = sorted(found)
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(numbers), key=lambda at: at[1] - at[0])]
    names = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    shown = ", ".join(names[:_RUNS] + ["..."] * (len(names) > _RUNS))
    return f", block{'s' if len(numbers) > 1 else ''} {shown}" if names else ""


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of text: rows of as many cells, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
