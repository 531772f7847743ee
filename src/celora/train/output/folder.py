"""The output folder of a run: which files are celora's, what a new run may replace, and where to resume.

A run locks the folder until it ends or dies. It writes `run.json` first, which marks the folder as celora's. Only files
with names that a run writes are ever removed. A manifest says whether a checkpoint is whole.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from celora.errors import CELoraError
from celora.files import clear, read_json
from celora.settings.names import CONFIG_NAME
from celora.train.output.manifest import read_manifest, sealed, unseal
from celora.train.processes import is_first

RUN, METRICS, REPORT, CARD = "run.json", "metrics.jsonl", "report.html", "README.md"
CONFIG = CONFIG_NAME
LOCK, SAVING = "_celora.lock", ".adapter.tmp"
_FOLDERS = (SAVING, "additional_chat_templates")  # the second: of a tokenizer with several
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_DAMAGED = ".damaged"
_NAMES = (
    r"run\.json|metrics\.jsonl|report\.html|loss\.svg|celora_config\.json|README\.md|training_args\.bin"
    r"|adapter_config\.json|adapter_model\.(safetensors|bin)|chat_template\.jinja|processor_config\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|vocab\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model"
)
_OURS = re.compile(rf"({_NAMES})|\.({_NAMES})\.tmp")  # the second form while the file is being written
_ASIDE = ".replaced"
CARD_MARK = "<!-- celora writes this file anew at every save, until this line is deleted. -->"
# Marks of a generated card: celora's, TRL's, PEFT's. A card without any of them is the user's own.
_GENERATED = (CARD_MARK, "It has been trained using [TRL](", "# Model Card for Model ID")
P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """Turn an OSError in the body into a one-line CELoraError about `--output`."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename not in (None, str(output)) else ""
        raise CELoraError(f"cannot write to --output {str(output)!r}: {error.strerror or error}{where}") from None


