"""What a step of the model costs, found on a stand-in: the same model with random weights, few blocks and few words.

Layers, adapter, preset, loss and collator are those of the run. All that a step takes is nearly linear in the number of
blocks and of tokens:

    f(blocks, tokens) = fixed + tokens * per_token + blocks * (block + tokens * block_per_token)

so two numbers of blocks and two of tokens give the four coefficients.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoModelForCausalLM

import celora
from celora.errors import CELoraError, first_line, out_of_memory
from celora.kernels.backends import torch_alone
from celora.modeling.int8_base import held_in_8_bits, quantise_base
from celora.runtime.attachment import require
from celora.train.checkpointing import checkpointed, kept_by
from celora.train.choose import settled, tokens_of
from celora.train.request.arguments import TrainRequest
from celora.train.rows.truncation import row_lengths

WORDS = 8_192  # of the stand-in's vocabulary at most
_WORK = 80e9  # FLOPs of a step that is timed, about
_FEWEST, _MOST = 64, 1_024  # tokens in it
_COUNTED = 128  # tokens in a step whose bytes are counted; with fewer on CPU, celora leaves adapters to PEFT
_MOST_BYTES = 2**28  # of the blocks, unless two take more
_TURNS, _ENOUGH_S = 3, 2.0  # turns, fewer once they took so long; the fastest counts; one before them warms up


@dataclass(frozen=True)
class Line:
    """`fixed + tokens * per_token`."""

    fixed: float
    per_token: float

    def at(self, tokens: float) -> float:
        return self.fixed + tokens * self.per_token

    @classmethod
    def through(cls, points: Mapping[int, float]) -> Line:
        """The line through two points, with nothing below zero; or what is proportional to a single one."""
        (few, low), (many, high) = min(points.items()), max(points.items())
        slope = max(0.0, (high - low) / (many - few)) if many > few else high / many
        return cls(max(0.0, high - slope * many), slope)


@dataclass(frozen=True)
class Cost:
    """What a step takes with one base and one preset.

    Attributes:
        step: without and with checkpointing (or one of them), two lines over the tokens of a micro-batch: seconds
            outside of the blocks, and seconds of one block. Empty if only bytes were counted.
        weights, trained, copies: bytes of the frozen numbers, of the trained numbers, and of 8-bit copies of layers.
            Each is a pair: outside of the blocks, and in one block.
        kept: bytes that one token keeps for its backward outside of the blocks, and in one.
        dense: bytes of the largest 8-bit weight when a refresh de-quantises it: its integers, and its numbers.
        itemsize: bytes of a number of the model.
        computes_in: the dtype of its products; autocast's, if it is on.
        packed: whether padding is left out.
        head_in_8_bits: whether there is an 8-bit copy of the head.
    """

    step: dict[bool, tuple[Line, Line]]
    weights: tuple[float, float]
    trained: tuple[float, float]
    copies: tuple[float, float]
    kept: tuple[float, float]
    dense: int
    itemsize: int
    computes_in: str
    packed: bool
    head_in_8_bits: bool


def stand_in_config(config: Any, blocks: int | None) -> Any:
    """The configuration with so many blocks, or with all (None), and few words."""
    small = copy.deepcopy(config)
    if small.get_text_config() is not small:
        raise CELoraError(f"models of type {config.model_type!r} have other parts than text, which are not estimated")
    words, blocks = min(WORDS, small.vocab_size), small.num_hidden_layers if blocks is None else blocks
    small.num_hidden_layers, small.vocab_size = blocks, words
    for name in ("layer_types", "no_rope_layers"):
        if getattr(small, name, None) is not None:
            setattr(small, name, getattr(small, name)[:blocks])
    if (pad := getattr(small, "pad_token_id", None)) is not None and not 0 <= pad < words:
        small.pad_token_id = None
    return small


Build = Callable[[Any], Any]


def how_many_blocks(config: Any) -> int:
    """The blocks of the larger stand-in: enough to tell one block apart from the rest, and not much memory."""
    bytes_ = 4 * block_numbers(outline(config))
    return min(int(config.num_hidden_layers), max(2, min(4, _MOST_BYTES // max(1, bytes_))))


def outline(config: Any, blocks: int | None = 1) -> Any:
    """A stand-in of so many blocks, or of all, without numbers."""
    return stand_in(config, blocks, torch.float32, None, torch.device("meta"))


def are_alike(model: nn.Module, lora: LoraConfig) -> bool:
    """Whether LoRA's targets are the same layers in all blocks of a model that have them."""
    blocks, taken = _blocks(model), dict[str, set[bool]]()
    (path,) = (name for name, module in model.named_modules() if module is blocks)
    for i, block in enumerate(blocks):
        for name, _ in block.named_modules():
            taken.setdefault(name, set()).add(bool(check_target_module_exists(lora, f"{path}.{i}.{name}")))
    return all(len(found) == 1 for found in taken.values())


