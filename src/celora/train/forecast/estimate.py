"""`celora estimate`: will it fit, and how long will it take? It takes about a minute, and reads no weights.

The rows are tokenised as training does it, all of them or a sample. The machine is measured with a few blocks of the
model. For an NVIDIA GPU only bytes are counted with them, and times come from published peaks. The rest is arithmetic.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter as _clock
from typing import Any

import numpy as np
import torch

from celora.errors import CELoraError
from celora.machine.allocator import give_back_freed_memory
from celora.machine.device import default_device
from celora.machine.memory import available_memory, resident_memory
from celora.modeling.int8_base import frozen_linears
from celora.modeling.report import aligned
from celora.settings.config import CELoraConfig
from celora.train.dtype import settle_dtype
from celora.train.forecast import gpu as gpus
from celora.train.forecast.blocks import (
    WORDS,
    Build,
    Cost,
    are_alike,
    block_numbers,
    count,
    measure,
    mlp_width,
    outline,
    stand_in,
)
from celora.train.forecast.peaks import GPUS, USABLE, usable
from celora.train.forecast.ways import QUALITY, Model, Rows, Way, best, ways_of
from celora.train.loading import (
    check_model_folder,
    check_modules,
    checked_config,
    gguf_of,
    load_tokenizer,
    lora_config,
    quiet_libraries,
    read_tokenizer,
    training_rows,
)
from celora.train.prepare import MEASURES_ONLY
from celora.train.processes import processes
from celora.train.request.arguments import TrainRequest, make_request, sft_config
from celora.train.rows.answers import learnt_tokens
from celora.train.rows.truncation import row_lengths, truncation_lines
from celora.train.trainer import build_trainer, check_tokens
from celora.train.units import duration, gib, in_bytes
from celora.weights.checkpoint import stored_itemsize

PRESETS = ("auto", "exact", "fast")
OWN = "celora:"  # settings without a preset
_ENOUGH_S = 60.0  # after so many seconds no other way is measured
_PROBED = 64  # rows that batches are made of
_SAMPLE, _LONGEST = 2_048, 64  # rows that are tokenised of a large data set: as many evenly, and the longest


@dataclass(frozen=True)
class Estimate:
    """What `celora estimate` found.

    Attributes:
        rows, tokens: number of rows, and of tokens after long rows are cut; `labelled`: tokens that are learnt.
        longest: tokens of the longest row.
        cut: a line on what is cut off, or "".
        sampled: rows that were tokenised, if not all were.
        epochs: number of epochs that the run would train; `max_steps` decides if it is given.
        memory: bytes that the run may take, as asked for; by default what is free; None if nobody knows.
        gpu: the GPU that it is for; None for this machine's CPU.
        ways: all that were measured, fastest first.
        taken: the way that celora would take; None if nothing fits.
        skipped: what was not measured, in words: its weights alone do not fit, or the time was over.
    """

    rows: int
    tokens: int
    labelled: int
    longest: int
    cut: str
    sampled: int | None
    epochs: float
    memory: int | None
    gpu: str | None
    ways: tuple[Way, ...]
    taken: Way | None
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON: all ways; `shown` are those of the table."""
        shown = self.shown()
        ways = [
            asdict(way)
            | {"fits": way.fits(self.memory), "quality": _quality(way), "shown": way in shown}
            | ({} if self.gpu is None else {"smallest_gpu_gb": gpus.smallest(way)})
            for way in self.ways
        ]
        return asdict(self) | {"ways": ways, "taken": None if self.taken is None else asdict(self.taken)}

    def __str__(self) -> str:
        share = self.labelled / max(1, self.tokens)
        of = "" if self.sampled is None else f", from a sample of {self.sampled:,}"
        lines = [
            f"{self.rows:,} rows, {self.tokens:,} tokens, the longest row has {self.longest:,}; {share:.0%} are "
            f"learnt{of}.",
        ]
        lines += [self.cut] if self.cut else []
        if self.gpu is not None:
            lines.append(f"{self.gpu}: computed from its published peaks, not measured.")
        head = ["base", "preset", "checkpointing", "batch", "peak memory", "a step", "an epoch", "kept on one text", ""]
        if self.gpu is not None:
            head[4:7] = "peak memory", "smallest GPU", "a step, at least", "an epoch, at least"
        lines += ["", *aligned([head, *(self._row(way) for way in self.shown())]), ""]
        lines += [f"Not measured: {reason}." for reason in self.skipped]
        lines += [""] if self.skipped else []
        return "\n".join([*lines, self.verdict()])

    def shown(self) -> list[Way]:
        """The ways of the table: what is taken, the fastest and the smallest that fit; if none fits, the smallest."""
        fitting = [way for way in self.ways if way.fits(self.memory)]
        if self.taken is None or not fitting:
            return [min(self.ways, key=lambda way: way.peak_bytes)]
        chosen = (self.taken, fitting[0], min(fitting, key=lambda way: way.peak_bytes))
        return sorted(dict.fromkeys(chosen), key=self.ways.index)

    def _row(self, way: Way) -> tuple[str, ...]:
        base = way.dtype if way.base != "int8" else f"int8, else {way.dtype}"
        mark = "<- celora takes this" if way == self.taken else "" if way.fits(self.memory) else "does not fit"
        on = () if self.gpu is None else (f"{gpus.smallest(way) or 'over ' + str(max(USABLE))} GB",)
        return (
            base, way.preset, "on" if way.checkpointing else "off", f"{way.batch} x {way.accumulation}",
            gib(way.peak_bytes), *on, f"{way.step_seconds:.3g} s", duration(way.epoch_seconds), _quality(way), mark,
        )  # fmt: skip

    def verdict(self) -> str:
        """One line: what would be taken, or what the least is."""
        if self.taken is not None:
            way = self.taken
            held = " on a base in int8" if way.base == "int8" else ""
            on = ", checkpointing" if way.checkpointing else ""
            bound = "" if self.gpu is None else "at least "
            return (
                f"{way.preset} in {way.dtype}{held}, {way.batch} x {way.accumulation} rows a step{on}: "
                f"{gib(way.peak_bytes)} at the peak, {bound}{duration(way.epoch_seconds)} an epoch, "
                f"{self.epochs:.3g} of them."
            )
        least = min(self.ways, key=lambda way: way.peak_bytes)
        return (
            f"nothing fits into {gib(self.memory or 0)} with 5 % to spare: the least is {gib(least.peak_bytes)}, with "
            f"preset {least.preset}, base {least.base}, {least.batch} x {least.accumulation} rows a step"
            f"{' and checkpointing' if least.checkpointing else ''}; shorten rows with --max_length, or take a smaller "
            "model"
        )


