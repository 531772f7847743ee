"""Where rows come from: the files that a name and a split mean, or a data set on the hub."""

from __future__ import annotations

import contextlib
import difflib
import re
from pathlib import Path

import datasets

from celora.errors import CELoraError, first_line, unknown
from celora.files import check_regular
from celora.train.rows.readers import READERS, fail

SPLITS = {  # split -> words that name it in file names, as in `datasets`
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".zip")
HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


def local_files(source: str | Path, split: str) -> list[Path]:
    """The files that `load_rows` reads. Empty if `source` can only be the name of a hub data set."""
    path = Path(source).expanduser()
    if "[" in split and path.exists():
        raise CELoraError(f"{split!r} is a slice, which only the hub gives; write the rows you want into a file")
    check_regular(path)
    if path.is_dir():
        try:
            files = _in_folder(path, split)
        except OSError as error:
            fail(str(path), f"cannot be listed: {error.strerror}; check its permissions")
    elif path.exists():
        if path.suffix.lower() not in READERS:
            raise unknown(f"file ending of {str(path)!r}:", path.suffix, READERS)
        files = [path]
    elif isinstance(source, str) and HUB_NAME.fullmatch(source) and path.suffix.lower() not in READERS:
        return []
    else:
        raise CELoraError(f"no such data file or folder: {str(path)!r}.{_nearest(path)}")
    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            fail(str(file), f"cannot be opened: {error.strerror}; check the file and its permissions")
    return files


def _in_folder(folder: Path, split: str) -> list[Path]:
    def named(file: Path, name: str, pattern: str = r"(.*[-_. \d])?{}([-_. \d].*)?") -> bool:
        stem = (file.with_suffix("") if file.suffix.lower() in _COMPRESSED else file).stem
        return any(re.fullmatch(pattern.format(re.escape(word)), stem, re.I) for word in SPLITS.get(name, (name,)))

    saved = ({"state.json", "dataset_info.json"}, {"dataset_dict.json"})  # of one data set; of several
    if any(all((folder / name).is_file() for name in names) for names in saved):
        fail(str(folder), "written by save_to_disk, which celora does not read; write it again with to_parquet")
    files = _files_in(folder)
    if not files:
        below = next((f"; {inner.name!r} in it does" for inner in sorted(folder.glob("*/")) if _files_in(inner)), "")
        fail(str(folder), f"holds no data files, which end in {', '.join(READERS)}{below}")
    # Names like train-00000 come first. If there are none, the word may be anywhere in the name.
    chosen = [file for file in files if named(file, split, r"{}([-_.]\d.*)?")]
    if not chosen:
        chosen = [file for file in files if named(file, split)]
        for file in chosen:
            if len(splits := [name for name in SPLITS if named(file, name)]) > 1:
                fail(str(file), f"its name says {' and '.join(map(repr, splits))}; rename it, so that it says one")
    if not chosen and split == "train":
        # Never train on a file that is named like a test set.
        chosen = [file for file in files if not any(named(file, name) for name in SPLITS)]
    if not chosen:
        names = ", ".join(file.name for file in files[:5])
        raise CELoraError(f"{str(folder)!r} has no {split!r} file among {names}; name one like {split}.jsonl.")
    # In the hub's cache, files in snapshots/REVISION are links to the folder blobs beside snapshots.
    here = folder.resolve()
    roots = [here, *(parent.with_name("blobs") for parent in here.parents if parent.name == "snapshots")]
    for file in chosen:
        if not any(file.resolve().is_relative_to(root) for root in roots):
            fail(str(file), "a link out of the data folder; give what it points to as data, or copy it into the folder")
        if file.suffix.lower() in _COMPRESSED:
            fail(str(file), "compressed, and its rows would be left out; unpack it, or move it out of the folder")
    return chosen


def _files_in(folder: Path) -> list[Path]:
    """The data files in a folder: those that celora reads, and compressed ones that are not there unpacked, too."""
    return sorted(
        file
        for file in folder.iterdir()
        if not file.name.startswith(".")
        and file.is_file()
        and (file.suffix.lower() in READERS or (_is_compressed(file) and not file.with_suffix("").exists()))
    )


def _is_compressed(file: Path) -> bool:
    return file.suffix.lower() in _COMPRESSED and file.with_suffix("").suffix.lower() in READERS


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return f" The folder {str(path.parent)!r} does not exist either."
    near: list[str] = []
    with contextlib.suppress(OSError):
        near = difflib.get_close_matches(path.name, [other.name for other in path.parent.iterdir()], n=1)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else " Check the name."


def hub_rows(name: str, split: str, config: str | None) -> datasets.Dataset:
    """A split of a hub data set. The error says what else the name could have meant here."""
    try:
        return datasets.load_dataset(name, name=config, split=split)
    except Exception as error:  # whatever the hub client raises: network, unknown name, unknown split, ...
        raise CELoraError(
            f"{name!r} is no file or folder here, and as a hub data set it failed: {type(error).__name__}: "
            f"{first_line(error)} -- if it is meant to be a file:{_nearest(Path(name))}"
        ) from error