def _in_one_line(method: Callable[Concatenate[OutputFolder, P], T]) -> Callable[Concatenate[OutputFolder, P], T]:
    @functools.wraps(method)
    def said(folder: OutputFolder, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with writing_to(folder.path):
            return method(folder, *args, **kwargs)

    return said


@dataclass(frozen=True)
class OutputFolder:
    """The folder of one run."""

    path: Path

    @property
    @_in_one_line
    def begun(self) -> bool:
        """Whether any run has ever used this folder, even if it was killed at once."""
        return (self.path / LOCK).exists() or (self.path / RUN).exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder while the body runs. The operating system releases the lock if the process dies.

        Raises:
            CELoraError: another run has locked it, it is not writable, or a file that a run would write is a link.
        """
        if not is_first():
            yield  # the first process locks for all processes of a run
            return
        if links := [entry.name for entry in self.path.glob("*") if entry.is_symlink() and _written(entry)]:
            raise CELoraError(
                f"{links[0]!r} in --output {str(self.path)!r} is a link, and a run would write through it; remove it "
                "or choose another folder"
            )
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise CELoraError(
                f"another run is writing to --output {str(self.path)!r}; wait until it ends, or choose another folder"
            ) from None
        except OSError as error:
            raise CELoraError(f"cannot write to --output {str(self.path)!r}: {error.strerror or error}") from None
        try:
            yield
        finally:
            lock.release()

    @_in_one_line
    def in_use(self) -> bool:
        """Whether a run has locked the folder at this moment; taken for granted where this user may not ask."""
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(timeout=0)
        except OSError:  # a timeout is one, too
            return True
        lock.release()
        return False

    @_in_one_line
    def run(self) -> dict[str, Any] | None:
        """The content of run.json, or None if no run of celora has used the folder.

        Raises:
            CELoraError: run.json is damaged.
        """
        # While the first process moves an earlier run back, the others find run.json in either place.
        for place in [self.path / RUN] if is_first() else [self.path / RUN, self.path / _ASIDE / RUN, self.path / RUN]:
            try:
                document = read_json(place)
                break
            except CELoraError as error:
                if place.is_file():
                    raise CELoraError(
                        f"{error} Its checkpoints can be used without it: start a new run in another folder, or put it "
                        "back."
                    ) from None
        else:
            return None
        return document if isinstance(document, dict) and "celora" in document else None

    @_in_one_line
    def earlier(self) -> dict[str, Any] | None:
        """Like `run`, but first put back an earlier run that a killed process had begun to replace."""
        if is_first() and (self.path / _ASIDE).is_dir():
            with self.locked():
                self.recover()
        return self.run()

    def resumable(self) -> dict[str, Any]:
        """Like `earlier`, but raises CELoraError if there is nothing to resume."""
        run = self.earlier()
        if run is None:
            raise CELoraError(
                f"nothing to resume in {str(self.path)!r}: no run of celora is there; give --model and --data, too, to "
                "start one, or another --output"
            )
        return run

    @_in_one_line
    def missing(self) -> list[str]:
        """The files of a finished run that this folder lacks, except the report."""
        weights = [] if any(self.path.glob("adapter_model.*")) else ["adapter_model.safetensors"]
        return weights + [name for name in ("adapter_config.json", "README.md") if not (self.path / name).is_file()]

    @_in_one_line
    def reported(self) -> bool:
        """Whether the report exists and is newer than run.json: a run may be killed between writing the two."""
        report = self.path / REPORT
        return report.is_file() and report.stat().st_mtime_ns >= (self.path / RUN).stat().st_mtime_ns

    @_in_one_line
    def check_writable(self) -> None:
        """Refuse a folder that is not writable. It need not exist yet."""
        place = next(place for place in (self.path.absolute(), *self.path.absolute().parents) if place.exists())
        if self.path.is_symlink() and not self.path.exists():
            raise CELoraError(f"cannot write to --output {str(self.path)!r}: it is a link to what is not there")
        if not place.is_dir():
            raise CELoraError(f"cannot write to --output {str(self.path)!r}: {str(place)!r} is a file, not a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise CELoraError(f"cannot write to --output {str(self.path)!r}: {str(place)!r} is read-only for you")

    @_in_one_line
    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that is not writable, or whose files are not celora's. Removes nothing."""
        self.check_writable()
        # Left by a run that was killed before it wrote run.json, or ended before its first step (TensorBoard's logs).
        ours = {LOCK, f".{RUN}.tmp", "runs"}
        names = sorted({entry.name for entry in self.path.iterdir()} - ours) if self.path.exists() else []
        if not names or (self.run() is not None and (resume or overwrite)):
            return
        if self.run() is not None:
            raise CELoraError(
                f"--output {str(self.path)!r} already holds a run; --resume continues it, --overwrite replaces it"
            )
        raise CELoraError(
            f"--output {str(self.path)!r} holds files that are not from a run of celora ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}) and is left alone; choose another folder"
        )

    @_in_one_line
    def set_aside(self) -> Path | None:
        """Move the files of the earlier run into a hidden folder, run.json last, and return that folder."""
        if self.run() is None:
            return None
        aside = self.path / _ASIDE
        _remove(aside)  # an older run that a killed process had already begun to replace
        aside.mkdir()
        for entry in _ours(self.path):
            entry.rename(aside / entry.name)
        return aside

    @_in_one_line
    def restore(self) -> None:
        """Undo `set_aside`: remove what was written since, and move the earlier run back."""
        for entry in _ours(self.path):
            clear(entry)
        self.recover()

    @_in_one_line
    def recover(self) -> None:
        """Move the earlier run back if the process that was replacing it died before the new run began.

        `run.json` moves last, in both directions, and a new run writes it first. So if both folders have one, the new
        run has begun. If neither has one, nothing was set aside.
        """
        aside = self.path / _ASIDE
        if (aside / RUN).exists() != (self.path / RUN).exists():
            for entry in _ours(aside):
                entry.rename(self.path / entry.name)
            with contextlib.suppress(OSError):  # no such folder, or the user's files are in it
                aside.rmdir()

    @_in_one_line
    def forget_earlier(self) -> None:
        """Remove the run that was set aside, once a new one has trained. What cannot be removed stays."""
        with contextlib.suppress(OSError):
            _remove(self.path / _ASIDE)

    def last_checkpoint(self, say: Callable[[str], object] = lambda _: None) -> tuple[Path, dict[str, Any]] | None:
        """The newest checkpoint to resume from, and its manifest ("step", "seconds"). `say`: told why no newer one."""
        for checkpoint in reversed(self._checkpoints()):
            if not sealed(checkpoint):
                say(f"{checkpoint.name} was not saved to its end.")
                continue
            try:
                manifest = read_manifest(checkpoint)
            except CELoraError as error:
                say(f"{checkpoint.name} is damaged: {str(error).rstrip('.')}.")
                continue
            if manifest["resumable"]:
                return checkpoint, manifest
            say(f"{checkpoint.name} holds the adapter alone (save_only_model).")
        return None

    @_in_one_line
    def clear_after(self, step: int) -> None:
        """Rename damaged checkpoints after `step` and remove unfinished ones, so that the run can save there again."""
        for checkpoint in self._checkpoints():
            if not sealed(checkpoint):
                shutil.rmtree(checkpoint)
            elif _step(checkpoint) > step and not _is_whole(checkpoint):
                damaged = checkpoint.with_name(checkpoint.name + _DAMAGED)
                clear(damaged)
                checkpoint.rename(damaged)

    def keep_last(self, limit: int | None, keep: Container[str]) -> None:
        """Remove the oldest finished checkpoints until `limit` are left (None, 0: no limit). Those in `keep` stay."""
        finished = [checkpoint for checkpoint in self._checkpoints() if sealed(checkpoint)]
        spare = [checkpoint for checkpoint in finished if checkpoint.name not in keep]
        for checkpoint in spare[: max(0, len(finished) - limit)] if limit else []:
            unseal(checkpoint)  # first: what is left of it, if anything, counts as unfinished
            shutil.rmtree(checkpoint, ignore_errors=True)  # on Windows, something may be reading a file

    def _checkpoints(self) -> list[Path]:
        """Folders named like checkpoints, in the order of their steps."""
        found = (e for e in self.path.glob("checkpoint-*") if _CHECKPOINT.fullmatch(e.name) and not e.is_symlink())
        return sorted((e for e in found if e.is_dir()), key=_step)


def _ours(folder: Path) -> list[Path]:
    """The entries of a folder that a run has written, `run.json` last. Links and a card of the user's never count."""
    found = [
        entry
        for entry in folder.glob("*")
        if not entry.is_symlink()
        and (
            (entry.is_dir() and (_CHECKPOINT.fullmatch(entry.name.removesuffix(_DAMAGED)) or entry.name in _FOLDERS))
            or (entry.is_file() and _OURS.fullmatch(entry.name) and not (entry.name == CARD and is_own(entry)))
        )
    ]
    return sorted(found, key=lambda entry: entry.name == RUN)


def is_own(path: Path) -> bool:
    """Whether the card at `path` is the user's own: written by them, or claimed by deleting the mark."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return not any(mark in text for mark in _GENERATED)


def _remove(aside: Path) -> None:
    """Remove a run that was set aside, `run.json` last: without it, `recover` takes the rest for the folder's own.

    Raises:
        OSError: of the first entry that cannot be removed. The others are.
    """
    stay: list[OSError] = []
    for entry in (entry for entry in aside.glob("*") if entry.name != RUN):
        try:
            clear(entry)
        except OSError as error:
            stay.append(error)
    if stay:
        raise stay[0]
    clear(aside)


def _written(entry: Path) -> bool:
    """Whether a run writes to this name. Checkpoints are left out: a new checkpoint replaces a link."""
    return entry.name in (LOCK, _ASIDE, *_FOLDERS) or bool(_OURS.fullmatch(entry.name))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except CELoraError:
        return False
    return True
