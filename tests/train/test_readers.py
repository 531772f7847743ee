"""Files of rows are read row by row: every character is kept, and each damaged place gives one clear line."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from celora.errors import CELoraError
from celora.train.rows import data
from rowfiles import Load, write

TEXT = {"text": "fine"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"data\.jsonl:2: not UTF-8 \(byte 0xe9 at column 11\)"),
        ("data.json", '[{"text": "a"}]'.encode("utf-16"), r"data\.json:1: not UTF-8"),
        ("data.csv", b"text\na\n\xe9\n", r"data\.csv:3: not UTF-8"),
        ("data.csv", b"text,id\na,1\nb, c,2\n", r"data\.csv:3: 3 values for 2 columns; quote texts with commas"),
        ("data.csv", b'text,id\n"a\nb",1\n"c"d,2\n', r"data\.csv:4: not CSV: "),
        ("data.csv", b"text,text\na,b\n", r"data\.csv:1: two columns have one name"),
        ("data.csv", b'text,id\n"a\n\nb",1\n"",2\n', r"data\.csv:5: 'text' is empty"),
        ("data.csv", b"text\n", r"data\.csv: no rows"),
        ("data.csv", b"", r"data\.csv: no rows"),
        ("data.parquet", b"PAR1 not really", r"data\.parquet: not readable as Parquet"),
        ("data.txt", b"a", r"unknown file ending of .*data\.txt': '\.txt'.* Known: \.csv, \.json, \.jsonl, \.parquet"),
        ("data.jsonl.gz", b"a", r"unknown file ending of .*'\.gz'"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, load: Load, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CELoraError, match=message) as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def parquet(path: Path, column: pyarrow.Array, *, compression: str = "none") -> bytes:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["fine"] * len(column), "x": column}),
        path, compression=compression, use_dictionary=False, write_statistics=False,
    )  # fmt: skip
    return path.read_bytes()


NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffb")]
)


@pytest.mark.parametrize("damage", ["a flipped bit", "not UTF-8", "the year 10000"])
def test_damaged_parquet(tmp_path: Path, load: Load, damage: str) -> None:
    path = tmp_path / "data.parquet"
    if damage == "a flipped bit":
        content = bytearray(parquet(path, pyarrow.array(["words " * 99] * 9), compression="snappy"))
        at = content.index(b"words ")
        content[at + 7] ^= 0x80
        path.write_bytes(content)
    else:
        parquet(path, NOT_UTF8 if damage == "not UTF-8" else pyarrow.array([2_932_897], pyarrow.date32()))
    with pytest.raises(
        CELoraError, match=r"data\.parquet: not readable as Parquet: .*; write the file again"
    ) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
def test_a_file_that_the_disk_does_not_give(tmp_path: Path, load: Load) -> None:
    (tmp_path / "data.jsonl").symlink_to("/proc/self/mem")
    with pytest.raises(CELoraError, match=r"data\.jsonl: cannot be read: Input/output error; check the disk"):
        load(tmp_path / "data.jsonl")


def test_a_column_that_comes_twice_in_parquet(tmp_path: Path, load: Load) -> None:
    """As a mapping, a row would keep only the last of the two."""
    columns = [pyarrow.array([text]) for text in ("asked", "answered", "another")]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "completion", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    with pytest.raises(CELoraError, match=r"data\.parquet: two columns have one name among .*; rename or drop one"):
        load(tmp_path / "data.parquet")


def test_parquet_errors_name_the_row(tmp_path: Path, load: Load) -> None:
    datasets.Dataset.from_list([TEXT] * 1500 + [{"text": ""}]).to_parquet(tmp_path / "data.parquet")
    with pytest.raises(CELoraError, match=r"data\.parquet, row 1501: 'text' is empty"):
        load(tmp_path / "data.parquet")


HOSTILE = [
    "=cmd|' /C calc'!A0",
    "@SUM(1+1)*cmd",
    "-1",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7*7 }}{% for x in () %}",
    "${jndi:ldap://x}",
    "../../etc/passwd",
    "!!python/object:os.system",
]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_hostile_text_is_text(tmp_path: Path, load: Load, suffix: str) -> None:
    rows = [{"prompt": text, "completion": text} for text in HOSTILE]
    path = tmp_path / f"data{suffix}"
    if suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".jsonl":
        write(path, *rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    assert load(path) == rows


@pytest.mark.parametrize("megabytes", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_a_huge_line(tmp_path: Path, load: Load, megabytes: int) -> None:
    text = "word " * (megabytes * 200_000)
    path = write(tmp_path / "data.jsonl", {"text": text})
    assert load(path) == [{"text": text}]
    write(path, json.dumps({"text": text})[:-2])
    with pytest.raises(CELoraError, match=r"data\.jsonl:1: not JSON: Unterminated string") as caught:
        load(path)
    assert len(str(caught.value)) < 500
    (tmp_path / "data.csv").write_text(f'text,id\n"{text}",1\n', "utf-8")
    assert load(tmp_path / "data.csv") == [{"text": text}]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_stream(tmp_path: Path, kind: str) -> None:
    """Ten times as many rows take no more memory."""
    peaks = []
    for count in (1_500, 15_000):
        rows = [{"text": f"row {i} " + "word " * 20} for i in range(count)]
        path = tmp_path / f"{count}.{kind}"
        if kind == "jsonl":
            write(path, *rows)
        else:
            table = datasets.Dataset.from_list(rows)
            table.to_parquet(path, batch_size=500) if kind == "parquet" else table.to_csv(path, index=False)
        del rows
        tracemalloc.start()
        seen = sum(1 for _ in data._generate(path.name, (str(path),), None, False, None, False, ""))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert seen == count
    assert peaks[1] < 1.5 * peaks[0]


STREAM = """
import resource, sys
from celora.train.rows.data import load_rows
from celora.train.loading import quiet_libraries
with quiet_libraries():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = load_rows(sys.argv[1], chat=False, cache_dir=sys.argv[2])
    print(len(rows), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_five_million_rows_stream_with_flat_memory(tmp_path: Path) -> None:
    """The peak memory of the process grows as much for 5,000,000 rows (600 MB) as for 200,000."""
    grown = []
    for count in (200_000, 5_000_000):
        path = tmp_path / "data.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for i in range(count):
                file.write(f'{{"text": "row {i} {"word " * 20}"}}\n')
        command = [sys.executable, "-c", STREAM, str(path), str(tmp_path / f"cache{count}")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows, mebibytes = map(int, done.stdout.split())
        assert rows == count
        grown.append(mebibytes)
    print(f"{grown[0]} and {grown[1]} MiB")
    assert grown[1] < grown[0] + 50