def _quality(way: Way) -> str:
    """What the preset kept of LoRA's improvement, if that was measured. With a base in int8, only `fast` was."""
    return QUALITY.get(way.preset, "") if way.base != "int8" or way.preset == "fast" else ""


def estimate(
    given: TrainRequest,
    memory: int | None = None,
    presets: tuple[str, ...] | None = None,
    gpu: str | None = None,
    *,
    say: Callable[[str], object] = lambda line: None,
) -> Estimate:
    """What a run of this request would take, in each way that the request leaves open.

    What the request says (`dtype`, `base`, `preset`, `gradient_checkpointing`, `per_device_train_batch_size`) is kept;
    the rows of a step are kept in any case.

    Args:
        given: as for `celora train`.
        memory: bytes that may be taken; None for what is free.
        presets: presets to compare; None for the request's own or, if it names none, what most people want.
        gpu: an NVIDIA GPU to estimate for, by its name; None for what would train here.
        say: hears the size of the model, before rows are read and ways are measured.

    Raises:
        CELoraError: nothing is known of the GPU, the model has other parts than text, or rows, tokenizer or
            configuration cannot be read.
    """
    asked, gpu = gpu, gpus.gpu_of(given, gpu)
    if presets is None:
        presets = _presets(given, PRESETS if gpu is None else gpus.PRESETS)
    with quiet_libraries(), tempfile.TemporaryDirectory() as scratch, _settings(given) as (folder, stored):
        request = replace(given, model=folder, output=Path(scratch), train=given.train | MEASURES_ONLY)
        request = request if gpu is None else gpus.on_cpu(request, presets)
        args = sft_config(request)
        tokenizer = load_tokenizer(request) if folder == given.model else read_tokenizer(folder)
        config = checked_config(request)
        _check_targets(request, config)
        model = _model(request, config, stored)
        budget = _budget(memory, gpu if asked is not None else None, args.device if gpu is None else default_device())
        say(_size_line(model, budget))
        everything = training_rows(request, tokenizer)

        def build(model: Any, rows: Any) -> Any:
            trainer = build_trainer(request, copy.copy(args), model, tokenizer, rows, peft=lora_config(request))
            check_tokens(trainer, request, config.get_text_config().vocab_size)  # the stand-in has fewer words
            return trainer

        found, rows, cut = _rows(everything, config, build)
        few = rows.select(np.linspace(0, len(rows) - 1, min(_PROBED, len(rows))).astype(int).tolist())
        ways, skipped = _all_ways(
            request, args, lambda stand_in: build(stand_in, few), config, found, model, presets, gpu, budget
        )
    return Estimate(
        rows=len(everything),
        tokens=found.tokens,
        labelled=found.labelled,
        longest=found.longest[0],
        cut=cut,
        sampled=None if len(rows) == len(everything) else len(rows),
        epochs=_epochs(args, found.count),
        memory=budget,
        gpu=gpu,
        ways=tuple(sorted(ways, key=lambda way: (way.epoch_seconds, way.peak_bytes))),
        taken=best((way for way in ways if way.preset == (given.preset or OWN)), budget),
        skipped=skipped,
    )


