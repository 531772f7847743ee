"""From the cost of a block to memory and time of a whole run, for each way to train it; and the way that is taken.

The peak of the process is the sum of

- what it has before the model comes,
- the frozen numbers, and 8-bit copies of layers and head,
- four times what trains: the numbers, their gradients and AdamW's two moments,
- what the largest micro-batch keeps for its backward, and
- the largest thing that lives for a moment while all of that is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from celora.numerics.head import chunk_size
from celora.settings.config import CELoraConfig
from celora.train.forecast.blocks import Cost
from celora.train.forecast.peaks import Gpu

_ADAMW = 4  # times the bytes of what trains
_ROUNDED = 17 / 16  # celora rounds the tokens left after padding up
_LOGITS = 8  # bytes that a logit takes while its chunk is computed: itself in float32, and its gradient
_TO_SPARE = 1.05  # of the peak, to fit: estimates were up to 9 % too low, and a budget may be exceeded by 5 %
_SEEN = 3  # tensors of the width of the MLP that live for a moment in a block's backward
# Share of LoRA's improvement in held-out loss that is kept on one text by a 135M model; docs/measured/learning.md.
QUALITY = {
    "off": "100 %, it is LoRA",
    "exact": "100 %",
    "paper": "not measured",
    "auto": "99 to 100 %",
    "fast": "99 %",
}


@dataclass(frozen=True)
class Model:
    """The facts about a model that decide how much memory it takes.

    Attributes:
        blocks, hidden, intermediate, words: its sizes.
        block_numbers: how many numbers the weights of a block have.
        stand_in_words: words in the vocabulary of the stand-in that was measured.
        tables: number of matrices with a row for each word: the embedding, and the head if it is not the same.
        stored: bytes of a number in the checkpoint.
        trained_tables: how many of those matrices train as a whole, each a copy beside the frozen one.
    """

    blocks: int
    hidden: int
    intermediate: int
    words: int
    block_numbers: int
    stand_in_words: int
    tables: int
    stored: int
    trained_tables: int = 0


@dataclass(frozen=True)
class Rows:
    """The facts about the data that decide memory and time.

    Attributes:
        count: rows, after packing.
        tokens: number of tokens in all rows.
        labelled: number of tokens that are learnt.
        longest: tokens of the longest rows, descending, as many as a batch has or more.
    """

    count: int
    tokens: int
    labelled: int
    longest: tuple[int, ...]


@dataclass(frozen=True)
class Way:
    """One way to train, and what it takes: bytes at the peak, and seconds of a step and of an epoch."""

    base: str
    dtype: str
    preset: str
    checkpointing: bool
    batch: int
    accumulation: int
    peak_bytes: int
    epoch_seconds: float
    step_seconds: float

    def fits(self, memory: int | None) -> bool:
        """Whether `memory` bytes are enough, with a little to spare. None: nobody knows how many there are."""
        return memory is None or _TO_SPARE * self.peak_bytes <= memory

    @property
    def settings(self) -> dict[str, object]:
        """The settings of `celora train` for this way. The preset is not among them."""
        return {
            "dtype": self.dtype,
            "base": "int8" if self.base == "int8" else None,
            "gradient_checkpointing": self.checkpointing,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
        }


def ways_of(
    cost: Cost,
    model: Model,
    rows: Rows,
    before: int,
    *,
    named: tuple[str, str, str],
    config: CELoraConfig,
    batches: Iterable[tuple[int, int]],
    checkpointing: Sequence[bool],
    gpu: Gpu | None = None,
) -> list[Way]:
    """All ways to train with one base and one preset.

    Args:
        before: bytes of the process before there is a model.
        named: base, dtype and preset.
        config: what the preset and the user's changes of it make.
        batches: pairs of rows in a micro-batch, and micro-batches in a step.
        gpu: the GPU whose published peaks give the time; None if steps were timed.
    """
    found = []
    for batch, accumulation in batches:
        for on in checkpointing:
            peak = peak_bytes(cost, model, rows, batch, checkpointing=on) + before
            if gpu is None:
                seconds = epoch_seconds(cost, model, rows, batch, checkpointing=on)
            else:
                seconds = least_seconds(gpu, cost, model, rows, config, checkpointing=on)
            steps = -(-rows.count // (batch * accumulation))
            found.append(Way(*named, on, batch, accumulation, int(peak), seconds, seconds / steps))
    return found


def peak_bytes(cost: Cost, model: Model, rows: Rows, batch: int, *, checkpointing: bool) -> float:
    """Bytes at the peak, without what the process has before."""
    table = (model.words - model.stand_in_words) * model.hidden * cost.itemsize  # of what the stand-in's lack
    weights = _whole(cost.weights, model) + table * model.tables
    loading = weights + (weights / cost.itemsize * model.stored if model.stored != cost.itemsize else 0)
    copies = _whole(cost.copies, model) + (model.words * model.hidden if cost.head_in_8_bits else 0)
    held = weights + _ADAMW * (_whole(cost.trained, model) + table * model.trained_tables) + copies
    lengths = rows.longest[:batch]
    tokens = sum(lengths) * (_ROUNDED if len(lengths) > 1 else 1) if cost.packed else len(lengths) * lengths[0]
    kept = kept_bytes(cost, model, checkpointing=checkpointing)
    labelled = int(tokens * rows.labelled / max(1, rows.tokens)) or 1
    logits: float
    if cost.packed:
        logits = _LOGITS * min(labelled, chunk_size(labelled, model.words)) * model.words
    else:
        logits = 2 * _LOGITS * tokens * model.words
    moment = max(logits, _SEEN * tokens * model.intermediate * cost.itemsize + cost.dense)
    return max(loading, held + kept * tokens + moment)


def kept_bytes(cost: Cost, model: Model, *, checkpointing: bool) -> float:
    """Bytes that a token keeps for its backward."""
    outside, block = cost.kept
    if checkpointing:
        return outside + model.blocks * model.hidden * cost.itemsize + block
    return outside + model.blocks * block


def epoch_seconds(cost: Cost, model: Model, rows: Rows, batch: int, *, checkpointing: bool) -> float:
    """Seconds of an epoch. Rows come in any order, so a micro-batch has the mean number of tokens."""
    micro_batches = -(-rows.count // batch)
    tokens = rows.tokens / micro_batches
    outside, block = cost.step[checkpointing]
    words = model.words / model.stand_in_words  # of what grows with tokens outside of the blocks, the head is most
    return micro_batches * (outside.fixed + words * outside.per_token * tokens + model.blocks * block.at(tokens))


def least_seconds(
    gpu: Gpu, cost: Cost, model: Model, rows: Rows, config: CELoraConfig, *, checkpointing: bool
) -> float:
    """Seconds that an epoch takes at least on a GPU, by its published peaks. Computed, not measured.

        seconds >= max(operations / rate, bytes / bandwidth)

    Operations are those of the products with frozen weights and of the head. Bytes are what a step keeps for its
    backward, written once and read once. Everything else is left out.
    """
    usual = gpu.float32 if cost.computes_in == "float32" else gpu.bfloat16
    forward = gpu.int8 if config.forward == "int8" else usual  # also of what backward multiplies with frozen weights
    frozen = 2 * model.blocks * model.block_numbers * rows.tokens  # in one direction
    head = 2 * model.hidden * model.words * (rows.labelled if cost.packed else rows.tokens)
    busy = ((3 if checkpointing else 2) * frozen + head) / forward + config.head_keep_ratio * head / usual
    return max(busy, 2 * rows.tokens * kept_bytes(cost, model, checkpointing=False) / gpu.bandwidth)


def best(ways: Iterable[Way], memory: int | None) -> Way | None:
    """The way that celora takes: the fastest that fits. It takes a base in int8 only if no other way fits."""
    fitting = [way for way in ways if way.fits(memory)]
    plain = [way for way in fitting if way.base != "int8"]
    return min(plain or fitting, key=lambda way: (way.epoch_seconds, way.peak_bytes), default=None)


def _whole(parts: tuple[float, float], model: Model) -> float:
    return parts[0] + model.blocks * parts[1]
