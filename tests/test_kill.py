"""A run killed with SIGKILL at any moment goes on and ends with bit-identical parameters (the harness: kill.py)."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kill import MODES

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")


def killed(folder: Path, cases: list[dict], seconds: float) -> list[dict]:
    (folder / "cases.json").write_text(json.dumps(cases))
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(tests / "kill.py"), str(folder), str(folder / "cases.json")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])},
        capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases), done.stderr
    assert not [line for line in done.stderr.splitlines() if "Traceback" in line], done.stderr
    assert [one for one in results if not one["same"]] == []
    return results


@pytest.mark.fault(
    "crash",
    "SIGKILL, or a loss of power, at any moment",
    sees="nothing at the time; `--resume` says from which checkpoint it goes on",
    kept="all up to the last whole checkpoint; the end is bit-identical to an uninterrupted run's: plain, accumulated, "
    "checkpointed",
)
def test_killed_at_seeded_moments(tmp_path):
    """One kill early and one late in each mode, in the latter case a second one while the run goes on."""
    random_ = random.Random(7)
    cases = [
        {"mode": mode, "moments": [["event", random_.uniform(low, high)], *more]}
        for mode in MODES
        for low, high, more in ((0.0, 0.6, []), (0.6, 1.0, [["event", 0.1]]))
    ]
    results = killed(tmp_path, cases, 300)
    assert [one["kills"] for one in results] == [1, 2] * len(MODES)


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path):
    random_ = random.Random(50)
    modes, kinds = list(MODES), ("event", "time")
    cases = [
        {
            "mode": modes[i % len(modes)],
            "moments": [[kinds[i // len(modes) % 2], random_.random()] for _ in range(1 + i % 2)],
        }
        for i in range(50)
    ]
    results = killed(tmp_path, cases, 1800)
    print(f"{sum(one['kills'] for one in results)} kills in {len(results)} runs")
    assert sum(one["kills"] > 0 for one in results) >= 45  # a moment measured in seconds may come after the end
