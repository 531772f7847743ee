"""The studies of learning: no training on held-out rows, right scores, and tables that agree with rows."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.learning import convergence, quality, quality_tables, quality_tasks
from tiny import save_tiny_model


@pytest.mark.parametrize("name", ["chat", "text", "chain_sum", "number_filtering"])
def test_held_out_rows_are_not_trained_on(
    name: str,
) -> None:
    if name in quality_tasks.GENERATED:
        pytest.importorskip("reasoning_gym")
    task = quality_tasks.task(name)

    def said(row: dict[str, Any]) -> str:
        return " ".join((row.get("text") or row["prompt"][-1]["content"]).casefold().split())

    parts = [{said(row) for row in part} for part in (task.train, task.validation, task.test)]
    assert all(parts)
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert len(parts[2]) == len(task.test)
    first, again, other = (quality_tasks.shuffled(task.train, seed, 50) for seed in (0, 0, 1))
    assert first == again != other


def test_judges(tmp_path: Path) -> None:
    """Exact match judges what greedy decoding says, and the loss is transformers' own. Batching changes neither."""
    folder = save_tiny_model(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    rows = []
    for i in range(6):
        prompt = [{"role": "user", "content": " ".join(f"w{i + j}" for j in range(1 + i))}]
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        answer = tokenizer.decode(ids[0, -3:])
        rows.append({"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]})
    # The template ends a turn with <eos>. A random model need not choose that; it is judged by what it does choose.
    contexts = [c for c, _ in quality_tasks._encoded(tokenizer, rows)]
    answers = [a for _, a in quality_tasks._encoded(tokenizer, rows)]
    expected = []
    for context, answer in zip(contexts, answers, strict=True):
        ids = torch.tensor([context])
        for _ in answer:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        expected.append(ids[0, len(context) :].tolist() == answer)
    assert quality_tasks.exact_match(model, tokenizer, rows) == pytest.approx(sum(expected) / len(rows))
    losses, tokens = 0.0, 0
    for context, answer in zip(contexts, answers, strict=True):
        ids = torch.tensor([context + answer])
        labels = torch.tensor([[-100] * len(context) + answer])
        losses += model(ids, labels=labels).loss.item() * len(answer)
        tokens += len(answer)
    assert quality_tasks.loss(model, tokenizer, rows) == pytest.approx(losses / tokens, rel=1e-5)
    assert quality_tasks.loss(model, tokenizer, [{"text": "w1 w2 w3"}]) == pytest.approx(
        model(
            torch.tensor([tokenizer("w1 w2 w3")["input_ids"]]),
            labels=torch.tensor([tokenizer("w1 w2 w3")["input_ids"]]),
        ).loss.item(),
        rel=1e-5,
    )


def row(arm: str, seed: int, rate: float, validation: float, test: float, **more: Any) -> dict[str, Any]:
    return {
        "task": "chain_sum", "arm": arm, "seed": seed, "learning_rate": rate, "steps": 60, "metric": "exact match",
        "higher_is_better": True, "validation": validation, "test": test,
        "threads": 1, "cpu": "a CPU", "torch": "2", **more,
    }  # fmt: skip


def test_validation_chooses_and_test_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.jsonl")
    monkeypatch.setattr(quality, "TIMES", tmp_path / "times.jsonl")
    assert quality_tables.scores() == "Not measured yet."
    rows = [
        row("LoRA", 0, 1e-3, 0.5, 0.40), row("LoRA", 0, 2e-3, 0.4, 0.90), row("LoRA", 1, 1e-3, 0.5, 0.50),
        row("auto", 0, 1e-3, 0.5, 0.42), row("auto", 1, 1e-3, 0.5, 0.52),
    ]  # fmt: skip
    quality.RESULTS.write_text("".join(json.dumps(r) + "\n" for r in rows))
    times = {"task": "chain_sum", "arm": "LoRA", "time_ms": 900.0, "threads": 2, "cpu": "a CPU", "torch": "2"}
    quality.TIMES.write_text(json.dumps(times) + "\n")
    assert quality.best_rate("chain_sum", "LoRA", 60) == 1e-3
    lines = quality_tables.scores().splitlines()
    assert (
        lines[2]
        == "| chain_sum | exact match | LoRA | a CPU | 60 | 900 ms | 0.001 of 2 | 2 | 45.0% (40.0% to 50.0%) |  |"
    )
    assert lines[3].endswith("| 47.0% (42.0% to 52.0%) | +2.0 points (+2.0 points to +2.0 points) |")
    assert "Trained on a CPU, 1 thread, torch 2; the column names the CPU." in lines[-1]
    elsewhere = [r | {"cpu": "another CPU"} if r["arm"] == "auto" else r for r in rows]
    quality.RESULTS.write_text("".join(json.dumps(r) + "\n" for r in elsewhere))
    assert quality_tables.scores().splitlines()[3].endswith("+2.0 points), on another CPU |")
    missing = quality_tables.missing()
    assert "LoRA (2 of 3 seeds)" in missing
    assert "`chat`: all arms" in missing


def test_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task is lost by more than a point and an error. A task with too few seeds is left out."""
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.jsonl")
    monkeypatch.setattr(quality, "TIMES", tmp_path / "none.jsonl")
    monkeypatch.setattr(quality, "COMMANDS", tmp_path / "none.jsonl")
    assert quality_tables.verdict() == "No task has all of its runs yet."
    ended = {  # task -> arm -> difference of its loss or accuracy from LoRA's at equal steps
        "chat": {
            "untouched": 1.0,
            "LoRA": 0.0,
            "auto": 0.005,
            "fast": 0.02,
            "LoRA, auto's time": 0.025,
            "upper half, auto's time": 0.03,
        },
        "chain_sum": {"LoRA": 0.0, "auto": -0.05, "fast": -0.02, "LoRA, auto's time": -0.1},
        "number_filtering": {"LoRA": 0.42667, "auto": 0.41667, "fast": 0.43667},  # three of 300, exactly a point
    }
    rows = [
        row(arm, seed, 1e-3, 0.5, 0.5 + 0.01 * seed + difference) | {"task": task, "higher_is_better": task != "chat"}
        for task, arms in ended.items()
        for arm, difference in arms.items()
        for seed in range(3)
    ]
    rows += [r | {"task": "text"} for r in rows if r["task"] == "chat" and r["seed"] < 2]
    quality.RESULTS.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert quality_tables.verdict().splitlines()[2:10] == [
        "| chain_sum | auto | 3 | -5.0 (-5.0 to -5.0) | no | no | +5.0 (+5.0 to +5.0) |  |",
        "| chain_sum | fast | 3 | -2.0 (-2.0 to -2.0) | no | no |  |  |",
        "| number_filtering | auto | 3 | -1.0 (-1.0 to -1.0) | yes | shown |  |  |",
        "| number_filtering | fast | 3 | +1.0 (+1.0 to +1.0) | yes | shown |  |  |",
        "| chat | auto | 3 | -0.5 (-0.5 to -0.5) | yes | shown | +2.0 (+2.0 to +2.0) | +2.5 (+2.5 to +2.5) |",
        "| chat | fast | 3 | -2.0 (-2.0 to -2.0) | no | no |  |  |",
        "| mean of the 2 with labels or answers | auto | 3 | -3.0 (-3.0 to -3.0) | no | no |  |  |",
        "| mean of the 2 with labels or answers | fast | 3 | -0.5 (-0.5 to -0.5) | yes | shown |  |  |",
    ]
    values = {name: value() for name, value in quality_tables.VALUES.items() if not re.search("text|whole", name)}
    assert values == {
        "near_auto": "2 of 3",
        "near_fast": "1 of 3",
        "shown_auto": "2 of 3",
        "shown_fast": "1 of 3",
        "together_auto": "-3.0 (-3.0 to -3.0)",
        "together_fast": "-0.5 (-0.5 to -0.5)",
        "furthest_auto": "5.0 points on chain_sum",
        "furthest_fast": "2.0 points on chain_sum",
        "leads": "2 of 2",
        "leads_surely": "2 of 2",
        "leads_upper_half": "1 of 1",
        "lead_chat": "0.02 nats",
        "lead_chain_sum": "5.0 points",
    }


def test_the_time_of_a_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, and who is ahead, of tasks with three seeds of each arm, at the steps that the times allow."""
    for name in ("RESULTS", "TIMES", "COMMANDS"):
        monkeypatch.setattr(quality, name, tmp_path / f"{name}.jsonl")
    assert quality_tables.whole_command(50) == "Not measured yet."
    times = {"LoRA": (9.0, 1000.0), "upper half": (9.5, 700.0), "auto": (11.0, 300.0)}
    on = {"threads": 2, "cpu": "a CPU", "torch": "2"}
    quality.rows.write(
        quality.COMMANDS,
        [
            {"task": task, "arm": arm, "first_s": first, "time_ms": ms} | on
            for task in ("chat", "chain_sum", "text")
            for arm, (first, ms) in times.items()
        ],
    )
    steps = {"LoRA, 50 steps": 50, "upper half, 50 steps' time": 70, "auto, 50 steps' time": 157}
    losses = dict(zip(steps, (1.0, 1.2, 0.9), strict=True))
    quality.rows.write(
        quality.RESULTS,
        [
            row(arm, seed, 1e-3, 0.5, score + seed / 100, steps=count) | {"task": task, "higher_is_better": good}
            for task, good in (("chat", False), ("chain_sum", True), ("text", False))
            for seed in range(3)
            for arm, count in steps.items()
            if (task, seed) != ("text", 2)
            for score in [losses[arm] if task == "chat" else losses[arm] / 2]
        ]
        + [row("auto, 50 steps' time", seed, 1e-3, 0.9, 0.0, steps=9) | {"task": "chat"} for seed in range(3)],
    )
    table = quality_tables.whole_command(50).splitlines()
    assert table[2:5] == [
        "| chain_sum | 58 s | 51.0% (50 at 0.001) | 61.0% (70 at 0.001) | 46.0% (157 at 0.001) | 3 | "
        "-5.0 (-5.0 to -5.0) | -15.0 (-15.0 to -15.0) |",
        "| chat | 58 s | 1.010 (50 at 0.001) | 1.210 (70 at 0.001) | 0.910 (157 at 0.001) | 3 | "
        "+10.0 (+10.0 to +10.0) | +30.0 (+30.0 to +30.0) |",
        "",  # `text` lacks a seed
    ]
    values = {
        name: value() for name, value in quality_tables.VALUES.items() if re.search("whole_(steps|leads).*50", name)
    }
    assert values.pop("whole_steps_50") == "157 to 157"
    assert len(values) == 4
    assert set(values.values()) == {"1 of 2"}
    assert quality_tables.VALUES["whole_lead_chat_50"]() == "0.10 nats"
    assert quality_tables.whole_steps(200) == "657 to 657"
    assert quality_tables.whole_command(200) == "Not measured yet."
    assert "auto, 50 steps" not in quality_tables.scores()


def test_a_mean_over_tasks_pairs_seeds() -> None:
    def of(task: str, arm: str, seeds: Sequence[int], score: float) -> list[dict[str, Any]]:
        return [row(arm, seed, 1e-3, 0.5, score + seed) | {"task": task, "higher_is_better": True} for seed in seeds]

    found = [*of("chain_sum", "LoRA", range(4), 0.0), *of("chain_sum", "auto", range(4), 0.5)]
    found += [*of("number_filtering", "LoRA", range(4), 0.0), *of("number_filtering", "auto", [0, 2, 3], 0.25)]
    found[5]["test"] = 9.0  # of the seed that one task lacks
    tasks, values = quality_tables._together(found, "auto")
    assert tasks == ["chain_sum", "number_filtering"]
    assert values == [0.375] * 3


def test_a_wide_interval_shows_nothing() -> None:
    """Three seeds that differ by more than the margin neither show that an arm is not worse nor that it is."""
    better = quality_tables._better
    assert quality_tables._not_worse(better([0.03, -0.03, 0.0]), 0.01) == "open"
    assert quality_tables._not_worse(better([0.001, -0.001, 0.0]), 0.01) == "shown"
    assert quality_tables._not_worse(better([-0.021, -0.02, -0.022]), 0.01) == "no"


def save_times(task: str) -> None:
    """Steps take 100, 60, 90 and 75 ms. So 30 of LoRA's steps take as long as 40 of auto's."""
    times = {"LoRA": 100.0, "upper half": 60.0, "paper": 90.0, "auto": 75.0}
    quality.TIMES.write_text(
        "".join(json.dumps({"task": task, "arm": arm, "time_ms": ms}) + "\n" for arm, ms in times.items())
    )


def test_times_measured_anew_leave_out_the_runs_of_the_old_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "TIMES", tmp_path / "times.jsonl")
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.jsonl")
    save_times("chain_sum")
    arm = "LoRA, auto's time"
    rows = [row(arm, 0, 1e-3, 0.9, 0.9, steps=36), row(arm, 0, 1e-3, 0.5, 0.4, steps=30)]
    assert quality_tables.chosen(rows, "chain_sum", arm) == {0: rows[1]}
    assert quality_tables.chosen(rows[:1], "chain_sum", arm) == {}
    quality.RESULTS.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert f"{arm} (1 of 3 seeds)" in quality_tables.missing()


def test_arms_of_equal_time_follow_the_measured_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "TIMES", tmp_path / "times.jsonl")
    assert quality.steps_in_autos_time("chat") == {}
    save_times("chat")
    assert quality.steps_in_autos_time("chat") == {"LoRA, auto's time": 30, "upper half, auto's time": 50}


def test_the_grid_grows_until_the_best_rate_is_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.jsonl")
    monkeypatch.setattr(quality, "TIMES", tmp_path / "times.jsonl")

    def trained(task: str, arm: str, seed: int, rate: float, steps: int) -> dict[str, Any]:
        return {"validation": 1 - abs(rate - 5e-3), "test": 0.5, "higher_is_better": True}

    monkeypatch.setattr(quality, "trained", trained)
    for _ in range(2):  # the second time, nothing is missing
        quality.run(["chat"], ["LoRA"], [0, 1], [1e-3, 5e-4, 2e-3], Mock())
        rates = [(row["seed"], row["learning_rate"]) for row in quality.found()]
        assert rates == [(0, 1e-3), (0, 5e-4), (0, 2e-3), (0, 4e-3), (0, 8e-3), (1, 4e-3)]
    quality.run(["text"], ["LoRA"], [0], [2e-3], Mock())
    assert [row["learning_rate"] for row in quality.found() if row["task"] == "text"] == [2e-3]


def test_only_the_rate_that_validation_prefers_is_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the best so far; then worse; equal with a higher loss; equal with a lower loss; better
    validation = iter(((0.5, 1.0), (0.4, 0.5), (0.5, 1.1), (0.5, 0.9), (0.6, 2.0)))

    def judged(task: str, model: Any, part: str) -> dict[str, Any]:
        score, loss = next(validation) if part == "validation" else (0.3, 1.0)
        return {"higher_is_better": True, part: score, f"{part}_loss": loss}

    finished = SimpleNamespace(status="finished", model=torch.nn.Module(), summary={"estimated_cost": 1.0, "loss": 0.1})
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "quality.jsonl")
    monkeypatch.setattr(quality, "request", lambda *args, **own: None)
    monkeypatch.setattr(quality, "train", lambda *args, **own: finished)
    monkeypatch.setattr(quality, "_judged", judged)
    quality.run(["chat"], ["LoRA"], [0, 1], [1.0, 2.0, 6.0, 4.0, 5.0], lambda line: None)
    rows = quality.found()
    assert [(r["seed"], r["learning_rate"], r["test"]) for r in rows] == [
        (0, 1.0, 0.3), (0, 2.0, None), (0, 6.0, None), (0, 4.0, 0.3), (0, 5.0, 0.3), (1, 5.0, 0.3),
    ]  # fmt: skip


