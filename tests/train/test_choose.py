"""Presets auto and fast in a run: how the rule is adjusted, and what a run keeps of it."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from peft import AutoPeftModelForCausalLM, get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file

from celora.settings.config import CELoraConfig
from celora.settings.presets import RULE
from celora.train import choose, prepare
from celora.train.progress import read_metrics
from celora.train.request.arguments import make_request, parse
from celora.train.run import train
from machine import refuses
from patching import patch_all
from runs import SHORT


def run_of(inputs, output, **more):
    console = Console(file=io.StringIO(), width=200)
    return train(make_request({**inputs, "output": str(output), **more}), console=console), console.file.getvalue()


@pytest.fixture
def all_pay(monkeypatch):
    """Pretend that every estimate is faster here.

    A share of 0.9 of the energy loses enough for layers to move.
    """
    native = {"precision": "native"} if refuses() else {}
    patch_all(monkeypatch, "celora.runtime.gate:_fastest", lambda own, *_: (dataclasses.replace(own, **native), {}))
    patch_all(monkeypatch, "celora.runtime.gate:_share", lambda found, config, *_: config.head_keep_ratio)
    patch_all(monkeypatch, "celora.settings.presets:RULE", {**RULE, "keep_ratio": 0.9, "most_error": 0.2})
    patch_all(monkeypatch, "celora.runtime.ladder:SHARES", (0.9,))


@pytest.mark.filterwarnings("ignore:celora. at step")  # estimates that draw from so few words are bad
def test_auto_begins_with_a_rule_adjusts_it_and_repeats_that_when_resumed(inputs, tmp_path, monkeypatch, all_pay):
    short = {key: value for key, value in SHORT.items() if key != "celora"} | {"lr_scheduler_type": "constant"}
    _, text = run_of(inputs, tmp_path / "whole", **short | {"max_steps": 12})
    assert "Refreshes measure each estimate's relative error: beyond 0.2 a layer becomes exact, and the head" in text
    config, record = CELoraConfig.load(tmp_path / "whole"), json.loads((tmp_path / "whole" / "run.json").read_text())
    assert (config.estimator, config.forward, config.most_error) == ("tokens", "exact", 0.2)
    assert (record["config"]["estimator"], record["settled"]) == ("dense", config.to_dict())
    assert [timing["count"] for timing in record["gate"]] == [8, 4, 2]  # kinds of layers
    moves = record["moves"]
    assert {move["step"] for move in moves} <= {*range(1, 13)}
    assert len({move["layer"] for move in moves if move["keeps"] == 1}) >= 3

    run_of(inputs, tmp_path / "parts", **short | {"max_steps": 6})
    part = json.loads((tmp_path / "parts" / "run.json").read_text())["moves"]
    assert part == moves[: len(part)]
    patch_all(monkeypatch, "celora.runtime.gate:gate", None)  # a resumed run must not measure again
    request = parse(["--max_steps", "12"], {"output": str(tmp_path / "parts"), "resume": True})
    assert train(request, console=Console(file=io.StringIO())).status == "finished"
    resumed = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert [resumed[key] for key in ("moves", "settled", "gate")] == [moves, record["settled"], record["gate"]]
    resumed, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def test_a_gate_times_as_many_tokens_as_a_batch_has(inputs, tmp_path):
    """The number from the rows equals that of the collator's batches without padding."""
    for given in ({}, {"packing": True, "max_length": 64}):
        request = make_request({**inputs, "output": str(tmp_path), "per_device_train_batch_size": 4, **given})
        with prepare.prepared(request, None, None) as (trainer, _):
            tokens, labelled = choose.batch_size(trainer)
            batch = next(iter(trainer.get_train_dataloader()))
            assert labelled == int((batch["labels"] != -100).sum()) > 0
            assert tokens == int(batch.get("attention_mask", batch["input_ids"] >= 0).sum()) >= labelled


def test_timing_does_not_change_the_order_of_the_data(inputs, tmp_path):
    seen = {}
    for preset in ("off", "auto"):
        losses = []
        request = make_request(
            {
                **inputs,
                "output": str(tmp_path / preset),
                "preset": preset,
                "max_steps": 3,
                "per_device_train_batch_size": 4,
            }
        )
        train(request, console=Console(file=io.StringIO()))
        losses = [row["loss"] for row in read_metrics(tmp_path / preset / "metrics.jsonl")]
        seen[preset] = losses
    assert seen["auto"] == pytest.approx(seen["off"], rel=1e-3)


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, so preset fast is exact")
@pytest.mark.filterwarnings("ignore:celora. at step")  # estimates that draw from so few words are bad
def test_fast_resumes_as_it_was_and_is_evaluated_on_the_base_too(inputs, tmp_path, monkeypatch):
    """A run measures only once what is faster. Its log has two losses: on the 8-bit base, and on the untouched base."""
    short = {key: value for key, value in SHORT.items() if key != "celora"} | {
        "preset": "fast",
        "lr_scheduler_type": "constant",
    }
    patch_all(monkeypatch, "celora.runtime.gate:_fastest", lambda own, *_: (own, {}))
    evaluated = {"eval_data": inputs["data"], "eval_strategy": "steps", "eval_steps": 3}
    run_of(inputs, tmp_path / "whole", **short | evaluated | {"max_steps": 6})
    config = CELoraConfig.load(tmp_path / "whole")
    assert (config.forward, config.precision) == ("int8", "int8")
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "eval_loss" in row]
    assert rows
    for row in rows:
        assert row["eval_base_loss"] != row["eval_loss"]
        assert row["eval_base_loss"] == pytest.approx(row["eval_loss"], rel=0.05)
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert "head" in record["forward_errors"]
    worst = record["summary"]["worst_forward_error"]
    assert 0 < worst == max(record["forward_errors"].values()) < 0.1
    assert record["forwards_made_exact"] == [] != record["summary"]["forwards_made_exact"]
    page = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert "worst relative error of a forward in 8 bits" in page
    trained = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert set(trained) == set(get_peft_model_state_dict(plain))

    run_of(inputs, tmp_path / "parts", **short | evaluated | {"max_steps": 3})
    patch_all(monkeypatch, "celora.runtime.gate:_fastest", None)  # a resumed run must not measure again
    request = parse(["--max_steps", "6"], {"output": str(tmp_path / "parts"), "resume": True})
    assert train(request, console=Console(file=io.StringIO())).status == "finished"
    resumed = load_file(tmp_path / "parts" / "adapter_model.safetensors")
    assert all(value.equal(resumed[name]) for name, value in trained.items())
