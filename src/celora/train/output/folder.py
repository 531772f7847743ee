"""The output folder of a run: who made what is in it, what may be replaced, where to resume.

A run keeps the folder locked until it ends or dies. It writes `run.json` first, which marks the folder as celora's.
Only names that a run writes are ever removed. A manifest says whether a checkpoint is whole.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from celora.errors import CELoraError
from celora.files import clear, read_json, write_text
from celora.train.output.manifest import read_manifest, sealed, unseal
from celora.train.processes import is_first

RUN, METRICS, REPORT, CONFIG = "run.json", "metrics.jsonl", "report.html", "celora_config.json"
PLAN = "celora_plan.json"
LOCK, SAVING = ".celora.lock", ".adapter.tmp"
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_DAMAGED = ".damaged"
_NAMES = (
    r"run\.json|metrics\.jsonl|report\.html|celora_(config|plan|state)\.json|README\.md|training_args\.bin"
    r"|adapter_config\.json|adapter_model\.(safetensors|bin)|chat_template\.jinja|processor_config\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|vocab\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model"
)
_OURS = re.compile(rf"({_NAMES})|\.({_NAMES})\.tmp")  # the latter while it is written
_ASIDE = ".replaced"
P = ParamSpec("P")
T = TypeVar("T")


def finite(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON; what JSON cannot hold is written as its `str`."""
    write_text(path, json.dumps(finite(value), indent=2, default=str, allow_nan=False) + "\n")