def _budget(memory: int | None, card: str | None, device: torch.device) -> int | None:
    """Bytes that a run may take: as asked for, those of a named GPU, or what is free here and what celora has."""
    if memory is not None:
        return memory
    if card is not None:
        return usable(GPUS[card].memory)
    free = available_memory(device)
    on_cpu = device.type == "cpu"  # the peak counts what there is already
    return None if free is None else free + resident_memory() if on_cpu else free


def _weight_bytes(model: Model, base: str, dtype: str) -> int:
    """Bytes of the frozen weights."""
    itemsize: int = getattr(torch, dtype).itemsize
    tables = model.tables * model.words * model.hidden * itemsize
    return tables + model.blocks * model.block_numbers * (1 if base == "int8" else itemsize)


def _size_line(model: Model, budget: int | None) -> str:
    numbers = model.blocks * model.block_numbers + model.tables * model.words * model.hidden
    sizes = [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "bfloat16")]
    said = ", ".join(f"{gib(_weight_bytes(model, *kind))} in {kind[0]}" for kind in sizes)
    room = "" if budget is None else f" There are {gib(budget)} for the run."
    return f"{numbers / 1e6:,.0f} million weights: {said}.{room}"


def _epochs(args: Any, rows: int) -> float:
    """How many epochs a run with so many rows has."""
    if args.max_steps <= 0:
        return float(args.num_train_epochs)
    steps = math.ceil(math.ceil(rows / args.train_batch_size) / args.gradient_accumulation_steps)  # of an epoch
    return float(args.max_steps / steps)


def fitted(request: TrainRequest, memory: str) -> tuple[TrainRequest, str]:
    """The request as the way that fits into so much memory, and one line that says which.

    Raises:
        CELoraError: nothing fits.
    """
    if processes() > 1:
        raise CELoraError("--memory is for one process; for several, give the settings that celora estimate shows")
    found = estimate(request, in_bytes(memory), (request.preset or OWN,))
    if found.taken is None:
        raise CELoraError(f"--memory {memory}: {found.verdict()}")
    given = request.given | {name: value for name, value in found.taken.settings.items() if value is not None}
    return make_request(given), f"Within {memory}: {found.verdict()}"


