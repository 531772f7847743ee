"""Generates text with a trained adapter, or with its untouched base model: one conversation, or batches of prompts.

Transformers generates. Prompts go through the tokenizer's chat template. Without a template, or with `raw`, the model
gets the prompt unchanged. Nothing is sent anywhere.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import TextStreamer, set_seed

from celora.errors import CELoraError
from celora.train.rows.data import Instruction
from celora.train.rows.template import check_text_is_rendered
from celora.train.use.trained import Trained

Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. The same seed gives the same answers on the same machine.

    `temperature`: None leaves it to the model's own generation_config.json; 0 takes the likeliest token.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        """The arguments of Transformers' `generate`."""
        found: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            found |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif self.temperature is not None:
            found |= {"do_sample": True, "temperature": self.temperature}
        return found


@dataclass
class Conversation:
    """A conversation with the adapter, or with its base model (`base`). It keeps its history in `turns`.

    Without a chat template there are no turns: every prompt is completed by itself.
    """

    trained: Trained
    sampling: Sampling
    base: bool = False
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.system is not None and not self.has_turns:
            raise CELoraError(
                "--system needs the chat template, and prompts come without it here; leave it out, or add --template"
            )

    @property
    def has_turns(self) -> bool:
        return bool(self.trained.tokenizer.chat_template) and not self.trained.raw

    def ask(self, prompt: str, say: Callable[[str], object] = lambda _: None) -> str:
        """Return the answer, and give it to `say` piece by piece. Ctrl-C ends the answer early.

        Raises:
            CELoraError: the conversation is longer than the model's context, or the chat template refuses it.
            KeyboardInterrupt: on Ctrl-C, after the answer so far has been added to the history.
        """
        told: list[str] = []

        def hear(text: str) -> None:
            told.append(text)
            say(text)

        asked: Prompt = prompt
        if self.has_turns:
            system = [] if self.system is None else [{"role": "system", "content": self.system}]
            before = self.turns or system
            asked = [*before, {"role": "user", "content": prompt}]
        tokens = encode(self.trained.tokenizer, asked, raw=self.trained.raw)
        interrupted: KeyboardInterrupt | None = None
        try:
            generate(self.trained, [tokens], self.sampling, base=self.base, streamer=_Streamer(self.trained, hear))
        except KeyboardInterrupt as error:
            interrupted = error
        answer = "".join(told)
        if isinstance(asked, list):
            self.turns = [*asked, {"role": "assistant", "content": answer}]
        if interrupted is not None:
            raise interrupted
        return answer

    def forget(self) -> None:
        """Forget the history, and begin a new conversation."""
        self.turns = []


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Gives each finished piece of text to `hear`, where Transformers' streamer would print it."""

    def __init__(self, trained: Trained, hear: Callable[[str], object]) -> None:
        super().__init__(trained.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.hear = hear

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.hear(text)


def answers(
    trained: Trained, prompts: Sequence[Prompt], sampling: Sampling, *, base: bool = False, first: int = 0
) -> list[str]:
    """One answer for each prompt, generated in one batch. A prompt that leaves less room has a batch of its own.

    `first`: the number of the first prompt among all. Each batch has draws of its own.
    """
    tokens = [encode(trained.tokenizer, prompt, raw=trained.raw) for prompt in prompts]
    room = {i: _room(trained.model, [row], sampling) for i, row in enumerate(tokens)}
    whole = [i for i in room if room[i] == sampling.max_new_tokens]
    made: dict[int, str] = {}
    for batch in filter(None, [whole, *([i] for i in room if i not in whole)]):
        draws = replace(sampling, seed=zlib.crc32(f"{sampling.seed} {first + batch[0]}".encode()))
        new = generate(trained, [tokens[i] for i in batch], draws, base=base)
        made |= zip(batch, trained.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True)
    return [str(made[i]) for i in room]


def encode(tokenizer: Any, prompt: Prompt, *, raw: bool = False) -> list[int]:
    """The tokens of a prompt. The chat template renders it, a string as a user's message, unless `raw`.

    Without the template, an instruction ends as in training.
    """
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    if any(re.search("[\ud800-\udfff]", text) for text in texts):  # bytes of a terminal or a file that are not UTF-8
        raise CELoraError("the prompt is not UTF-8 text; save its file, or set the terminal, as UTF-8")
    if tokenizer.chat_template and not raw and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        tokens = _begun(tokenizer, prompt.as_text() if isinstance(prompt, Instruction) else prompt)
    elif not tokenizer.chat_template:
        raise CELoraError("the tokenizer has no chat template, so it takes no conversations; give a prompt as text")
    else:
        try:
            tokens = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        except Exception as error:  # jinja2's, or any that the template's own expressions raise
            raise CELoraError(f"the chat template refuses this conversation: {error}") from error
        check_text_is_rendered({"messages": prompt}, tokenizer)
    if not tokens:
        raise CELoraError("the prompt holds no tokens; give some text")
    return list(tokens)


def _begun(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that goes on: with what the tokenizer puts before it, without an end."""
    whole, own = list(tokenizer(text)["input_ids"]), list(tokenizer(text, add_special_tokens=False)["input_ids"])
    first = next((at for at in range(len(whole)) if whole[at : at + len(own)] == own), len(whole) - len(own))
    return whole[: first + len(own)] if own else whole


def generate(
    trained: Trained, prompts: Sequence[list[int]], sampling: Sampling, *, base: bool = False, streamer: Any = None
) -> list[Any]:
    """The new tokens of each prompt: a tensor (longest answer,), padded after the end of shorter ones."""
    model, tokenizer = trained.model, trained.tokenizer
    room = _room(model, prompts, sampling)
    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    rows, ones = ([torch.tensor(row) for row in prompts], [torch.ones(len(row), dtype=torch.long) for row in prompts])
    inputs = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left").to(model.device)
    mask = pad_sequence(ones, batch_first=True, padding_side="left").to(model.device)
    arguments = sampling.arguments() | {"max_new_tokens": room, "pad_token_id": pad, "eos_token_id": ends or None}
    # One answer to a prompt, as numbers, whatever the model's generation_config.json asks for.
    arguments |= {"num_return_sequences": 1, "return_dict_in_generate": False, "tokenizer": tokenizer}
    if streamer is not None:
        arguments["num_beams"] = 1
    set_seed(sampling.seed)
    with torch.inference_mode(), _adapter(model, off=base):
        try:
            made = model.generate(input_ids=inputs, attention_mask=mask, streamer=streamer, **arguments)
        except ValueError as error:  # Transformers', of settings that it refuses
            raise CELoraError(f"the model's generation_config.json and these options do not work: {error}") from error
    return list(made[:, inputs.shape[1] :])


def check_length(trained: Trained, prompt: Prompt) -> None:
    """Raise CELoraError if a prompt leaves no room for an answer, or if `encode` refuses it."""
    _room(trained.model, [encode(trained.tokenizer, prompt, raw=trained.raw)], Sampling())


def _room(model: Any, prompts: Sequence[list[int]], sampling: Sampling) -> int:
    """How many new tokens the longest prompt leaves room for, `max_new_tokens` at most."""
    longest, context = max(map(len, prompts)), _context(model)
    if context is None:
        return sampling.max_new_tokens
    if longest >= context:
        raise CELoraError(
            f"{longest} tokens, and the model's context holds {context}; shorten the prompt, or leave it out. In a "
            "chat, /reset begins anew"
        )
    return min(sampling.max_new_tokens, context - longest)


@contextlib.contextmanager
def _adapter(model: Any, *, off: bool) -> Iterator[None]:
    if not off:
        yield
        return
    with model.disable_adapter():
        yield


def check_base(trained: Trained) -> None:
    """Raise CELoraError if training changed the base model's own biases: then there is no untouched model to show."""
    bias = trained.model.peft_config[trained.model.active_adapter].bias
    if bias != "none":
        raise CELoraError(
            f"--base shows the untouched model, and bias={bias!r} has trained biases of the model's own; leave it out"
        )


def _context(model: Any) -> int | None:
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length else None


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's own, and the tokenizer's, which ended answers in training."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = own if isinstance(own, list) else [own]
    return sorted({int(end) for end in [*found, tokenizer.eos_token_id] if end is not None})
