"""Every script and notebook in examples/ runs, learns, and leaves an adapter that stock PEFT loads."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from patching import patch_all
from tiny import save_tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [
    # When peft saves, it looks for the base model's configuration on the hub, and says that it did not find it.
    pytest.mark.filterwarnings("ignore:Could not find a config file in"),
    # TRL turns checkpointing on under the name that transformers 5.24 has just deprecated.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in a folder to work in. Nothing is fetched."""
    monkeypatch.chdir(tmp_path)
    patch_all(monkeypatch, "celora.studies.assets:demo_model", None)
    return save_tiny_model(tmp_path / "model")


def check(losses: list[float], model: Path) -> None:
    assert losses[-1] < losses[0]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), "adapter")
    assert any(p.abs().max() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)


SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts(script: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = runpy.run_path(str(EXAMPLES / f"{script}.py"))["main"](str(model), steps=4)
    assert len(losses) >= 4
    assert "LoRA fused with its base layer in 14 of 14 layers" in capsys.readouterr().out
    check(losses, model)


def test_there_is_one_for_each_way_to_train() -> None:
    assert SCRIPTS == ["accelerate_loop", "bare_loop", "transformers_trainer", "trl_sft"]


def test_notebook(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MODEL", str(model))
    monkeypatch.setenv("STEPS", "3")
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        assert not cell.get("outputs"), "committed without outputs: they would be of another day"
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    printed = capsys.readouterr().out
    assert "LoRA fused with its base layer in 14 of 14 layers" in printed
    assert printed.endswith("True\n")
    check(names["losses"], model)
