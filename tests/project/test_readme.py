"""The README's snippets run. Tables and pictures, there and in the docs, come from the committed rows."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import datasets
import pytest
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import celora
from benchmarks import tables
from celora.cli.main import main
from celora.runtime.attachment import find
from celora.train.rows.data import load_rows
from tiny import save_rows, save_tiny_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the README names: ./model and chats.jsonl."""
    save_tiny_model(tmp_path / "model")
    save_rows(tmp_path / "chats.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


# When peft saves, it looks for the base model's configuration on the hub, and says that it did not find it.
@pytest.mark.filterwarnings("ignore:Could not find a config file in")
# TRL turns checkpointing on under the name that transformers 5.24 has just deprecated.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
# TRL's defaults are a GPU's.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
def test_python_snippets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, audit = _blocks("python")
    trainer = SFTTrainer(
        model=str(folder / "model"),
        train_dataset=load_rows("chats.jsonl", chat=True),
        args=SFTConfig(output_dir="out", max_steps=4, report_to="none", bf16=False),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    exec(lines, {"trainer": trainer})
    assert trainer.state.global_step == 4
    assert "LoRA fused with its base layer in 14 of 14 layers" in str(find(trainer.model).report)
    trainer.save_model("adapter")
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    batch = dict.fromkeys(("input_ids", "labels"), model.dummy_inputs["input_ids"] % 40)
    exec(audit, {"celora": celora, "model": model, "batches": [batch]})
    said = capsys.readouterr().out
    assert "frozen layers estimated" in said
    assert "LoRA gradient, estimated against exact" in said


def test_commands(folder: Path) -> None:
    commands = [
        shlex.split(line) for block in _blocks("bash") for line in block.splitlines() if line.startswith("celora ")
    ]
    assert len(commands) == 6
    for command in commands:
        assert main([*command[1:]]) == 0, command


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^make (\w+)", "\n".join(_blocks("bash")), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_pages_and_pictures_come_from_the_committed_rows() -> None:
    written = tables.written()
    pages = ("README.md", "docs/measured/learning.md", "docs/measured/layers.md")
    assert {ROOT / name for name in pages} <= written.keys()
    assert set((ROOT / "docs" / "measured").glob("*.svg")) <= written.keys()
    for path, text in written.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m benchmarks.tables"


def test_code_to_copy_begins_with_exact() -> None:
    """`paper` learns least, so users must ask for it by name. Pages for contributors name the preset that they add."""
    pages = [path for path in (ROOT / "docs").rglob("*.md") if "develop" not in path.parts]
    pages += [ROOT / "README.md", *(ROOT / "examples").iterdir()]
    attached = [re.findall(r"celora\.attach\([\w.]+, \\?\"(\w+)", path.read_text(encoding="utf-8")) for path in pages]
    assert {preset for found in attached for preset in found} <= {"exact", "auto", "fast"}


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "benchmarks" / "README.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
