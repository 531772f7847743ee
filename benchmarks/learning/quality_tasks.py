"""Eight small tasks for SmolLM2-135M, each with rows for training, validation and test, and with a way to score.

* sentiment of movie reviews, product reviews and tweets (rated by people, see `celora.studies.assets`): the share of
  sentences for which the right one of two labels has the larger logit;
* `chain_sum`, `family_relationships` and `number_filtering` of reasoning-gym (generated): exact match of the greedy
  answer, with the end of the turn. The untouched model answers in sentences, and gets no credit. So a part of what is
  learnt is to give only the answer;
* chat: questions about functions of the Python standard library, answered by the first paragraph of their docstring.
  The questions are made from a few templates, so this is instruction data in form, not conversation: held-out loss;
* text: pieces of the Python language reference, other topics held out: held-out loss, nats per token.

No row of validation or test is in training, whatever its case and spacing. The seed does not change which rows are held
out.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import random
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pydoc_data import topics
from types import ModuleType
from typing import Any

import torch

from celora.studies import sentiment
from celora.studies.assets import rated_sentences
from celora.studies.stock_eval import label_accuracy

VALIDATION, TEST, GENERATED_TEST = 100, 300, 1000
Row = dict[str, Any]
SENTIMENT = {"movie": "movie reviews", "product": "product reviews", "tweets": "tweets"}
GENERATED: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "family_relationships": {"max_family_size": 4},
    "number_filtering": {"min_numbers": 3, "max_numbers": 5, "max_decimals": 0},
}
MODULES = (  # noqa: SIM905  (a list would take a page)
    "argparse ast asyncio base64 bisect calendar cmath collections contextlib copy csv ctypes datetime decimal difflib "
    "dis email.utils fnmatch fractions functools gc glob gzip hashlib heapq hmac html imaplib inspect io ipaddress "
    "itertools json linecache locale logging math mimetypes operator os os.path pathlib pickle platform pprint random "
    "re secrets shlex shutil signal socket sqlite3 ssl statistics string struct subprocess sys tarfile tempfile "
    "textwrap threading time tokenize traceback types typing unicodedata unittest urllib.parse urllib.request uuid "
    "warnings weakref xml.etree.ElementTree zipfile zlib"
).split()
QUESTIONS = ("What does `{}` do?", "Explain Python's `{}`.", "What is `{}` for?")


@dataclass(frozen=True)
class Task:
    """Rows for `celora train`, and a function that scores a model on some of them.

    Attributes:
        train: more rows than any run uses.
        higher_is_better: accuracy rather than loss.
    """

    name: str
    metric: str
    higher_is_better: bool
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    judge: Callable[[Any, Any, Sequence[Row]], float]


NAMES = [*(f"sentiment-{kind}" for kind in SENTIMENT), *GENERATED, "chat", "text"]


@functools.cache
def task(name: str) -> Task:
    """The task of this name. Its data is fetched or generated."""
    if name.startswith("sentiment-"):
        kind = name.removeprefix("sentiment-")
        drawn = sentiment.splits(0, validation=VALIDATION, test=TEST, reviews=rated_sentences(kind))  # type: ignore[arg-type]
        system = f"Classify the sentiment of {SENTIMENT[kind]}."
        parts = [sentiment.to_rows(part, system=system) for part in (drawn.train, drawn.validation, drawn.test)]
        return Task(name, "accuracy", True, *parts, label_accuracy)
    if name in GENERATED:
        return Task(name, "exact match", True, *_split(_generated(name), GENERATED_TEST), exact_match)
    rows = _chat() if name == "chat" else _text()
    return Task(name, "loss, nats per token", False, *rows, loss)


def exact_match(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """The share of rows that greedy decoding answers exactly.

    Greedy decoding gives the answer exactly if each of its tokens, with the end of the turn, is the likeliest after the
    tokens before. So one forward over the right answers decides it, and nothing is generated.
    """
    return sum(bool((scores.argmax(-1) == ids).all()) for scores, ids in _answers(model, tokenizer, rows)) / len(rows)


def loss(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    """Mean negative log-likelihood of the labelled tokens."""
    found = [
        torch.nn.functional.cross_entropy(s.float(), i, reduction="sum") for s, i in _answers(model, tokenizer, rows)
    ]
    return float(sum(found)) / sum(len(ids) for _, ids in _encoded(tokenizer, rows))


def _encoded(tokenizer: Any, rows: Sequence[Row]) -> list[tuple[list[int], list[int]]]:
    """(context, labelled tokens) of each row, as token ids."""
    pairs = []
    for row in rows:
        if "text" in row:
            ids = tokenizer(row["text"])["input_ids"]
            pairs.append((ids[:1], ids[1:]))
            continue
        open_, whole = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering).rstrip()
            for messages, answering in ((row["prompt"], True), (row["prompt"] + row["completion"], False))
        )
        ids, context = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, open_ + "\n"))
        if ids[: len(context)] != context:
            raise ValueError("the chat template renders an answered chat differently from an open one")
        pairs.append((context, ids[len(context) :]))
    return pairs


@torch.inference_mode()
def _answers(model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int = 16) -> Iterable[tuple[Any, Any]]:
    """(logits, ids) of each row's labelled tokens, in the order of lengths. The model's mode does not change."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    pairs = sorted(_encoded(tokenizer, rows), key=lambda pair: len(pair[0]) + len(pair[1]))
    found = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        tokens = torch.zeros(len(batch), max(len(c) + len(a) for c, a in batch), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for i, (context, answer) in enumerate(batch):
            tokens[i, : len(context) + len(answer)] = torch.tensor(context + answer)
            mask[i, : len(context) + len(answer)] = 1
        first = min(len(context) for context, _ in batch) - 1
        logits = model(
            input_ids=tokens.to(device),
            attention_mask=mask.to(device),
            use_cache=False,
            # Not a number of them: that is a view, for which torch copies a frozen head once a row.
            logits_to_keep=torch.arange(first, tokens.shape[1], device=device),
        ).logits
        for i, (context, answer) in enumerate(batch):
            at = len(context) - 1 - first
            found.append((logits[i, at : at + len(answer)], torch.tensor(answer, device=device)))
    model.train(was_training)
    return found


def _row(question: str, answer: str) -> Row:
    chat = [{"role": "user", "content": question}]
    return {"prompt": chat, "completion": [{"role": "assistant", "content": answer}]}


def _generated(name: str) -> list[Row]:
    import reasoning_gym

    entries = reasoning_gym.create_dataset(name, seed=0, size=2500, **GENERATED[name])
    return [_row(entry["question"].strip(), str(entry["answer"])) for entry in entries]


def _chat() -> tuple[list[Row], list[Row], list[Row]]:
    found: dict[str, Row] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what is looked at on the way
        for module in map(importlib.import_module, MODULES):
            for path, thing in _public(module):
                answer = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
                if 20 <= len(answer) <= 400:
                    question = QUESTIONS[int(_digest(path), 16) % len(QUESTIONS)].format(path)
                    found.setdefault(_spelling(answer), _row(question, answer))
    return _split(list(found.values()))


def _public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions, classes and their methods, by dotted name."""
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or not callable(value):
            continue
        yield f"{module.__name__}.{name}", value
        if inspect.isclass(value):
            for method, thing in sorted(vars(value).items()):
                if not method.startswith("_"):
                    yield f"{module.__name__}.{name}.{method}", thing


def _text() -> tuple[list[Row], list[Row], list[Row]]:
    """Pieces of about 500 characters; a topic is in one part only."""
    parts: tuple[list[Row], list[Row], list[Row]] = ([], [], [])
    for topic in sorted(topics.topics, key=_digest):
        pieces = [""]
        for paragraph in topics.topics[topic].split("\n\n"):
            if len(pieces[-1]) + len(paragraph) > 500 and pieces[-1]:
                pieces.append("")
            pieces[-1] += paragraph.strip()[:500] + "\n\n"
        part = next((i for i, most in ((2, TEST // 4), (1, VALIDATION // 4)) if len(parts[i]) < most), 0)
        parts[part].extend({"text": piece} for piece in pieces if len(piece) > 100)
    seen = {_spelling(row["text"]) for part in parts[1:] for row in part}
    return [row for row in parts[0] if _spelling(row["text"]) not in seen], parts[1], parts[2]


def _split(rows: list[Row], test: int = TEST) -> tuple[list[Row], list[Row], list[Row]]:
    """Training, validation and test rows; each question once, in an order that only depends on the questions."""
    distinct = {_spelling(row["prompt"][-1]["content"]): row for row in reversed(rows)}
    ordered = [distinct[key] for key in sorted(distinct, key=_digest)]
    return ordered[test + VALIDATION :], ordered[test : test + VALIDATION], ordered[:test]


def shuffled(rows: Sequence[Row], seed: int, count: int) -> list[Row]:
    """`count` rows in the seed's order. If there are too few, they are repeated."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[order[i % len(order)]] for i in range(count)]


def _spelling(text: str) -> str:
    return re.sub(r"\s+", " ", text.casefold()).strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
