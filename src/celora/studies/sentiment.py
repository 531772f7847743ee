"""The demo's task: is a sentence of a movie review positive or negative?

Sentences with a clear rating (at least 1 away from neutral) become questions with a one-word answer. Only its text
decides whether a sentence is held out, never the seed. So runs with different seeds are judged on the same sentences.
No held-out sentence is in the training set, not even with other case, spacing or punctuation.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from celora.errors import CELoraError
from celora.studies.assets import Review, movie_reviews
from celora.studies.stock_eval import LABELS

# Of eight wordings, the untouched model does best with this one.
SYSTEM = "Classify the sentiment of movie reviews."
QUESTION = "{text}\nSentiment:"


@dataclass(frozen=True)
class Splits:
    """Three lists of reviews without a common sentence. Half of test, and half of validation, is positive."""

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
    """Split the reviews. Every seed holds out the same ones. It shuffles the rest, and keeps `train` of it.

    Of sentences that differ only in case, spacing or punctuation, the first stays. If their labels disagree, none
    stays. `reviews` are the movie reviews unless given.

    Raises CELoraError for odd or negative held-out sizes, or if there are fewer reviews than asked for.
    """
    for name, size in (("validation", validation), ("test", test)):
        if size < 0 or size % 2:
            raise CELoraError(f"{name}={size}; expected an even number of reviews, half of them positive.")
    usable = _distinct(movie_reviews(say) if reviews is None else reviews)
    reserved = (validation + test) // 2  # of each label
    by_label = {label: [review for review in usable if label_of(review) == label] for label in LABELS}
    for label, found in by_label.items():
        if len(found) <= reserved:
            raise CELoraError(
                f"validation={validation} and test={test} need {reserved} {label} reviews, and training more; there "
                f"are {len(found)}. Ask for fewer."
            )
    # test comes first in this order, so the size of validation does not change it.
    tested = [review for found in by_label.values() for review in found[: test // 2]]
    validated = [review for found in by_label.values() for review in found[test // 2 : reserved]]
    rest = [review for found in by_label.values() for review in found[reserved:]]
    if train is not None and not 0 < train <= len(rest):
        raise CELoraError(f"train={train}; expected 1 to {len(rest)} reviews, or None for all.")
    random.Random(seed).shuffle(rest)
    return Splits(train=rest[:train], validation=validated, test=tested)


def label_of(review: Review) -> str:
    """'positive' or 'negative', by the sign of the human rating."""
    return "positive" if review.score > 0 else "negative"


def to_rows(reviews: Iterable[Review], *, system: str = SYSTEM) -> list[dict[str, Any]]:
    """Chat rows for SFTTrainer: the question is the prompt, the label is the completion."""
    return [
        {
            "prompt": [
                {"role": "system", "content": system},
                {"role": "user", "content": QUESTION.format(text=review.text)},
            ],
            "completion": [{"role": "assistant", "content": label_of(review)}],
        }
        for review in reviews
    ]


def _normalised(text: str) -> str:
    return re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()


def _distinct(reviews: Iterable[Review]) -> list[Review]:
    """Clearly rated reviews, each sentence once, in an order that only depends on the sentences."""
    groups: dict[str, list[Review]] = {}
    for review in reviews:
        if abs(review.score) >= 1 and (key := _normalised(review.text)):
            groups.setdefault(key, []).append(review)
    agreed = {key: same[0] for key, same in groups.items() if len({label_of(review) for review in same}) == 1}
    return [agreed[key] for key in sorted(agreed, key=lambda key: hashlib.sha256(key.encode()).digest())]
