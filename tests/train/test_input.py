"""Generated configurations, rows and flags either work or give one line.

By default there are 300 cases in all. HYPOTHESIS_PROFILE=nightly runs 2,000, new ones every time.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from celora.cli import app as app_module
from celora.cli import main as cli
from celora.cli import studies
from celora.errors import CELoraError
from celora.settings.config import CELoraConfig, LayerConfig
from celora.studies import bench, compare, demo, doctor
from celora.train import prepare, record, run
from celora.train.request.arguments import TrainRequest, make_request, sft_config
from celora.train.request.fields import known_fields
from celora.train.rows.data import SHAPES, load_rows
from patching import patch_all

TEXTS = st.sampled_from(
    ["", " ", "a", "none", "true", "1e999", "-1", "0", "0.5", "\0", "\ud800", "\u2028", "é" * 50, "../../etc/passwd",
     "=cmd|' /C calc'!A0", "<script>alert(1)</script>", "${HOME}", "!!python/object/apply:os.system [ls]", "{", "[1",
     "1" * 5000, "columns", "tokens", "int8", "energy", "balanced", "paper", "auto", "q_proj", "*"]
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.text(max_size=8)
    | st.sampled_from([10**400, -(2**63), 2**64, 1e308, 5e-324])
)  # fmt: skip
JUNK = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def one_line(error: CELoraError, names: str = "") -> None:
    assert str(error).strip()
    assert "\n" not in str(error)
    assert names in str(error)


# --- configuration ---------------------------------------------------------------------------------------------------

FIELDS = list(CELoraConfig().to_dict())
VALID = st.sampled_from(
    [("estimator", "tokens"), ("keep_ratio", 0.3), ("rank", 2), ("rank", "adapter"), ("selection", "energy"),
     ("precision", "int8"), ("refresh_every", 5), ("target_error", 0.2), ("overrides", {"*.q_proj": {"rank": 0}}),
     ("labelled_head", True), ("padding_free", True), ("head_keep_ratio", 0.5), ("spread", True), ("seed", 3)]
)  # fmt: skip
ENTRIES = VALID | st.tuples(st.sampled_from(FIELDS), JUNK) | st.tuples(st.text(max_size=6), JUNK)
OVERRIDES = st.dictionaries(TEXTS, st.dictionaries(st.sampled_from(list(LayerConfig.__dataclass_fields__)), JUNK))


@given(st.lists(ENTRIES | st.tuples(st.just("overrides"), OVERRIDES), max_size=4).map(dict))
def test_configuration(values: dict[str, Any]) -> None:
    try:
        config = CELoraConfig.from_dict(values)
    except CELoraError as error:
        return one_line(error)
    assert CELoraConfig.from_dict(config.to_dict()) == config
    assert 0 < config.for_layer("model.layers.0.self_attn.q_proj").keep_ratio <= 1
    return None


# --- rows ------------------------------------------------------------------------------------------------------------

COLUMNS = sorted({column for columns in SHAPES.values() for column in columns} | {"input"})


@pytest.fixture
def _no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "human"]), "content": TEXTS})
    | st.dictionaries(st.sampled_from(["role", "content", "from"]), JUNK, max_size=3),
    max_size=3,
)
ROWS = st.dictionaries(st.sampled_from(COLUMNS), st.text(min_size=1, max_size=9) | TEXTS | JUNK | MESSAGES, max_size=4)
FINE = st.fixed_dictionaries({"text": st.text(min_size=1, max_size=9)})


@pytest.mark.usefixtures("_no_bars")
@given(st.lists(ROWS | FINE | JUNK, max_size=4), st.sampled_from([".jsonl", ".json"]), st.booleans())
def test_rows(rows: list[Any], suffix: str, chat: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"rows{suffix}"
        lines = [json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) if suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")
        try:
            loaded = load_rows(file, chat=chat, cache_dir=Path(folder) / "cache").to_list()
        except CELoraError as error:
            return one_line(error, names=str(file))
    assert len(loaded) == len(rows)
    return None


# --- flags -----------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(sorted(known_fields()))
FLAGS = st.one_of(
    st.tuples(NAMES, TEXTS | SCALARS.map(str) | JUNK.map(lambda value: json.dumps(value, default=str))).map(
        lambda pair: [f"--{pair[0]}", pair[1]]
    ),
    NAMES.map(lambda name: [f"--{name}"]),
    NAMES.map(lambda name: [f"--no-{name}"]),
    st.text(max_size=6).map(lambda text: [text]),
)


COMMANDS = typer.main.get_command(app_module.app).commands
VALUES = TEXTS | st.integers(-9, 9).map(str) | st.text(max_size=6)


def own_flags(command: str) -> st.SearchStrategy[list[str]]:
    """One of a command's own options, with a value if it takes one; or an argument."""

    def drawn(parameter: Any) -> st.SearchStrategy[list[str]]:
        if parameter.param_type_name == "argument":
            return VALUES.map(lambda text: [text])
        return st.just([parameter.opts[0]]) if parameter.is_flag else VALUES.map(lambda text: [parameter.opts[0], text])

    return st.sampled_from(COMMANDS[command].params).flatmap(drawn)


