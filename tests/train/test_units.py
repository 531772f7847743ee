"""Sizes and times as a user writes and reads them."""

import pytest

from celora.errors import CELoraError
from celora.train.units import duration, gib, in_bytes


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("8GiB", 2**33), ("8 gib", 2**33), ("512MB", 512_000_000), ("2G", 2**31), ("1.5KiB", 1536), ("77B", 77)],
)
def test_sizes(text, bytes_):
    assert in_bytes(text) == bytes_


@pytest.mark.parametrize("text", ["", "GiB", "8", "8 apples", "-8GiB", "0", "0GiB", "nan", "1e9", "9" * 40, "8GiB8"])
def test_what_is_no_size_is_one_line(text):
    with pytest.raises(CELoraError, match="expected a size with its unit, like 8GiB or 512MB"):
        in_bytes(text)


def test_how_sizes_are_read():
    assert [gib(size) for size in (0, 2**30 - 2**20, 2**30, 5 * 2**28)] == ["0 MiB", "1023 MiB", "1.00 GiB", "1.25 GiB"]


def test_how_times_are_read():
    seconds = (0.123, 9.9, 10, 119, 120, 7199, 7200)
    assert [duration(s) for s in seconds] == ["0.12 s", "9.9 s", "10 s", "119 s", "2 min", "120 min", "2.0 h"]
