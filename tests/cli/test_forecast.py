"""`celora estimate` on the command line: its help, and what it prints for programs."""

from __future__ import annotations

import json

from celora.cli.main import main
from patching import patch_all


def test_the_help_has_examples(capsys):
    assert main(["estimate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "celora estimate --model model.gguf --data chats.jsonl --memory 8GiB" in shown


def test_json_and_the_table_say_the_same(inputs, capsys, monkeypatch):
    patch_all(monkeypatch, "celora.train.forecast.blocks:seconds", lambda probe, batch, optimizer: 0.3)
    command = ["estimate", "--model", inputs["model"], "--data", inputs["data"], "--preset", "exact", "--base", "int8"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(command) == 0
    table = capsys.readouterr().out
    size, rows = table.splitlines()[:2]
    assert "million weights: " in size
    assert rows.startswith(f"{found['rows']:,} rows, {found['tokens']:,} tokens, the longest row has ")
    assert table.count("int8, else ") == sum(way["shown"] for way in found["ways"]) <= 3
    assert table.count("<- celora takes this") == 1


def test_a_busy_machine_is_said(inputs, capsys, monkeypatch):
    patch_all(monkeypatch, "celora.train.forecast.blocks:seconds", lambda probe, batch, optimizer: 0.3)
    patch_all(monkeypatch, "celora.machine.timing:disturbed", lambda: "other programs use 90% of the processors")
    command = ["estimate", "--model", inputs["model"], "--data", inputs["data"], "--preset", "exact", "--base", "int8"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["disturbed"] == "other programs use 90% of the processors"
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(
        "\nAsk again when the machine is idle: other programs use 90% of the processors.\n"
    )
