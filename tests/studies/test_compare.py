"""`celora compare`: what it runs, what it does not repeat, and what it refuses."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import TrainerCallback

import forked
from celora.cli import main as cli
from celora.errors import CELoraError
from celora.studies import compare as module
from celora.studies.compare import compare
from celora.studies.outcomes import Outcome, differences, findings
from celora.train import trainer as run
from machine import refuses
from patching import patch_all
from tiny import save_rows, save_tiny_model

ARMS = ("LoRA", "exact", "paper")
TWO = ARMS[:2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_model(folder / "model")
    save_rows(folder / "rows.jsonl", 40)
    return folder


def settings(inputs: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(inputs / "model"), "data": str(inputs / "rows.jsonl"), "output": str(output), "max_steps": 3,
        "per_device_train_batch_size": 4, "dtype": "float32", "learning_rate": 1e-2, "quiet": True, **more,
    }  # fmt: skip


def test_a_comparison(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = compare(settings(inputs, output), arms=ARMS, seeds=2)
    assert [(o.arm, o.seed) for o in found] == [(arm, seed) for arm in ARMS for seed in (0, 1)]
    losses = {(o.arm, o.seed): o.eval_loss for o in found}
    for seed in (0, 1):  # exact LoRA gets the same rows in the same order, so it equals LoRA
        assert losses["exact", seed] == pytest.approx(losses["LoRA", seed], rel=1e-5)
    assert losses["LoRA", 0] != losses["LoRA", 1]
    assert [json.loads(line) for line in (output / "compare.jsonl").read_text().splitlines()] == [
        vars(o) for o in found
    ]
    page = (output / "report.html").read_text(encoding="utf-8")
    for line in findings(found, ARMS):
        assert line.replace("'", "&#x27;") in page
    held_out = (output / "data" / "held-out.jsonl").read_text().splitlines()
    training = (output / "data" / "train.jsonl").read_text().splitlines()
    assert len(held_out) == 4
    assert len(training) == 36
    assert not set(held_out) & set(training)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    with pytest.MonkeyPatch.context() as patch:
        patch_all(patch, "celora.train.trainer:build_trainer", refuse)
        assert compare(settings(inputs, output), arms=ARMS, seeds=2) == found


def test_a_slice_of_a_hub_s_rows(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = datasets.load_dataset("json", data_files=str(inputs / "rows.jsonl"), split="train[:20]")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    own = settings(inputs, tmp_path, data="someone/reviews", dataset_train_split="train[:20]", max_steps=1)
    assert [(o.arm, o.seed) for o in compare(own, arms=TWO, seeds=1)] == [(arm, 0) for arm in TWO]


def test_goes_on_where_it_was_killed(inputs: Path, tmp_path: Path) -> None:
    whole = compare(settings(inputs, tmp_path / "whole", save_steps=1), arms=ARMS[:2], seeds=1)
    trained = module.train
    calls: list[str] = []

    def die(request: Any, **more: Any) -> Any:
        calls.append(request.output.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return trained(request, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch_all(patch, "celora.train.run:train", die)
        with pytest.raises(KeyboardInterrupt):
            compare(settings(inputs, tmp_path / "cut", save_steps=1), arms=ARMS[:2], seeds=1)
    again = compare(settings(inputs, tmp_path / "cut", save_steps=1), arms=ARMS[:2], seeds=1)
    assert [o.eval_loss for o in again] == [o.eval_loss for o in whole]


def test_goes_on_after_sigkill(inputs: Path, tmp_path: Path) -> None:
    """Killed in the second arm, after a checkpoint. The results are the same as without the kill."""
    given = settings(inputs, tmp_path / "cut", save_steps=2, max_steps=6)
    script = f"""
import os, signal
from celora.train import progress
from celora.studies.compare import compare
end = progress.MetricsWriter.on_step_end
def die(self, args, state, control, **more):
    end(self, args, state, control, **more)
    if "exact" in str(self.path) and state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
