"""Loads a run's folder again, the adapter and its base model. If one is missing, the error says so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from celora.cli.main import main
from celora.errors import CELoraError
from celora.train.use.generation import Sampling, answers
from celora.train.use.trained import adapter_config, load_trained, request_of, tokenizer_of, unfinished
from patching import patch_all
from runs import PressCtrlC, go, on_build


@pytest.fixture
def folder(finished, tmp_path):
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


def test_the_adapter_is_on_the_base_that_the_run_names(finished, inputs):
    trained = load_trained(finished[0])
    assert trained.base == inputs["model"]
    assert not trained.model.training
    assert trained.tokenizer.chat_template
    saved = load_file(finished[0] / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B"
    held = trained.model.get_submodule(name).default.weight
    assert torch.equal(held, saved[f"{name}.weight"])


def test_a_checkpoint_is_loaded_as_its_run_was(finished, inputs):
    checkpoint = next(finished[0].glob("checkpoint-3"))
    assert load_trained(checkpoint).base == inputs["model"]


def test_a_run_may_be_named_like_a_checkpoint(folder):
    named = folder.rename(folder.with_name("checkpoint-best"))
    record = json.loads((named / "run.json").read_text())
    record["lora"]["dtype"] = "bfloat16"
    (named / "run.json").write_text(json.dumps(record))
    assert request_of(named, {}, None).lora["dtype"] == "bfloat16"


def test_a_checkpoint_may_be_the_folder_that_the_user_is_in(finished, inputs, monkeypatch):
    monkeypatch.chdir(finished[0] / "checkpoint-3")
    assert request_of(Path("."), adapter_config(Path(".")), None).given["data"] == inputs["data"]


def test_without_a_tokenizer_of_its_own_an_adapter_has_that_of_its_bases_revision(folder, monkeypatch):
    asked = []
    patch_all(
        monkeypatch,
        "celora.train.loading:read_tokenizer",
        lambda source, revision="main": asked.append((source, revision)),
    )
    request = request_of(folder, {}, None)
    request = replace(request, model="owner/name", lora=request.lora | {"model_revision": "v2"})
    tokenizer_of(folder, request)
    (folder / "tokenizer_config.json").unlink()
    tokenizer_of(folder, request)
    assert asked == [(str(folder), "main"), ("owner/name", "v2")]


@pytest.mark.parametrize(("multiplied", "used"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_settled_dtype_is_the_runs_unless_it_is_emulated_here(folder, monkeypatch, multiplied, used):
    patch_all(monkeypatch, "celora.machine.cpu:multiplies", lambda dtype: multiplied)
    record = json.loads((folder / "run.json").read_text())
    record["lora"]["dtype"] = "bfloat16"
    (folder / "run.json").write_text(json.dumps(record))
    assert request_of(folder, {}, None).lora["dtype"] == "bfloat16"
    assert load_trained(folder).model.dtype == used


@pytest.mark.parametrize(
    ("row", "raw"),
    [
        ({"text": "w1 w2 w3"}, True),
        ({"prompt": "w1", "completion": "w2 w3"}, True),
        ({"instruction": "w1", "output": "w2 w3"}, False),
        ({"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}, False),
    ],
)
def test_prompts_are_given_as_the_rows_were(row, raw, inputs, tmp_path, capsys):
    """Rows of text are trained without the chat template. `--template` and `--raw` decide otherwise."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    go({**inputs, "data": str(tmp_path / "rows.jsonl")}, tmp_path / "out", max_steps=1)
    trained = load_trained(tmp_path / "out")
    assert trained.raw is raw
    assert ("apply_chat_template" not in (tmp_path / "out" / "README.md").read_text()) is raw
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": "w1 w2"}))
    asked = [
        "generate",
        str(tmp_path / "out"),
        "--data",
        str(tmp_path / "asked.jsonl"),
        "--temperature",
        "0",
        "--quiet",
    ]
    for flags, without in (([], raw), (["--raw"], True), (["--template"], False)):
        assert main([*asked, "--max-new-tokens", "4", *flags]) == 0
        (expected,) = answers(replace(trained, raw=without), ["w1 w2"], Sampling(4, 0.0, 0))
        assert json.loads(capsys.readouterr().out)["generated"] == expected


def test_a_template_that_is_not_there_cannot_be_asked_for(folder, capsys):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert main(["chat", str(folder), "--prompt", "w1", "--template"]) == 2
    assert "--template: the tokenizer of " in capsys.readouterr().err
    assert main(["chat", str(folder), "--prompt", "w1", "--max-new-tokens", "2", "--temperature", "0"]) == 0


def test_a_folder_of_peft_alone_names_its_base(folder, inputs):
    (folder / "run.json").unlink()
    assert load_trained(folder).base == inputs["model"]


def test_a_base_that_has_moved_is_asked_for(folder, inputs, tmp_path):
    record = json.loads((folder / "run.json").read_text())
    record["given"]["model"] = str(tmp_path / "gone")
    (folder / "run.json").write_text(json.dumps(record))
    with pytest.raises(CELoraError, match=r"was trained on .*gone', which is not there; give --model"):
        load_trained(folder)
    assert load_trained(folder, inputs["model"]).base == inputs["model"]


def test_what_is_no_finished_adapter_is_refused(folder, tmp_path):
    with pytest.raises(CELoraError, match=r"nowhere': no such folder; give the --output folder of celora train"):
        adapter_config(tmp_path / "nowhere")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(
        CELoraError, match=r"has no adapter_model.safetensors; give its newest checkpoint, .*checkpoint-6"
    ):
        adapter_config(folder)
    with pytest.raises(CELoraError, match=r"has no adapter_config.json; give the --output"):
        adapter_config(tmp_path)


def test_a_run_that_was_continued_and_not_finished_says_so(inputs, tmp_path, capsys):
    """Its folder still holds the adapter of its earlier end."""
    output = tmp_path / "out"
    go(inputs, output, max_steps=3)
    assert unfinished(output) == unfinished(output / "checkpoint-3") == ""
    with pytest.MonkeyPatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(PressCtrlC(after=3)))
        go(inputs, output, max_steps=6, resume=True)
    line = (
        f"{str(output)!r} holds the adapter of step 3. The run was continued: its newest steps are in "
        f"{str(output / 'checkpoint-4')!r}, and --resume finishes it."
    )
    assert unfinished(output) == line
    assert unfinished(output / "checkpoint-4") == ""
    for command in (["chat", "--prompt", "hi", "--max-new-tokens", "1"], ["export", "--to", "gguf"]):
        assert main([*command, str(output)]) == 0
        assert line in capsys.readouterr().err
    go(inputs, output, max_steps=6, resume=True)
    assert unfinished(output) == ""


def test_a_run_whose_upload_failed_was_not_continued(inputs, tmp_path, monkeypatch):
    patch_all(monkeypatch, "celora.train.run:upload", Mock(side_effect=OSError("no network")))
    with pytest.raises(CELoraError, match="no network"):
        go(inputs, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert adapter_config(tmp_path / "out")
    assert unfinished(tmp_path / "out") == ""


def test_another_kind_of_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(CELoraError, match="peft_type is 'IA3', expected 'LORA'"):
        load_trained(folder)
