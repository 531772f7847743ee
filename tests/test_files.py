from __future__ import annotations

from pathlib import Path

import pytest

from celora.errors import CELoraError
from celora.files import inside, read_json, write_text


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "[1]")
    write_text(tmp_path / "a.json", "[2]")
    assert read_json(tmp_path / "a.json") == [2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert inside(tmp_path, "a.json") == inside(tmp_path / "a.json", "b") == tmp_path / "a.json"


@pytest.mark.parametrize(
    ("content", "message"), [(b'{\n"a": }', ":2: not JSON"), (b"\xff", "not JSON"), (b"[" * 100_000, "not JSON")]
)
def test_what_is_not_json_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CELoraError, match=message):
        read_json(tmp_path / "a.json")
    with pytest.raises(CELoraError, match="No such file"):
        read_json(tmp_path / "none.json")