def mlp_width(model: Any) -> int:
    """How many numbers a token has within a block's MLP: as configured, or else as its widest matrix has."""
    width = getattr(model.config.get_text_config(), "intermediate_size", None)
    if isinstance(width, int):
        return width
    return max(size for weight in _blocks(model)[0].parameters() if weight.dim() == 2 for size in weight.shape)


def block_numbers(model: nn.Module) -> int:
    """Numbers in the weights of one block."""
    return _numbers(_blocks(model)[0])


def stand_in(
    config: Any, blocks: int | None, dtype: torch.dtype, attention: str | None, device: torch.device | None = None
) -> Any:
    """A model of random weights with so many blocks, on the CPU unless told otherwise.

    Raises:
        CELoraError: Transformers makes no causal language model of this configuration, or none with so few blocks.
    """
    more = {} if attention is None else {"attn_implementation": attention}
    try:
        with nullcontext() if device is None else device:
            return AutoModelForCausalLM.from_config(
                stand_in_config(config, blocks), dtype=dtype, trust_remote_code=False, **more
            )
    except Exception as error:  # whatever transformers raises about a configuration
        if isinstance(error, CELoraError) or out_of_memory(error):
            raise
        raise CELoraError(f"models of type {config.model_type!r} are not estimated: {first_line(error)}") from error


def _alike(config: Any, blocks: int, dtype: torch.dtype, attention: str | None) -> Any:
    """A stand-in whose numbers are all the same: to draw them takes longer than a step."""
    model = stand_in(config, blocks, dtype, attention, torch.device("meta")).to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(0.01)
    return model


def measure(
    request: TrainRequest,
    build: Build,
    config: Any,
    dtype: torch.dtype,
    *,
    int8: bool,
    checkpointing: Sequence[bool] = (False, True),
) -> Cost:
    """The cost of a step with this request's preset.

    Args:
        request: with the preset and the adapter's settings.
        build: makes a trainer around a model, as the run does.
        config: of the whole model.
        dtype: of the model.
        int8: whether its base is held in 8 bits.
        checkpointing: whether steps are timed without, with, or both.
    """
    many = how_many_blocks(config)
    tokens = _tokens(config, many)

    def part(blocks: int) -> _Part:
        model = stand_in(config, blocks, dtype, request.lora["attn_implementation"])
        return _part(request, build, model, int8, tokens, checkpointing, settled_config)

    return _cost(part, many, dtype)


def count(request: TrainRequest, build: Build, config: Any, dtype: torch.dtype, *, int8: bool) -> Cost:
    """The bytes of a step with torch's operators alone, as on a GPU. Times no step.

    Raises:
        CELoraError: a token passes only some of the model's experts, so numbers do not tell operations.
    """
    text = config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise CELoraError("mixtures of experts are not estimated for GPUs")

    def part(blocks: int) -> _Part:
        model = _alike(config, blocks, dtype, request.lora["attn_implementation"])
        return _part(request, build, model, int8, _COUNTED, (), lambda request, probe: request.config, repeats=True)

    with torch_alone():
        return _cost(part, how_many_blocks(config), dtype)


def _cost(part: Callable[[int], _Part], many: int, dtype: torch.dtype) -> Cost:
    """The cost from stand-ins of one block and of `many`."""
    parts = {count: part(count) for count in dict.fromkeys((1, many))}
    outside, per_block = _split({count: part.sizes for count, part in parts.items()}, many)
    weights, trained, copies, kept = zip(outside, per_block, strict=True)
    return Cost(
        step={on: _lines({n: part.seconds[on] for n, part in parts.items()}, many) for on in parts[1].seconds},
        weights=weights,
        trained=trained,
        copies=copies,
        kept=kept,
        dense=parts[many].largest_held * (1 + dtype.itemsize),
        itemsize=dtype.itemsize,
        computes_in=parts[many].computes_in,
        packed=parts[many].packed,
        head_in_8_bits=parts[many].head_in_8_bits,
    )


@dataclass(frozen=True)
class _Part:
    """A stand-in, measured: seconds of a step by checkpointing and tokens, and bytes as `Cost` has them.

    `largest_held`: numbers of the largest weight in 8 bits.
    """

    seconds: dict[bool, dict[int, float]]
    sizes: tuple[float, float, float, float]
    largest_held: int
    computes_in: str
    packed: bool
    head_in_8_bits: bool


