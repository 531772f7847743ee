"""The documentation builds without broken links, fetches nothing, and its commands and snippets run."""

from __future__ import annotations

import html
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from celora import CELoraConfig
from celora.cli.main import main
from celora.runtime.attachment import find
from celora.train.request.arguments import estimator_config, parse
from celora.train.rows.data import SHAPES, load_rows
from machine import refuses
from small import adapter, make_batch
from tiny import save_rows, save_tiny_model

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def build(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(root / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A copy of the sources with three deliberate mistakes, with the site built in it, and what the build said."""
    copy = tmp_path_factory.mktemp("site")
    for name in ("docs", "examples", "src"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, copy / name)
    with (copy / "docs" / "index.md").open("a", encoding="utf-8") as page:
        page.write("\n[a](nowhere.md) [b](measured/speed.md#nothing)\n")
    (copy / "docs" / "forgotten.md").write_text("# Forgotten\n")
    return copy, build(copy)


def test_the_site_builds_and_loads_nothing_from_elsewhere(
    built: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    copy, done = built
    warned = re.findall(r"^WARNING.*(?:\n  .*)*", done.stderr, flags=re.MULTILINE)
    assert len(warned) == 3, done.stdout + done.stderr  # one warning for each mistake, and no other
    assert "Aborted with 3 warnings in strict mode!" in done.stdout + done.stderr
    pages = {path: path.read_text(encoding="utf-8") for path in (copy / "site").rglob("*.html")}
    for path, text in pages.items():
        loaded = re.findall(
            r"<(?:script|img|iframe|source)[^>]*src=\"?(?:https?:)?//|<link[^>]*href=\"?https?://", text
        )
        assert not loaded, (path, loaded)
    for page, script in (
        ("trl", "trl_sft"), ("trainer", "transformers_trainer"), ("accelerate", "accelerate_loop"),
        ("accelerate", "bare_loop"),
    ):  # fmt: skip
        first, _, _ = (ROOT / "examples" / f"{script}.py").read_text(encoding="utf-8").partition("\n")
        text = html.unescape(re.sub(r"<[^>]+>", "", pages[copy / "site" / "use" / "recipes" / page / "index.html"]))
        assert first.strip('"') in text, f"{script}.py is not on the page {page}"


def test_broken_links_fail_the_build(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = built
    assert done.returncode == 1
    for part in ("nowhere.md", "#nothing", "forgotten.md"):
        assert part in done.stderr


def test_names_on_pages_exist() -> None:
    for page in DOCS.rglob("*.md"):
        for name in re.findall(r"`(celora(?:\.\w+)+)`", page.read_text(encoding="utf-8")):
            pkgutil.resolve_name(name)  # raises if there is none


def test_public_names_become_links_outside_of_code() -> None:
    hook = runpy.run_path(str(DOCS / "hooks.py"))["on_page_markdown"]
    text = "`celora.attach` and `celora.numerics.head`\n```python\n`celora.attach`\n```\n"
    assert hook(text) == (
        "[`celora.attach`][celora.attaching.attach] and `celora.numerics.head`\n```python\n`celora.attach`\n```\n"
    )


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages name: ./model, chats.jsonl, and a folder chats."""
    folder = tmp_path_factory.mktemp("docs")
    save_tiny_model(folder / "model", hidden=64)  # bitsandbytes packs in blocks of 64 for evaluation
    save_rows(folder / "chats.jsonl")
    (folder / "chats").mkdir()
    save_rows(folder / "chats" / "train.jsonl")
    return folder


@pytest.fixture
def folder(names: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(names)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", names / "cache")
    return names


@pytest.mark.parametrize("page", ["use/quick-start.md", "use/command-line.md", "use/try-and-export.md"])
def test_commands_run(page: str, folder: Path) -> None:
    for text in blocks(page, "yaml"):
        (folder / "sft.yaml").write_text(text, encoding="utf-8")
    shutil.rmtree(folder / "out", ignore_errors=True)
    commands = [shlex.split(line) for block in blocks(page, "bash") for line in block.splitlines()]
    ours = [command[1:] for command in commands if command[0] == "celora" and command[1] != "demo"]
    assert ours
    for command in ours:
        more = ["--max_steps", "2"] if command[0] == "train" and "--config" not in command else []
        assert main([*command, *([] if "--max_steps" in command else more)]) == 0, command


def test_the_configuration_of_ones_own_is_one() -> None:
    (text,) = blocks("use/presets.md", "yaml")
    given = yaml.safe_load(text)
    config, _ = estimator_config(given["preset"], given["celora"], 16)
    assert config.for_layer("layers.1.mlp.up_proj").keep_ratio == 0.999
    assert config.for_layer("layers.1.self_attn.k_proj").estimator == "dense"
    assert config.fused
    assert config.labelled_head
    assert config.padding_free


def test_rows_of_every_shape_are_read(tmp_path: Path) -> None:
    (found,) = blocks("use/data.md", "json")
    lines = found.splitlines()
    seen = set()
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.jsonl").write_text(line, encoding="utf-8")
        seen.add(tuple(load_rows(tmp_path / f"{number}.jsonl", chat=True, cache_dir=tmp_path).column_names))
    assert len(lines) == len(SHAPES)
    assert seen == {("messages",), ("prompt", "completion"), ("text",)}


def test_python_of_the_quick_start_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "--model", "model", "--data", "chats.jsonl", "--output", "out", "--max_steps", "1", "--overwrite"]
    assert main([*train, "--quiet"]) == 0
    names: dict[str, Any] = {}
    for block in blocks("use/quick-start.md", "python"):
        exec(block, names)
    assert "LoRA fused with its base layer in 14 of 14 layers" in capsys.readouterr().out


def test_the_qlora_recipe_estimates_and_trains(folder: Path) -> None:
    """Its script and its command have the same configuration."""
    if refuses(copy=False):
        return
    pytest.importorskip("bitsandbytes")
    (block,), (text,), (line,) = (blocks("use/recipes/qlora.md", language) for language in ("python", "yaml", "bash"))
    names: dict[str, Any] = {}
    exec(block, names)
    model, int8 = names["peft_model"], names["int8"]
    report = find(model).report
    assert len(report.estimated) == len(report.layers) == 14
    before = adapter(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):  # the first step only observes, and does not move lora_A, because lora_B begins at zero
        ids = make_batch(step)["input_ids"] % 48
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in adapter(model).items())

    assert CELoraConfig.from_dict(yaml.safe_load(text)["celora"]) == int8
    (folder / "int8.yaml").write_text(text, encoding="utf-8")
    shutil.rmtree(folder / "out", ignore_errors=True)
    _, *command = shlex.split(line)
    assert main([*command, "--max_steps", "2"]) == 0
    assert json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))["estimated_layers"] == 14


def test_accelerate_reads_the_configuration_of_the_fsdp2_recipe(tmp_path: Path) -> None:
    """No other page has such a configuration. Accelerate shards on accelerators only, so nothing is launched."""
    (text,) = blocks("use/recipes/fsdp2.md", "yaml")
    assert [page.name for page in DOCS.rglob("*.md") if "fsdp_config" in page.read_text(encoding="utf-8")] == [
        "fsdp2.md"
    ]
    (tmp_path / "fsdp.yaml").write_text(text, encoding="utf-8")
    config = load_config_from_file(str(tmp_path / "fsdp.yaml"))
    assert config.distributed_type == "FSDP"
    assert config.fsdp_config["fsdp_version"] == 2
    (line,) = (line for line in blocks("use/recipes/fsdp2.md", "bash")[0].splitlines())
    arguments = launch_command_parser().parse_args(shlex.split(line)[2:])
    assert config.fsdp_config.keys() <= vars(arguments).keys()
    assert parse(arguments.training_script_args[1:]).preset == "exact"
