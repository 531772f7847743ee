"""The output folder of a run: who made what is in it, what may be replaced, where to resume.

`run.json` is written first and marks the folder as ours; only names that a run writes are ever removed. A checkpoint is
complete when its last file, `celora_run.json`, is there: a process killed while saving leaves none.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celora.errors import CELoraError
from celora.files import write_text

RUN, METRICS, REPORT, CONFIG = "run.json", "metrics.jsonl", "report.html", "celora_config.json"
PLAN = "celora_plan.json"
MARKER = "celora_run.json"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OURS = re.compile(
    r"run\.json|metrics\.jsonl|report\.html|celora_(config|plan|state)\.json|README\.md|training_args\.bin"
    r"|adapter_config\.json|adapter_model\.(safetensors|bin)|chat_template\.jinja|processor_config\.json"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt|vocab\.txt"
    r"|(tokenizer|spiece|sentencepiece\.bpe)\.model|\.?[\w.]+\.tmp"
)
_ASIDE = ".replaced"


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


@dataclass(frozen=True)
class OutputFolder:
    """One run's folder."""

    path: Path

    def run(self) -> dict[str, Any] | None:
        """What run.json says, or None where no run of celora has been."""
        try:
            document = json.loads((self.path / RUN).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError):
            return None
        return document if isinstance(document, dict) and "celora" in document else None

    def resumable(self) -> dict[str, Any]:
        """What run.json says, or a CELoraError: there is nothing to resume."""
        run = self.run()
        if run is None:
            raise CELoraError(f"nothing to resume in {str(self.path)!r}: no run of celora is there; drop --resume")
        return run

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that is not ours to write into. Removes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise CELoraError(f"--output {str(self.path)!r} is a file; expected a folder")
        names = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
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

    def set_aside(self) -> Path | None:
        """Move what a run of ours wrote, run.json last, into a hidden folder, and say which; the rest stays."""
        if self.run() is None:
            return None
        aside = self.path / _ASIDE
        if aside.exists():
            shutil.rmtree(aside)  # left by a run that was killed: it was to be replaced already
        aside.mkdir()
        for entry in self._ours():
            entry.rename(aside / entry.name)
        return aside

    def restore(self, aside: Path) -> None:
        """Undo `set_aside`: what was written since goes, and the earlier run comes back."""
        for entry in self._ours():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for entry in sorted(aside.iterdir(), key=lambda e: e.name == RUN):
            entry.rename(self.path / entry.name)
        aside.rmdir()

    def _ours(self) -> list[Path]:
        found = [
            entry
            for entry in self.path.iterdir()
            if not entry.is_symlink()
            and (
                (entry.is_dir() and _CHECKPOINT.fullmatch(entry.name))
                or (entry.is_file() and _OURS.fullmatch(entry.name))
            )
        ]
        return sorted(found, key=lambda entry: entry.name == RUN)

    def last_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its marker ({"step", "seconds"})."""
        steps = sorted(
            (int(m[1]) for e in self.path.glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(e.name))), reverse=True
        )
        for step in steps:
            checkpoint = self.path / f"checkpoint-{step}"
            if (checkpoint / MARKER).is_file():
                return checkpoint, json.loads((checkpoint / MARKER).read_text(encoding="utf-8"))
        return None