progress.MetricsWriter.on_step_end = die
compare({given!r}, arms={ARMS[:2]!r}, seeds=1)
"""
    killed = forked.run(forked.code, script)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = tmp_path / "cut" / "LoRA-seed0" / "adapter_model.safetensors"
    assert (tmp_path / "cut" / "exact-seed0" / "checkpoint-4").is_dir()
    before = finished.stat().st_mtime_ns
    again = compare(given, arms=ARMS[:2], seeds=1)
    assert finished.stat().st_mtime_ns == before  # the finished arm is not touched
    rows = [json.loads(line) for line in (tmp_path / "cut" / "exact-seed0" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    whole = compare(settings(inputs, tmp_path / "whole", max_steps=6), arms=ARMS[:2], seeds=1)
    assert [o.eval_loss for o in again] == pytest.approx([o.eval_loss for o in whole], rel=1e-5)


def test_goes_on_without_clipping_and_keeps_no_secret(inputs: Path, tmp_path: Path) -> None:
    for token in ("hf_first", "hf_second"):  # results do not depend on the token
        given = settings(inputs, tmp_path / "out", max_grad_norm="inf", max_steps=1, hub_token=token)
        compare(given, arms=("LoRA", "exact"), seeds=1)
    assert "hf_" not in (tmp_path / "out" / "compare.json").read_text()


def test_copies_of_held_out_rows_are_not_trained_on(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_all(
        monkeypatch, "celora.studies.compare:_run", lambda arm, seed, *_: Outcome(arm, seed, 3, 1.0, None, None, 1.0)
    )
    (tmp_path / "twice.jsonl").write_text(2 * (inputs / "rows.jsonl").read_text())
    compare(settings(inputs, tmp_path / "out", data=str(tmp_path / "twice.jsonl")), arms=ARMS[:2], seeds=1)
    held_out, training = (
        (tmp_path / "out" / "data" / f"{name}.jsonl").read_text().splitlines() for name in ("held-out", "train")
    )
    assert len(held_out) == 8
    assert not set(held_out) & set(training)
    again = 72 - len(training)
    assert f"{again} rows are copies of held-out rows; they are not trained on." in capsys.readouterr().err
    (tmp_path / "same.jsonl").write_text(3 * (inputs / "rows.jsonl").read_text().splitlines(keepends=True)[0])
    with pytest.raises(CELoraError, match="no row but copies of those held out"):
        compare(settings(inputs, tmp_path / "none", data=str(tmp_path / "same.jsonl")), arms=ARMS[:2], seeds=1)


def test_given_held_out_rows(inputs: Path, tmp_path: Path) -> None:
    save_rows(tmp_path / "test.jsonl", 6)
    compare(settings(inputs, tmp_path / "out", eval_data=str(tmp_path / "test.jsonl")), arms=("LoRA", "exact"), seeds=1)
    assert not (tmp_path / "out" / "data").exists()


def test_a_mistake_before_anything_was_trained_does_not_bind_the_folder(inputs: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    good = (inputs / "rows.jsonl").read_text()
    rows.write_text(good + '{"text": null}\n')
    with pytest.raises(CELoraError, match="null"):
        compare(settings(inputs, tmp_path / "out", data=str(rows)), arms=ARMS[:2], seeds=1)
    rows.write_text(good)
    compare(settings(inputs, tmp_path / "out", data=str(rows)), arms=("LoRA", "exact"), seeds=1)


def test_a_comparison_that_is_under_way_is_left_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds even before its first run has left anything."""
    other = save_rows(tmp_path / "other.jsonl", 30)

    def meanwhile(arm: str, seed: int, *_: Any) -> Outcome:
        with pytest.raises(CELoraError, match="another run is writing to"):
            compare(settings(inputs, tmp_path / "out", data=str(other)), arms=ARMS[:2], seeds=1)
        return Outcome(arm, seed, 3, 1.0, None, None, 1.0)

    patch_all(monkeypatch, "celora.studies.compare:_run", meanwhile)
    patch_all(monkeypatch, "celora.train.report:write_report", lambda *_, **__: None)
    compare(settings(inputs, tmp_path / "out"), arms=("LoRA", "exact"), seeds=1)
    assert (
        json.loads((tmp_path / "out" / "compare.json").read_text())["given"]["data"]
        == settings(inputs, tmp_path)["data"]
    )