@contextmanager
def _settings(request: TrainRequest) -> Iterator[tuple[str, int]]:
    """A folder with configuration and tokenizer, and the bytes of one number of the weights. Reads no weights."""
    path = gguf_of(request.model)
    if path is None:
        check_model_folder(request.model)  # or the hub would be asked for what can only be a file
        yield request.model, stored_itemsize(request.model, request.lora["model_revision"])
        return
    from celora.train.formats.gguf_base import own_dtype, write_settings
    from celora.train.formats.gguf_file import read_header

    header = read_header(path)
    dtype = request.lora["dtype"]
    kind = own_dtype(header) if dtype in (None, "auto") else getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as folder:
        write_settings(header, Path(folder), kind)
        yield folder, kind.itemsize


def _check_targets(request: TrainRequest, config: Any) -> None:
    """Raise CELoraError for targets that the model does not have, and for those of single blocks: all count alike."""
    whole, targets = outline(config, None), request.lora["lora_target_modules"]
    check_modules(request, whole)
    if targets and not are_alike(whole, lora_config(request)):
        raise CELoraError(
            f"lora_target_modules={' '.join(targets)!r} takes other layers in some blocks than in others, and celora "
            "estimate and --memory count all blocks alike; leave out numbers of blocks"
        )


def _rows(everything: Any, config: Any, build: Callable[[Any, Any], Any]) -> tuple[Rows, Any, str]:
    """What of the data decides, the rows that it was found on, and a line on what is cut off."""

    def trainer_of(rows: Any) -> Any:
        return build(stand_in(config, 1, torch.float32, None), rows)

    rows, count = everything, len(everything)
    if count > _SAMPLE + _LONGEST:
        rows = everything.select(np.linspace(0, count - 1, _SAMPLE).astype(int).tolist())
    trainer = trainer_of(rows)
    lengths = longest = row_lengths(trainer.train_dataset)
    times = count / len(rows)
    if rows is not everything:
        characters = np.array([len(json.dumps(row)) for row in everything])
        long = trainer_of(everything.select(np.argsort(-characters)[:_LONGEST].tolist()))
        longest = np.concatenate([np.repeat(lengths, math.ceil(times)), row_lengths(long.train_dataset)])
    found = Rows(
        count=max(1, round(len(lengths) * times)),
        tokens=round(int(lengths.sum()) * times),
        labelled=round(learnt_tokens(trainer.train_dataset)[0] * times),
        longest=tuple(np.sort(longest)[::-1].tolist()),
    )
    return found, rows, " ".join(truncation_lines(trainer, rows))


def _trained_tables(request: TrainRequest, bare: Any) -> int:
    """How many of embedding and head `lora_modules_to_save` names."""
    tables = bare.get_input_embeddings(), bare.get_output_embeddings()
    names = [f".{name}" for name, module in bare.named_modules() if module in tables]
    saved = tuple(f".{target}" for target in request.lora["lora_modules_to_save"] or ())
    return sum(name.endswith(saved) for name in names)


def _model(request: TrainRequest, config: Any, stored: int) -> Model:
    text, bare = config.get_text_config(), outline(config)
    tables = 1 if text.tie_word_embeddings else 2
    return Model(
        int(text.num_hidden_layers), int(text.hidden_size), mlp_width(bare), int(text.vocab_size),
        block_numbers(bare), min(WORDS, int(text.vocab_size)), tables, stored, _trained_tables(request, bare),
    )  # fmt: skip


