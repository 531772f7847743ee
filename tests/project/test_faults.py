"""docs/use/faults.md agrees with the markers of the tests, and the tests exist."""

from __future__ import annotations

import pytest

from faults import DOC, faults, page


def test_the_page_is_written_from_the_tests():
    assert DOC.read_text(encoding="utf-8") == page(list(faults())), "run: python tests/helpers/faults.py"


def test_rows_are_read_from_markers_and_wrong_ones_refused(tmp_path):
    mark = "@pytest.mark.fault"
    (tmp_path / "test_a.py").write_text(
        f'{mark}("input", "a | b", sees="one " "line", kept="all")\n{mark}("crash", "c", sees="d", kept="e")\n'
        "def test_x(): ...\n"
    )
    rows = list(faults(tmp_path))
    assert [(row.area, row.fault, row.sees, row.test) for row in rows] == [
        ("input", "a | b", "one line", "test_a.py::test_x"),
        ("crash", "c", "d", "test_a.py::test_x"),
    ]
    assert "| a \\| b | one line | all | `test_a.py::test_x` |" in page(rows)
    (tmp_path / "test_a.py").write_text(f'{mark}("inptu", "a", sees="b", kept="c")\ndef test_x(): ...\n')
    with pytest.raises(ValueError, match="area 'inptu'; expected one of crash"):
        list(faults(tmp_path))
