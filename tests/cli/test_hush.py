"""A command prints celora's own lines. Of other libraries' lines it prints only those that concern the run."""

from __future__ import annotations

import logging
import sys

import pytest

from celora.cli.hush import MESSAGES, hush


@pytest.mark.parametrize("name", MESSAGES)
def test_only_the_listed_messages_are_left_out(name: str) -> None:
    hush()
    hush()  # every command of one process does
    logger = logging.getLogger(name)
    said = [
        record
        for words in (MESSAGES[name], "the weights are packed")
        if (record := logger.makeRecord(name, logging.WARNING, "file.py", 1, f"{words} because", (), None))
        and logger.filter(record)
    ]
    assert [record.getMessage() for record in said] == (
        [] if name == "DeepSpeed" else ["the weights are packed because"]
    )
    assert len(logger.filters) == 1


def test_what_deepspeed_says_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSpeed's own handler writes to stdout, but stdout is for results."""
    hush()
    logger, handler = logging.getLogger("DeepSpeed"), logging.StreamHandler(sys.stdout)
    logger.addHandler(handler)
    try:
        logger.warning("Setting accelerator to CPU. If you have one, ...")
        logger.warning("the optimizer state is partitioned")
    finally:
        logger.removeHandler(handler)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "the optimizer state is partitioned\n")