def test_slopes() -> None:
    """The fit finds the exponent of a power law. The committed rows show LoRA's rate for every arm."""
    made = [
        {"arm": "LoRA", "steps": steps, "seed": seed, "mean_squared_gradient": (2 + seed) * steps**-0.5}
        for seed in range(3)
        for steps in convergence.STEPS
    ]
    mean, width = convergence.slope(made, "LoRA")
    assert mean == pytest.approx(-0.5)
    assert width == pytest.approx(0, abs=1e-9)
    found = convergence.rows.read(convergence.RESULTS)
    slopes = {arm: convergence.slope(found, arm) for arm in convergence.RATED}
    for arm, (mean, width) in slopes.items():
        like = slopes["LoRA, Adam" if arm.endswith(convergence.ADAM) else "LoRA"][0]
        assert math.isclose(mean, like, abs_tol=0.1), arm
        assert arm.endswith(convergence.ADAM) or mean - width <= -0.5, arm
    warned = {r["arm"] for r in found if r["monitor"]}
    assert {"sampled 0.1", "sampled 0.05"} <= warned
    assert not {*convergence.RATED} & warned


def test_runs_what_is_missing_and_times_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The study itself, on a tiny model: every arm, interrupted and continued, and each row once."""
    model = save_tiny_model(tmp_path / "model")
    rows = [quality_tasks._row(f"w{i} w{i + 1}", f"w{i % 7}") for i in range(30)]
    tiny = quality_tasks.Task("chat", "exact match", True, rows[:20], rows[20:25], rows[25:], quality_tasks.exact_match)
    monkeypatch.setattr(quality_tasks, "task", lambda name: tiny)
    for name, value in {"STEPS": 2, "BATCH": 2, "LORA_STEPS": (2,)}.items():
        monkeypatch.setattr(quality, name, value)
    for name in ("RESULTS", "TIMES", "COMMANDS"):
        monkeypatch.setattr(quality, name, tmp_path / f"{name}.jsonl")
    monkeypatch.setattr(quality, "demo_model", lambda: model)
    said: list[str] = []
    arms = [arm for arm in quality.ARMS if arm not in quality.COMMAND_ARMS] + [
        quality.command_arm(arm, 2) for arm in quality.CONTENDERS
    ]
    quality.run(["chat"], ["untouched", "LoRA"], [0], [1e-3], said.append)
    quality.time_steps(["chat"], list(quality.TIMED), 2)
    timed = quality.rows.read(quality.TIMES)
    assert [r["arm"] for r in timed] == list(quality.TIMED)
    forget, command = Mock(), Mock(return_value={"adapter_s": 9.0})
    monkeypatch.setattr(quality, "forget_measurements", forget)
    monkeypatch.setattr(quality, "command", command)
    quality.time_commands(["chat"], 2)
    assert [call.args[1] for call in command.call_args_list] == ["off", "off", "auto"]
    assert all(call.args[2]["max_steps"] == 1 and "preset" not in call.args[2] for call in command.call_args_list)
    forget.assert_called_once_with()
    monkeypatch.setattr(quality, "interleaved", Mock(side_effect=[{"LoRA": {"time_ms": 6.0}}, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):  # stopped at the second task
        quality.time_steps(["text", "chat"], list(quality.TIMED), 2)
    again = quality.rows.read(quality.TIMES)
    assert [r for r in again if r["task"] == "chat"] == timed
    assert [(r["task"], r["arm"]) for r in again if r["task"] != "chat"] == [("text", "LoRA")]
    quality.run(["chat"], arms, [0], [1e-2], said.append)
    twice = ["LoRA", "upper half"]  # one run is enough for the other arms
    quality.run(["chat"], twice, [0, 1], [1e-3, 1e-2], said.append)
    found = quality.found()
    keys = [(r["arm"], r["seed"], r["learning_rate"]) for r in found]
    assert len(set(keys)) == len(keys)
    assert {(arm, seed) for arm, seed, _ in keys} == {(arm, 0) for arm in arms} | {(arm, 1) for arm in twice}
    assert {rate for arm, seed, rate in keys if arm == "LoRA" and seed == 0} >= {1e-3, 1e-2}
    assert {r["steps"] for r in found if r["arm"] == "LoRA"} == {2}
    quality.run(["chat"], arms, [0], [1e-2], said.append)
    quality.run(["chat"], twice, [0, 1], [1e-3, 1e-2], said.append)
    assert quality.found() == found
    # The upper half is one of two blocks. LoRA there alone trains another model than LoRA everywhere.
    losses = {
        (r["arm"], r["learning_rate"]): r["train_loss"] for r in found if r["arm"] != "untouched" and not r["seed"]
    }
    assert losses["upper half", 1e-2] != losses["LoRA", 1e-2]


def test_rivals_get_the_time_of_the_whole_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps as fit between a slower start and the end of LoRA's command, and not one more."""
    monkeypatch.setattr(quality, "TIMES", tmp_path / "none.jsonl")
    monkeypatch.setattr(quality, "COMMANDS", tmp_path / "commands.jsonl")
    assert quality.steps_in_the_time("chat") == {}
    times = {"LoRA": (9.0, 1000.0), "upper half": (9.5, 700.0), "auto": (11.0, 300.0)}
    measured = [
        {"task": task, "arm": arm, "first_s": first + late, "time_ms": ms}
        for task, late in (("chat", 0.0), ("text", 8.0), ("chain_sum", -0.0))
        for arm, (first, ms) in times.items()
    ]
    quality.rows.write(quality.COMMANDS, measured)
    found = quality.steps_in_the_time("chat")
    assert found == {
        "LoRA, 50 steps": 50, "upper half, 50 steps' time": 70, "auto, 50 steps' time": 157,
        "LoRA, 200 steps": 200, "upper half, 200 steps' time": 284, "auto, 200 steps' time": 657,
    }  # fmt: skip
    for (arm, (first, ms)), steps in itertools.product(times.items(), quality.LORA_STEPS):
        whole, count = 9.0 + (steps - 1) * 1.0, found[quality.command_arm(arm, steps)]
        assert first + (count - 1) * ms / 1000 <= whole < first + count * ms / 1000
