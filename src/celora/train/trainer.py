"""TRL's SFTTrainer with timed phases, one-line errors and safe checkpoints."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTTrainer

from celora.borrowed import NAMES, borrow
from celora.errors import CELoraError, out_of_memory
from celora.files import read_json
from celora.train.output.saving import STATE, UNUSABLE, SafeSaving
from celora.train.processes import lost_contact
from celora.train.progress import Phases
from celora.train.request.arguments import TrainRequest
from celora.train.rows.answers import AnswersOnly
from celora.train.rows.data import has_turns
from celora.train.rows.template import check_text_is_rendered, refused_row
from celora.train.rows.truncation import sequence_lengths
from celora.train.wall_clock import WallClock


class OrderOfEpoch(Sampler[int]):
    """A random sampler whose order depends only on the seed and the epoch. Accelerate calls `set_epoch`."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self.sampler, self.seed = sampler, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch from the next iteration on."""
        self.sampler.generator = torch.Generator().manual_seed(self.seed + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class Trainer(SafeSaving, AnswersOnly, SFTTrainer):  # type: ignore[misc]
    """An SFTTrainer that times its phases and sends no telemetry."""

    _train_batch_size: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.phases, self.wall_clock = Phases(), WallClock()
        super().__init__(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Like TRL's, timed while training. The tokens that TRL counts for its metrics are those of the run's state."""
        before = self._total_train_tokens
        with self.phases.timing("forward") if self.model.training else nullcontext():
            loss = super().compute_loss(*args, **kwargs)
        if self.args.include_num_input_tokens_seen == "no":  # else Trainer counts, and waits for an accelerator again
            self.state.num_input_tokens_seen += self._total_train_tokens - before
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Like TRL's, timed: the part outside `compute_loss` counts as backward."""
        with self.phases.timing("backward", without="forward"):
            return super().training_step(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Like TRL's, timed."""
        with self.wall_clock.spending("evaluate"):
            return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Like `SafeSaving`'s, timed."""
        with self.wall_clock.spending("save"):
            super()._save_checkpoint(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's. A setting that a library refuses before the first step becomes a one-line error."""
        with refused("training", self):
            return super().train(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's, but the order depends only on seed and epoch, so a resumed run sees the same rows."""
        sampler = super()._get_train_sampler(*args, **kwargs)
        if isinstance(sampler, LengthGroupedSampler):
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler = OrderOfEpoch(sampler, seed)
        return sampler

    def get_train_dataloader(self) -> Any:
        """Like Trainer's, but refuses to train without a batch."""
        loader = super().get_train_dataloader()
        if len(loader) == 0:
            raise CELoraError(
                f"dataloader_drop_last={self.args.dataloader_drop_last} leaves no batch: {len(self.train_dataset):,} "
                f"rows for batches of {self.args.train_batch_size:,}; leave it out, or make batches smaller"
            )
        return loader

    def count_steps(self, checkpoint: Path, step: int) -> int:
        """Optimizer steps of the whole run that goes on from this checkpoint, as Trainer counts them.

        A part of an epoch is rounded up. With `auto_find_batch_size`, Trainer takes the checkpoint's batch size.

        Raises:
            CELoraError: the run would end before `step`, at which the checkpoint was saved.
        """
        args = self.args
        steps, epochs = int(args.max_steps), float(args.num_train_epochs)
        asked = f"max_steps={steps}"
        if steps <= 0:
            if args.auto_find_batch_size:
                self._train_batch_size = read_json(checkpoint / STATE)["train_batch_size"] or self._train_batch_size
            with refused("training", self):
                loader = self.get_train_dataloader()
            steps = math.ceil(epochs * math.ceil(len(loader) / args.gradient_accumulation_steps))
            asked = f"num_train_epochs={epochs:g} ends at step {steps}"
        if steps < step:
            raise CELoraError(f"{asked}, but the run is saved at step {step}; give more")
        return steps

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> Any:
        """Like Trainer's. A metric that no evaluation reports becomes a one-line error.

        With `save_strategy="best"` Trainer saves if this is true. It is so, too, if a callback has asked for it: a run
        that is stopped saves its last step.
        """
        with refused("best model"):
            return bool(super()._determine_best_metric(*args, **kwargs)) or self.control.should_save

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *rest: Any) -> Any:
        """Like TRL's, but names the row that the chat template refuses, and refuses a template without text."""
        if has_turns(dataset):
            check_text_is_rendered(dataset[0], processing_class)
        try:
            return super()._prepare_dataset(dataset, processing_class, *rest)
        except OSError:
            raise
        except Exception as error:
            found = refused_row(dataset, processing_class, getattr(self, "chat_template", None))
            if found is None:
                raise
            if not (processing_class.chat_template or getattr(self, "chat_template", None)):
                raise CELoraError(
                    "the rows are chats, and the model's tokenizer has no chat template; give --chat_template_path "
                    "FILE.jinja, or rows of text (columns 'text', or 'prompt' and 'completion')"
                ) from error
            (number, reason), data = found, "training" if rest[-1] == "train" else "evaluation"
            raise CELoraError(f"the chat template refuses row {number:,} of the {data} data: {reason}") from error

    def _send_telemetry(self) -> None:
        """TRL reports each new trainer to the hub. celora sends nothing."""


# What `Trainer` and its mixins override, as `celora.borrowed` lists it.
OVERRIDDEN = tuple(name for name in NAMES if name.startswith(("transformers:Trainer._", "trl:SFTTrainer._")))


@contextmanager
def refused(what: str, trainer: Any = None) -> Iterator[None]:
    """Turn an exception of another library about the user's settings for `what` into a one-line CELoraError.

    Other exceptions pass unchanged: those of celora's own code (they are bugs), and those about memory or a lost
    process. With a `trainer`, so do those about files, and all that come after the first step.
    """
    try:
        yield
    except CELoraError:
        raise
    except Exception as error:
        late = trainer is not None and (isinstance(error, UNUSABLE) or trainer.state.global_step > 0)
        if late or out_of_memory(error) or lost_contact(error) or _raised_here(error):
            raise
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise CELoraError(f"no {what} with these settings: {kind}{error}") from error


def _raised_here(error: Exception) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("celora.")


def build_trainer(
    request: TrainRequest,
    args: Any,
    model: Any,
    tokenizer: Any,
    rows: Any,
    eval_rows: Any = None,
    *,
    peft: LoraConfig | None,
) -> Any:
    """The SFTTrainer of this run, not yet attached and without progress. What it refuses becomes a one-line error."""
    for name in OVERRIDDEN:
        borrow(name)  # warns if the method is gone from the library: then nobody calls our override
    if not (getattr(args, "pad_token", None) or tokenizer.pad_token or tokenizer.eos_token):
        raise CELoraError(
            f"the tokenizer of {request.model!r} has neither a pad token nor an end token, and shorter rows need "
            "padding; write one of its tokens as pad_token into its tokenizer_config.json, or give --pad_token"
        )
    texts = not all(has_turns(some) for some in (rows, eval_rows) if some is not None)
    if texts and not (getattr(args, "eos_token", None) or tokenizer.eos_token):
        raise CELoraError(
            f"the tokenizer of {request.model!r} has no end token, and rows of text have to end with one; write one of "
            "its tokens as eos_token into its tokenizer_config.json, or give --eos_token"
        )
    with refused("trainer"):
        trainer = Trainer(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            peft_config=peft,
            answers=request.train.get("assistant_only_loss"),
        )
    trainer.remove_callback(PrinterCallback)
    for dataset, source in _prepared(trainer, request):
        if not _teaches(dataset):
            raise CELoraError(
                f"no row of {source!r} has a token to learn within max_length={args.max_length} "
                "(the first of a row predicts, and is not predicted); give longer rows or a larger --max_length"
            )
    return trainer


def _prepared(trainer: Any, request: TrainRequest) -> list[tuple[Any, str]]:
    """The prepared rows to train and to evaluate on, each with the name of its source."""
    own = request.options.eval_data or request.data
    both = [(trainer.train_dataset, request.data), (trainer.eval_dataset, own)]
    return [(dataset, source) for dataset, source in both if dataset is not None]


def check_tokens(trainer: Any, request: TrainRequest, embeddings: int | None = None) -> None:
    """Raise CELoraError if a prepared row has a token or a position for which the model has no embedding.

    `embeddings`: how many there are; None for as many as the trainer's model has.
    """
    if embeddings is None:
        table = trainer.model.get_input_embeddings()
        table = getattr(table, "base_layer", table)
        embeddings = getattr(table, "num_embeddings", None) or len(table.weight)  # under ZeRO-3 the weight is elsewhere
    for dataset, source in _prepared(trainer, request):
        _check_tokens(dataset, source, embeddings)
        _check_positions(dataset, source, trainer.model)


def _check_positions(dataset: Any, source: str, model: Any) -> None:
    """Raise CELoraError for rows longer than a table of learned positions, as GPT-2 and OPT have one."""
    most, words = getattr(model.config.get_text_config(), "max_position_embeddings", None), model.get_input_embeddings()
    of_words = set(words.modules())
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m not in of_words]
    if most is None or not any(most <= size <= most + 2 for size in sizes):  # OPT's has two more
        return
    longest = int(sequence_lengths(dataset).max(initial=0))
    if longest > most:
        raise CELoraError(
            f"a row of {source!r} has {longest:,} tokens, and the model has {most:,} positions; give --max_length "
            f"{most}"
        )


def _check_tokens(dataset: Any, source: str, embeddings: int) -> None:
    first = 0
    for batch in dataset.select_columns("input_ids").with_format("arrow").iter(10_000):
        tokens = batch["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        largest = int(tokens.max()) if len(tokens) else 0
        if largest >= embeddings:
            row = next(i for i, ids in enumerate(batch["input_ids"].to_pylist(), first + 1) if largest in ids)
            raise CELoraError(
                f"row {row:,} of {source!r} has token {largest:,}, and the model has {embeddings:,} embeddings: the "
                "tokenizer is another model's, or has tokens of its own. Give the model with its own tokenizer"
            )
        first += len(batch)


def _teaches(dataset: Any) -> bool:
    """Whether any row of a prepared data set has a labelled token after its first."""
    column = "labels" if "labels" in dataset.column_names else "input_ids"
    return any(label != -100 for labels in dataset[column] for label in labels[1:])
