"""Whole runs of a tiny model: what they write, how they resume, what they refuse."""

from __future__ import annotations

import io
import json
import shutil
from importlib import metadata

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from celora.errors import CELoraError
from celora.machine.device import device_name
from celora.settings.config import CELoraConfig
from celora.train.progress import read_metrics
from celora.train.request.arguments import make_request
from celora.train.run import train
from runs import PressCtrlC, adapter, go, on_build


def test_output_folder(finished):
    output, result, text, _ = finished
    names = {entry.name for entry in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "celora_config.json"} <= names
    assert {"metrics.jsonl", "run.json", "report.html", "checkpoint-3", "checkpoint-6"} <= names
    assert not [name for name in names if name.endswith((".tmp", ".bin"))]
    assert CELoraConfig.load(output).keep_ratio == 0.4
    assert "celora" not in (output / "adapter_config.json").read_text(encoding="utf-8").replace(str(output), "")
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], result.status, result.step) == ("finished", "finished", 6)
    assert record["given"]["max_steps"] == 6
    assert record["versions"]["torch"] == metadata.version("torch")
    assert record["machine"]["device"] == device_name(torch.device("cpu"))
    assert "columns" in text
    assert "step 6/6" in text


def test_metrics_rows(finished, inputs):
    rows = read_metrics(finished[0] / "metrics.jsonl")
    training, evaluation = rows[:-1], rows[-1]
    assert [row["step"] for row in training] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "learning_rate", "grad_norm", "seconds", "tokens_seen", "tokens_per_second", "step_time_ms"):
        assert all(row[key] is not None for row in training), key
    assert training[-1]["celora/refreshes"] == 3
    assert evaluation["eval_loss"] > 0
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    with open(inputs["data"], encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    texts = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in rows]
    # 6 steps of 4 rows are one epoch of 24: every token once, no padding.
    assert training[-1]["tokens_seen"] == sum(len(tokenizer(text).input_ids) for text in texts)


def test_adapter_reloads_in_stock_peft_with_the_same_logits(finished, inputs):
    output, *_, trained = finished
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs["model"]), str(output)).eval()
    ids = torch.arange(6, 26)[None]
    with torch.no_grad():
        tuned = model(ids).logits
        assert torch.equal(tuned, trained.eval()(ids).logits)
        with model.disable_adapter():
            assert not torch.equal(tuned, model(ids).logits)


