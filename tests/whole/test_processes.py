"""`celora train` in two processes, under torchrun and `accelerate launch`."""

from __future__ import annotations

import io
import json
import os
import socket
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from celora.cli.main import main
from celora.train import processes
from celora.train.progress import read_metrics
from celora.train.request.arguments import parse
from celora.train.run import train
from forked import accelerate_launch, code, run, torchrun
from patching import patch_all
from tiny import save_rows, save_tiny_model
from train_worker import COLUMNS, USUAL

# Two processes add up what one process computes at once; see test_distributed.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_tiny_model(folder / "model")
    save_rows(folder / "rows.jsonl")
    done = torchrun(Path(__file__).parents[1] / "helpers" / "train_worker.py", folder, ahead="train_worker")
    return folder, done


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]


def test_the_first_process_writes_and_prints_for_all(ran):
    folder, done = ran
    said = done.stdout + done.stderr
    assert said.count("14 of 14 frozen layers estimated") == 3  # once for each run with columns
    assert done.stdout.count(f"finished: step 6  loss {losses(folder / 'whole')[-1]:.4f}") == 1
    assert "find_unused_parameters" not in said
    rows = read_metrics(folder / "whole" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert rows[-1]["eval_loss"] > 0
    assert (folder / "whole" / "adapter_model.safetensors").is_file()
    assert json.loads((folder / "whole" / "run.json").read_text())["status"] == "finished"


def test_two_processes_train_as_one_with_the_same_batch(ran, tmp_path):
    folder, _ = ran
    own = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl"), "output": str(tmp_path / "one")}
    train(parse([*USUAL, "--per_device_train_batch_size", "4", "--celora", COLUMNS], own), console=silent())
    assert losses(folder / "whole") == pytest.approx(losses(tmp_path / "one"), abs=TOLERANCE)
    two, one = (read_metrics(f / "metrics.jsonl")[5]["tokens_seen"] for f in (folder / "whole", tmp_path / "one"))
    assert two == one


def test_exact_trains_as_one_process_whatever_each_has_to_learn_from(ran, tmp_path):
    """Losses are means over all processes' labels. One process has more labels than the other."""
    folder, _ = ran
    first, second = (json.loads((folder / f"exact.{rank}.json").read_text()) for rank in range(2))
    assert first["labels"] != second["labels"]
    own = {"model": str(folder / "model"), "data": str(folder / "rows.jsonl"), "output": str(tmp_path / "one")}
    train(parse([*USUAL, "--per_device_train_batch_size", "4", "--preset", "exact"], own), console=silent())
    assert losses(folder / "exact") == pytest.approx(losses(tmp_path / "one"), abs=TOLERANCE)


def silent() -> Console:
    return Console(file=io.StringIO())


def test_what_is_timed_holds_for_all(ran):
    folder, _ = ran
    first, second = (json.loads((folder / f"auto.{rank}.json").read_text()) for rank in range(2))
    assert (first["report"], first["config"]) == (second["report"], second["config"])
    assert len(losses(folder / "auto")) == 2


def test_bad_input_is_one_line_from_all_processes(ran):
    folder, done = ran
    lines = [line for line in done.stderr.splitlines() if "nowhere.jsonl" in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: no such data file")
    assert not (folder / "bad").exists()


def test_a_signal_to_one_process_stops_all_at_the_same_step(ran):
    folder, done = ran
    assert (folder / "stopped" / "checkpoint-2" / "celora_run.json").is_file()
    assert done.stderr.count("Saved checkpoint-2; continue with") == 1
    assert json.loads((folder / "stopped" / "run.json").read_text())["status"] == "interrupted"


def test_a_killed_process_ends_the_job_in_one_line_and_the_job_resumes(ran):
    folder, done = ran
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "process 0 of 2 lost contact with the others" in lines[-1]
    assert "--resume" in lines[-1]
    assert not any("Traceback" in line and "rank" in line for line in done.stderr.splitlines())

    # On a CPU, --multi_gpu only chooses accelerate's launcher for several processes.
    launch = ["--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    resumed = accelerate_launch(*launch, "-m", "celora", "train", "--output", folder / "killed", "--resume")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert resumed.stderr.count("Resuming from checkpoint-3.") == 1
    whole, parts = (load_file(folder / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all((whole[name] == parts[name]).all() for name in whole)
    assert losses(folder / "killed") == losses(folder / "whole")


def test_one_of_several_processes_leaves_without_waiting_for_threads():
    """This thread never ends, and gloo's threads may abort finished work.

    Functions registered for the exit run first.
    """
    script = (
        "import atexit, runpy, sys, threading; atexit.register(print, 'done');"
        "threading.Thread(target=threading.Event().wait).start();"
        "sys.argv = ['celora', 'train']; runpy.run_module('celora', run_name='__main__')"
    )
    several = os.environ | {"WORLD_SIZE": "2", "RANK": "0"}
    left = run(code, script, environment=several, timeout=120)
    assert left.returncode == 2
    assert "error: --model and --data and --output are missing" in left.stderr
    assert left.stdout == "done\n"


def test_a_launcher_that_answers_nothing_silences_nobody(monkeypatch):
    """The launcher accepts the connection and is frozen. The store's own time limit does not help then."""
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        for name, value in (("WORLD_SIZE", 2), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", frozen.getsockname()[1])):
            monkeypatch.setenv(name, str(value))
        patch_all(monkeypatch, "celora.train.processes:_PATIENCE_S", 0.2)
        assert processes.speaks()


def test_other_commands_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    patch_all(monkeypatch, "celora.train.processes:speaks", lambda: True)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "error: celora demo was started in 2 processes; it runs in one\n"
