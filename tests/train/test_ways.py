"""From the cost of a block to a whole run: sums that can be checked by hand, and which way is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from celora.settings.config import CELoraConfig
from celora.settings.presets import PRESETS
from celora.train.forecast.blocks import Cost, Line
from celora.train.forecast.peaks import Gpu
from celora.train.forecast.ways import Model, Rows, Way, best, epoch_seconds, least_seconds, peak_bytes, ways_of

COST = Cost(
    step={False: (Line(0.5, 0.001), Line(0.1, 0.002)), True: (Line(0.6, 0.001), Line(0.15, 0.0025))},
    weights=(1000.0, 100.0),
    trained=(0.0, 10.0),
    copies=(0.0, 25.0),
    kept=(2.0, 30.0),
    dense=0,
    itemsize=4,
    computes_in="float32",
    packed=False,
    head_in_8_bits=False,
)
MODEL = Model(blocks=8, hidden=4, intermediate=6, words=10, block_numbers=24, stand_in_words=5, tables=1, stored=4)
ROWS = Rows(count=10, tokens=200, labelled=100, longest=(40, 30, 20, 20))
CARD = Gpu(memory=8, bandwidth=1000.0, float32=10.0, bfloat16=100.0, int8=400.0)


def test_an_epoch_is_the_sum_of_its_micro_batches() -> None:
    # 5 micro-batches of 40 tokens. The head has 10 words, and was measured with 5.
    one = 0.5 + 2 * 0.001 * 40 + 8 * (0.1 + 0.002 * 40)
    assert epoch_seconds(COST, MODEL, ROWS, 2, checkpointing=False) == pytest.approx(5 * one)
    checkpointed = 0.6 + 2 * 0.001 * 40 + 8 * (0.15 + 0.0025 * 40)
    assert epoch_seconds(COST, MODEL, ROWS, 2, checkpointing=True) == pytest.approx(5 * checkpointed)


def test_the_peak_is_what_is_there_together() -> None:
    weights = 1000 + 8 * 100 + 5 * 4 * 4  # including the words that the stand-in lacks
    tokens = 2 * 40  # two rows, padded to the longest
    moment = max(2 * 8 * tokens * 10, 3 * tokens * 6 * 4)
    expected = weights + 4 * 80 + 200 + (2 + 8 * 30) * tokens + moment
    assert peak_bytes(COST, MODEL, ROWS, 2, checkpointing=False) == expected
    checkpointed = weights + 4 * 80 + 200 + (2 + 8 * 16 + 30) * tokens + moment
    assert peak_bytes(COST, MODEL, ROWS, 2, checkpointing=True) == checkpointed


def test_a_table_that_trains_is_a_copy_with_its_gradient_and_moments() -> None:
    both = peak_bytes(COST, replace(MODEL, trained_tables=2), ROWS, 2, checkpointing=True)
    assert both - peak_bytes(COST, MODEL, ROWS, 2, checkpointing=True) == 2 * 4 * 5 * 4 * 4


def test_a_refresh_de_quantises_a_weight_in_8_bits() -> None:
    held = replace(COST, dense=100_000)
    grown = peak_bytes(held, MODEL, ROWS, 2, checkpointing=True) - peak_bytes(COST, MODEL, ROWS, 2, checkpointing=True)
    assert grown == 100_000 + 3 * 80 * 6 * 4 - 2 * 8 * 80 * 10  # without it, the logits are the larger part


def test_a_head_in_8_bits_is_a_byte_a_number_of_all_words() -> None:
    in_8_bits = replace(COST, head_in_8_bits=True)
    with_it, without = (peak_bytes(cost, MODEL, ROWS, 2, checkpointing=True) for cost in (in_8_bits, COST))
    assert with_it - without == 10 * 4


def test_without_padding_only_tokens_count_and_logits_come_in_chunks() -> None:
    packed = replace(COST, packed=True)
    tokens = 70 * 17 / 16
    expected = 1880 + 320 + 200 + 242 * tokens + max(8 * int(tokens / 2) * 10, 3 * tokens * 24)
    assert peak_bytes(packed, MODEL, ROWS, 2, checkpointing=False) == pytest.approx(expected)


def test_loading_in_another_dtype_may_be_the_peak() -> None:
    small = replace(COST, kept=(0.0, 0.0), copies=(0.0, 0.0), trained=(0.0, 0.0))
    other = replace(MODEL, stored=2, words=5)
    short = replace(ROWS, longest=(1,))
    assert peak_bytes(small, other, short, 1, checkpointing=False) == 1800 * 1.5
    assert peak_bytes(small, replace(other, stored=4), short, 1, checkpointing=False) == 1800 + 2 * 8 * 5


def test_ways_are_named_and_in_all_combinations() -> None:
    found = ways_of(
        COST, MODEL, ROWS, 7, named=("int8", "float32", "fast"), config=PRESETS["fast"],
        batches=[(4, 1), (2, 2)], checkpointing=[False, True],
    )  # fmt: skip
    assert [(way.batch, way.accumulation, way.checkpointing) for way in found] == [
        (4, 1, False), (4, 1, True), (2, 2, False), (2, 2, True),
    ]  # fmt: skip
    assert found[2].peak_bytes == int(peak_bytes(COST, MODEL, ROWS, 2, checkpointing=False) + 7)
    assert found[2].settings == {
        "dtype": "float32",
        "base": "int8",
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }


def way(base: str, peak: int, seconds: float) -> Way:
    return Way(base, "float32", "auto", False, 8, 1, peak, seconds, seconds)


def test_the_fastest_that_fits_is_taken_and_8_bits_only_where_needed() -> None:
    ways = [way("float32", 100, 5.0), way("bfloat16", 60, 9.0), way("int8", 40, 3.0)]
    assert best(ways, None) == ways[0]
    assert best(ways, 105) == ways[0]  # a twentieth is to spare
    assert best(ways, 104) == ways[1]
    assert best(ways, 62) == ways[2]
    assert best(ways, 41) is None


def test_the_least_time_is_that_of_operations_or_of_bytes() -> None:
    frozen, head = 2 * 8 * 24 * 200, 2 * 4 * 10 * 200  # two operations for each number and token
    moved = 2 * 200 * (2 + 8 * 30)

    def seconds(checkpointing: bool, dtype: str, config: CELoraConfig, gpu: Gpu = CARD) -> float:
        cost = replace(COST, computes_in=dtype)
        return least_seconds(gpu, cost, MODEL, ROWS, config, checkpointing=checkpointing)

    assert seconds(False, "bfloat16", PRESETS["auto"]) == pytest.approx((2 * frozen + 2 * head) / 100)
    assert seconds(False, "float32", PRESETS["off"]) == pytest.approx((2 * frozen + 2 * head) / 10)
    assert seconds(True, "bfloat16", PRESETS["fast"]) == pytest.approx((3 * frozen + head) / 400 + 0.1 * head / 100)
    assert seconds(True, "bfloat16", PRESETS["fast"], replace(CARD, bandwidth=1.0)) == pytest.approx(moved)
    own = replace(PRESETS["fast"], head_keep_ratio=1.0)  # what the user has changed counts, and no name
    assert seconds(True, "bfloat16", own) == pytest.approx((3 * frozen + head) / 400 + head / 100)


def test_logits_of_labelled_tokens_only_where_padding_is_left_out() -> None:
    costs = (replace(COST, computes_in="bfloat16", packed=packed) for packed in (False, True))
    whole, packed = (least_seconds(CARD, cost, MODEL, ROWS, PRESETS["auto"], checkpointing=False) for cost in costs)
    assert whole - packed == pytest.approx(2 * 2 * 4 * 10 * (200 - 100) / 100)


def test_the_peak_does_not_depend_on_whose_time_it_is() -> None:
    given: dict[str, Any] = {"named": ("bfloat16", "bfloat16", "auto"), "config": PRESETS["auto"]}
    given |= {"batches": [(2, 4)], "checkpointing": [True]}
    (here,), (there,) = (ways_of(COST, MODEL, ROWS, 77, gpu=gpu, **given) for gpu in (None, CARD))
    assert here.peak_bytes == there.peak_bytes
    assert here.epoch_seconds != there.epoch_seconds
    assert (there.batch, there.accumulation, there.checkpointing) == (2, 4, True)
