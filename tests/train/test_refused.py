"""What would train, save or destroy something wrong is refused in one line, before anything is written."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import celora
from celora.cli.main import main
from celora.cli.sft import _where
from celora.errors import CELoraError
from celora.studies.compare import compare
from celora.train.request.arguments import parse
from runs import PressCtrlC, adapter, go, on_build
from tiny import save_tiny_model

CHAT = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"bf16_full_eval": True}, "bf16_full_eval=True is refused: it would round the adapter"),
        ({"chat_template_path": "FOLDER"}, "is no file; give one with a template"),
        ({"use_dora": True, "lora_bias": True}, "no adapter with these settings"),
        ({"lora_modules_to_save": ["heads"]}, "lora_modules_to_save='heads', but the model has no module of that name"),
        (
            {"lora_target_parameters": ["up.weight"]},
            "lora_target_parameters='up.weight', but the model has no parameter",
        ),
        (
            {"lora_target_modules": ["q_porj"]},
            "unknown lora_target_modules 'q_porj'; did you mean 'q_proj'",
        ),
        ({"lora_target_modules": ["q_proj", "_proj"]}, "unknown lora_target_modules '_proj'"),
        ({"lora_target_modules": ["all-linear", "q_proj"]}, "all-linear takes every linear layer; give it alone"),
    ],
)
def test_settings(more, said, inputs, tmp_path):
    more = {name: str(tmp_path) if value == "FOLDER" else value for name, value in more.items()}
    with pytest.raises(CELoraError, match=said):
        go(inputs, tmp_path / "out", **more)
    assert not (tmp_path / "out").exists()


def test_a_file_names_no_other_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("config: other.yaml")
    with pytest.raises(CELoraError, match="a file names no other file"):
        parse([], {"config": str(file)})


@pytest.mark.parametrize("to", [["mlx"], ["safetensors", "--merged"]])
def test_a_gguf_file_is_for_a_gguf_export(to, finished, capsys):
    assert main(["export", str(finished[0]), "--to", *to, "--gguf", "base.gguf"]) == 2
    assert f"--gguf 'base.gguf' is for --to gguf; --to {to[0]} takes no GGUF file" in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--to", "gguf"], ["--to", "safetensors", "--merged"]])
def test_how_weights_are_stored_is_for_a_merged_gguf_file(how, finished, capsys):
    assert main(["export", str(finished[0]), *how, "--outtype", "f16"]) == 2
    assert "--outtype f16 is for a merged GGUF file" in capsys.readouterr().err


def test_a_setting_that_is_refused_late_leaves_no_run(inputs, tmp_path):
    with pytest.raises(CELoraError, match="no training with these settings"):
        go(inputs, tmp_path / "out", lr_scheduler_kwargs={"bad": 1})
    assert go(inputs, tmp_path / "out")[0].status == "finished"


@pytest.mark.parametrize("which", ["data", "eval_data"])
def test_a_token_without_an_embedding(which, inputs, tmp_path):
    model = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["one", "more", "new"])  # there were 46
    tokenizer.save_pretrained(model)
    given = {**inputs, "model": str(model), which: write(tmp_path / "rows.jsonl", CHAT, {"text": "w1 new w2"})}
    given = {**given, which: write(tmp_path / "rows.jsonl", {"text": "w1 w2"}, {"text": "w1 new w2"})}
    with pytest.raises(CELoraError, match=r"row 2 of '.*rows.jsonl' has token 48, and the model has 48 embeddings"):
        go(given, tmp_path / "out")


@pytest.mark.parametrize("base", [None, "int8"])
def test_a_checkpoint_that_lacks_weights(base, inputs, tmp_path):
    model = Path(shutil.copytree(inputs["model"], tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CELoraError, match=r"lacks 1 of the model's weights, 'model.layers.1.mlp.up_proj.weight'"):
        go({**inputs, "model": str(model)}, tmp_path / "out", **({} if base is None else {"base": base}))


def test_a_folder_without_a_tokenizer(inputs, tmp_path):
    model = Path(shutil.copytree(inputs["model"], tmp_path / "model"))
    for file in model.glob("*token*"):
        file.unlink()
    with pytest.raises(CELoraError, match="has no tokenizer: no tokenizer"):
        go({**inputs, "model": str(model)}, tmp_path / "out")


def test_settings_of_the_model_are_used_and_no_library_says_otherwise(inputs, tmp_path, monkeypatch):
    said = logging.StreamHandler(io.StringIO())
    for name in ("", "transformers", "trl", "peft", "accelerate"):  # the first is all that pass on what is said
        monkeypatch.setattr(logging.getLogger(name), "handlers", [said])
    result, _ = go(inputs, tmp_path / "out", max_steps=1, model_init_kwargs={"attention_dropout": 0.1})
    assert result.model.config.attention_dropout == 0.1
    assert "model_init_kwargs" not in said.stream.getvalue()


def test_chats_without_a_chat_template(inputs, tmp_path):
    model = Path(shutil.copytree(inputs["model"], tmp_path / "model"))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CELoraError, match="has no chat template; give --chat_template_path FILE"):
        go({**inputs, "model": str(model)}, tmp_path / "out")


def test_conversations_are_messages(inputs, tmp_path):
    data = write(tmp_path / "rows.jsonl", {"conversations": CHAT["messages"]})
    with pytest.raises(CELoraError, match="did you mean 'messages' for 'conversations'"):
        go({**inputs, "data": data}, tmp_path / "out")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"conversations": [{"from": "human", "value": "w1"}]}, "write 'messages' with 'role' and 'content'"),
        ({"prompt": "w1", "chosen": "w2", "rejected": "w3"}, "use TRL's DPOTrainer, with celora.attach"),
        ({"instruction": "w1", "input": "w2", "answer": "w3"}, "did you mean 'output' for 'answer'"),
        ({"question": "w1", "answer": "w2"}, "did you mean 'prompt' for 'question' and 'completion' for 'answer'"),
    ],
)
def test_rows_of_another_tool_say_what_to_write(row, said, inputs, tmp_path):
    with pytest.raises(CELoraError, match=said):
        go({**inputs, "data": write(tmp_path / "rows.jsonl", row)}, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("rows.json", '{\n  "text": "w1 w2"\n}\n', "rows.json:1: a row over several lines; put each row on one line"),
        (
            "rows.csv",
            "prompt;completion\nw1;w2\n",
            "rows.csv:2: columns are separated by ';'; save the file with commas",
        ),
    ],
)
def test_files_of_another_layout_say_what_to_write(name, text, said, inputs, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(CELoraError, match=said):
        go({**inputs, "data": str(tmp_path / name)}, tmp_path / "out")


@pytest.mark.parametrize("batches", ["x", ["x"]])
def test_what_is_no_batch(batches, model):
    celora.attach(model, "paper")
    with pytest.raises(CELoraError, match="a batch is 'x'; expected a mapping with the model's arguments"):
        celora.audit(model, batches)


def test_answers_do_not_replace_their_questions(finished, tmp_path, capsys):
    data = write(tmp_path / "rows.jsonl", CHAT, CHAT)
    before = Path(data).read_text()
    assert main(["generate", str(finished[0]), "--data", data, "--output", data, "--overwrite"]) == 2
    assert "is the --data; give another file" in capsys.readouterr().err
    assert Path(data).read_text() == before


def test_answers_do_not_replace_the_questions_in_a_folder(finished, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    test = write(folder / "test.jsonl", CHAT, CHAT)
    before = Path(test).read_text()
    assert main(["generate", str(finished[0]), "--data", str(folder), "--output", test, "--overwrite"]) == 2
    assert "is the --data; give another file" in capsys.readouterr().err
    write(folder / "train.jsonl", CHAT)
    assert main(["generate", str(finished[0]), "--data", str(folder), "--output", test, "--overwrite"]) == 2
    assert "is the --data; give another file" in capsys.readouterr().err
    assert Path(test).read_text() == before


def test_a_comparison_in_a_budget(inputs, tmp_path):
    with pytest.raises(CELoraError, match="memory is not for a comparison"):
        compare({**inputs, "output": str(tmp_path / "out"), "memory": "1GiB"}, arms=["LoRA", "auto"], seeds=1)


def test_a_resumed_run_takes_defaults_again(inputs, tmp_path):
    output, epochs = tmp_path / "out", {"max_steps": -1, "num_train_epochs": 2}
    go(inputs, output, **epochs)
    before = adapter(output)
    again = {**epochs, "resume": True, "bias": "none", "dataset_train_split": "train", "lora_bias": False}
    assert go(inputs, output, **again)[0].status == "already finished"
    assert all(value.equal(before[name]) for name, value in adapter(output).items())


def test_a_resumed_run_takes_no_fewer_epochs_than_it_has(inputs, tmp_path, monkeypatch):
    on_build(monkeypatch, lambda trainer: trainer.add_callback(PressCtrlC(after=8)))
    given = {"max_steps": -1, "per_device_train_batch_size": 4}
    assert go(inputs, tmp_path / "out", **given, num_train_epochs=4)[0].status == "interrupted"
    with pytest.raises(
        CELoraError, match="num_train_epochs=1 ends at step 6, but the run is saved at step 9; give more"
    ):
        go(inputs, tmp_path / "out", **given, num_train_epochs=1, resume=True)


def test_off_in_yaml_is_a_preset(inputs, tmp_path):
    (tmp_path / "settings.yaml").write_text("preset: off\n")
    given = {**inputs, "output": str(tmp_path / "out")}
    assert parse(["--config", str(tmp_path / "settings.yaml")], given).preset == "off"


def test_trl_is_told_where_it_trains(monkeypatch):
    monkeypatch.setattr("celora.machine.device.accelerator", lambda: None)
    assert _where(["--bf16", "true"]) == ["--use_cpu", "true"]
    assert _where(["--use_cpu=false"]) == _where(["--use_cpu", "true"]) == []
    monkeypatch.setattr("celora.machine.device.accelerator", lambda: "cuda")
    assert _where([]) == []