def test_the_best_of_its_checkpoints_is_what_is_left(inputs, tmp_path):
    """The highest loss counts as the best here, so that the best checkpoint is not the last."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    output = tmp_path / "out"
    result, _ = go(
        inputs, output, eval_data=inputs["data"], eval_strategy="steps", eval_steps=2, save_steps=2,
        learning_rate=1e-2, **best,
    )  # fmt: skip
    *rows, last = (row for row in read_metrics(output / "metrics.jsonl") if "eval_loss" in row)
    losses = {row["step"]: row["eval_loss"] for row in rows}
    assert list(losses) == [2, 4, 6]
    step = max(losses, key=losses.get)
    assert last["eval_loss"] == result.summary["eval_loss"] == losses[step]
    assert (result.status, step) == ("finished", 2)
    found = adapter(output)
    for name, value in adapter(output / f"checkpoint-{step}").items():
        assert value.equal(found[name])


def test_ctrl_c_keeps_the_newest_checkpoint_beside_the_best(inputs, tmp_path, monkeypatch):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    on_build(monkeypatch, lambda trainer: trainer.add_callback(PressCtrlC(4)))
    result, text = go(
        inputs, tmp_path / "out", eval_data=inputs["data"], eval_strategy="steps", eval_steps=2, save_steps=2,
        learning_rate=1e-2, save_total_limit=1, **best,
    )  # fmt: skip
    assert result.status == "interrupted"
    assert "Saved checkpoint-5; continue" in text
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-5"}


def test_a_template_from_elsewhere_is_a_template(inputs, tmp_path):
    """With a chat template, from whatever place, rows of instructions become conversations."""
    bare = tmp_path / "bare"
    shutil.copytree(inputs["model"], bare)
    template = (bare / "chat_template.jinja").rename(tmp_path / "chat_template.jinja")
    row = {"instruction": "w1 w2", "output": "w3"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    flags = {"data": str(tmp_path / "rows.jsonl"), "max_steps": 1, "per_device_train_batch_size": 1}
    seen = {
        name: go(inputs, tmp_path / name, model=model, **flags, **more)[0].summary["tokens_seen"]
        for name, model, more in (
            ("own", inputs["model"], {}), ("given", str(bare), {"chat_template_path": str(template)}),
        )
    }  # fmt: skip
    assert seen["given"] == seen["own"]


def test_a_loss_that_is_no_number_is_shown(inputs, tmp_path):
    with pytest.raises(CELoraError, match="holds NaN or infinity"):
        go(inputs, tmp_path / "out", learning_rate=1e30, max_grad_norm=0.0, preset="off", celora=None, max_steps=3)
    losses = [row["loss"] for row in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in row]
    assert losses[0] > 0
    assert losses[-1] is None


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_is_left_alone(inputs, tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(CELoraError, match=r"not from a run of celora \(thesis.tex\)"):
        go(inputs, tmp_path, overwrite=overwrite)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]


def test_bad_input_leaves_the_earlier_run_alone(inputs, tmp_path):
    output = tmp_path / "out"
    go(inputs, output, max_steps=1)
    before = sorted(entry.name for entry in output.iterdir())
    with pytest.raises(CELoraError, match="nowhere"):
        go({**inputs, "data": str(tmp_path / "nowhere.jsonl")}, output, overwrite=True)
    assert sorted(entry.name for entry in output.iterdir()) == before


def test_paper_preset_trains_the_balanced_rank(inputs, tmp_path):
    request = {**inputs, "output": str(tmp_path / "out"), "max_steps": 1, "lora_r": 8, "save_strategy": "no"}
    request["preset"] = "paper"
    console = Console(file=io.StringIO(), width=200)
    train(make_request(request), console=console)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 7
    assert CELoraConfig.load(tmp_path / "out").rank == "adapter"
    assert "r0 = 7: floor(7/8 of lora_r=8)" in console.file.getvalue()


def test_off_is_plain_lora_and_quiet_prints_nothing(inputs, tmp_path):
    _, text = go(inputs, tmp_path / "out", preset="off", celora=None, max_steps=2, quiet=True)
    assert text == ""
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["step"] == 2


def test_biases_train_and_are_saved_with_checkpointing(inputs, tmp_path):
    go(inputs, tmp_path / "a", bias="lora_only", lora_bias=True, gradient_checkpointing=True, max_steps=2)
    saved = adapter(tmp_path / "a")
    assert any(name.endswith("lora_B.bias") for name in saved)
    assert any(name.endswith(("q_proj.base_layer.bias", "q_proj.bias")) for name in saved)
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_bias"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_target_modules": ["nothing.*"]}, "Target modules"),
        ({"eval_strategy": "steps"}, "--eval-data"),
        ({"eval_on_start": True}, "eval_on_start=True needs rows .* --eval-data"),
        ({"activation_offloading": True, "use_cpu": True}, "activation_offloading=True needs an accelerator"),
        ({"model": "./nowhere"}, "no such folder"),
        ({"model": "C:\\models\\nowhere"}, "no such folder"),
        ({"model": "nowhere.gguf"}, "'nowhere.gguf': no such file; check the name"),
        ({"model": "models/nowhere.gguf", "memory": "8GiB"}, "nowhere.gguf': no such file; check the name"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0; expected a number >= 0"),
        ({"lora_target_modules": ["["]}, "unterminated character set"),
        ({"chat_template_path": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_runs_are_one_line(inputs, tmp_path, change, message):
    with pytest.raises(CELoraError, match=message) as caught:
        go({**inputs, **change}, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.filterwarnings("ignore:celora. a gradient of .* is not finite")
def test_an_adapter_that_is_not_finite_is_not_saved(inputs, tmp_path, monkeypatch):
    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kw):
            if state.global_step == 5:
                next(p for p in model.parameters() if p.requires_grad).data[0] = float("nan")

    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(Diverge()))
        with pytest.raises(CELoraError, match=r"step 6 .* holds NaN or infinity.* Checkpoint-3 is whole") as caught:
            go(inputs, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "checkpoint-6").exists()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_rows_without_a_token_to_learn(inputs, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1 w2 w3", "completion": " w4"}\n')
    with pytest.raises(CELoraError, match="has a token to learn within max_length=2"):
        go({**inputs, "data": str(tmp_path / "rows.jsonl")}, tmp_path / "out", max_length=2)
    for packing in (False, True):
        with pytest.raises(CELoraError, match="has a token to learn within max_length=1 "):
            go(inputs, tmp_path / "out", max_length=1, packing=packing)


def test_model_folders_that_are_none(inputs, finished, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "config.json").write_text("{}")
    for model, message in (
        (tmp_path / "empty", "no config.json"),
        (tmp_path, "has no weights"),
        (inputs["data"], "is a file"),
        (finished[0], "is an adapter, not a model"),
    ):
        with pytest.raises(CELoraError, match=message):
            go({**inputs, "model": str(model)}, tmp_path / "out")


def test_metrics_say_where_the_time_goes(inputs, tmp_path):
    go(inputs, tmp_path / "a", max_steps=3, preset="paper", celora=None, gradient_accumulation_steps=2)
    rows = [row for row in read_metrics(tmp_path / "a" / "metrics.jsonl") if "loss" in row]
    assert len(rows) == 3
    for row in rows:
        parts = [row[f"{phase}_ms"] for phase in ("forward", "backward", "optimizer")]
        assert min(parts) > 0
        assert sum(parts) <= row["step_time_ms"]
        assert row["peak_memory_mib"] > 50
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert {layer["name"].rpartition(".")[2] for layer in record["layers"]} >= {"q_proj", "up_proj"}


@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
def test_label_smoothing_is_the_same_in_the_head(inputs, tmp_path):
    """Transformers' LabelSmoother needs all logits. celora's head smooths piece by piece."""
    losses = {}
    for preset in ("off", "exact"):
        smoothed = {"celora": None, "lora_dropout": 0.0, "label_smoothing_factor": 0.1}
        go(inputs, tmp_path / preset, max_steps=3, preset=preset, **smoothed)
        rows = read_metrics(tmp_path / preset / "metrics.jsonl")
        losses[preset] = [row["loss"] for row in rows if "loss" in row]
    assert losses["exact"] == pytest.approx(losses["off"], rel=1e-5)
