from __future__ import annotations

import os
from pathlib import Path

import pytest

from celora.errors import CELoraError
from celora.files import inside, read_json, write_text
from celora.train.data import load_rows
from celora.train.yaml_file import read_document


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "[1]")
    write_text(tmp_path / "a.json", "[2]")
    assert read_json(tmp_path / "a.json") == [2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert inside(tmp_path, "a.json") == inside(tmp_path / "a.json", "b") == tmp_path / "a.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n"a": }', ":2: not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'[{"a": {"b": 1, "c": 2, "b": 1}}]', "the key 'b' comes twice in one object"),
    ],
)
def test_what_is_not_json_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(CELoraError, match=message):
        read_json(tmp_path / "a.json")
    with pytest.raises(CELoraError, match="No such file"):
        read_json(tmp_path / "none.json")


@pytest.mark.fault(
    "input",
    "a pipe or a device, or a link to one, as data, configuration, plan or record of a run",
    sees="`a pipe or a device; expected a file`",
    kept="everything: nothing waits for ever, nothing is read without end",
)
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("read", [read_json, read_document, load_rows])
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_what_is_neither_file_nor_folder_is_not_opened(tmp_path: Path, what: str, read) -> None:
    path = tmp_path / "rows.jsonl"
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CELoraError, match="a pipe or a device; expected a file"):
        read(path, **({"chat": False} if read is load_rows else {}))
