"""A module of celora that runs in a process of its own finds its modules, and none of the user's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from celora.machine.own_process import of_module


def test_modules_are_found_where_this_process_finds_them_and_not_in_the_folder_it_runs_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("there", "here"):
        (tmp_path / folder).mkdir()
    (tmp_path / "there" / "asked.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))")
    (tmp_path / "here" / "json.py").write_text("raise SystemExit('taken from here')")
    monkeypatch.syspath_prepend(tmp_path / "there")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry] + [tmp_path])  # Python ignores a Path
    monkeypatch.chdir(tmp_path / "here")
    command, environment = of_module("asked", "a b", "c")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ('["a b", "c"]', "", 0)
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in a notebook
    command, environment = of_module("asked")
    assert "taken from here" in subprocess.run(command, env=environment, capture_output=True, text=True).stderr
