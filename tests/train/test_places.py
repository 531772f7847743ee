"""Where rows come from: which files of a folder are read, and one clear line for what cannot be."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from celora.errors import CELoraError
from celora.train.rows.places import local_files
from rowfiles import Load, write
from unprivileged import as_nobody, public_folder

TEXT = {"text": "a"}


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


def test_a_compressed_file_is_not_left_out(tmp_path: Path, load: Load) -> None:
    for name in ("train-1.jsonl", "test.jsonl"):
        write(tmp_path / name, TEXT)
    (tmp_path / "test-2.jsonl.gz").write_bytes(b"\x1f\x8b")
    (tmp_path / "notes.txt.gz").write_bytes(b"\x1f\x8b")
    assert load(tmp_path) == [TEXT]
    with pytest.raises(CELoraError, match=r"test-2\.jsonl\.gz: compressed, and its rows would be left out; unpack it"):
        load(tmp_path, split="test")
    write(tmp_path / "test-2.jsonl", TEXT)  # unpacked
    assert load(tmp_path, split="test") == [TEXT, TEXT]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "rows.csv.ZST").write_bytes(b"")
    with pytest.raises(CELoraError, match=r"rows\.csv\.ZST: compressed"):
        load(tmp_path / "only")
