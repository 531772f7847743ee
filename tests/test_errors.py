from __future__ import annotations

from celora.errors import CELoraError, unknown


def test_unknown_names_suggest_the_nearest() -> None:
    assert str(unknown("preset", "papper", ["paper", "off"])) == (
        "unknown preset 'papper'; did you mean 'paper'? Known: off, paper"
    )
    assert str(unknown("preset", "zzz", ["paper"])) == "unknown preset 'zzz'. Known: paper"
    assert isinstance(unknown("a", "b", []), CELoraError)
