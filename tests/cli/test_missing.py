"""What `celora` says where it was installed as a library, without the packages of the command line."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from celora.__main__ import run
from celora.cli.missing import missing
from patching import patch_all

NEEDS = [
    "torch>=2.8",
    'torch>=2.11; extra == "app"',
    'trl>=1.16; extra == "app"',
    'gguf>=0.17; extra == "app"',
    'typer>=0.19; extra == "app"',
    'pytest>=8; extra == "dev"',
]
THERE = {"torch": "2.11.0+cpu", "trl": "1.17.0.dev0", "gguf": "0.17", "typer": "0.27"}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The installed packages and their versions. A test changes them."""
    there = dict(THERE)

    def version(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: NEEDS)
    return there


def test_nothing_is_missing(installed: dict[str, str]) -> None:
    assert missing() == ""


def test_what_is_missing_or_too_old_is_named(installed: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    installed["trl"] = "1.9.0"
    del installed["gguf"]
    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == 2
    out, line = capsys.readouterr()
    assert out == ""
    assert line.count("\n") == 1
    assert line.startswith(
        'error: the command line needs trl>=1.16 (not 1.9.0), gguf; run: pip install "celora[app]" ('
    )


def test_doctor_runs_all_the_same_and_says_it(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    del installed["gguf"]
    patch_all(monkeypatch, "celora.studies.doctor:examine", dict)
    patch_all(monkeypatch, "celora.studies.doctor:describe", lambda found: "found")
    monkeypatch.setattr(sys, "argv", ["celora", "doctor"])
    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == 0
    found, line = capsys.readouterr().out.strip().split("\n\n")
    assert found == "found"
    assert line.startswith(
        'For other commands than doctor, the command line needs gguf; run: pip install "celora[app]"'
    )


def test_doctor_needs_typer(installed: dict[str, str]) -> None:
    installed["typer"] = "0.12"
    assert missing("doctor").startswith("the command line needs typer>=0.19 (not 0.12); run: ")


def test_a_copy_that_was_never_installed_needs_what_it_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert missing() == ""
