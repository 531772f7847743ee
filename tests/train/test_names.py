"""The names of TRL's settings, read from its sources without importing it."""

from __future__ import annotations

import dataclasses

import pytest
from accelerate.commands.launch import launch_command_parser

from celora.train.request import names
from celora.train.request.fields import (
    check_flags,
)
from celora.train.request.names import launcher_names, trl_names
from patching import patch_all
from trl_fields import TRL_SFT


def test_names_read_from_sources_are_those_of_the_import():
    """With these names, celora refuses flags before it imports TRL."""
    of_trl = {f.name for cls in TRL_SFT for f in dataclasses.fields(cls)}
    assert trl_names() == of_trl
    imported = {action.dest for action in launch_command_parser()._actions}  # the parser itself has these names
    assert launcher_names() >= imported - {"training_script", "training_script_args", "tpu_use_cluster"}
    flags = "--max-steps 4 --no_packing --output_dir=x --lora_r=-1 -- --bf16 false stray"
    check_flags(flags.split())


HERE = "from .a import SFTConfig"


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"__init__": HERE, "a": "class SFTConfig:\n    lr: float\n    k: ClassVar[int] = 3"}, {"lr"}),
        ({"__init__": "from .a import C as SFTConfig", "a": "from .b import B\nclass C(B):\n    x: int = 0",
          "b": "class B:\n    y: int"}, {"x", "y"}),
        ({"__init__": HERE, "a": "from elsewhere import B\nclass SFTConfig(B):\n    x: int"}, None),
        ({"__init__": HERE, "a": "class SFTConfig(made()):\n    x: int"}, None),
        ({"__init__": "from . import SFTConfig"}, None),
        ({"__init__": HERE, "a": "class ("}, None),
        ({"__init__": ""}, None),
    ],
)  # fmt: skip
def test_sources_that_cannot_be_followed_are_none(files, found, tmp_path, monkeypatch):
    package = tmp_path / "a_library"
    package.mkdir()
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    names._parse.cache_clear()
    assert names._fields("a_library", "SFTConfig") == found
    names._parse.cache_clear()


def test_without_sources_flags_wait_for_the_import(monkeypatch):
    patch_all(monkeypatch, "celora.train.request.names:trl_names", lambda: None)
    check_flags(["--anything"])
