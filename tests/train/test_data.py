"""Rows of every shape and of every kind of file, and one clear line for every mistake."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from celora.errors import CELoraError
from celora.train.rows.data import load_rows
from rowfiles import Load, write

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("row", "chat", "expected"),
    [
        ({"messages": [USER, {**ASSISTANT, "id": 3}], "id": 7}, True, {"messages": [USER, ASSISTANT]}),
        ({"messages": [{"role": "system", "content": ""}, USER]}, True, None),
        ({"prompt": "a", "completion": " b", "id": 7}, True, {"prompt": "a", "completion": " b"}),
        ({"prompt": [USER], "completion": [ASSISTANT]}, False, None),
        ({"text": "a\u2028b"}, True, None),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, False, {"prompt": "Add\n\n1 2\n\n", "completion": "3"}),
        ({"instruction": "Hi", "input": "", "output": "Yo"}, False, {"prompt": "Hi\n\n", "completion": "Yo"}),
        (
            {"instruction": "Hi", "input": None, "output": "Hello"},
            True,
            {"prompt": [USER], "completion": [ASSISTANT]},
        ),
    ],
)
def test_each_shape(tmp_path: Path, load: Load, row: Any, chat: bool, expected: Any) -> None:
    assert load(write(tmp_path / "data.jsonl", row), chat=chat) == [expected or row]


def test_each_kind_of_file(tmp_path: Path, load: Load) -> None:
    rows = [{"prompt": 'a, "b"\nc', "completion": "None"}, {"prompt": "2", "completion": "NA"}]
    with (tmp_path / "data.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2), "utf-8-sig")
    write(tmp_path / "lines.json", rows[0], "", "  ", rows[1])
    write(tmp_path / "data.jsonl", *rows)
    for name in ("data.csv", "data.parquet", "list.json", "lines.json", "data.jsonl"):
        assert load(tmp_path / name) == rows, name
        assert load(str(tmp_path / name)) == rows, name


def test_a_row_with_the_columns_of_two_shapes_follows_the_first_row(tmp_path: Path, load: Load) -> None:
    both = {"messages": [USER], "text": "b"}
    assert load(write(tmp_path / "data.jsonl", {"text": "a"}, both)) == [{"text": "a"}, {"text": "b"}]


def test_a_text_column_of_another_name(tmp_path: Path, load: Load) -> None:
    rows = write(tmp_path / "data.jsonl", {"content": "a", "id": 1}, {"content": "b", "id": 2})
    assert load(rows, text_field="content") == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(CELoraError, match="columns 'content', 'id' are no known row"):
        load(rows)


def test_a_text_column_that_is_named_counts_before_other_columns(tmp_path: Path, load: Load) -> None:
    row = {"instruction": "Add", "output": "3", "text": "Add 3"}
    rows = write(tmp_path / "data.jsonl", row, {**row, "text": "Add 4"})
    assert load(rows, text_field="text") == [{"text": "Add 3"}, {"text": "Add 4"}]
    assert [*load(rows)[0]] == ["prompt", "completion"]
    assert load(write(tmp_path / "chats.jsonl", {"messages": CHAT}), text_field="text") == [{"messages": CHAT}]


@pytest.mark.parametrize("label", [False, "False"])  # of JSON; of CSV
def test_what_is_marked_as_bad_is_not_learnt(tmp_path: Path, load: Load, label: object) -> None:
    good, bad = ({"prompt": "a", "completion": "b", "label": mark} for mark in (True, label))
    with pytest.raises(
        CELoraError, match=r"data.jsonl:2: 'label' is false, which marks a bad completion, and all are learnt; leave"
    ):
        load(write(tmp_path / "data.jsonl", good, bad))
    skipped = [USER, {**ASSISTANT, "weight": 1}, USER, {**ASSISTANT, "weight": 0}]
    with pytest.raises(CELoraError, match=r"chats.jsonl:1: messages\[3\].weight is 0, and every answer is learnt here"):
        load(write(tmp_path / "chats.jsonl", {"messages": skipped}))
    with pytest.raises(CELoraError, match=r"lists.jsonl:1: completion\[0\].weight is 0"):
        load(write(tmp_path / "lists.jsonl", {"prompt": skipped[:3], "completion": skipped[3:]}))
    asked = {"prompt": skipped, "completion": [{**ASSISTANT, "weight": 1}], "label": True}  # a prompt is not learnt
    assert load(write(tmp_path / "fine.jsonl", {**asked, "prompt": [*skipped, USER]}))[0]["completion"] == [ASSISTANT]


def test_a_hub_configuration_of_local_rows(tmp_path: Path, load: Load) -> None:
    with pytest.raises(CELoraError, match=r"dataset_config='small' is for hub data sets, .*data\.jsonl' is here"):
        load(write(tmp_path / "data.jsonl", {"text": "a"}), config="small")


def test_a_changed_file_is_read_again(tmp_path: Path, load: Load) -> None:
    path = write(tmp_path / "data.jsonl", {"text": "one"})
    assert load(path) == [{"text": "one"}]
    before = path.stat()
    write(path, {"text": "two"})
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    assert load(path) == [{"text": "two"}]


def test_an_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "data.jsonl", {"text": "one"})
    first, second = (load_rows(path, chat=True, cache_dir=tmp_path / ".cache") for _ in range(2))
    assert first.cache_files == second.cache_files != []


TEXT = {"text": "fine"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([TEXT, "", '{"text": "a"'], r"data\.jsonl:3: not JSON: .* at column \d+; expected one JSON object per row"),
        ([TEXT, '{"text": "a"} {"text": "b"}'], r":2: not JSON: .*put each row on a line"),
        ([TEXT, '"text"'], r":2: a row is 'text'; expected an object"),
        ([TEXT, "[]"], r":2: a row is \[\]; expected an object"),
        (['{"text": "a", "text": "b"}'], r":1: not a usable JSON row: the key 'text' comes twice"),
        (['{"text": "a", "x": {"y": 1, "y": 2}}'], r":1: .*the key 'y' comes twice"),
        (['{"text": "a", "x": NaN}'], r":1: .*NaN is no JSON value"),
        (["[" * 100_000], r":1: not "),
        (['{"text": "a\0b"}'], r":1: holds a NUL byte"),
        ([{"text": "a\0b"}], r":1: 'text' holds a NUL"),
        (['{"text": "\\ud800"}'], r":1: 'text' holds .* half a surrogate pair"),
        (['[{"text": "a"},', "", '{"text": 3}]'], r":3: 'text' is int 3; expected a string"),
        (['[{"text": "a"}', '{"text": "b"}]'], r":2: not JSON: '\{' in a list of rows; expected ',' or '\]'"),
        (['[{"text": "a"},', "]"], r":2: not JSON: Expecting value"),
        (['[{"text": "a"}'], r":2: not JSON: the end of the file"),
        (['[{"text": "a"}]', "x"], r":2: not JSON: 'x' after the list of rows"),
        (["[]"], r"data\.jsonl: no rows; expected at least one: a row has messages, or prompt \+ completion"),
        ([""], r"no rows"),
        (
            [TEXT, {"promt": "a", "completion": "b"}],
            r":2: columns 'promt', 'completion' are no known row \(did you mean 'prompt' for 'promt'\?\); a row has "
            r"messages, or prompt \+ completion, or instruction \(\+ input\) \+ output, or text\.$",
        ),
        ([{}], r":1: columns \(none\) are no known row"),
        (
            [TEXT, {"prompt": "a", "completion": "b"}],
            r":2: this row is prompt .*first one \(.*:1\) is text .*one shape",
        ),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [ASSISTANT]}],
            r":2: this row is prompt \+ completion as lists, the first one",
        ),
        ([{"prompt": "a", "completion": [ASSISTANT]}], r":1: 'prompt' and 'completion' differ in kind"),
        ([{"prompt": "a", "completion": None}], r":1: 'completion' is null; expected a value"),
        ([{"text": None}], r":1: 'text' is null"),
        ([{"text": ["a"]}], r":1: 'text' is list \['a'\]; expected a string"),
        ([{"text": " \n"}], r":1: 'text' is empty"),
        ([{"instruction": "a", "input": 3, "output": "b"}], r":1: 'input' is int 3; expected a string"),
        ([{"messages": "Hi"}], r":1: 'messages' is 'Hi'; expected a list of \{'role': \.\.\., 'content': \.\.\.\}"),
        ([{"messages": []}], r":1: 'messages' is \[\]; expected a list"),
        ([{"messages": [USER, "Hi"]}], r":1: messages\[1\] has 'Hi'; expected a list"),
        ([{"messages": [{"from": "human", "value": "Hi"}]}], r"messages\[0\] has keys 'from', 'value'; expected"),
        ([{"messages": [{"role": "human", "content": "Hi"}]}], r"role is 'human'; expected one of system, developer"),
        ([{"messages": [USER, {"role": "assistant", "content": ""}]}], r"'messages\[1\]\.content' is empty"),
        ([{"messages": [{"role": "user", "content": None}]}], r"'messages\[0\]\.content' is null"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, load: Load, rows: list[Any], message: str) -> None:
    path = write(tmp_path / "data.jsonl", *rows)
    with pytest.raises(CELoraError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("what", ["full", "no folder"])
def test_no_place_to_keep_the_rows(tmp_path: Path, what: str) -> None:
    resource = pytest.importorskip("resource")
    path, cache = write(tmp_path / "data.jsonl", *[{"text": "word " * 99}] * 2000), tmp_path / ".cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if what == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    else:
        cache.write_text("")
    try:
        with pytest.raises(CELoraError, match=r"cannot keep the rows of .*data\.jsonl' in .*\.cache': .*HF_DATASETS"):
            load_rows(path, chat=True, cache_dir=cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({"messages": CHAT, "tools": [{"name": "search"}]}, "'tools'"),
        ({"messages": [*CHAT[:1], CHAT[1] | {"tool_calls": [{"name": "search"}]}]}, r"messages\[1\].tool_calls"),
        ({"prompt": CHAT[:1], "completion": [CHAT[1] | {"reasoning_content": "hm"}]}, r"completion\[0\].reasoning"),
    ],
)
def test_what_a_template_would_write_is_not_dropped(tmp_path: Path, load: Load, row: Any, where: str) -> None:
    with pytest.raises(CELoraError, match=f"{where}.* is not trained on here; leave such rows out"):
        load(write(tmp_path / "rows.jsonl", row))
    for i, nothing in enumerate((None, [], "[]", " ")):
        assert load(write(tmp_path / f"{i}.jsonl", {"messages": CHAT, "tools": nothing})) == [{"messages": CHAT}]
