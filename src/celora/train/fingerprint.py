"""What a run is made from, in two short texts, so that it is not resumed with other rows or another model under the
same name. Content counts, not dates: a copy is the same. Of what comes from the hub, nothing is known here.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

from celora.errors import CELoraError
from celora.train.arguments import TrainRequest
from celora.train.data import local_files

_BLOCK, _BLOCKS = 2**20, 256  # larger files are looked at in that many places, evenly spaced, ends included


def fingerprints(request: TrainRequest) -> dict[str, str]:
    """Of the data and of the model's weights, where they are local files."""
    model = Path(request.model).expanduser()
    weights = (
        sorted(path for end in ("safetensors", "bin") for path in model.glob(f"*.{end}")) if model.is_dir() else []
    )
    found = {"data": local_files(request.data, request.options.dataset_train_split), "model": weights}
    of: dict[str, str] = {}
    for name, files in found.items():
        with contextlib.suppress(OSError):  # the loaders say so
            of |= {name: _of(files)} if files else {}
    return of


def check_same(before: object, now: dict[str, str], request: TrainRequest) -> None:
    """Refuse to resume where a fingerprint is known and is another one now; CELoraError."""
    for name, path in (("data", request.data), ("model", request.model)):
        if isinstance(before, dict) and before.get(name, now.get(name)) != now.get(name):
            raise CELoraError(
                f"--resume: the {name} in {path!r} is not what the run was started with; put it back or start a new run"
            )


def _of(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size};".encode())
        with file.open("rb") as opened:
            starts = [*range(0, size, _BLOCK)]
            if len(starts) > _BLOCKS:
                starts = [i * (size - _BLOCK) // (_BLOCKS - 1) for i in range(_BLOCKS)]
            for start in starts:
                opened.seek(start)
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()