def _part(
    request: TrainRequest,
    build: Build,
    model: Any,
    int8: bool,
    tokens: int,
    checkpointing: Sequence[bool],
    settle: Callable[[TrainRequest, Any], Any],
    *,
    repeats: bool = False,
) -> _Part:
    if int8:
        quantise_base(model)
    probe = build(model)
    peft, rows, words = probe.model.train(), _ordinary(probe.train_dataset), model.config.vocab_size
    # A micro-batch of short rows may have few tokens.
    rows = rows[: probe.args.per_device_train_batch_size] if not repeats else list(islice(cycle(rows), tokens))
    large = _batch(probe, rows, tokens, words)
    batches = [large, _batch(probe, rows, max(2, tokens_of(large) // 4), words)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself will say it
        celora.attach(peft, settle(request, probe), spread=False)  # the step that warms up measures every layer
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=1e-5)
    taken: dict[bool, dict[int, float]] = {}
    for on in checkpointing:
        with checkpointed(peft) if on else nullcontext():
            taken[on] = {tokens_of(batch): seconds(probe, batch, optimizer) for batch in batches}
    if not taken:
        kept_by(probe, dict(large))  # the first call may keep more than later ones
    kept = kept_by(probe, dict(large)) / tokens_of(large)
    head = require(peft).forward
    packed = head is not None and head.packs
    eight_bit = None if head is None else head.eight_bit
    in_8_bits = eight_bit is not None and eight_bit.takes(peft.get_output_embeddings().weight)
    sizes = (*_sizes(peft), kept)
    largest = max((layer.in_features * layer.out_features for layer in held_in_8_bits(peft).values()), default=0)
    celora.detach(peft)
    computes_in = "bfloat16" if probe.args.bf16 else str(model.dtype).removeprefix("torch.")
    return _Part(taken, sizes, largest, computes_in, packed, in_8_bits)


def settled_config(request: TrainRequest, probe: Any) -> Any:
    """What a run of this request attaches."""
    if request.preset not in ("auto", "fast"):
        return request.config
    return settled(request, probe).config


def seconds(probe: Any, batch: Mapping[str, Any], optimizer: Any) -> float:
    """Seconds of a step: the fastest of a few, which is what other programs disturbed least."""
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "celora: ")  # they are about the stand-in's random weights
        for _ in range(_TURNS + 1):
            begin = time.perf_counter()
            probe.compute_loss(probe.model, dict(batch)).backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            found.append(time.perf_counter() - begin)
            if sum(found[1:]) > _ENOUGH_S:
                break
    return min(found[1:])


def _tokens(config: Any, blocks: int) -> int:
    """Tokens of the larger of the two batches that are timed, for a stand-in of so many blocks."""
    model = outline(config)
    work = 6 * blocks * block_numbers(model) + 4 * model.config.hidden_size * model.config.vocab_size
    return int(min(_MOST, max(_FEWEST, _WORK / work)))


def _batch(probe: Any, rows: Sequence[dict[str, Any]], tokens: int, words: int) -> dict[str, Any]:
    """A batch of about so many tokens: the first rows, the last without its beginning.

    So answers, which stand at the end, are learnt in any case.
    """
    taken: list[dict[str, Any]] = []
    for row in rows:
        room = tokens - sum(len(other["input_ids"]) for other in taken)
        if room < 2:
            break
        taken.append({key: value[-room:] for key, value in row.items() if isinstance(value, list)})
        taken[-1].pop("seq_lengths", None)
    batch = probe.data_collator(taken)
    for name in ("input_ids", "labels"):
        if name in batch:
            batch[name] = torch.where(batch[name] >= 0, batch[name] % words, batch[name])
    return dict(batch)


def _ordinary(dataset: Any) -> list[dict[str, Any]]:
    """Rows of middling length first, so that a batch of them is an ordinary one."""
    lengths = row_lengths(dataset)
    return [dataset[int(number)] for number in np.argsort(np.abs(lengths - lengths.mean()), kind="stable")]


def _blocks(model: nn.Module) -> nn.ModuleList:
    """The model's numbered blocks."""
    found = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=_numbers, default=None)
    if found is None or not len(found):
        raise CELoraError(
            f"{type(model).__name__} has no numbered blocks, so nothing is known of its whole from a part"
        )
    return found


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _sizes(model: nn.Module) -> tuple[float, float, float]:
    """Bytes of what is frozen in an attached model, of what trains, and of 8-bit copies of layers."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values()
    trained = sum(tensor.nbytes for tensor in tensors if tensor.requires_grad)
    grafts, dtype = require(model).grafts.values(), next(model.parameters()).dtype
    copies = 0 if held_in_8_bits(model) else sum(graft.estimator.memory(dtype) for graft in grafts)
    return sum(tensor.nbytes for tensor in tensors) - trained, trained, copies


def _split(sizes: Mapping[int, tuple[float, ...]], many: int) -> tuple[list[float], list[float]]:
    """What is outside of the blocks, and what one block adds."""
    if many == 1:
        return [0.0] * len(sizes[1]), [*sizes[1]]
    per_block = [(high - low) / (many - 1) for low, high in zip(sizes[1], sizes[many], strict=True)]
    return [max(0.0, low - each) for low, each in zip(sizes[1], per_block, strict=True)], per_block


def _lines(times: Mapping[int, Mapping[int, float]], many: int) -> tuple[Line, Line]:
    """Seconds outside of the blocks, and of one block, from seconds by the number of blocks and of tokens."""
    if many == 1:
        return Line(0.0, 0.0), Line.through(times[1])
    block = {n: max(0.0, (times[many][n] - few) / (many - 1)) for n, few in times[1].items()}
    outside = {n: max(0.0, few - block[n]) for n, few in times[1].items()}
    return Line.through(outside), Line.through(block)
