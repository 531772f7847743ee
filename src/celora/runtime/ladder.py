"""How refreshes adjust the rule of preset `auto`: a layer with a large error becomes exact, the head keeps more words.

A refresh measures the relative error. If it is above `most_error`, a layer that keeps the rule's share becomes exact.
The head goes from a tenth of the words to three tenths, and then to exact. Other shares are a user's, and stay. Nothing
goes down: keeping less would save little and cost learning (docs/develop/what-did-not-work.md). Processes that train
together make the same moves, by the largest error of any of them. Source: ours.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass

from celora.errors import CELoraError
from celora.settings.names import HEAD
from celora.settings.presets import RULE

SHARES: tuple[float, ...] = (RULE["keep_ratio"],)  # of the squared norm of a layer's gradient
WORDS: tuple[float, ...] = (RULE["head_keep_ratio"], 0.3)  # shares of the vocabulary
EXACT = 1.0


@dataclass(frozen=True)
class Move:
    """What one refresh changed.

    Attributes:
        step: the first optimizer step with the new share, counted from 0.
        layer: the layer's name; `head` is the vocabulary projection.
        kept, keeps: the share before and after; 1 is exact.
        relative_error: the measured error.
    """

    step: int
    layer: str
    kept: float
    keeps: float
    relative_error: float


class Ladder:
    """The moves of one model's layers, in the order of their steps.

    Attributes:
        most_error: a layer with a larger relative error moves; None: no layer ever moves.
    """

    def __init__(self, most_error: float | None) -> None:
        self.most_error = most_error
        self.moves: list[Move] = []

    @property
    def exact(self) -> set[str]:
        """The layers that have become exact."""
        return {move.layer for move in self.moves if move.keeps == EXACT}

    def move(self, layer: str, kept: float, error: float, step: int) -> float:
        """The share that the layer keeps from `step` on, after the share `kept` had the relative error `error`."""
        rungs = (*(WORDS if layer == HEAD else SHARES), EXACT)
        theirs = kept not in rungs[:-1]  # the user's
        if self.most_error is None or theirs or not error > self.most_error:
            return kept
        keeps = rungs[rungs.index(kept) + 1]
        self.moves.append(Move(step, layer, kept, keeps, error))
        return keeps

    def keeps(self, layer: str, else_: float) -> float:
        """The share that the layer keeps after its latest move; `else_` if it never moved."""
        return next((move.keeps for move in reversed(self.moves) if move.layer == layer), else_)

    def to_json(self) -> str:
        """The moves as JSON, for a checkpoint; `load` is the inverse."""
        return json.dumps([asdict(move) for move in self.moves])

    def load(self, text: str, layers: Collection[str]) -> None:
        """Restore the moves in `text`.

        Raises:
            CELoraError: it is no list of moves, or a move has a layer that is not in `layers`. Nothing changes then.
        """
        try:
            moves = [Move(**move) for move in json.loads(text)]
            if not all(isinstance(move.step, int) and 0 < move.kept <= 1 and 0 < move.keeps <= 1 for move in moves):
                raise ValueError("shares that no layer keeps")
            other = next((move.layer for move in moves if move.layer not in layers), None)
        except (ValueError, TypeError) as error:
            raise CELoraError(f"no moves of layers: {type(error).__name__}: {error}") from None
        if other is not None:
            raise CELoraError(f"a move of {other!r}, which is not estimated in this model")
        self.moves = moves
