"""A run counts what is cut off, and says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from celora.errors import CELoraError
from celora.train.rows.truncation import _positions
from runs import go


def rows(path, lengths, **more):
    """Prompts of 2 words, with completions that give these lengths, including the end of the text."""
    lines = [{"prompt": "w1 w2", "completion": " " + "w3 " * (n - 3)} for n in lengths]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data": str(path), "max_steps": 1, "save_strategy": "no", **more}


def test_what_does_not_fit_is_counted(inputs, tmp_path):
    given = rows(tmp_path / "rows.jsonl", [8, 9, 10, 15, 8], max_length=8, quiet=True)
    _, text = go({**inputs, **given}, tmp_path / "out")
    assert "3 of 5 rows are longer than max_length=8: 10 of 50 tokens are cut off. A larger" in text
    given = rows(tmp_path / "rows.jsonl", [8, 9, 10, 15, 8], max_length=8)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines.append(json.dumps({"prompt": "w1 " * 11 + "w2", "completion": " w3"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    _, text = go({**inputs, **given}, tmp_path / "b")
    assert "4 of 6 rows" in text
    assert "and 1 rows have nothing to learn left and are not used" in text


@pytest.mark.parametrize(
    ("strategy", "said"), [("bfd", "2 of 4 rows are longer than max_length=8: 9 of 41 tokens are cut off. A larger"),
                           ("bfd_split", ""), ("wrapped", "")]
)  # fmt: skip
def test_what_packing_cuts_off_is_counted_too(strategy, said, inputs, tmp_path):
    given = rows(tmp_path / "rows.jsonl", [8, 10, 15, 8], max_length=8, quiet=True)
    _, text = go({**inputs, **given}, tmp_path / "out", packing=True, packing_strategy=strategy, eval_packing=False)
    assert text.startswith(said) if said else text == ""


def test_rows_to_evaluate_on_are_counted_for_themselves(inputs, tmp_path):
    given = rows(tmp_path / "rows.jsonl", [8, 8], max_length=8, quiet=True)
    test = rows(tmp_path / "test.jsonl", [8, 9, 12])["data"]
    _, text = go({**inputs, **given}, tmp_path / "out", eval_data=test)
    assert text.startswith("2 of 3 rows to evaluate on are longer than max_length=8: 5 of 29 tokens are cut off.")
    (tmp_path / "test.jsonl").write_text(json.dumps({"prompt": "w1 " * 11 + "w2", "completion": " w3"}))
    with pytest.raises(CELoraError, match=r"no row of .*test\.jsonl' has a token to learn within max_length=8"):
        go({**inputs, **given}, tmp_path / "b", eval_data=test)


def test_rows_beyond_the_model_s_positions_are_counted(inputs, tmp_path):
    config = Path(inputs["model"]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 9}))
    given = rows(tmp_path / "rows.jsonl", [8, 9, 10, 15], max_length=12, quiet=True)
    _, text = go({**inputs, **given}, tmp_path / "out")
    cut, beyond = text.strip().splitlines()
    assert cut.startswith("1 of 4 rows are longer than max_length=12")
    assert beyond == (
        "2 of 4 rows have more tokens than the 9 positions that the model was made for. --max_length 9 cuts them."
    )


@pytest.mark.parametrize(
    ("own", "known"),
    [
        ({"max_position_embeddings": 9}, 9), ({"max_position_embeddings": -1}, None), ({}, None),
        ({"max_position_embeddings": 9, "rope_parameters": {"rope_type": "default"}}, 9),
        ({"max_position_embeddings": 9, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, None),
        ({"max_position_embeddings": 9, "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"max_position_embeddings": 9, "rope_parameters": {"sliding": {"rope_type": "linear"}}}, None),
    ],
)  # fmt: skip
def test_a_scaled_rotation_reaches_further(own, known):
    assert _positions(SimpleNamespace(**own)) == (known or sys.maxsize)


def test_nothing_is_said_where_all_fits(inputs, tmp_path):
    given = rows(tmp_path / "rows.jsonl", [8, 7, 8], max_length=8, quiet=True)
    _, text = go({**inputs, **given}, tmp_path / "out")
    assert text == ""
