"""Fingerprints of the local files that a run is made from: data, model, tokenizer, template.

A run cannot be resumed with other rows, or another model, under the same name. Content counts, not dates: a copy has
the same fingerprint. Files on the hub have none.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from pathlib import Path

from celora.errors import CELoraError
from celora.train.loading import gguf_of
from celora.train.request.arguments import TrainRequest
from celora.train.rows.places import local_files

_BLOCK, _BLOCKS = 2**20, 256  # of a larger file, this many blocks are read, evenly spaced, ends included


# Files that tokenizers, configurations and chat templates are read from.
_SETTINGS = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "merges.txt",
    "vocab.txt",
    "additional_chat_templates/*.jinja",
)


def fingerprints(request: TrainRequest, evaluation: str | None) -> dict[str, str]:
    """Digests of the local files, by what they are: "data in 'rows.jsonl'" and so on.

    `evaluation`: where the evaluation rows come from, if there are any.
    """
    options, model = request.options, str(request.given["model"])
    source = str(gguf_of(model) or model)
    found = {
        f"data in {request.data!r}": local_files(request.data, options.dataset_train_split),
        f"model in {model!r}": _matching(source, "*.safetensors"),
        f"tokenizer or configuration in {model!r}": _matching(source, *_SETTINGS),
    }
    if evaluation is not None:
        found[f"evaluation data in {evaluation!r}"] = local_files(evaluation, options.dataset_test_split)
    if template := request.train.get("chat_template_path"):
        found[f"chat template in {template!r}"] = _matching(template, *_SETTINGS)
    digests: dict[str, str] = {}
    for name, files in found.items():
        with contextlib.suppress(OSError):  # the loaders will say what is wrong
            digests |= {name: _digest(files)} if files else {}
    return digests


def check_same(before: object, now: dict[str, str], *, of: str = "run") -> None:
    """Raise CELoraError if a recorded fingerprint differs from the one of now."""
    for name, digest in now.items():
        if isinstance(before, dict) and before.get(name, digest) != digest:
            raise CELoraError(f"the {name} is not what the {of} was started with; put it back or start a new {of}")


def _matching(source: str, *patterns: str) -> list[Path]:
    """The file, or the files of a folder that match one of the patterns."""
    path = Path(source).expanduser()
    return [path] if path.is_file() else sorted({file for pattern in patterns for file in path.glob(pattern)})


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name};{size};".encode())
        with file.open("rb") as opened:
            starts = [*range(0, size, _BLOCK)]
            if len(starts) > _BLOCKS:
                starts = [i * (size - _BLOCK) // (_BLOCKS - 1) for i in range(_BLOCKS)]
            for start in starts:
                opened.seek(start)
                digest.update(opened.read(_BLOCK))
    return digest.hexdigest()
