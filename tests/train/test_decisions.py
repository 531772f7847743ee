"""What a run says of its decisions, on the terminal and in its report."""

from __future__ import annotations

from typing import Any

import pytest

from celora.files import read_json, write_json
from celora.train.decisions import decision_rows, estimator_rows, rank_line
from celora.train.report import make_page
from celora.train.request.arguments import make_request
from reports import run_folder

GATE = {"layers": "q_proj, o_proj", "count": 60, "shape": [576, 576], "dtype": "torch.float32", "tokens": 512,
        "over_exact": {"tokens x int8": 0.612, "tokens x native": 0.9}, "chosen": "tokens x int8"}  # fmt: skip
MOVES = [
    {"step": step, "layer": layer, "kept": 0.9997, "keeps": keeps, "relative_error": 0.06}
    for step, layer, keeps in ((3, "m.0.q_proj", 1.0), (3, "m.1.q_proj", 1), (3, "head", 0.3), (200, "m.0.k_proj", 1.0))
]
RECORD: dict[str, Any] = {
    "config": {"estimator": "dense", "head_keep_ratio": 0.3, "overrides": {}},
    "settled": {"estimator": "tokens", "head_keep_ratio": 1.0, "overrides": {
        "=m.0.v_proj": {"estimator": "dense"}, "=m.1.v_proj": {"estimator": "dense"}, "up_proj": {"keep_ratio": 0.9}}},
    "gate": [GATE],
    "moves": MOVES,
}  # fmt: skip


def test_the_configuration_that_trained_is_told_and_layers_named_alone_are_counted() -> None:
    rows = estimator_rows(RECORD)
    expected: dict[str, Any] = {"estimator": "tokens", "head_keep_ratio": 1.0, "up_proj": "keep_ratio 0.9"}
    assert rows == expected | {"layers with estimator dense": 2}
    assert estimator_rows({}) == {}


def test_what_was_decided_and_when() -> None:
    assert decision_rows(RECORD) == {
        "before the first step: 60 x q_proj, o_proj, [576, 576]": "tokens x int8 (time over exact: tokens x int8 0.61, "
        "tokens x native 0.90)",
        "from step 3 on": "2 x q_proj exact, 1 x head keeps 0.3",
        "from step 200 on": "1 x k_proj exact",
    }
    assert decision_rows({}) == {}


def test_kinds_of_layers_that_differ_in_their_dtype_only_are_both_told() -> None:
    other = GATE | {"dtype": "torch.bfloat16", "chosen": "exact"}
    assert [*decision_rows({"gate": [GATE, other]}).values()] == [
        "tokens x int8 (time over exact: tokens x int8 0.61, tokens x native 0.90); "
        "exact (time over exact: tokens x int8 0.61, tokens x native 0.90)"
    ]


def test_the_report_shows_both(tmp_path) -> None:
    folder = run_folder(tmp_path)
    write_json(folder / "run.json", read_json(folder / "run.json") | RECORD)
    page = make_page({"run": folder})
    for cell in ("layers with estimator dense", "from step 200 on", "2 x q_proj exact, 1 x head keeps 0.3"):
        assert cell in page


@pytest.mark.parametrize(
    "damage",
    [
        {"gate": [3, {"over_exact": "fast"}, {"over_exact": {"x": "y"}}], "moves": []},
        {"gate": "none", "moves": [{}, 1, {"step": [], "keeps": 1}, {"step": 1, "keeps": "x"}]},
        {"settled": {"overrides": []}, "moves": None, "gate": None},
        {"settled": {"overrides": {"a": 1}}, "moves": {}, "gate": {}},
    ],
)
def test_what_cannot_be_read_is_left_out(damage: dict[str, Any]) -> None:
    assert decision_rows(damage) == {}
    assert estimator_rows(damage) == {}


def test_the_lines_of_a_run(tmp_path) -> None:
    asked = {"model": "m", "data": "d", "output": str(tmp_path), "preset": "off", "lora_r": 16}
    assert rank_line(make_request(asked)) == "LoRA r = 16."
    assert "LoRA r = frozen factor r0 = 14" in rank_line(make_request(asked | {"preset": "paper"}))
