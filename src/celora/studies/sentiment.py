"""The demo's task: is a sentence of a movie review positive or negative?

Sentences with a clear rating (at least 1 away from neutral) become one-word questions. A sentence's text alone decides
whether it is held out, never the seed. No held-out sentence is in the training set, not even with other case, spacing
or punctuation. So runs with different seeds are judged on the same, unseen sentences.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from celora.errors import CELoraError
from celora.studies.assets import Review, movie_reviews
from celora.studies.stock_eval import LABELS, label_accuracy

# The untouched model does best with this wording on the validation sentences: benchmarks/learning/demo_choices.py.
SYSTEM = "Classify the sentiment of movie reviews."
QUESTION = "{text}\nSentiment:"


@dataclass(frozen=True)
class Splits:
    """Three lists of reviews that share no sentence; test and validation hold as many positive as negative ones."""

    train: list[Review]
    validation: list[Review]
    test: list[Review]


def splits(
    seed: int,
    *,
    train: int | None = None,
    validation: int = 256,
    test: int = 1000,
    reviews: Iterable[Review] | None = None,
    say: Callable[[str], None] | None = None,
) -> Splits:
    """Held-out reviews, the same for every seed, and the rest (or `train` of it) in an order drawn from the seed.

    If sentences differ only in case, spacing or punctuation, the first stays; if their labels disagree, none does.
    `reviews` are the movie reviews unless given.

    Raises CELoraError for odd or negative held-out sizes, or if there are fewer reviews than asked for.
    """
    for name, size in (("validation", validation), ("test", test)):
        if size < 0 or size % 2:
            raise CELoraError(f"{name}={size}; expected an even number of reviews, half of them positive.")
    usable = _distinct(movie_reviews(say) if reviews is None else reviews)
    held = (validation + test) // 2
    by_label = {label: [review for review in usable if label_of(review) == label] for label in LABELS}
    for label, found in by_label.items():
        if len(found) <= held:
            raise CELoraError(
                f"validation={validation} and test={test} need {held} {label} reviews, and training more; there are "
                f"{len(found)}. Ask for fewer."
            )
    # test comes first in this order, so the size of validation does not change it.
    tested = [review for found in by_label.values() for review in found[: test // 2]]
    validated = [review for found in by_label.values() for review in found[test // 2 : held]]
    rest = [review for found in by_label.values() for review in found[held:]]
    if train is not None and not 0 < train <= len(rest):
        raise CELoraError(f"train={train}; expected 1 to {len(rest)} reviews, or None for all.")
    random.Random(seed).shuffle(rest)
    return Splits(train=rest[:train], validation=validated, test=tested)


def label_of(review: Review) -> str:
    """'positive' or 'negative', by the sign of the human rating."""
    return "positive" if review.score > 0 else "negative"


def to_rows(
    reviews: Iterable[Review], *, system: str | None = None, question: str | None = None
) -> list[dict[str, Any]]:
    """Chat rows as SFTTrainer takes them: a short question as the prompt, the label as the completion."""
    return [
        {
            "prompt": [
                {"role": "system", "content": system or SYSTEM},
                {"role": "user", "content": (question or QUESTION).format(text=review.text)},
            ],
            "completion": [{"role": "assistant", "content": label_of(review)}],
        }
        for review in reviews
    ]


def accuracy(model: Any, tokenizer: Any, reviews: Sequence[Review], batch_size: int = 32) -> float:
    """The share of reviews for which the model prefers the right label; see `stock_eval.label_accuracy`."""
    return label_accuracy(model, tokenizer, to_rows(reviews), batch_size=batch_size)


def _normalised(text: str) -> str:
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _distinct(reviews: Iterable[Review]) -> list[Review]:
    """Clearly rated reviews, each sentence once, in an order that depends on the sentences alone."""
    groups: dict[str, list[Review]] = {}
    for review in reviews:
        if abs(review.score) >= 1 and (key := _normalised(review.text)):
            groups.setdefault(key, []).append(review)
    agreed = {key: same[0] for key, same in groups.items() if len({label_of(review) for review in same}) == 1}
    return [agreed[key] for key in sorted(agreed, key=lambda key: hashlib.sha256(key.encode()).digest())]
