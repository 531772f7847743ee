"""What TRL's script fails on: bad input is one line, anything else keeps its traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from forked import run, script

GUARDED = Path(__file__).parents[2] / "src" / "celora" / "cli" / "sft_script.py"
TRAINS = """
from transformers import Trainer, TrainerState

class Training(Trainer):
    def __init__(self, step):
        self.state = TrainerState(global_step=step)

    def train(self):
        raise {error}

Training({step}).train()
"""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise ValueError('no such\\nrows')", "no such rows"),
        ("{}['test']", "KeyError: 'test'"),
        (TRAINS.format(step=0, error="ValueError('too long')"), "too long"),
    ],
)
def test_what_is_refused_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "refuses.py").write_text(text)
    done = run(script, GUARDED, tmp_path / "refuses.py")
    assert done.returncode == 2, done.stderr
    shown = "(`trl sft` with the same arguments shows the traceback)"
    assert done.stderr == f"error: no training with these settings: {said} {shown}\n"


@pytest.mark.parametrize(
    "text",
    [
        TRAINS.format(step=1, error="ValueError('of step 1')"),
        "exec('raise ValueError', {'__name__': 'celora.own'})",
        "raise MemoryError",
    ],
)
def test_a_bug_and_a_training_that_fails_keep_their_traceback(text: str, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(text)
    done = run(script, GUARDED, tmp_path / "fails.py")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "trl sft" not in done.stderr


def test_a_script_that_ends_well(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import sys; sys.exit(5)")
    assert run(script, GUARDED, tmp_path / "ends.py").returncode == 5
