"""Whole runs that meet a full disk, a read-only folder and damaged checkpoints: one line says how to continue."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from rich.console import Console
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState
from trl import SFTTrainer

from celora.errors import CELoraError
from celora.train import trainer as trainer_module
from celora.train.live import look
from celora.train.output.manifest import MANIFEST
from celora.train.output.saving import find_best
from celora.train.progress import read_metrics
from celora.train.request.arguments import parse
from celora.train.run import train
from patching import patch_all
from runs import PressCtrlC, adapter, go, on_build
from small import written_whole
from tiny import save_rows, save_tiny_model
from unprivileged import as_nobody, public_folder

resource = pytest.importorskip("resource")


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    go(inputs, output)
    return adapter(output)


def resume(output):
    console = Console(file=io.StringIO(), width=300)
    return train(parse([], {"output": str(output), "resume": True}), console=console), console.file.getvalue()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class FullDisk(TrainerCallback):
    """From step 4 on, no file may grow beyond `size()` bytes. For this process that is like a full disk."""

    def __init__(self, size):
        self.size = size

    def on_step_begin(self, args, state, control, **kw):
        if state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size(), resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def unlimited():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("too_large", ["metrics.jsonl", "adapter_model.safetensors", "optimizer.pt"])
def test_a_full_disk_stops_the_run_and_resume_goes_on(too_large, inputs, whole, tmp_path, monkeypatch, unlimited):
    output = tmp_path / "out"
    file = output / (too_large if too_large == "metrics.jsonl" else f"checkpoint-3/{too_large}")
    full = FullDisk(lambda: file.stat().st_size - (0 if too_large == "metrics.jsonl" else 100))
    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(full))
        with pytest.raises(
            CELoraError, match=r"^the run stopped: .*Checkpoint-3 is whole: .*--resume goes on"
        ) as caught:
            go(inputs, output)
    assert "\n" not in str(caught.value)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    result, text = resume(output)
    assert (result.status, result.step) == ("finished", 6)
    assert "Resuming from checkpoint-3" in text
    assert same(adapter(output), whole)
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def fill_by_tokenizers(patch):
    to_full = lambda tokenizer, *_, **__: tokenizer.backend_tokenizer.save("/dev/full")  # noqa: E731
    patch.setattr(PreTrainedTokenizerBase, "save_pretrained", to_full)


def fill_by_torch(patch):
    save = torch.save
    patch.setattr(torch, "save", lambda what, where, **more: save(what, "/dev/full", **more))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("fill", [fill_by_tokenizers, fill_by_torch])
@pytest.mark.parametrize("moment", ["on_step_end", "on_train_end"])  # in a checkpoint, and in the finished adapter
def test_a_full_disk_is_said_whoever_writes(moment, fill, inputs, tmp_path, monkeypatch):
    class Fills(TrainerCallback):
        pass

    setattr(Fills, moment, lambda *_, **__: fill(monkeypatch))
    on_build(monkeypatch, lambda trainer: trainer.add_callback(Fills()))
    with pytest.raises(CELoraError, match=r"^the run stopped: .*(No space left|iostream error|inline_container)"):
        go(inputs, tmp_path / "out")


@pytest.mark.parametrize(
    "error", [RuntimeError(), torch.OutOfMemoryError("CUDA out of memory"), dist.DistError("gone")]
)
def test_what_is_not_the_disk_s_fault_keeps_its_name(error, inputs, tmp_path, monkeypatch):
    """The command line has a line for lack of memory and for other processes. It calls everything else a bug."""
    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", raising(error))
    with pytest.raises(type(error)) as caught:
        go(inputs, tmp_path / "out")
    assert caught.value is error


def raising(error):
    def save(*_, **__):
        raise error

    return save


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("name", "damage"),
    [("optimizer.pt", flip), ("adapter_model.safetensors", cut), ("trainer_state.json", os.unlink), (MANIFEST, flip)],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(name, damage, inputs, whole, tmp_path):
    output = tmp_path / "out"
    interrupted(inputs, output)
    damage(output / "checkpoint-4" / name)
    result, text = resume(output)
    assert f"checkpoint-4 is damaged: {name}" in text.replace(str(output / "checkpoint-4") + "/", "")
    assert "Resuming from checkpoint-2." in text
    assert result.status == "finished"
    assert same(adapter(output), whole)
    assert (output / "checkpoint-4.damaged").is_dir()


def test_without_a_whole_checkpoint_the_run_begins_again(inputs, whole, tmp_path):
    output = tmp_path / "out"
    interrupted(inputs, output)
    for checkpoint in output.glob("checkpoint-*"):
        cut(checkpoint / "scheduler.pt")
    result, text = resume(output)
    assert text.count("scheduler.pt is not what was saved") == 2
    assert "Resuming from the beginning: there is no checkpoint to go on from." in text
    assert result.status == "finished"
    assert same(adapter(output), whole)


def interrupted(inputs, output):
    """A run that was stopped before its end, with whole checkpoints 2 and 4."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step == 4:
                raise OSError("stop here")

    with pytest.MonkeyPatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(Stop()))
        with pytest.raises(CELoraError, match="Checkpoint-4 is whole"):
            go(inputs, output, save_steps=2)


