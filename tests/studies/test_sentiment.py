"""The demo's task: held-out sentences stay held out. Rows have the form that training and judging expect."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from celora.errors import CELoraError
from celora.studies import sentiment
from celora.studies.assets import Review, demo_model, movie_reviews
from celora.studies.sentiment import Splits, label_of, splits, to_rows
from celora.studies.stock_eval import label_accuracy
from celora.train.rows.data import load_rows

REVIEWS = [Review(f"sentence {number}", score) for number in range(40) for score in [(-1) ** number * 1.5]]


def keys(reviews: list[Review]) -> set[str]:
    return {sentiment._normalised(review.text) for review in reviews}


@pytest.mark.usefixtures("real_assets")
def test_real_splits_share_no_sentence() -> None:
    parts = splits(0)
    assert (len(parts.validation), len(parts.test)) == (256, 1000)
    assert len(parts.train) > 7000
    everything = [*parts.train, *parts.validation, *parts.test]
    assert len(keys(everything)) == len(everything)
    assert all(abs(review.score) >= 1 for review in everything)
    for held in (parts.validation, parts.test):
        assert sum(label_of(review) == "positive" for review in held) == len(held) // 2


@pytest.mark.usefixtures("real_assets")
def test_only_the_training_order_depends_on_the_seed() -> None:
    first, second, again = splits(1), splits(2), splits(1)
    assert first == again
    assert (first.test, first.validation) == (second.test, second.validation)
    assert first.train != second.train
    assert keys(first.train) == keys(second.train)
    assert splits(1, train=100).train == first.train[:100]
    assert splits(1, validation=0).test == first.test


def test_splits_do_not_depend_on_the_order_of_the_file() -> None:
    shuffled = REVIEWS.copy()
    random.Random(0).shuffle(shuffled)
    assert splits(3, validation=4, test=8, reviews=shuffled) == splits(3, validation=4, test=8, reviews=REVIEWS)


def test_sentences_that_differ_in_form_only_are_one() -> None:
    same = [Review("A  Clich\u00e9!", 2.0), Review("a clich\u00e9", 3.0), Review("... A cliche\u0301 ...", 1.0)]
    torn = [Review("So so.", 1.0), Review("so, so", -1.0)]
    weak, empty = Review("Fine", 0.9), Review("...", 2.0)
    assert sentiment._distinct([*same, *torn, weak, empty]) == [same[0]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"test": 7}, "test=7; expected an even number"),
        ({"validation": -2}, "validation=-2; expected an even number"),
        ({"validation": 20, "test": 20}, "need 20 negative reviews, and training more; there are 20"),
        ({"validation": 4, "test": 8, "train": 29}, "train=29; expected 1 to 28 reviews"),
        ({"validation": 4, "test": 8, "train": 0}, "train=0; expected 1 to 28 reviews"),
    ],
)
def test_sizes_that_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(CELoraError, match=message):
        splits(0, reviews=REVIEWS, **sizes)


def test_splits_are_frozen_lists() -> None:
    parts = splits(0, train=5, validation=4, test=8, reviews=REVIEWS)
    assert isinstance(parts, Splits)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [5, 4, 8]


def test_rows_can_be_trained_on(tmp_path: Path) -> None:
    rows = to_rows([Review("Dull {text}.", -1.5), Review("Fun", 2.0)])
    assert [row["completion"][0]["content"] for row in rows] == ["negative", "positive"]
    assert "Dull {text}." in rows[0]["prompt"][-1]["content"]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    assert load_rows(path, chat=True, cache_dir=tmp_path / "cache").to_list() == rows


@pytest.mark.usefixtures("real_assets")
def test_the_untouched_model_knows_something() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32)
    held = splits(0, test=64).test
    score = label_accuracy(model, tokenizer, sentiment.to_rows(held))
    assert 0.6 < score < 0.95  # 64 sentences
    assert len(movie_reviews()) == 10605


@pytest.mark.usefixtures("real_assets")
def test_rows_are_short() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    chats = [
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        for row in to_rows(splits(0).test)
    ]
    lengths = [len(ids) for ids in tokenizer(chats, add_special_tokens=False)["input_ids"]]
    assert max(lengths) < 128
