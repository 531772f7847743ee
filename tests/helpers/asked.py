"""Requests of a user, and the one-line errors for wrong requests."""

from __future__ import annotations

from pathlib import Path

import pytest

from celora.cli.main import main
from celora.errors import CELoraError
from celora.train.request.arguments import parse

OWN = {"model": "m", "data": "d.jsonl", "output": "out"}


def fails(tokens: list[str], *parts: str, own: dict[str, object] = OWN) -> None:
    with pytest.raises(CELoraError) as caught:
        parse(tokens, own)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_line(capsys, *arguments) -> str:
    """Run a command that must fail, and return its one line."""
    assert main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.err + captured.out
    return lines[0]