@pytest.mark.parametrize("where", ["no such place", "read-only"])
def test_a_folder_that_cannot_be_written_to(where):
    with public_folder() as folder:
        given = {"model": str(save_tiny_model(folder / "model")), "data": str(save_rows(folder / "rows.jsonl"))}
        output = folder / "rows.jsonl" / "out" if where == "no such place" else folder
        error = as_nobody(lambda: go(given, output))
    assert isinstance(error, CELoraError)
    assert "cannot write to --output" in str(error)


@pytest.mark.parametrize(
    "length", [{}, {"max_steps": -1, "num_train_epochs": 0.4}], ids=["steps", "a part of an epoch"]
)
def test_a_run_killed_between_its_last_checkpoint_and_its_end(length, inputs, whole, tmp_path, monkeypatch):
    """Nothing is left to train. With a limit of one checkpoint, one is always there."""
    steps = 6
    if length:  # 2.4 of 6 steps, which are 3
        go(inputs, tmp_path / "whole", **length)
        whole, steps = adapter(tmp_path / "whole"), 3
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch_all(patch, "celora.train.output.saving:save_adapter", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(inputs, output, save_total_limit=1, **length)
    assert not (output / "adapter_model.safetensors").exists()
    assert [path.name for path in output.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    assert look(output).steps == steps
    result, _ = resume(output)
    assert (result.status, result.step) == ("finished", steps)
    assert same(adapter(output), whole)


def test_an_adapter_is_on_the_disk_before_it_takes_the_place_of_another(inputs, tmp_path, disk):
    output = tmp_path / "out"
    go(inputs, output, max_steps=1, save_strategy="no")
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"):
        flushed, renamed, named = written_whole(output / name)
        at = disk.index(renamed)
        assert disk[at - 1] == flushed
    assert disk[at + 1] == named  # after the last checkpoint, before anything else is written


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(inputs, tmp_path, monkeypatch, capfd):
    """The first evaluation is the best, and nothing else is saved but the step at which the run is stopped."""
    best = {"save_strategy": "best", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    best |= {"greater_is_better": True, "eval_strategy": "steps", "eval_steps": 2, "eval_data": inputs["data"]}
    go(inputs, tmp_path / "whole", **best, learning_rate=1e-2)
    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(PressCtrlC(after=4)))
        assert go(inputs, tmp_path / "first", **best, learning_rate=1e-2)[0].status == "interrupted"
    (tmp_path / "first").rename(tmp_path / "moved")
    assert resume(tmp_path / "moved")[0].status == "finished"
    assert same(adapter(tmp_path / "moved"), adapter(tmp_path / "whole"))
    assert not same(adapter(tmp_path / "moved"), load_file(tmp_path / "moved/checkpoint-5/adapter_model.safetensors"))
    assert "does not exist anymore" not in capfd.readouterr().err


def test_the_best_checkpoint_is_the_one_that_was_saved_before_the_best_evaluation(tmp_path):
    """Steps may be evaluated and not saved. Trainer forgets a path that is gone."""
    checkpoint = tmp_path / "checkpoint-8"
    checkpoint.mkdir()
    (tmp_path / "checkpoint-4").mkdir()
    saved = TrainerState(best_global_step=6, best_model_checkpoint="/elsewhere/checkpoint-4")
    saved.save_to_json(str(checkpoint / "trainer_state.json"))
    state = TrainerState(best_global_step=6)
    find_best(state, checkpoint)
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4").rmdir()
    with pytest.warns(
        UserWarning, match="checkpoint-4, the best checkpoint so far, is not there; only a better one can be loaded"
    ):
        find_best(state, checkpoint)
    assert state.best_model_checkpoint is None


@pytest.mark.parametrize("after", [2, 3])
def test_a_run_that_found_a_smaller_batch_is_resumed_to_its_end(after, inputs, tmp_path, monkeypatch):
    """Half of the batch makes twice as many steps. Ctrl-C where the given batch would end, and after that."""
    own = {"max_steps": -1, "num_train_epochs": 0.4, "per_device_train_batch_size": 4, "auto_find_batch_size": True}
    step = trainer_module.Trainer.training_step

    def too_large(self, model, given, *rest):
        if len(given["input_ids"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return step(self, model, given, *rest)

    monkeypatch.setattr(trainer_module.Trainer, "training_step", too_large)
    with monkeypatch.context() as patch:
        on_build(patch, lambda trainer: trainer.add_callback(PressCtrlC(after=after)))
        assert go(inputs, tmp_path, **own)[0].status == "interrupted"
    assert (look(tmp_path).step, look(tmp_path).steps) == (after + 1, 5)
    result, _ = resume(tmp_path)
    assert (result.status, result.step) == ("finished", 5)


def test_nothing_pickled_is_written_only_to_be_looked_at(inputs, tmp_path):
    go(inputs, tmp_path / "out", max_steps=3)
    assert not list((tmp_path / "out").rglob("training_args.bin"))


def test_a_tokenizer_with_several_chat_templates_is_saved_again(inputs, tmp_path, monkeypatch):
    def two(trainer):
        template = trainer.processing_class.chat_template
        trainer.processing_class.chat_template = {"default": template, "tools": template}

    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        on_build(patch, two)
        go(inputs, output, max_steps=1)
        assert go(inputs, output, max_steps=2, resume=True)[0].status == "finished"
        assert (output / "additional_chat_templates" / "tools.jinja").is_file()
    go(inputs, output, max_steps=1, overwrite=True)
    assert not (output / "additional_chat_templates").exists()


def test_only_the_finished_adapter_is_uploaded(inputs, tmp_path, monkeypatch):
    uploads = []

    def upload(api, *, repo_id, folder_path, token, ignore_patterns, **_):
        assert (repo_id, token) == ("me/out", "hf_secret")
        files = [path for path in folder_path.rglob("*") if path.is_file()]
        names = (path.relative_to(folder_path).as_posix() for path in files)
        uploads.append(set(filter_repo_objects(names, ignore_patterns=ignore_patterns)))

    monkeypatch.setattr(SFTTrainer, "init_hf_repo", lambda self, *_: setattr(self, "hub_model_id", "me/out"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    output = tmp_path / "out"
    go(inputs, output, max_steps=1)
    assert not uploads
    go(inputs, output, max_steps=2, save_steps=1, overwrite=True, push_to_hub=True, hub_token="hf_secret")
    (names,) = uploads
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= names
    assert not [name for name in names if name.startswith((".", "_", "checkpoint-")) or name == "training_args.bin"]
    assert {"run.json", "report.html"}.isdisjoint(names)
    mine = names - {"adapter_config.json"}  # PEFT's, which names the base model
    assert not [name for name in mine if str(output).encode() in (output / name).read_bytes()]
    with pytest.raises(CELoraError, match="hub_strategy='every_save' is refused: checkpoints stay here"):
        go(inputs, output, hub_strategy="every_save", push_to_hub=True)


def test_damaged_metrics_are_said(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"st\xffep": 2}\n[3]\n{"step": 4}\n{"ste')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:[23]: not a metrics row; it is left out"):
        assert [row["step"] for row in read_metrics(file)] == [1, 4]
