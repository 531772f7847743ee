"""Preset auto in a run: how its rule is adjusted, when it plans, and what a run keeps of both."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model_state_dict
from rich.console import Console
from safetensors.torch import load_file

from celora.errors import CELoraError
from celora.settings.config import CELoraConfig
from celora.settings.presets import RULE
from celora.train import planning, prepare
from celora.train.progress import read_metrics
from celora.train.request.arguments import make_request, parse
from celora.train.run import train
from machine import refuses
from patching import patch_all
from runs import SHORT, go


def test_auto_plans_at_the_start_keeps_the_plan_and_resumes_with_it(inputs, tmp_path, monkeypatch):

    without = {key: value for key, value in SHORT.items() if key != "celora"}
    whole, _ = train_auto(inputs, tmp_path / "whole", **without)
    plan = json.loads((tmp_path / "whole" / "celora_plan.json").read_text())
    assert plan["fidelity"] == 0.95
    assert whole.status == "finished"

    train_auto(inputs, tmp_path / "parts", **{**without, "max_steps": 3, "plan": str(tmp_path / "whole")})
    patch_all(monkeypatch, "celora.planning.planner:_make_plans", None)  # a resumed run must not plan again
    request = parse(["--max_steps", "6"], {"output": str(tmp_path / "parts"), "resume": True})
    assert train(request, console=Console(file=io.StringIO())).status == "finished"
    assert json.loads((tmp_path / "parts" / "celora_plan.json").read_text()) == plan


def test_a_run_that_was_given_a_plan_resumes_with_its_own_copy(inputs, tmp_path, monkeypatch):
    short, given = {key: value for key, value in SHORT.items() if key != "celora"}, tmp_path / "given.json"
    train_auto(inputs, tmp_path / "planned", **short | {"max_steps": 1})
    plan = json.loads((tmp_path / "planned" / "celora_plan.json").read_text())
    given.write_text(json.dumps(plan))
    train_auto(inputs, tmp_path / "out", **short | {"max_steps": 1, "plan": str(given)})
    other = plan | {"layers": plan["layers"][:1], "threads": 77}
    for step, change in enumerate((lambda: given.write_text(json.dumps(other)), given.unlink), 2):
        change()
        request = parse(["--max_steps", str(step)], {"output": str(tmp_path / "out"), "resume": True})
        assert train(request, console=Console(file=io.StringIO())).step == step
        assert json.loads((tmp_path / "out" / "celora_plan.json").read_text()) == plan
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    train(parse(["--max_steps", "4"], {"output": str(tmp_path / "out"), "resume": True}), console=console)
    assert "threads and torch has 77 here. The run goes on with its plan" in console.file.getvalue()


def test_a_plan_that_cannot_be_read_is_told_before_the_model_is_loaded(inputs, tmp_path):
    console, given = Console(file=io.StringIO()), {**inputs, "output": str(tmp_path / "out")}
    with pytest.raises(CELoraError, match=r"cannot read .*gone\.json"):
        train(make_request(given | {"plan": str(tmp_path / "gone.json")}), console=console)
    assert console.file.getvalue() == ""


def train_auto(inputs, output, **more):
    fidelity = {} if "plan" in more else {"fidelity": 0.95}
    return run_of(inputs, output, preset="auto", **fidelity, **more)


def run_of(inputs, output, **more):
    console = Console(file=io.StringIO(), width=200)
    return train(make_request({**inputs, "output": str(output), **more}), console=console), console.file.getvalue()


@pytest.fixture
def all_pay(monkeypatch):
    """Pretend that every estimate is faster here.

    A share of 0.9 of the energy loses enough for layers to move.
    """
    native = {"precision": "native"} if refuses() else {}
    patch_all(monkeypatch, "celora.planning.fastest:_fastest", lambda own, *_: (dataclasses.replace(own, **native), {}))
    patch_all(monkeypatch, "celora.planning.fastest:_share", lambda found, config, *_: config.head_keep_ratio)
    patch_all(monkeypatch, "celora.settings.presets:RULE", {**RULE, "keep_ratio": 0.9, "most_error": 0.2})
    patch_all(monkeypatch, "celora.runtime.ladder:SHARES", (0.9,))


@pytest.mark.filterwarnings("ignore:celora. at step")  # estimates that draw from so few words are bad
def test_auto_begins_with_a_rule_adjusts_it_and_repeats_that_when_resumed(inputs, tmp_path, monkeypatch, all_pay):
    patch_all(monkeypatch, "celora.train.planning:make_plan", None)
    short = {key: value for key, value in SHORT.items() if key != "celora"} | {"lr_scheduler_type": "constant"}
    _, text = run_of(inputs, tmp_path / "whole", **short | {"max_steps": 12})
    assert "Refreshes measure each estimate's relative error: beyond 0.2 a layer becomes exact, and the head" in text
    config, record = CELoraConfig.load(tmp_path / "whole"), json.loads((tmp_path / "whole" / "run.json").read_text())
    assert (config.estimator, config.forward, config.most_error) == ("tokens", "exact", 0.2)
    assert not (tmp_path / "whole" / "celora_plan.json").exists()
    assert (record["config"]["estimator"], record["settled"]) == ("dense", config.to_dict())
    assert [timing["count"] for timing in record["gate"]] == [8, 4, 2]  # kinds of layers
    moves = record["moves"]
    assert {move["step"] for move in moves} <= {*range(1, 13)}
    assert len({move["layer"] for move in moves if move["keeps"] == 1}) >= 3

    run_of(inputs, tmp_path / "parts", **short | {"max_steps": 6})
    part = json.loads((tmp_path / "parts" / "run.json").read_text())["moves"]
    assert part == moves[: len(part)]
    patch_all(monkeypatch, "celora.planning.fastest:gate", None)  # a resumed run must not measure again
    request = parse(["--max_steps", "12"], {"output": str(tmp_path / "parts"), "resume": True})
    assert train(request, console=Console(file=io.StringIO())).status == "finished"
    resumed = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert [resumed[key] for key in ("moves", "settled", "gate")] == [moves, record["settled"], record["gate"]]
    resumed, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("parts", "whole"))
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def test_a_word_about_a_plan_makes_one(inputs, tmp_path, monkeypatch):
    plans = []
    patch_all(monkeypatch, "celora.train.planning:make_plan", lambda *_: plans.append(1) or 1 / 0)
    for more in ({"fidelity": 0.9}, {"memory_limit": 1.0}):
        with pytest.raises(CELoraError, match="division by zero"):
            go(inputs, tmp_path / "out", celora=None, max_steps=1, **more)
    assert len(plans) == 2


def test_a_gate_times_as_many_tokens_as_a_batch_has(inputs, tmp_path):
    """The number from the rows equals that of the collator's batches without padding."""
    for given in ({}, {"packing": True, "max_length": 64}):
        request = make_request({**inputs, "output": str(tmp_path), "per_device_train_batch_size": 4, **given})
        with prepare.prepared(request, None, None) as (trainer, _):
            tokens, labelled = planning.batch_size(trainer)
            batch = next(iter(trainer.get_train_dataloader()))
            assert labelled == int((batch["labels"] != -100).sum()) > 0
            assert tokens == int(batch.get("attention_mask", batch["input_ids"] >= 0).sum()) >= labelled


