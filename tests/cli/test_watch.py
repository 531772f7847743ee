"""`celora watch` as a command."""

from __future__ import annotations

import dataclasses
import json

from asked import error_line
from celora.cli.main import main
from celora.train.live import look
from patching import patch_all


def test_watching_runs(finished, capsys, tmp_path):
    out = str(finished[0])
    assert main(["watch", out, out]) == 0  # not a terminal, so the table is printed once
    table = capsys.readouterr().out
    assert [line.split() for line in table.splitlines() if line.startswith("status")] == [["status", *["finished"] * 2]]
    assert main(["watch", out, "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["name"], run["status"]) == (out, "finished")
    assert run["step"] == run["steps"] > 0
    assert error_line(capsys, "watch", tmp_path).startswith("error: there is no run in ")


def test_watching_in_a_terminal_ends_with_the_last_run(finished, monkeypatch):
    states = iter(["running", "running", "finished"])
    seen = []

    def looked(folder):
        seen.append(folder)
        return dataclasses.replace(look(folder), status=next(states))

    patch_all(monkeypatch, "celora.train.live:look", looked)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr("celora.cli.watch._EVERY_S", 0.0)
    assert main(["watch", str(finished[0])]) == 0
    assert len(seen) == 3


def test_waiting_for_the_end_of_a_run(finished, capsys):
    assert main(["watch", str(finished[0]), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
