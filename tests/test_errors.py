from __future__ import annotations

import pytest

from celora.errors import CELoraError, choose, unknown


def test_unknown_names_suggest_the_nearest() -> None:
    assert str(unknown("preset", "papper", ["paper", "off"])) == (
        "unknown preset 'papper'; did you mean 'paper'? Known: off, paper"
    )
    assert str(unknown("preset", "zzz", ["paper"])) == "unknown preset 'zzz'. Known: paper"
    assert isinstance(unknown("a", "b", []), CELoraError)


def test_the_case_of_a_name_does_not_matter() -> None:
    assert choose("arm", "lora", ["auto", "LoRA"]) == "LoRA"
    with pytest.raises(CELoraError, match="unknown arm 'aut'; did you mean 'auto'"):
        choose("arm", "aut", ["auto", "LoRA"])


def test_a_message_is_one_line_whatever_it_quotes() -> None:
    said = str(CELoraError("cannot read 'a  b.json':\n\n  line 1\r\n    is wrong\n"))
    assert said == "cannot read 'a  b.json': line 1 is wrong"
