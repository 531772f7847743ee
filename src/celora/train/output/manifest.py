"""The manifest of a checkpoint: written last, with the checksum of every file. It tells whether a checkpoint is whole.

A folder without a manifest is unfinished: its process died while writing. If a file differs from its checksum, the
checkpoint was damaged later. celora resumes from neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celora.errors import CELoraError
from celora.files import read_json, sync, write_text

MANIFEST = "celora_run.json"
_OWN = "manifest_sha256"


def seal(folder: Path, note: Mapping[str, Any]) -> None:
    """Flush every file in `folder`, and write the manifest: `note`, the SHA-256 of each file, and its own."""
    files = _files(folder)
    for path in (*files.values(), *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(path)
    manifest = {**note, "sha256": {name: _sha256(path) for name, path in files.items()}}
    write_text(folder / MANIFEST, json.dumps(manifest | {_OWN: _own(manifest)}, indent=2) + "\n")
    sync(folder.parent)  # makes the folder's name durable, so older checkpoints may go


def sealed(folder: Path) -> bool:
    """Whether the folder was written completely."""
    return (folder / MANIFEST).is_file()


def unseal(folder: Path) -> None:
    """Mark the folder as unfinished."""
    (folder / MANIFEST).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest, and check every file against it.

    Raises:
        CELoraError: a file is missing, has changed or is a link, or the manifest is damaged; names the file.
    """
    if link := next((path for path in folder.rglob("*") if path.is_symlink()), None):
        raise CELoraError(f"{link.relative_to(folder).as_posix()} is a link, and no run saves one")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.pop(_OWN, None) != _own(manifest):
        raise CELoraError(f"{MANIFEST} is not what was saved (its checksum differs)")
    found = _files(folder)  # the manifest's names are only looked up in this; they are never opened as paths
    for name, expected in manifest["sha256"].items():
        if name not in found:
            raise CELoraError(f"{name} is missing")
        if _sha256(found[name]) != expected:
            raise CELoraError(f"{name} is not what was saved (its checksum differs)")
    return dict(manifest)


def _own(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> dict[str, Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {name: path for path in paths if (name := path.relative_to(folder).as_posix()) != MANIFEST}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
