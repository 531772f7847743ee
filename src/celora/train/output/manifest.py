"""A checkpoint is whole or it is none: the manifest, written last, holds the checksum of every file in the folder.

A folder without manifest was being written when its process died. One whose files differ from their checksums has been
damaged since. Neither is ever resumed from.
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
    """Flush every file in `folder` and write the manifest: `note`, the SHA-256 of each, and one of all that."""
    files = _files(folder)
    for path in (*files.values(), *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync(path)
    manifest = {**note, "sha256": {name: _sha256(path) for name, path in files.items()}}
    write_text(folder / MANIFEST, json.dumps(manifest | {_OWN: _own(manifest)}, indent=2) + "\n")
    sync(folder.parent)  # where the folder's own name is: older ones may be removed now


def sealed(folder: Path) -> bool:
    """Whether the folder was written to its end."""
    return (folder / MANIFEST).is_file()


def unseal(folder: Path) -> None:
    """Make the folder one that was not."""
    (folder / MANIFEST).unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `seal` wrote, the files being what they were then.

    Raises:
        CELoraError: a file is missing, has changed or is a link, or the manifest itself is damaged; it names the file.
    """
    if link := next((path for path in folder.rglob("*") if path.is_symlink()), None):
        raise CELoraError(f"{link.relative_to(folder).as_posix()} is a link, and no run saves one")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.pop(_OWN, None) != _own(manifest):
        raise CELoraError(f"{MANIFEST} is not what was saved (its checksum differs)")
    found = _files(folder)  # names in a manifest are looked up here, never opened
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
