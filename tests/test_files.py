from __future__ import annotations

import errno
import json
import os
import stat
from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from celora import files
from celora.errors import CELoraError
from celora.files import clear, inside, json_lines, read_json, replacing_folder, write_text
from celora.train.request.yaml_file import read_document
from celora.train.rows.data import load_rows
from small import written_whole


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "[1]")
    write_text(tmp_path / "a.json", "[2]")
    assert read_json(tmp_path / "a.json") == [2]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert inside(tmp_path, "a.json") == inside(tmp_path / "a.json", "b") == tmp_path / "a.json"


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_it_counts(tmp_path: Path, disk) -> None:
    write_text(tmp_path / "a.json", "[1]")
    assert disk == written_whole(tmp_path / "a.json")


def test_on_windows_a_file_that_another_program_reads_is_replaced_a_little_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refusals = os.replace, []

    def replace(*paths: Path) -> None:
        if len(refusals) < 2:
            refusals.append(paths)
            raise PermissionError(errno.EACCES, "Access is denied")
        real(*paths)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(CELoraError, match="Access is denied; what was there is unchanged"):
        write_text(tmp_path / "a.json", "[1]")
    monkeypatch.setattr(files, "_WINDOWS", True)
    write_text(tmp_path / "a.json", "[2]")
    assert read_json(tmp_path / "a.json") == [2]
    refusals.clear()
    monkeypatch.setattr(files, "_PATIENCE_S", 0.0)
    with pytest.raises(CELoraError, match="Access is denied; what was there is unchanged"):
        write_text(tmp_path / "a.json", "[3]")


def test_folders_that_cannot_be_flushed_are_no_reason_to_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a virtual machine shares with its host, for example. A file that cannot be flushed is one."""
    real = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) or failing:
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    failing = False
    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a.json", "[1]")
    failing = True
    with pytest.raises(CELoraError, match="Invalid argument; what was there is unchanged"):
        write_text(tmp_path / "a.json", "[2]")
    assert read_json(tmp_path / "a.json") == [1]


@pytest.mark.parametrize(("windows", "shown"), [(False, "'my runs/out'"), (True, '"my runs/out"')])
def test_a_path_is_shown_as_the_shell_takes_it(windows: bool, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WINDOWS", windows)
    assert files.quoted(Path("my runs/out")) == shown
    assert files.quoted("out") == "out"
    assert files.quoted("a&b") != "a&b"
    if windows:
        assert files.quoted(r"C:\runs\out-1") == r"C:\runs\out-1"


def test_what_stands_under_the_temporary_name_is_neither_written_through_nor_kept(tmp_path: Path) -> None:
    """A link at the temporary name is replaced, and so is a killed process's file. A folder stays."""
    (tmp_path / "thesis.tex").write_text("years")
    (tmp_path / ".a.json.tmp").symlink_to(tmp_path / "thesis.tex")
    write_text(tmp_path / "a.json", "[1]")
    (tmp_path / ".a.json.tmp").write_text("[1, 2, 3")
    write_text(tmp_path / "a.json", "[2]")
    assert (read_json(tmp_path / "a.json"), (tmp_path / "thesis.tex").read_text()) == ([2], "years")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.json", "thesis.tex"]
    assert not (tmp_path / "a.json").is_symlink()
    (tmp_path / ".a.json.tmp").mkdir()
    with pytest.raises(CELoraError, match=r"cannot write .*a\.json.*; what was there is unchanged"):
        write_text(tmp_path / "a.json", "[3]")
    assert read_json(tmp_path / "a.json") == [2]


def _stop_in_the_middle(path: Path) -> None:
    with replacing_folder(path) as new:
        assert list(new.iterdir()) == []
        (new / "c").write_text("half")
        raise KeyboardInterrupt


def test_numpys_error_of_a_full_disk_says_what_it_may_be(tmp_path: Path) -> None:
    def write() -> None:
        with replacing_folder(tmp_path / "made"):
            raise OSError("69632 requested and 52800 written")  # as `ndarray.tofile` does

    with pytest.raises(CELoraError, match=r"and 52800 written bytes: is the disk full\?; what was there is unchanged"):
        write()


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made"
    with replacing_folder(path) as new:
        (new / "a").write_text("1")
        assert not path.exists()
    with replacing_folder(path) as new:
        (new / "b").write_text("2")
        assert (path / "a").read_text() == "1"
    assert [entry.name for entry in path.iterdir()] == ["b"]
    with pytest.raises(KeyboardInterrupt):
        _stop_in_the_middle(path)
    assert [entry.name for entry in tmp_path.rglob("*")] == ["made", "b"]
    with pytest.raises(CELoraError, match=r"cannot write .*; what was there is unchanged"), replacing_folder(path):
        raise OSError("full")
    assert (path / "b").read_text() == "2"


def test_a_folder_comes_back_whose_process_died_while_it_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "made"
    (tmp_path / ".made.replaced").mkdir()
    (tmp_path / ".made.tmp").mkdir()
    (tmp_path / ".made.tmp" / "half").write_text("")
    with pytest.raises(KeyboardInterrupt):
        _stop_in_the_middle(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("what", ["file", "folder", "link", "link to nothing", "nothing"])
def test_clear_removes_a_link_and_not_what_it_points_to(tmp_path: Path, what: str) -> None:
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "path"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_text("years")
    if what == "folder":
        path.mkdir()
        (path / "link").symlink_to(elsewhere)
    elif what == "file":
        path.write_text("")
    elif what.startswith("link"):
        path.symlink_to(elsewhere if what == "link" else tmp_path / "nowhere")
    clear(path)
    assert not os.path.lexists(path)
    assert (elsewhere / "thesis.tex").read_text() == "years"


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


def test_rows_of_any_python_are_lines_of_json() -> None:
    row = {"loss": float("nan"), "at": date(2026, 11, 30), "said": "é \ud800", "of": Decimal("0.5")}
    for ascii in (True, False):
        line = json_lines([row], ascii=ascii)
        assert ("é" in line) is not ascii
        line.encode()  # a file can hold it
        assert json.loads(line) == {"loss": None, "at": "2026-11-30", "said": "é \ud800", "of": "0.5"}