@contextlib.contextmanager
def writing_to(output: Path) -> Iterator[None]:
    """Tell in one line what the system refuses inside."""
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
    """One run's folder."""

    path: Path

    @property
    @_in_one_line
    def begun(self) -> bool:
        """Whether a run of ours has ever been here, if only for a moment."""
        return (self.path / LOCK).exists() or (self.path / RUN).exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder. The operating system owns the lock and releases it if the process dies.

        Raises:
            CELoraError: another run has locked it, it cannot be written to, or a run would write through a link.
        """
        if not is_first():
            yield  # the processes of one run share the lock of the first
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
    def run(self) -> dict[str, Any] | None:
        """What run.json says, or None where no run of celora has been.

        Raises:
            CELoraError: there is one, but it is damaged.
        """
        # While the first process brings an earlier run back, others find run.json in one place or in the other.
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
        """What run.json says, once a run that was being replaced is back; None where no run of celora has been."""
        if is_first() and (self.path / _ASIDE).is_dir():
            with self.locked():
                self.recover()
        return self.run()

    def resumable(self) -> dict[str, Any]:
        """`earlier`, or a CELoraError: there is nothing to resume."""
        run = self.earlier()
        if run is None:
            raise CELoraError(
                f"nothing to resume in {str(self.path)!r}: no run of celora is there; give --model and --data, too, to "
                "start one, or another --output"
            )
        return run

    @_in_one_line
    def missing(self) -> list[str]:
        """The files that a finished run has and this folder lacks, its report left out."""
        weights = [] if any(self.path.glob("adapter_model.*")) else ["adapter_model.safetensors"]
        return weights + [name for name in ("adapter_config.json", "README.md") if not (self.path / name).is_file()]

    @_in_one_line
    def reported(self) -> bool:
        """Whether the report is there and was written after what run.json says: a run is killed between the two."""
        report = self.path / REPORT
        return report.is_file() and report.stat().st_mtime_ns >= (self.path / RUN).stat().st_mtime_ns

    @_in_one_line
    def check_writable(self) -> None:
        """Refuse a folder that nobody can write into; it may be yet to be made."""
        place = next(place for place in (self.path.absolute(), *self.path.absolute().parents) if place.exists())
        if self.path.is_symlink() and not self.path.exists():
            raise CELoraError(f"cannot write to --output {str(self.path)!r}: it is a link to what is not there")
        if not place.is_dir():
            raise CELoraError(f"cannot write to --output {str(self.path)!r}: {str(place)!r} is a file, not a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise CELoraError(f"cannot write to --output {str(self.path)!r}: {str(place)!r} is read-only for you")

    @_in_one_line
    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that is not ours to write into, or that nobody can. Removes nothing."""
        self.check_writable()
        ours = {LOCK, f".{RUN}.tmp"}  # left by a run that was killed before it could say that it is one
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
        """Move what a run of ours wrote, run.json last, into a hidden folder, and say which; the rest stays."""
        if self.run() is None:
            return None
        aside = self.path / _ASIDE
        clear(aside)  # left by a run that was killed: it was to be replaced already
        aside.mkdir()
        for entry in _ours(self.path):
            entry.rename(aside / entry.name)
        return aside

    @_in_one_line
    def restore(self) -> None:
        """Undo `set_aside`: what was written since goes, and the earlier run comes back."""
        for entry in _ours(self.path):
            clear(entry)
        self.recover()

    @_in_one_line
    def recover(self) -> None:
        """Bring the earlier run back if the process that was to replace it died before it began a new one.

        `run.json` is the last to be set aside, the last to come back and the first that a new run writes: where both
        have one, the new run has begun, and where neither has, none of ours was set aside.
        """
        aside = self.path / _ASIDE
        if (aside / RUN).exists() != (self.path / RUN).exists():
            for entry in _ours(aside):
                entry.rename(self.path / entry.name)
            with contextlib.suppress(OSError):  # there is none, or something that is not ours is left in it
                aside.rmdir()

    @_in_one_line
    def forget_earlier(self) -> None:
        """Remove the run that was set aside, by this process or by one that was killed: a new one has trained."""
        if (self.path / _ASIDE).is_dir():
            shutil.rmtree(self.path / _ASIDE)

    def last_checkpoint(self, say: Callable[[str], object] = lambda _: None) -> tuple[Path, dict[str, Any]] | None:
        """The newest whole checkpoint to resume from, and its manifest ("step", "seconds"); hears why not a newer."""
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
        """Move damaged checkpoints after `step` out of the way and remove unfinished ones: the run saves anew."""
        for checkpoint in self._checkpoints():
            if not sealed(checkpoint):
                shutil.rmtree(checkpoint)
            elif _step(checkpoint) > step and not _is_whole(checkpoint):
                damaged = checkpoint.with_name(checkpoint.name + _DAMAGED)
                clear(damaged)
                checkpoint.rename(damaged)

    def keep_last(self, limit: int | None, keep: Container[str]) -> None:
        """Remove the oldest finished checkpoints until `limit` are left (None or 0: no limit), but none in `keep`."""
        finished = [checkpoint for checkpoint in self._checkpoints() if sealed(checkpoint)]
        spare = [checkpoint for checkpoint in finished if checkpoint.name not in keep]
        for checkpoint in spare[: max(0, len(finished) - limit)] if limit else []:
            unseal(checkpoint)  # first, so that what a kill leaves of it counts as unfinished
            shutil.rmtree(checkpoint)

    def _checkpoints(self) -> list[Path]:
        """Folders named like checkpoints, by step."""
        found = (e for e in self.path.glob("checkpoint-*") if _CHECKPOINT.fullmatch(e.name) and not e.is_symlink())
        return sorted((e for e in found if e.is_dir()), key=_step)


def _ours(folder: Path) -> list[Path]:
    """What a run of ours has written in a folder, `run.json` last; links are none of it."""
    found = [
        entry
        for entry in folder.glob("*")
        if not entry.is_symlink()
        and (
            (entry.is_dir() and (_CHECKPOINT.fullmatch(entry.name.removesuffix(_DAMAGED)) or entry.name == SAVING))
            or (entry.is_file() and _OURS.fullmatch(entry.name))
        )
    ]
    return sorted(found, key=lambda entry: entry.name == RUN)


def _written(entry: Path) -> bool:
    """Whether a run writes under this name, if it is no checkpoint's: a link there is replaced by the checkpoint."""
    return entry.name in (LOCK, SAVING, _ASIDE) or bool(_OURS.fullmatch(entry.name))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_manifest(checkpoint)
    except CELoraError:
        return False
    return True