def test_one_table_of_layers_and_errors_by_the_plan_until_they_are_measured(inputs, tmp_path):
    """Nothing is measured before the first refresh. Until then the errors are the plan's, and are reported as such."""
    output, auto = tmp_path / "out", {"preset": "auto", "celora": None, "max_steps": 3}
    go(inputs, tmp_path / "planned", fidelity=0.9, **auto | {"max_steps": 1})
    plan = json.loads((tmp_path / "planned" / "celora_plan.json").read_text())
    plan["settings"] = [{"estimator": "dense"}, {"estimator": "columns", "keep_ratio": 0.5, "rank": 4}]
    plan["head"] = None
    for i, layer in enumerate(plan["layers"]):  # otherwise such a small model is left exact
        layer |= {"candidates": [[0, 1.0, 0.0, 0], [1, 0.5, 0.3 + i / 100, 0]], "chosen": 1}
    (tmp_path / "plan.json").write_text(json.dumps(plan))

    _, text = go(inputs, output, plan=str(tmp_path / "plan.json"), **auto)
    record = json.loads((output / "run.json").read_text())
    summary, planned = record["summary"], record["planned_errors"]
    assert len([line for line in text.splitlines() if line.startswith("layers ")]) == 1
    names = [layer["name"] for layer in plan["layers"]]
    assert f"{len(names)} of 14 frozen layers estimated, refreshed every 200 optimizer steps." in text
    assert planned == {name: 0.3 + i / 100 for i, name in enumerate(names)}
    assert (summary["layers_measured"], summary["layers_not_measured"]) == (0, len(names))
    assert (summary["worst_relative_error"], summary["worst_planned_error"]) == (None, max(planned.values()))


def test_planning_does_not_change_the_order_of_the_data(inputs, tmp_path):
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
            | ({"fidelity": 1.0} if preset == "auto" else {})
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
    patch_all(monkeypatch, "celora.planning.fastest:_fastest", lambda own, *_: (own, {}))
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
    patch_all(monkeypatch, "celora.planning.fastest:_fastest", None)  # a resumed run must not measure again
    request = parse(["--max_steps", "6"], {"output": str(tmp_path / "parts"), "resume": True})
    assert train(request, console=Console(file=io.StringIO())).status == "finished"
    resumed = load_file(tmp_path / "parts" / "adapter_model.safetensors")
    assert all(value.equal(resumed[name]) for name, value in trained.items())
