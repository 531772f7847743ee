"""Finds the tokens of a conversation that the assistant wrote. A chat model learns only these, not what users say.

Marks `{% generation %}` in a chat template say where they are. TRL has a marked version of the templates that it knows,
and this one decides. With any other template, celora compares rendered texts, and refuses what it cannot tell.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc  # type: ignore[import-untyped]
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from celora.errors import CELoraError
from celora.train.rows.data import code_digest, has_turns

_WAYS_OUT = (
    "give a template with {% generation %} marks in --chat_template_path, leave out such rows, or learn every token "
    "with --assistant_only_loss false"
)
Messages = Sequence[dict[str, Any]]


class AnswersOnly:
    """A mixin for SFTTrainer: `assistant_only_loss` for every chat template.

    `answers` is the user's `assistant_only_loss`. None means: in rows of messages learn the answers, in other rows
    learn what TRL learns.
    """

    args: Any
    completion_only_loss: bool

    def __init__(self, *arguments: Any, answers: bool | None, **more: Any) -> None:
        self.answers = answers
        args, rows = more["args"], more["train_dataset"]
        # TRL refuses templates that it does not know. It must not check: celora makes the masks.
        args.assistant_only_loss = False
        super().__init__(*arguments, **more)
        args.assistant_only_loss = self._learns_answers(rows)

    def _learns_answers(self, rows: Any) -> bool:
        return "messages" in rows.column_names if self.answers is None else self.answers

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Add the column `assistant_masks`. TRL's own method then makes labels of it, cuts and packs."""
        columns = dataset.column_names
        if self._learns_answers(dataset) and "input_ids" not in columns:
            data = "training" if dataset_name == "train" else "evaluation"
            if has_turns(dataset):
                with args.main_process_first():
                    dataset = _masked(dataset, processing_class, args.dataset_num_proc, data, self.completion_only_loss)
                    if packing and args.packing_strategy == "bfd":
                        dataset = _with_answers_within(dataset, args)
            elif dataset_name == "train":
                raise CELoraError(
                    "assistant_only_loss=True is for conversations, and these rows are text; leave it out, or give "
                    "rows of messages"
                )
        return super()._prepare_dataset(  # type: ignore[misc]
            dataset, processing_class, args, packing, formatting_func, dataset_name
        )


def _masked(dataset: Any, tokenizer: Any, processes: int | None, data: str, completion_only: bool) -> Any:
    template = marked_template(tokenizer)
    _check_stop(tokenizer, template)
    return dataset.map(
        _mask_row,
        with_indices=True,
        # The code is part of the key under which `datasets` keeps masks; a function's name alone would be.
        fn_kwargs={
            "tokenizer": tokenizer,
            "template": template,
            "data": data,
            "completion_only": completion_only,
            "code": code_digest(__file__),
        },
        remove_columns=dataset.column_names,
        num_proc=processes,
        desc="Finding the answers",
    )


def _with_answers_within(dataset: Any, args: Any) -> Any:
    """Leave out rows whose answers are all cut off, unless no row would remain. TRL only does so without packing."""
    kept = dataset.filter(
        _has_answer_within,
        fn_kwargs={"limit": args.max_length},
        num_proc=args.dataset_num_proc,
        desc="Leaving out rows",
    )
    return kept if len(kept) else dataset


def _has_answer_within(row: dict[str, Any], limit: int) -> bool:
    return any(row["assistant_masks"][:limit])


def _check_stop(tokenizer: Any, template: str | None) -> None:
    """Warn if the chat template does not end answers, or ends them outside its marks."""
    probe = [{"role": role, "content": text} for role, text in (("user", "no"), ("assistant", "yes"), ("user", "no"))]
    with contextlib.suppress(Exception):  # a row that the template refuses gets its own error later
        found = mask_answers(probe, tokenizer, template)
        learnt = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
        if tokenizer.decode(learnt).strip().endswith("yes"):
            warnings.warn(
                "celora: the chat template writes nothing that ends an answer, or not between its {% generation %} "
                "marks, so the model may not learn to stop.",
                stacklevel=2,
            )


def marked_template(tokenizer: Any) -> str | None:
    """The chat template with `{% generation %}` marks: the tokenizer's own, or TRL's version of it; else None."""
    if not (tokenizer.is_fast and tokenizer.chat_template):
        return None
    own: str = tokenizer.get_chat_template()
    if has_generation_markers(own):
        return own
    try:
        return str(get_training_chat_template(tokenizer))
    except ValueError:  # TRL does not know it
        return None


def _mask_row(
    row: dict[str, Any],
    index: int,
    tokenizer: Any,
    template: str | None,
    data: str,
    completion_only: bool,
    code: str,
) -> dict[str, Any]:
    messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
    first = len(row["prompt"]) if "prompt" in row and completion_only else 0
    try:
        return mask_answers(messages, tokenizer, template, first)
    except CELoraError as error:
        raise CELoraError(f"row {index + 1:,} of the {data} data: {error}") from None
    except Exception as error:
        if template is None:
            raise
        raise CELoraError(f"the chat template refuses row {index + 1:,} of the {data} data: {error}") from error