def _all_ways(
    request: TrainRequest,
    args: Any,
    build: Build,
    config: Any,
    rows: Rows,
    model: Model,
    presets: tuple[str, ...],
    gpu: str | None,
    budget: int | None,
) -> tuple[list[Way], tuple[str, ...]]:
    """The ways, and what was not measured. Bases whose weights alone do not fit are left out, unless none does."""
    bare = outline(config)
    on = bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)
    both = bare.supports_gradient_checkpointing and not request.asks_for_checkpointing
    checkpointing = [False, True] if both else [on]
    options = _batches(request, args)
    costs: list[tuple[tuple[str, str, str], CELoraConfig, Cost]] = []
    bases, skipped = _bases(request, args, bare, None if gpu is None else model.stored), []
    small = [named for named in bases if budget is None or _weight_bytes(model, *named) < budget]
    for named in bases if small else []:
        if named not in small:
            skipped.append(f"base {named[0]}, whose weights alone take {gib(_weight_bytes(model, *named))}")
    begin, late = _clock(), []
    for preset in presets:
        for base, dtype in small or bases:
            if costs and _clock() - begin > _ENOUGH_S:
                late.append(f"{preset} on base {base}")
                continue
            own, kind, int8 = _with_preset(request, preset), getattr(torch, dtype), base == "int8"
            if gpu is None:
                cost = measure(own, build, config, kind, int8=int8, checkpointing=checkpointing)
            else:
                cost = count(own, build, config, kind, int8=int8)
            costs.append(((base, dtype, preset), own.config, cost))
    if late:
        skipped.append(f"after {_ENOUGH_S:.0f} s: {', '.join(late)}; --preset or --dtype asks for one")
    gc.collect()
    give_back_freed_memory()
    # With what libraries keep once there have been steps.
    before, card = (resident_memory(), None) if gpu is None else (gpus.BESIDE, GPUS[gpu])
    found = [
        way
        for named, own, cost in costs
        for way in ways_of(
            cost, model, rows, before, named=named, config=own, batches=options, checkpointing=checkpointing, gpu=card
        )
    ]
    return found, tuple(skipped)


def _presets(request: TrainRequest, usual: tuple[str, ...]) -> tuple[str, ...]:
    if all(getattr(request.options, name) is None for name in ("preset", "celora")):
        return usual
    return (request.preset or OWN,)


def _with_preset(request: TrainRequest, preset: str) -> TrainRequest:
    if preset not in PRESETS or preset == request.preset:
        return request
    made = make_request({**request.given, "preset": preset})
    return replace(request, preset=preset, config=made.config, r=made.r)


def _bases(request: TrainRequest, args: Any, bare: Any, stored: int | None) -> list[tuple[str, str]]:
    """Pairs of a base and the dtype of what is not in 8 bits. `stored`: bytes of a number in a checkpoint for a GPU."""
    if request.lora["load_in_4bit"] or request.lora["load_in_8bit"]:
        raise CELoraError(
            "bases in bitsandbytes' formats are not estimated; leave out --load_in_4bit and --load_in_8bit"
        )
    dtypes = ["bfloat16"] if stored == 2 else ["float32", "bfloat16"]
    if "dtype" in request.given and request.lora["dtype"] not in (None, "auto"):
        dtypes = [request.lora["dtype"]]
    held = replace(request, options=replace(request.options, base="int8"))
    settled = settle_dtype(held, args)[0].lora["dtype"] if stored is None else None
    beside = settled if settled in ("float32", "bfloat16", "float16") else dtypes[0]
    plain = [(dtype, dtype) for dtype in dtypes]
    can = any(frozen_linears(bare))  # GPT-2's layers, for example, cannot be held in 8 bits
    return [("int8", beside)] if request.options.base else [*plain, ("int8", beside)] if can else plain


def _batches(request: TrainRequest, args: Any) -> list[tuple[int, int]]:
    """Ways to have the rows of a step: the one asked for, and with halved micro-batches where it is left open."""
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    found = [(batch, accumulation)]
    while "per_device_train_batch_size" not in request.given and batch % 2 == 0:
        batch, accumulation = batch // 2, accumulation * 2
        found.append((batch, accumulation))
    return found