def test_the_first_arm_is_plain_whatever_the_settings_are_of(inputs: Path, tmp_path: Path) -> None:
    columns = {"overrides": {"*": {"estimator": "columns", "keep_ratio": 0.5, "rank": 0}}}
    with pytest.raises(CELoraError, match="overrides with estimates beside preset 'exact'"):
        compare(settings(inputs, tmp_path / "out", celora=columns), arms=("LoRA", "exact"), seeds=1)
    assert not (tmp_path / "out").exists()
    compare(settings(inputs, tmp_path / "out", celora=columns), arms=("LoRA", "paper"), seeds=1)
    estimated = [json.loads((tmp_path / "out" / f"{arm}-seed0" / "run.json").read_text()) for arm in ("LoRA", "paper")]
    assert [run["estimated_layers"] > 0 for run in estimated] == [False, True]


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, so preset fast is exact")
@pytest.mark.filterwarnings("ignore:celora. at step")  # estimates that draw from so few words are bad
def test_an_arm_in_8_bits_is_judged_on_the_original_base(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_all(monkeypatch, "celora.runtime.gate:_fastest", lambda own, *_: (own, {}))
    found = compare(settings(inputs, tmp_path / "out"), arms=("LoRA", "fast"), seeds=1)
    for o in found:
        said = json.loads((tmp_path / "out" / f"{o.arm}-seed0" / "run.json").read_text())["summary"]
        if o.arm == "fast":
            assert o.eval_loss == said["eval_base_loss"] != said["eval_loss"]
            assert o.eval_accuracy == said["eval_base_mean_token_accuracy"]
        else:
            assert (o.eval_loss, o.eval_accuracy) == (said["eval_loss"], said["eval_mean_token_accuracy"])
            assert "eval_base_loss" not in said


@pytest.mark.filterwarnings("ignore:celora. a gradient of")
def test_a_run_that_diverges_does_not_end_the_comparison(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = run.Trainer.training_step

    def spoilt(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step(self, *args, **kwargs)
        if "exact-seed1" in self.args.output_dir:
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)
        return loss

    monkeypatch.setattr(run.Trainer, "training_step", spoilt)
    found = compare(settings(inputs, tmp_path / "out"), arms=TWO, seeds=3)
    assert [o.eval_loss is None for o in found if o.arm == "exact"] == [False, True, False]
    assert not [o for o in found if o.arm == "LoRA" and o.eval_loss is None]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "exact: diverged with 1 of 3 seeds" in page


@pytest.mark.filterwarnings("ignore:celora. a gradient of")
def test_a_held_out_loss_that_is_no_number_is_divergence(inputs: Path, tmp_path: Path) -> None:
    request = settings(inputs, tmp_path / "out", learning_rate=1e30, max_grad_norm=0.0)
    found = compare(request, arms=TWO, seeds=1)
    assert [(o.eval_loss, o.eval_accuracy) for o in found] == [(None, None), (None, None)]
    assert differences(found, TWO) == {}


def test_what_stops_a_run_is_said_with_the_run(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise CELoraError("the run stopped: No space left on device")

    patch_all(monkeypatch, "celora.train.run:train", full)
    with pytest.raises(CELoraError, match="LoRA, seed 0: the run stopped: No space left"):
        compare(settings(inputs, tmp_path / "out"), arms=TWO, seeds=1)


def test_a_folder_without_a_test_split_may_be_evaluated_on_what_is_held_out(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    save_rows(tmp_path / "data" / "train.jsonl", 20)
    request = settings(inputs, tmp_path / "out", data=str(tmp_path / "data"), eval_strategy="steps", max_steps=1)
    assert len(compare(request, arms=TWO, seeds=1)) == 2


@pytest.mark.parametrize(
    ("more", "arms", "message"),
    [
        ({}, ("LoRA", "auta"), "unknown arm 'auta'; did you mean 'auto'"),
        ({}, ("LoRA",), "expected two or more different ones"),
        ({"preset": "auto"}, ARMS, "preset is not for a comparison"),
        ({"seed": 3}, ARMS, "seed is not for a comparison"),
        ({"push_to_hub": True}, ARMS, "push_to_hub is not for a comparison"),
        ({"data": "nowhere.jsonl"}, ARMS, "no such data file"),
    ],
)
def test_bad_input(inputs: Path, tmp_path: Path, more: dict[str, Any], arms: tuple[str, ...], message: str) -> None:
    with pytest.raises(CELoraError, match=message):
        compare(settings(inputs, tmp_path / "out", **more), arms=arms, seeds=1)


def test_another_comparisons_folder_is_refused(inputs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output).mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(CELoraError, match="holds something else"):
        compare(settings(inputs, output), arms=ARMS, seeds=1)
    assert (output / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    compare(settings(inputs, other), arms=("LoRA", "exact"), seeds=1)
    with pytest.raises(CELoraError, match="holds a comparison with max_steps=3, not 4"):
        compare(settings(inputs, other, max_steps=4), arms=("LoRA", "exact"), seeds=1)


def test_one_table_is_of_one_model_and_of_the_same_rows(inputs: Path, tmp_path: Path) -> None:
    model, data = save_tiny_model(tmp_path / "model"), save_rows(tmp_path / "rows.jsonl", 24)
    held_out = save_rows(tmp_path / "test.jsonl", 6)
    given = settings(inputs, tmp_path / "out", model=str(model), data=str(data), max_steps=1, eval_data=str(held_out))
    compare(given, arms=("LoRA", "exact"), seeds=1)
    for file, what in (
        (data, "data"),
        (held_out, "evaluation data"),
        (model / "config.json", "tokenizer or configura"),
    ):
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        with pytest.raises(
            CELoraError, match=rf"^the {what}.* is not what the comparison was started with; put it back"
        ):
            compare(given, arms=("exact", "paper"), seeds=1)
        file.write_bytes(before)
    compare(given, arms=("LoRA", "exact"), seeds=1)


@pytest.mark.parametrize("content", ["[]", '{"given": 3}', "{}"])
def test_a_record_edited_by_hand_is_one_line(inputs: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "compare.json").write_text(content)
    with pytest.raises(CELoraError, match=r"compare\.json is not what a comparison wrote"):
        compare(settings(inputs, tmp_path), arms=("LoRA", "exact"), seeds=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["compare.json"]


def test_command_line(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["compare", "--model", str(inputs / "model"), "--data", str(inputs / "rows.jsonl"), "--max_steps", "2"]
    given += ["--arm", "LoRA", "--arm", "exact", "--seeds", "1", "--output", str(tmp_path / "out")]
    assert cli.main(given) == 0
    printed = capsys.readouterr()
    assert "exact: held-out loss" in printed.out
    assert "Report: " in printed.out
    assert "Run 1 of 2: LoRA, seed 0\n" in printed.err
    assert "Run 2 of 2: exact, seed 0, about" in printed.err
    assert cli.main([*given, "--quiet", "--json"]) == 0
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert [o["arm"] for o in document["outcomes"]] == ["LoRA", "exact"]
    assert document["held_out_loss_difference"]["exact"]["real"] is None  # there is only one seed
    assert document["findings"][0].startswith("exact: held-out loss")
    assert printed.err == ""
    assert cli.main([*given, "--preset", "paper"]) == 2
    assert "preset is not for a comparison" in capsys.readouterr().err


def test_ctrl_c_saves_and_says_how_to_go_on(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["compare", "--model", str(inputs / "model"), "--data", str(inputs / "rows.jsonl"), "--max_steps", "3"]
    given += ["--arm", "LoRA", "--arm", "exact", "--seeds", "1", "--quiet", "--output", str(tmp_path / "out")]

    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            signal.raise_signal(signal.SIGINT)

    def press(*arguments: Any, **more: Any) -> Any:
        trainer = build(*arguments, **more)
        trainer.add_callback(PressCtrlC())
        return trainer

    build = run.build_trainer
    with monkeypatch.context() as patch:
        patch_all(patch, "celora.train.trainer:build_trainer", press)
        assert cli.main(given) == 130
    said = capsys.readouterr().err
    assert "Saved checkpoint-1" in said
    assert "To continue the whole comparison, give the same celora compare command again." in said
    assert cli.main(given) == 0
    document = json.loads((tmp_path / "out" / "LoRA-seed0" / "run.json").read_text())
    assert (document["status"], document["summary"]["step"]) == ("finished", 3)
