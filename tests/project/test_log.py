"""The log has short dated entries: a verdict in the title, at most 120 words, at most one table."""

from __future__ import annotations

import re
from pathlib import Path

LOG = Path(__file__).parents[2] / "docs" / "develop" / "log"
TITLE = re.compile(r"20\d\d-\d\d-\d\d (kept|negative|fixed|measured|missed|open): \S.*")


def entries() -> list[tuple[str, str]]:
    pages = [path.read_text(encoding="utf-8") for path in sorted(LOG.glob("*.md")) if path.name != "index.md"]
    parts = [part for page in pages for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]]
    return [(part.partition("\n")[0], part.partition("\n")[2].strip()) for part in parts]


def test_titles_are_dated_and_say_the_verdict() -> None:
    assert len(entries()) > 90
    assert [title for title, _ in entries() if not TITLE.fullmatch(title)] == []


def test_entries_are_short_and_have_one_table_at_most() -> None:
    for title, body in entries():
        words = [word for line in body.splitlines() if not line.startswith("|") for word in line.split()]
        assert len(words) <= 120, (title, len(words))
        tables = re.findall(r"(?:^\|.*\n?)+", body, flags=re.MULTILINE)
        assert len(tables) <= 1, title


def test_newest_first() -> None:
    for path in LOG.glob("*.md"):
        dates = re.findall(r"^## (\S+) ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert dates == sorted(dates, reverse=True), path.name
