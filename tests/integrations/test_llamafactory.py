"""celora's launcher for LLaMA-Factory: its key, its errors, and a run of the real package where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from celora import CELoraError
from celora.integrations.llamafactory import main, take_out
from celora.integrations.while_training import AttachWhileTraining
from tool_runs import check_same_training, python, said_by_celora, save_inputs

INSTALLED = importlib.util.find_spec("llamafactory") is not None


@pytest.mark.parametrize(
    ("given", "asked", "left"),
    [
        ({"stage": "sft", "celora": "fast"}, "fast", {"stage": "sft"}),
        ({"celora": {"preset": "auto"}}, {"preset": "auto"}, {}),
        ({"celora": False}, False, {}),
        ({"stage": "sft"}, "exact", {"stage": "sft"}),
        (["--stage", "sft", "--celora", "fast", "--do_train"], "fast", ["--stage", "sft", "--do_train"]),
        (["--celora=fast", "--stage", "sft"], "fast", ["--stage", "sft"]),
        (["--stage", "sft"], "exact", ["--stage", "sft"]),
    ],
)
def test_the_key_is_taken_out(given: Any, asked: object, left: object) -> None:
    assert take_out(given) == asked
    assert given == left


def test_a_flag_without_a_value_is_refused() -> None:
    with pytest.raises(CELoraError, match="--celora without a value; give a preset"):
        take_out(["--stage", "sft", "--celora"])


class StandIn:
    """What the launcher calls of LLaMA-Factory: `read_args` and `run_exp`, and what its environment asks for."""

    def __init__(self, patch: pytest.MonkeyPatch, read: Any) -> None:
        self.ran: list[tuple[Any, list[Any]]] = []
        self.devices, self.environment, self.argv = 0, set[str](), list[str]()

        def read_args() -> Any:
            self.argv = sys.argv[1:]
            return read

        parts: dict[str, dict[str, Any]] = {
            "llamafactory": {},
            "llamafactory.extras": {},
            "llamafactory.extras.misc": {
                "get_device_count": lambda: self.devices,
                "is_env_enabled": lambda name: name in self.environment,
                "use_ray": lambda: "USE_RAY" in self.environment,
            },
            "llamafactory.hparams": {"read_args": read_args},
            "llamafactory.train": {},
            "llamafactory.train.tuner": {"run_exp": lambda args, callbacks: self.ran.append((args, callbacks))},
        }
        for name, content in parts.items():
            module = ModuleType(name)
            vars(module).update(content)
            patch.setitem(sys.modules, name, module)
        patch.setattr(sys, "argv", ["celora"])
        patch.delenv("LOCAL_RANK", raising=False)


def test_the_rest_goes_to_llamafactory_with_a_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn(monkeypatch, {"stage": "sft", "celora": {"preset": "exact", "labelled_head": False}})
    assert main(["train", "x.yaml", "max_steps=4"]) == 0
    ((arguments, (callback,)),) = stand_in.ran
    assert (arguments, stand_in.argv) == ({"stage": "sft"}, ["x.yaml", "max_steps=4"])
    assert isinstance(callback, AttachWhileTraining)
    assert (callback.config, callback.changes) == ("exact", {"labelled_head": False})
    monkeypatch.setenv("LOCAL_RANK", "1")  # torchrun has started this process
    stand_in.devices = 2
    assert main(["train", "x.yaml"]) == 0


@pytest.mark.parametrize(
    ("given", "read", "environment", "devices", "said"),
    [
        (["webui"], {}, "", 0, "celora is for training; python -m celora.integrations.llamafactory train FILE.yaml"),
        ([], {}, "", 0, "celora is for training"),
        (["train", "x.yaml"], {"celora": "xact"}, "", 0, "unknown preset 'xact'; did you mean 'exact'?"),
        (["train", "x.yaml"], {}, "USE_V1", 0, "USE_V1=1 asks for LLaMA-Factory's new trainer"),
        (
            ["train", "x.yaml"], {}, "", 4,
            "LLaMA-Factory would start several processes, without celora; start them: torchrun --nproc-per-node 4 -m "
            "celora.integrations.llamafactory train x.yaml",
        ),
        (["train", "x.yaml"], {}, "FORCE_TORCHRUN", 0, "LLaMA-Factory would start several processes"),
        (["train", "x.yaml"], {"use_asft_loss": True}, "", 0, "use_asft_loss reads outputs.logits; give celora: {"),
    ],
)  # fmt: skip
def test_what_is_refused_is_one_line(
    given: list[str], read: Any, environment: str, devices: int, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stand_in = StandIn(monkeypatch, read)
    stand_in.environment, stand_in.devices = {environment}, devices
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert (error.count("\n"), stand_in.ran) == (1, [])


@pytest.mark.skipif(INSTALLED, reason="LLaMA-Factory is installed")
def test_without_llamafactory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "x.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: LLaMA-Factory is not in this environment; pip install")


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs LLaMA-Factory")
def test_llamafactory_trains_the_same_with_the_one_line(tmp_path: Path) -> None:
    save_inputs(tmp_path)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    settings = {
        "model_name_or_path": "model", "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 8,
        "lora_target": "all", "dataset_dir": ".", "dataset": "rows", "template": "alpaca", "cutoff_len": 128,
        "output_dir": "alone", "logging_steps": 1, "max_steps": 4, "save_steps": 2, "optim": "sgd",
        "learning_rate": 1.0, "lr_scheduler_type": "constant", "per_device_train_batch_size": 8, "use_cpu": True,
        "report_to": "none", "overwrite_cache": True, "lora_dropout": 0,
    }  # fmt: skip
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(settings))
    done = python("-m", "llamafactory.cli", "train", "alone.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    settings |= {"celora": "exact", "output_dir": "exact"}
    (tmp_path / "exact.yaml").write_text(yaml.safe_dump(settings))
    launcher = ("-m", "celora.integrations.llamafactory", "train", "exact.yaml")
    done = python(*launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    said = "celora: preset exact attached to LlamaForCausalLM: none of 14 frozen layers estimated, the gradient is"
    assert said_by_celora(done) == [f"{said} LoRA's own."]
    check_same_training(tmp_path / "exact", tmp_path / "alone")

    done = python(*launcher, "celora=paper", "output_dir=paper", cwd=tmp_path)
    assert said_by_celora(done) == [
        "celora: preset paper attached to LlamaForCausalLM: 8 of 14 frozen layers estimated."
    ]
    done = python(*launcher, "celora=xact", cwd=tmp_path)
    (line,) = said_by_celora(done)
    assert (done.returncode, line.startswith("error: unknown preset 'xact'; did you mean 'exact'?")) == (2, True)
