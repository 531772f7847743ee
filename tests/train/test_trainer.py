"""TRL's trainer with celora's additions: if a library refuses, it is one line; every overridden method exists."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import SFTTrainer

from celora import borrowed
from celora.errors import CELoraError
from celora.train import prepare
from celora.train import trainer as trainer_module
from celora.train.decisions import rank_line
from celora.train.forecast.estimate import estimate
from celora.train.request.arguments import make_request
from celora.train.run import train
from patching import patch_all
from runs import SHORT, adapter, go


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr_scheduler_kwargs": {"bogus": 1}}, "no training with these settings: .*bogus"),
        ({"optim_args": "bogus"}, "no training with these settings"),
        ({"dataloader_persistent_workers": True}, "no training with these settings: .*num_workers"),
    ],
)
def test_what_a_library_refuses_late_is_one_line_and_brings_the_earlier_run_back(inputs, tmp_path, change, message):
    output = tmp_path / "out"
    go(inputs, output, max_steps=1)
    before = adapter(output)
    with pytest.raises(CELoraError, match=message) as caught:
        train(make_request({**inputs, **SHORT, **change, "output": str(output), "overwrite": True, "quiet": True}))
    assert "\n" not in str(caught.value)
    assert all(before[name].equal(value) for name, value in adapter(output).items())


def test_a_metric_that_no_evaluation_has_is_one_line(inputs, tmp_path):
    best = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "nope"}
    with pytest.raises(CELoraError, match=r"'eval_nope', which is not found .*eval_loss") as caught:
        go(inputs, tmp_path / "out", eval_data=inputs["data"], **best)
    assert "\n" not in str(caught.value)


def test_data_without_a_whole_batch_is_one_line(inputs, tmp_path):
    whole = {"dataloader_drop_last": True}
    with pytest.raises(CELoraError, match="no batch: 24 rows for batches of 25"):
        go(inputs, tmp_path / "out", per_device_train_batch_size=25, **whole)
    with pytest.raises(CELoraError, match="no batch: 24 rows for batches of 25"):
        prepare.audit_model(make_request({**inputs, "output": str(tmp_path), "preset": "exact", **whole}), rows=25)


def test_a_bug_and_a_lack_of_memory_are_not_refusals():
    with pytest.raises(CELoraError, match=r"no step .*: JSONDecodeError: Expecting"), trainer_module.refused("step"):
        json.loads("")
    with pytest.raises(MemoryError), trainer_module.refused("step"):
        raise MemoryError
    with pytest.raises(AttributeError, match="'r'"), trainer_module.refused("step"):
        rank_line(None)


def test_every_private_method_that_the_trainer_overrides_is_listed():
    """`test_borrowed` checks that the installed libraries have them. Otherwise nobody would call our methods."""
    ours = [cls for cls in trainer_module.Trainer.__mro__ if cls.__module__.startswith("celora.")]
    private = {name for cls in ours for name in vars(cls) if name.startswith("_") and not name.startswith("__")}
    assert private & set(dir(SFTTrainer)) <= {name.rpartition(".")[2] for name in trainer_module.OVERRIDDEN}


def test_a_method_that_the_libraries_no_longer_have_is_said_at_the_start(inputs, tmp_path, monkeypatch):
    found = borrowed._look_up
    gone = {"trl:SFTTrainer._prepare_dataset", "transformers:Trainer._load_from_checkpoint"}
    go(inputs, tmp_path / "out", max_steps=3)
    for name in ("adapter_model.safetensors", "report.html"):
        (tmp_path / "out" / name).unlink()
    patch_all(monkeypatch, "celora.borrowed:_look_up", lambda name: None if name in gone else found(name))
    monkeypatch.setattr(borrowed, "_found", {})
    borrowed._say_missing.cache_clear()
    with (
        pytest.warns(UserWarning, match="no trl.SFTTrainer._prepare_dataset, so neither a row that the chat template"),
        pytest.warns(UserWarning, match="no transformers.Trainer._load_from_checkpoint, so a run that was stopped"),
        pytest.raises(CELoraError, match=r"checkpoint-3 is the run's last step, .* give a larger --max_steps"),
    ):
        go(inputs, tmp_path / "out", max_steps=3, resume=True)


def test_a_tokenizer_with_nothing_to_pad_with_is_one_line(inputs, tmp_path):
    model = Path(shutil.copytree(inputs["model"], tmp_path / "model"))
    names = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in names.items() if name not in ("pad_token", "eos_token")})
    )
    said = (
        r"has neither a pad token nor an end token, .*as pad_token into its tokenizer_config.json, or give --pad_token"
    )
    with pytest.raises(CELoraError, match=said):
        go(inputs | {"model": str(model)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts_without_an_end_token_are_one_line(inputs, tmp_path):
    model = Path(shutil.copytree(inputs["model"], tmp_path / "model"))
    names = json.loads((model / "tokenizer_config.json").read_text())
    del names["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 8)
    texts = {"model": str(model), "data": str(tmp_path / "rows.jsonl")}
    with pytest.raises(CELoraError, match=r"has no end token, and rows of text have to end with one; .*--eos_token"):
        go(texts, tmp_path / "out", max_steps=1)
    assert go(texts, tmp_path / "out", max_steps=1, eos_token="<eos>")[0].status == "finished"


def test_rows_longer_than_the_learned_positions_are_one_line(inputs, tmp_path):
    small = {"vocab_size": 48, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 16, "bos_token_id": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **small)).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(inputs["model"]).save_pretrained(tmp_path / "model")
    (tmp_path / "long.jsonl").write_text('{"text": "w1 w2"}\n' + json.dumps({"text": "w3 " * 30}))
    given = {"model": str(tmp_path / "model"), "data": str(tmp_path / "long.jsonl"), "output": str(tmp_path / "out")}
    said = r"a row of '.*long\.jsonl' has 31 tokens, and the model has 16 positions; give --max_length 16"
    with pytest.raises(CELoraError, match=said):
        train(make_request(given | SHORT))
    assert not [*(tmp_path / "out").iterdir()]
    with pytest.raises(CELoraError, match=said):
        estimate(make_request(given))
    with pytest.raises(CELoraError, match=said):
        train(make_request(given | SHORT | {"max_length": 31, "packing": True}))
    assert train(make_request(given | SHORT | {"max_length": 16})).status == "finished"
