"""What is cut off is counted and said."""

from __future__ import annotations

import json

import pytest

from test_run import go, inputs  # noqa: F401 - a fixture


def rows(path, lengths, **more):
    """Prompts of 2 words and completions that make up the given lengths, the end of the text included."""
    lines = [{"prompt": "w1 w2", "completion": " " + "w3 " * (n - 3)} for n in lengths]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"data": str(path), "max_steps": 1, "save_strategy": "no", **more}


@pytest.mark.fault(
    "input",
    "conversations longer than --max_length",
    sees="how many rows and tokens are cut off, and how many rows have nothing to learn left; even with --quiet",
    kept="what fits; `--max_length` keeps more",
)
def test_what_does_not_fit_is_counted(inputs, tmp_path):  # noqa: F811
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


def test_nothing_is_said_where_all_fits(inputs, tmp_path):  # noqa: F811
    given = rows(tmp_path / "rows.jsonl", [8, 7, 8], max_length=8, quiet=True)
    _, text = go({**inputs, **given}, tmp_path / "out")
    assert text == ""
