"""celora's plugin for axolotl: its hooks as axolotl calls them, and a run of the real package where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from celora import CELoraError
from celora.integrations.while_training import AttachWhileTraining
from tool_runs import check_same_training, python, said_by_celora, save_inputs

INSTALLED = importlib.util.find_spec("axolotl") is not None
NAME = "celora.integrations.axolotl.CeloraPlugin"


class BasePlugin:
    """Stands for axolotl's: its hooks do nothing."""

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def add_callbacks_pre_trainer(self, cfg: dict[str, Any], model: object) -> list[Any]:
        return []


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin, found by its name like axolotl finds it."""
    if not INSTALLED:
        for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules["axolotl.integrations.base"])["BasePlugin"] = BasePlugin
    module, _, name = NAME.rpartition(".")
    monkeypatch.delitem(sys.modules, module, raising=False)
    made = getattr(importlib.import_module(module), name)()
    yield made
    sys.modules.pop(module, None)


def test_hooks_in_the_order_of_axolotl(plugin: Any) -> None:
    cfg: dict[str, Any] = {"adapter": "lora", "celora": {"preset": "exact", "labelled_head": False}}
    plugin.register(cfg)
    assert cfg["lora_mlp_kernel"] is cfg["lora_qkv_kernel"] is cfg["lora_o_kernel"] is False
    module, _, name = plugin.get_input_args().rpartition(".")
    key = getattr(sys.modules[module], name)
    assert (key().celora, key(celora="fast").celora) == (None, "fast")
    (callback,) = plugin.add_callbacks_pre_trainer(cfg=cfg, model=None)
    assert isinstance(callback, AttachWhileTraining)
    assert (callback.config, callback.changes) == ("exact", {"labelled_head": False})
    (callback,) = plugin.add_callbacks_pre_trainer(cfg={}, model=None)
    assert callback.config == "exact"


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel: True; axolotl's kernel computes past the layers that celora"),
        ({"lora_qkv_kernel": True, "celora": "exact"}, "lora_qkv_kernel: True; axolotl's kernel"),
        ({"lora_o_kernel": True}, "lora_o_kernel: True; axolotl's kernel"),
        ({"celora": "xact"}, "unknown preset 'xact'; did you mean 'exact'?"),
        ({"celora": {"preset": "exact", "labeled_head": 0}}, "unknown setting 'labeled_head'"),
    ],
)
def test_what_is_refused_is_one_line(cfg: dict[str, Any], said: str, plugin: Any) -> None:
    with pytest.raises(CELoraError) as caught:
        plugin.register(cfg)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs axolotl")
def test_axolotl_trains_the_same_with_the_plugin(tmp_path: Path) -> None:
    save_inputs(tmp_path)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), lora).save_pretrained(tmp_path / "begun")
    settings: dict[str, Any] = {
        "base_model": "./model", "adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True,
        "lora_model_dir": "begun",  # axolotl initialises a new adapter before it sets the seed
        "datasets": [{"path": "rows.json", "ds_type": "json", "type": "alpaca"}], "val_set_size": 0,
        "sequence_len": 128, "micro_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 4,
        "logging_steps": 1, "save_steps": 2, "optimizer": "sgd", "learning_rate": 1.0, "lr_scheduler": "constant",
        "bf16": False, "fp16": False, "tf32": False, "dataset_prepared_path": "prepared", "output_dir": "alone",
        "special_tokens": {"pad_token": "<pad>"}, "seed": 1,
        "lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False,
    }  # fmt: skip
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(settings))
    done = python("-m", "axolotl.cli.train", "alone.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    settings |= {"plugins": [NAME], "celora": "exact", "output_dir": "exact"}
    (tmp_path / "exact.yaml").write_text(yaml.safe_dump(settings))
    done = python("-m", "axolotl.cli.train", "exact.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = "celora: preset exact attached to LlamaForCausalLM: none of 14 frozen layers estimated, the gradient is"
    assert said_by_celora(done) == [f"{said} LoRA's own."]
    check_same_training(tmp_path / "exact", tmp_path / "alone")

    (tmp_path / "kernel.yaml").write_text(yaml.safe_dump(settings | {"lora_mlp_kernel": True}))
    done = python("-m", "axolotl.cli.train", "kernel.yaml", cwd=tmp_path)
    assert done.returncode != 0
    assert "CELoraError: lora_mlp_kernel: True; axolotl's kernel computes past the layers" in done.stderr
