"""A run killed with SIGKILL at any moment resumes to bit-identical parameters (the harness: kill.py)."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest

import forked
from kill import MODES, PROCESSES

ALWAYS = "always --resume"
ALONE, TOGETHER = (
    [mode for mode in MODES if (PROCESSES[mode] == 1) is alone and mode != ALWAYS] for alone in (True, False)
)

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")


def run(folder: Path, cases: list[dict], seconds: float) -> list[dict]:
    """The harness's results for these cases, from one process that imports the training stack once."""
    (folder / "cases.json").write_text(json.dumps(cases))
    tests = Path(__file__).parents[1] / "helpers"
    done = forked.run(
        forked.script, tests / "kill.py", folder, folder / "cases.json",
        environment=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}, timeout=seconds,
    )  # fmt: skip
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(cases), done.stderr
    assert not [line for line in done.stderr.splitlines() if "Traceback" in line], done.stderr
    return results


def same(results: list[dict]) -> list[dict]:
    """The results, after a check that all of them ended as if nothing had been killed."""
    assert [one for one in results if not one["same"]] == []
    return results


# Each mode is killed once early and once late. After the late kill, the resumed run is killed, too.
SEEDED = random.Random(7)
EACH_MODE = [
    {"mode": mode, "moments": [["event", SEEDED.uniform(low, high)], *more]}
    for mode in ALONE
    for low, high, more in ((0.0, 0.6, []), (0.6, 1.0, [["event", 0.1]]))
]
# A job gives the same command at every start. It is killed before its folder exists, and before its report does.
A_JOB = [["event", 0.0], ["write", ".run.json.tmp"], ["event", 0.7], ["write", ".report.html.tmp"]]
CASES = [
    *EACH_MODE,
    {"mode": ALWAYS, "moments": A_JOB},
    # The first is killed after its part of a checkpoint, the second before its part. Each selects by its own tokens.
    {"mode": "two", "moments": [["event", 0.75, 0], ["event", 0.5, 1]]},
    {"mode": "two auto", "moments": [["locked", 0], ["full", 0.7, 0], ["full", 0.1, 1]]},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run(tmp_path_factory.mktemp("killed"), CASES, 600)


def test_killed_at_seeded_moments(results):
    *each, always = same(results[: len(EACH_MODE) + 1])
    assert [one["kills"] for one in each] == [1, 2] * len(ALONE)
    assert {one["mode"] for one in each if one["moves"] > 1} == {"auto"}  # layers, and the head
    assert (always["kills"], always["left"][0]) == (len(A_JOB), [])
    assert "adapter_model.safetensors" in always["left"][-1]
    assert "report.html" not in always["left"][-1]


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path):
    random_ = random.Random(50)
    kinds = ("event", "time")
    cases = [
        {
            "mode": ALONE[i % len(ALONE)],
            "moments": [[kinds[i // len(ALONE) % 2], random_.random()] for _ in range(1 + i % 2)],
        }
        for i in range(50)
    ]
    results = same(run(tmp_path, cases, 1800))
    print(f"{sum(one['kills'] for one in results)} kills in {len(results)} runs")
    assert sum(one["kills"] > 0 for one in results) >= 45  # some moments, measured in seconds, come after the end


def test_one_of_two_killed_at_seeded_moments(results):
    assert same(results[-2:-1])[0]["kills"] == 2


def test_what_stops_one_of_two_stops_both(results):
    (stopped,) = same(results[-1:])
    assert (stopped["ended"], stopped["moves"] > 1) == ([2, 2, 2], True)


@pytest.mark.slow
def test_one_of_two_killed_at_many_random_moments(tmp_path):
    random_ = random.Random(24)
    cases = [
        {
            "mode": TOGETHER[i % len(TOGETHER)],
            "moments": [
                [("event", "time", "full")[i // 4 % 3], random_.random(), (i // 2 + j) % 2]
                for j in range(1 + i % 3 // 2)
            ],
        }
        for i in range(24)
    ]
    results = same(run(tmp_path, cases, 2400))
    print(f"{sum(one['kills'] for one in results)} kills in {len(results)} runs")
    assert sum(one["kills"] > 0 for one in results) >= 12  # a full disk kills nobody
