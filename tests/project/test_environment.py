"""Which build of torch the environment gets. `make demo` and `make test` make the environment."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import environment

NONE = ":env:.timeout='180'\nglobal.find-links='/srv/wheels'\n"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Linux machine without a card, on which every page of the web answers."""
    monkeypatch.setattr(environment.platform, "system", lambda: "Linux")
    monkeypatch.setattr(environment, "has_card", lambda: False)
    monkeypatch.setattr(environment, "reachable", lambda url: True)
    return monkeypatch


def test_without_a_card_torch_is_the_cpu_build(bare: pytest.MonkeyPatch) -> None:
    index, why = environment.index_of_torch(NONE)
    assert index == "https://download.pytorch.org/whl/cpu"
    assert "no NVIDIA card" in why


@pytest.mark.parametrize(
    ("name", "value", "configuration", "why"),
    [
        ("has_card", lambda: True, NONE, "with CUDA"),
        ("reachable", lambda url: False, NONE, "no answer"),
        ("platform", SimpleNamespace(system=lambda: "Darwin"), NONE, "usual index"),
        ("has_card", lambda: False, "global.index-url='https://mirror/simple'", "configured with"),
        ("has_card", lambda: False, ":env:.index-url='https://mirror/simple'", "configured with"),
        ("has_card", lambda: False, "install.no-index='true'", "configured with"),
    ],
)
def test_otherwise_it_is_what_pip_finds(
    bare: pytest.MonkeyPatch, name: str, value: object, configuration: str, why: str
) -> None:
    bare.setattr(environment, name, value)
    index, said = environment.index_of_torch(configuration)
    assert index is None
    assert why in said


def test_a_page_that_does_not_answer_is_not_reachable(tmp_path: Path) -> None:
    (tmp_path / "page").write_text("here")
    assert environment.reachable((tmp_path / "page").as_uri())
    assert not environment.reachable((tmp_path / "none").as_uri())
    assert not environment.reachable("http://127.0.0.1:9/")


def test_the_range_of_torch_stands_in_one_place() -> None:
    assert environment.requirement("torch").startswith("torch>=")


def test_pip_is_silent_unless_it_fails(capfd: pytest.CaptureFixture[str]) -> None:
    assert environment.pip(Path(sys.executable), "--version").startswith("pip ")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(SystemExit, match=r"celora: pip install --no-index no-such-package failed"):
        environment.pip(Path(sys.executable), "install", "--no-index", "no-such-package")
    assert "No matching distribution" in capfd.readouterr().err
