"""The user's cache: folders that only the user can write to, and small measurements that are kept in one.

What is compiled for this machine is loaded from here, and what was measured on it is believed. So nobody else may put
anything there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from celora.errors import CELoraError
from celora.files import read_json, write_text


def root() -> Path:
    """celora's folder in the user's cache: `$XDG_CACHE_HOME/celora`, else `~/.cache/celora`. It may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home).expanduser().absolute() / "celora"


def cache_folder(name: str) -> Path:
    """The user's folder `celora/name`, made if it is not there; OSError where others could put something there."""
    folder = root() / name
    for parent in reversed((folder, *folder.parents)):
        if not parent.exists():
            parent.mkdir(mode=0o700, exist_ok=True)  # `parents=True` would make those above as the umask says
    if not hasattr(os, "getuid"):  # Windows keeps a user's folder for the user
        return folder.resolve()
    for own in (folder.parent, folder):
        if own.stat().st_uid == os.getuid() and not trusted(own):
            # Another program made it with the umask's rights. What others have put there is not loaded.
            own.chmod(0o700)
    folder = folder.resolve()  # what a link leads to is checked, and used from then on
    if (unsafe := _open_to_others(folder)) is not None:
        raise PermissionError(f"{unsafe} could be written to by others")
    return folder


def trusted(path: Path, *, sticky: bool = False) -> bool:
    """Whether nobody but this user and root can write to it or, with `sticky`, replace what these two have in it."""
    if not hasattr(os, "getuid"):
        return True
    found = path.stat()
    closed = not found.st_mode & 0o022 or (sticky and found.st_mode & stat.S_ISVTX)
    return found.st_uid in (os.getuid(), 0) and bool(closed)


def _open_to_others(folder: Path) -> Path | None:
    """The first of `folder` and the folders above it in which others could replace what leads to it.

    Looks up to the user's home, or up to the root where `folder` lies elsewhere. In a sticky folder, as /tmp is one,
    nobody can replace what is another's.
    """
    way = [folder, *folder.parents]
    with contextlib.suppress(RuntimeError):  # no home
        home = Path.home().resolve()
        if folder.is_relative_to(home):
            way = [parent for parent in way if parent.is_relative_to(home)]
    return next((parent for parent in way if not trusted(parent, sticky=parent != folder)), None)


def recall(key: dict[str, Any]) -> Any:
    """The value that `keep` stored for this measurement; None if there is none, or it cannot be read or believed."""
    try:
        file = cache_folder(_MEASURED) / _name(key)
        document = read_json(file) if file.is_file() and trusted(file) else None
    except (OSError, RuntimeError, CELoraError):  # no home folder, one that cannot be used, or a damaged file
        return None
    return document.get("found") if isinstance(document, dict) and document.get("of") == key else None


def keep(key: dict[str, Any], found: Any) -> None:
    """Keep for this machine's later runs what was found, if possible. `key` is what was measured, in plain values."""
    with contextlib.suppress(OSError, RuntimeError, CELoraError):
        file = cache_folder(_MEASURED) / _name(key)
        write_text(file, json.dumps({"of": key, "found": found}, indent=2) + "\n")
        file.chmod(0o600)  # with a umask like 002, the group could write to it, and it would not be believed


_MEASURED = "measured"


def _name(key: dict[str, Any]) -> str:
    return f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
