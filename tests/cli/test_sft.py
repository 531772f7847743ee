"""`celora sft`: the arguments of `trl sft` reach TRL's script, which runs under celora."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import trl.scripts
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from celora.cli.main import main
from forked import run, script
from tiny import save_rows, save_tiny_model
from tool_runs import check_same_training, python, said_by_celora

SCRIPT = Path(next(iter(trl.scripts.__path__))) / "sft.py"
RUN = Path(__file__).parents[2] / "src" / "celora" / "cli" / "sft_script.py"
SAID = (
    "celora: preset exact attached to LlamaForCausalLM: none of 14 frozen layers estimated, the gradient is LoRA's own."
)


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of a short run, without `--output_dir`."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save_tiny_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    save_rows(tmp_path / "data" / "rows.jsonl", 64)
    words = (
        f"--model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/data --use_peft "
        "--lora_target_modules all-linear --optim sgd --learning_rate 1.0 --lr_scheduler_type constant "
        "--per_device_train_batch_size 16 --lora_dropout 0 --max_steps 4 --logging_steps 1 --save_steps 2 "
        "--report_to none --use_cpu true --bf16 false --gradient_checkpointing false --disable_tqdm true "
        "--dataloader_pin_memory false"
    )
    return words.split()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces the launcher, which starts a new interpreter, by one that forks."""
    calls: list[Any] = []

    def launch_command(parsed: Any) -> None:
        calls.append(parsed)
        calls.append(run(script, RUN, *parsed.training_script_args))
        if status := calls[-1].returncode:
            raise subprocess.CalledProcessError(status, "python")

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    return calls


@pytest.mark.filterwarnings("ignore")
def test_trains_as_trl_does(arguments: list[str], launched: list[Any], tmp_path: Path) -> None:
    alone, exact = tmp_path / "alone", tmp_path / "exact"
    done = run(script, SCRIPT, *arguments, "--output_dir", alone)
    assert done.returncode == 0, done.stderr[-3000:]
    assert main(["sft", "--num_processes", "1", *arguments, "--output_dir", str(exact)]) == 0
    parsed, done = launched
    assert (parsed.module, parsed.training_script, parsed.num_processes) == (True, "celora.cli.sft_script", 1)
    given = ["--preset", "exact", str(SCRIPT), *arguments, "--output_dir", str(exact)]
    assert parsed.training_script_args == given
    assert said_by_celora(done) == [SAID]
    check_same_training(exact, alone)


@pytest.mark.filterwarnings("ignore")
def test_errors(arguments: list[str], launched: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--preset", "xact", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: unknown preset 'xact'; did you mean 'exact'?")
    assert main(["sft", *arguments, "--accelerate_config", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: trl sft: Accelerate config nowhere is neither a file nor")
    assert error.count("\n") == 1
    for wrong in (["--lerning_rate", "1"], ["--learning_rate", "abc"], ["--config", str(tmp_path / "nowhere")]):
        assert main(["sft", *arguments, *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: trl sft: ")
        assert error.count("\n") == 1
        assert wrong[0].strip("-") in error or wrong[1] in error
    assert launched == []
    where = arguments.index("--dataset_name") + 1
    arguments[where] = str(tmp_path / "nowhere")
    assert main(["sft", *arguments]) == 2
    (said,) = said_by_celora(launched[-1])
    assert said.startswith("error: no training with these settings: FileNotFoundError: Couldn't find any data file at")
    assert said.endswith("nowhere. (`trl sft` with the same arguments shows the traceback)")
    assert "Traceback" not in launched[-1].stderr


@pytest.mark.filterwarnings("ignore")
def test_one_of_several_processes_has_said_why(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = {0: ProcessFailure(0, 7, 2, str(Path(arguments[1]) / "no reply"))}

    def launch_command(_: Any) -> None:
        raise ChildFailedError("sft", failed)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    assert main(["sft", *arguments]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_through_the_real_launcher(arguments: list[str], tmp_path: Path) -> None:
    done = python("-m", "celora", "sft", *arguments, "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert said_by_celora(done) == [SAID]
    done = python("-m", "celora", "sft", *arguments, "--dataset_name", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert said_by_celora(done)[-1].startswith("error: no training with these settings: ")