CALLS = st.sampled_from(["train", "train", *COMMANDS]).flatmap(
    lambda command: st.tuples(st.just(command), st.lists(own_flags(command), max_size=2))
)


@dataclass
class Nothing:
    """Stands for a report or a plan."""

    cosine: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, path: Path) -> None:
        """Save nothing."""


@pytest.fixture
def _no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands parse, check and print, but do nothing that takes long or writes."""
    found = doctor.examine()

    def checked(request: TrainRequest, **_: Any) -> Any:
        sft_config(request)
        return Nothing()

    def trained(request: TrainRequest, **_: Any) -> record.TrainResult:
        checked(request)
        return record.TrainResult("finished", request.output, 1, {"step": 1, "seconds": 1.0, "loss": 2.0})

    def compared(settings: dict[str, object], arms: tuple[str, ...], **_: Any) -> list[compare.Outcome]:
        checked(make_request(settings))
        return [compare.Outcome(arm, 0, 1, 2.0, None, None, 1.0) for arm in arms]

    for place, name, instead in (
        (run, "train", trained),
        (prepare, "audit_model", checked),
        (compare, "compare", compared),
        (demo, "run_demo", lambda *_, **__: [demo.DemoRow("LoRA", 0, 0.9, 4, 1, 8, 10.0, 1.0, 1.0, 1, "float32", "2")]),
        (demo, "whole_way", lambda _: []),
        (bench, "measure", lambda *_, **__: []),
        (doctor, "examine", lambda: found),
    ):
        monkeypatch.setattr(place, name, instead)
    monkeypatch.setattr(studies, "write_text", lambda *_: None)
    patch_all(monkeypatch, "celora.cli.options:settle_in", lambda: None)
    patch_all(monkeypatch, "celora.cli.sft:through_celora", lambda *_: None)
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b" / "c")


@pytest.mark.usefixtures("_no_work")
@given(
    CALLS,
    st.lists(FLAGS, max_size=3),
    st.dictionaries(NAMES | st.just("env"), JUNK, max_size=2) | JUNK,
    st.booleans(),
)
def test_flags(call: tuple[str, list[list[str]]], flags: list[list[str]], document: Any, with_file: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), mock.patch.dict(os.environ):
        warnings.simplefilter("ignore")  # TRL and transformers also warn about some values
        file = Path(folder) / "run.yaml"
        file.write_text(json.dumps(document), encoding="utf-8")
        command, own = call
        needed = [["--model", "m"], ["--data", "d"], ["--output", str(Path(folder) / "out")]]
        if command in ("train", "audit", "compare"):
            own = needed + own + flags + ([["--config", str(file)]] if with_file else [])
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            status = cli.main([command, *(token for flag in own for token in flag)])
    said = err.getvalue().splitlines()
    if status == 2:
        assert len(said) == 1
        assert said[0].startswith("error: ")
        assert out.getvalue() == ""
    else:
        before = [line for line in said if line.startswith("LoRA, CE-LoRA as published")]  # `celora demo` prints this
        assert (status, said) == (0, before)
