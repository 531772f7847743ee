"""Shared by the tests of the training application."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from celora.train.rows.data import load_rows
from rowfiles import Load


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def rows(source: str | Path, **options: Any) -> list[dict[str, Any]]:
        return load_rows(source, **{"chat": True, "cache_dir": tmp_path / ".cache", **options}).to_list()

    return rows
