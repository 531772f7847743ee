"""Rows from files, folders and the hub: every shape and every source, and one clear line for every mistake."""

from __future__ import annotations

import csv
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from celora.errors import CELoraError
from celora.train.rows.data import load_rows, local_files
from rowfiles import Load, write
from unprivileged import as_nobody, public_folder

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


def test_a_slice_of_local_rows(tmp_path: Path, load: Load) -> None:
    with pytest.raises(CELoraError, match=r"^'train\[:3\]' is a slice, which only the hub gives"):
        load(write(tmp_path / "data.jsonl", {"text": "a"}), split="train[:3]")


def test_folder(tmp_path: Path, load: Load) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "b.jsonl", {"text": "b"})
    (folder / "a.csv").write_text("text,id\na,1\n", "utf-8")
    (folder / "notes.md").write_text("no data", "utf-8")
    write(folder / "test.jsonl", {"text": "test"})
    write(folder / "val-00000-of-00001.jsonl", {"text": "validation"})
    assert load(folder) == [{"text": "a"}, {"text": "b"}]
    assert load(folder, split="test") == [{"text": "test"}]
    assert load(folder, split="validation") == [{"text": "validation"}]
    write(folder / "train-1.jsonl", {"text": "train"})
    write(folder / "trainer.jsonl", {"text": "no"})
    assert load(folder) == [{"text": "train"}]
    write(folder / "imdb_train.jsonl", {"text": "prefixed"})
    write(folder / "imdb_test.jsonl", {"text": "prefixed test"})
    write(folder / "train_extra.jsonl", {"text": "extra"})
    assert load(folder) == [{"text": "train"}]
    assert load(folder, split="test") == [{"text": "test"}]
    (folder / "train-1.jsonl").unlink()
    (folder / "test.jsonl").unlink()
    assert load(folder) == [{"text": "prefixed"}, {"text": "extra"}]
    assert load(folder, split="test") == [{"text": "prefixed test"}]
    with pytest.raises(CELoraError, match=r"no 'dev-set' file among .*name one like dev-set\.jsonl"):
        load(folder, split="dev-set")


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


@pytest.mark.fault(
    "input",
    "a row with the same key twice, nested too deeply, with a NUL byte, or of another shape than the first row",
    sees="the file, the line and what is wrong with the row",
    kept="everything: no row is left out or guessed at",
)
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


@pytest.mark.fault(
    "security",
    "a link in a data folder that leads out of the folder",
    sees="the link, and what to do",
    kept="everything: celora does not read the link's target",
)
def test_links_out_of_a_data_folder(tmp_path: Path, load: Load) -> None:
    elsewhere, folder = write(tmp_path / "rows.jsonl", {"text": "a"}), tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").symlink_to(write(folder / "own.jsonl", {"text": "b"}))
    assert load(folder) == [{"text": "b"}]
    (folder / "train.jsonl").unlink()
    (folder / "train.jsonl").symlink_to(elsewhere)
    with pytest.raises(CELoraError, match=r"train\.jsonl: a link out of the data folder; give what it points to"):
        load(folder)
    assert load(folder / "train.jsonl") == [{"text": "a"}]  # the user gave this file's own name

    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b" / "data"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    elsewhere.rename(blobs / "c0ffee")
    (snapshot / "train.jsonl").symlink_to("../../../blobs/c0ffee")
    assert load(snapshot) == [{"text": "a"}]


@pytest.mark.fault(
    "crash",
    "the disk for the cached rows is full or read-only",
    sees="`cannot keep the rows of ... in ...`, and the advice to set HF_DATASETS_CACHE to another folder",
    kept="everything: nothing is trained",
)
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


def test_a_data_set_of_save_to_disk_is_recognised(tmp_path: Path, load: Load) -> None:
    rows = datasets.Dataset.from_list([TEXT])
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "two")
    for name in ("one", "two"):
        with pytest.raises(CELoraError, match=rf"{name}: written by save_to_disk.*to_parquet\.$"):
            load(tmp_path / name)


def test_hidden_files_are_no_data(tmp_path: Path, load: Load) -> None:
    write(tmp_path / "train.jsonl", TEXT)
    (tmp_path / "._train.jsonl").write_bytes(b"\0\5\x16\7")  # macOS leaves such files
    assert load(tmp_path) == [TEXT]


def test_missing_places(tmp_path: Path, load: Load) -> None:
    write(tmp_path / "reviews.jsonl", TEXT)
    with pytest.raises(CELoraError, match=r"no such data file or folder: .*Did you mean '.*reviews\.jsonl'\?"):
        load(str(tmp_path / "review.jsonl"))
    with pytest.raises(CELoraError, match=r"The folder '.*nowhere' does not exist either"):
        load(tmp_path / "nowhere" / "data.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CELoraError, match=r"empty: holds no data files, which end in \.csv.*\.parquet\.$"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "data").mkdir()
    write(tmp_path / "empty" / "data" / "train.jsonl", TEXT)
    with pytest.raises(CELoraError, match=r"empty: holds no data files.*; 'data' in it does\.$"):
        load(tmp_path / "empty")


def test_a_folder_that_may_not_be_listed_is_one_line() -> None:
    with public_folder() as folder:
        write(folder / "data.jsonl", TEXT)
        folder.chmod(0o300 | 0o033)
        errors = [as_nobody(partial(local_files, folder / name, "train")) for name in ("", "date.jsonl")]
        folder.chmod(0o755)
    assert str(errors[0]) == f"{folder}: cannot be listed: Permission denied; check its permissions."
    assert str(errors[1]) == f"no such data file or folder: '{folder}/date.jsonl'. Check the name."


def test_hub(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    rows = datasets.Dataset.from_list([{"text": "a", "id": 1}, {"text": "b", "id": 2}])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append((path, options)) or rows)
    assert load("someone/reviews", split="test") == [{"text": "a"}, {"text": "b"}]
    assert load("someone/reviews", config="small") == [{"text": "a"}, {"text": "b"}]
    assert asked == [
        ("someone/reviews", {"name": None, "split": "test"}),
        ("someone/reviews", {"name": "small", "split": "train"}),
    ]
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": ""}])
    with pytest.raises(CELoraError, match=r"^someone/reviews, row 2: 'text' is empty"):
        load("someone/reviews", split="test")


def test_hub_out_of_reach(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, **options: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews").mkdir()
    with pytest.raises(CELoraError, match="'review' is no file or folder here") as caught:
        load("review")
    assert "it failed: ConnectionError: Couldn't reach the hub -- " in str(caught.value)
    assert str(caught.value).endswith("if it is meant to be a file: Did you mean 'reviews'?")


def test_a_test_set_of_any_name_is_not_trained_on(tmp_path: Path, load: Load) -> None:
    write(tmp_path / "reviews.jsonl", {"text": "train"})
    for name in ("reviews-test", "test1", "Testing", "evaluation", "dev-test", "reviews.val"):
        write(tmp_path / f"{name}.jsonl", {"text": "test"})
    assert load(tmp_path) == [{"text": "train"}]
    write(tmp_path / "train_test.jsonl", {"text": "which?"})
    with pytest.raises(CELoraError, match=r"train_test.jsonl.*says 'train' and 'test'; rename it"):
        load(tmp_path)


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