def mask_answers(messages: Messages, tokenizer: Any, template: str | None, first: int = 0) -> dict[str, list[int]]:
    """The tokens of a conversation, and whether each is part of an answer. Answers before message `first` do not count.

    `template`: the `marked_template`, or None to compare texts.

    Returns:
        `input_ids`, rendered by the chat template, and `assistant_masks`: 1 for a token to learn, else 0.

    Raises:
        CELoraError: there is no answer, or the template writes an answer differently when more follows.
    """
    if all(message["role"] != "assistant" for message in messages[first:]):
        raise CELoraError("no assistant turn is in it, so there is nothing to learn; leave it out")
    if template is None:
        return _compared(messages, tokenizer, first)

    def tokens(some: Messages, **more: Any) -> Any:
        return tokenizer.apply_chat_template(some, chat_template=template, tokenize=True, return_dict=True, **more)

    found = tokens(messages, return_assistant_tokens_mask=True)
    ids, mask = list(found["input_ids"]), list(found["assistant_masks"])
    if first:
        asked = _shared(ids, tokens(messages[:first], add_generation_prompt=True)["input_ids"])
        mask[:asked] = [0] * asked
    if not any(mask):
        raise CELoraError(f"the chat template marks none of its tokens as an answer; {_WAYS_OUT}")
    return {"input_ids": ids, "assistant_masks": mask}


def _compared(messages: Messages, tokenizer: Any, first: int) -> dict[str, list[int]]:
    """`mask_answers` with a template without marks: an answer is what it adds to the text that asks for it.

    The text before an answer, with the generation prompt, and the text up to the answer's end must be beginnings of
    the whole. Some templates add text where a conversation ends: the token `eos` after the last answer, or an empty
    thought before it. A token that is partly in an answer is learnt, as with marks.
    """
    if not tokenizer.is_fast:
        raise CELoraError(f"this tokenizer does not say which characters a token stands for; {_WAYS_OUT}")

    def render(some: Messages, prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=prompt))

    def before(k: int) -> str:
        if k:
            return render(messages[:k], True)
        # No template renders an empty conversation, so find the prompt in the conversation of this message alone.
        alone, more = render(messages[:1]), render(messages[:1], True)
        prompt = more[_shared(alone, more) :]
        return alone[: alone.find(prompt)] + prompt  # no beginning of `alone` if the prompt is not in it

    whole, eos, spans = render(messages), tokenizer.eos_token or "", []
    for k in (k for k in range(first, len(messages)) if messages[k]["role"] == "assistant"):
        try:
            asked, upto = before(k), render(messages[: k + 1])
        except Exception as error:  # the template's own, about a conversation that ends there
            reason = str(error).strip()
            raise CELoraError(f"the chat template refuses what ends at messages[{k}] ({reason}); {_WAYS_OUT}") from None
        written, said = upto[len(asked) :], str(messages[k].get("content") or "").strip()
        bare = written[max(0, written.find(said)) :]
        for text in (written, written.removesuffix(eos), bare, bare.removesuffix(eos)):
            if upto.startswith(asked) and (text is written or said in text) and whole.startswith(asked + text):
                spans.append((len(asked), len(asked) + len(text)))
                break
        else:
            raise CELoraError(
                f"the chat template writes the answer messages[{k}] differently after its generation prompt, or when "
                f"more messages follow, so its tokens are not known; {_WAYS_OUT}"
            )
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    mask = [int(any(end > a and start < b for a, b in spans)) for start, end in map(tuple, encoded["offset_mapping"])]
    return {"input_ids": list(encoded["input_ids"]), "assistant_masks": mask}


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements the beginnings of two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# --- how much is learnt ----------------------------------------------------------------------------------------------


def learnt_tokens(dataset: Any) -> tuple[int, int]:
    """How many tokens of a prepared data set have a label, and how many it has; read block by block from Arrow."""
    learnt = tokens = 0
    for labels in _flat_labels(dataset):
        tokens += len(labels)
        learnt += int(pc.sum(pc.not_equal(labels, -100)).as_py() or 0)
    return learnt, tokens


def _flat_labels(dataset: Any) -> Iterator[Any]:
    for block in dataset.select_columns("labels").with_format("arrow").iter(batch_size=1_000):
        yield pc.list_flatten(block["labels"])


@dataclass(frozen=True)
class Learnt:
    """How many tokens of the training data are learnt, how many there are, and which part is learnt in words."""

    learnt: int
    tokens: int
    part: str

    @property
    def share(self) -> str:
        """The learnt share in per cent. Only all of the tokens is 100 %, and only none is 0 %."""
        percent = round(100 * self.learnt / max(1, self.tokens))
        return f"{percent if self.learnt in (0, self.tokens) else min(max(percent, 1), 99)} %"

    def __str__(self) -> str:
        return f"Learning {self.share} of {self.tokens:,} tokens: {self.part}."


def what_is_learnt(trainer: Any, rows: Any) -> Learnt:
    """What a trainer learns from its training data, made of `rows`, after long rows have been cut."""
    if trainer.args.assistant_only_loss:
        part = "the answers"
    elif "prompt" in rows.column_names and trainer.completion_only_loss:
        part = "the completions"
    elif "messages" in rows.column_names:
        part = "all turns, the user's, too"
    else:
        part = "all of them"
    return Learnt(*learnt_tokens(trainer.train_dataset), part)
