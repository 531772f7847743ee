"""The output folder: its lock, and what remains if a run is killed while it replaces another one."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
from filelock import FileLock

from celora.errors import CELoraError
from celora.files import clear, write_json
from celora.train.output.folder import LOCK, RUN, OutputFolder
from celora.train.output.manifest import seal
from patching import patch_all
from unprivileged import as_nobody, public_folder


@pytest.fixture
def folder(tmp_path):
    write_json(tmp_path / RUN, {"celora": "0", "run": "earlier"})
    (tmp_path / "metrics.jsonl").write_text("")
    return OutputFolder(tmp_path)


def checkpoint(folder, step, *, resumable=True):
    path = folder.path / f"checkpoint-{step}"
    path.mkdir()
    (path / "weights").write_text(str(step))
    seal(path, {"step": step, "seconds": 0.0, "resumable": resumable})
    return path


def names(folder):
    return sorted(entry.name for entry in folder.path.iterdir())


def killed_after(times, act):
    """`act`, until it has been called so often: the next call ends the process."""
    done = itertools.count()

    def call(*arguments):
        if next(done) == times:
            raise KeyboardInterrupt
        return act(*arguments)

    return call


HOLD = (
    "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); "
    "time.sleep(60)"
)


def test_only_what_a_run_writes_is_taken_away(folder):
    for name in ("notes.tmp", ".mine.tmp", ".metrics.jsonl.tmp", "adapter_model.safetensors"):
        (folder.path / name).write_text("")
    folder.set_aside()
    assert names(folder) == [".mine.tmp", ".replaced", "notes.tmp"]


def test_a_run_that_was_killed_before_it_began_may_begin(tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / f".{RUN}.tmp").touch()
    (tmp_path / "runs").mkdir()  # TensorBoard's, of a run whose first step failed
    OutputFolder(tmp_path).check(resume=False, overwrite=False)


def test_a_link_to_nowhere_is_no_folder(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(CELoraError, match="it is a link to what is not there"):
        OutputFolder(tmp_path / "out").check(resume=False, overwrite=False)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_one_run_at_a_time_and_the_dead_hold_nothing(folder):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder.path / LOCK)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(CELoraError, match="another run is writing to --output"), folder.locked():
            pass
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with folder.locked(), pytest.raises(CELoraError, match="another run"), folder.locked():
        pass
    with folder.locked():
        assert LOCK in names(folder)


def test_processes_of_one_run_share_its_lock(folder, monkeypatch):
    with folder.locked():
        monkeypatch.setenv("RANK", "1")
        with folder.locked():
            pass


@pytest.mark.parametrize("moves", range(3))
def test_a_killed_overwrite_gives_the_earlier_run_back(folder, moves, monkeypatch):
    checkpoint(folder, 3)
    before = names(folder)
    with monkeypatch.context() as patch:
        patch.setattr(type(folder.path), "rename", killed_after(moves, type(folder.path).rename))
        with pytest.raises(KeyboardInterrupt):
            folder.set_aside()
    assert folder.resumable()["run"] == "earlier"
    assert {*names(folder)} - {LOCK} == {*before}  # older filelocks remove the file

    folder.set_aside()  # this time it ends, and the process is killed after it
    assert folder.run() is None
    assert folder.resumable()["run"] == "earlier"
    folder.set_aside()
    write_json(folder.path / RUN, {"celora": "0", "run": "new"})
    assert folder.resumable()["run"] == "new"  # the new run has begun
    folder.restore()
    assert folder.run()["run"] == "earlier"
    assert {*names(folder)} - {LOCK} == {*before}


@pytest.mark.parametrize("removed", range(4))
def test_a_killed_overwrite_does_not_mix_two_runs(folder, removed, monkeypatch):
    """The order is that of `clear`, which a file system may list in any order."""
    (folder.path / "adapter_config.json").write_text("earlier")
    (folder.path / "report.html").write_text("earlier")
    folder.set_aside()
    write_json(folder.path / RUN, {"celora": "0", "run": "new"})
    after = names(folder)
    with monkeypatch.context() as patch:
        patch_all(patch, "celora.train.output.folder:clear", killed_after(removed, clear))
        with pytest.raises(KeyboardInterrupt):
            folder.forget_earlier()
    assert folder.resumable()["run"] == "new"
    assert {*names(folder), ".replaced"} - {LOCK} == {*after} - {LOCK}
    folder.set_aside()
    assert folder.resumable()["run"] == "new"


def test_a_part_of_an_earlier_run_that_cannot_be_removed_stays(folder, monkeypatch):
    (folder.path / "report.html").write_text("earlier")
    folder.set_aside()
    write_json(folder.path / RUN, {"celora": "0", "run": "new"})

    def one_is_busy(path):
        if path.name == "metrics.jsonl":
            raise OSError("busy")
        clear(path)

    patch_all(monkeypatch, "celora.train.output.folder:clear", one_is_busy)
    folder.forget_earlier()
    assert sorted(entry.name for entry in (folder.path / ".replaced").iterdir()) == ["metrics.jsonl", RUN]
    assert folder.resumable()["run"] == "new"


def test_what_others_call_replaced_is_not_brought_back(folder):
    """Nobody else's files move, and neither does a link among ours."""
    folder.set_aside()
    aside = folder.path / ".replaced"
    (aside / "README.md").symlink_to(folder.path)
    (aside / "notes").mkdir()
    folder.recover()
    assert names(folder) == [".replaced", "metrics.jsonl", RUN]
    assert sorted(entry.name for entry in aside.iterdir()) == ["README.md", "notes"]
    (folder.path / RUN).unlink()
    (aside / ".run.json.tmp").write_text("")
    with pytest.raises(CELoraError, match="nothing to resume"):
        folder.resumable()
    assert (aside / ".run.json.tmp").exists()


def test_other_processes_read_while_the_first_brings_the_run_back(folder, monkeypatch):
    folder.set_aside()
    with monkeypatch.context() as patch:
        patch.setenv("RANK", "1")
        before = names(folder)
        assert folder.resumable()["run"] == "earlier"
        assert names(folder) == before
    folder.recover()
    monkeypatch.setenv("RANK", "1")
    assert folder.resumable()["run"] == "earlier"


def test_the_newest_whole_checkpoint_is_taken_and_others_make_way(folder):
    for step in (2, 9, 30, 100):
        checkpoint(folder, step)
    checkpoint(folder, 120, resumable=False)
    (folder.path / "checkpoint-100" / "weights").write_text("100?")
    (folder.path / "checkpoint-110").mkdir()
    (folder.path / "checkpoint-130").symlink_to(folder.path / "checkpoint-9")
    said = []
    path, manifest = folder.last_checkpoint(said.append)
    assert (path.name, manifest["step"]) == ("checkpoint-30", 30)
    assert said == [
        "checkpoint-120 holds the adapter alone (save_only_model).",
        "checkpoint-110 was not saved to its end.",
        "checkpoint-100 is damaged: weights is not what was saved (its checksum differs).",
    ]
    for _ in range(2):
        folder.clear_after(30)
        kept = ["checkpoint-100.damaged", "checkpoint-120", "checkpoint-130", "checkpoint-2", "checkpoint-30"]
        assert [name for name in names(folder) if name.startswith("checkpoint")] == [*kept, "checkpoint-9"]
        assert folder.last_checkpoint() == (path, manifest)
        checkpoint(folder, 100).joinpath("weights").unlink()


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [1, 2, 3, 4]),
        (0, None, [1, 2, 3, 4]),
        (2, None, [3, 4]),
        (1, None, [4]),
        (2, 1, [1, 4]),
        (1, 2, [2, 4]),
    ],
)
def test_only_whole_checkpoints_count_and_the_best_stays(folder, limit, best, left):
    for step in (1, 2, 3, 4):
        checkpoint(folder, step)
    (folder.path / "checkpoint-5").mkdir()
    folder.keep_last(limit, {"checkpoint-4", f"checkpoint-{best}"})
    assert [int(name[11:]) for name in names(folder) if name.startswith("checkpoint-")] == [*left, 5]


def test_an_old_checkpoint_that_something_is_reading_stays_and_does_not_count(folder, monkeypatch):
    """Windows removes no file that is open, for example in a virus scanner."""
    for step in (1, 2):
        checkpoint(folder, step)

    def refuses(*_, **__):
        raise PermissionError(errno.EACCES, "The process cannot access the file")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuses)
        folder.keep_last(1, set())
    assert (folder.path / "checkpoint-1").is_dir()
    (folder.path / "checkpoint-2").rename(folder.path / "elsewhere")
    assert folder.last_checkpoint() is None
    folder.clear_after(0)
    assert not (folder.path / "checkpoint-1").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_is_only_read_counts_as_in_use(folder, number, monkeypatch):
    def refuses(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refuses)
    assert folder.in_use()


def test_a_damaged_record_is_said(folder):
    (folder.path / RUN).write_text('{"celora": ')
    for attempt in (folder.resumable, lambda: folder.check(resume=False, overwrite=True)):
        with pytest.raises(CELoraError, match=r"run\.json:1: not JSON.* Its checkpoints can be used without it"):
            attempt()


@pytest.mark.parametrize(
    ("mode", "attempt"),
    [
        (0o300, lambda folder: folder.check(resume=False, overwrite=True)),
        (0o600, lambda folder: folder.begun),
        (0o600, OutputFolder.resumable),
        (0o500, OutputFolder.set_aside),
        (0o500, lambda folder: folder.clear_after(0)),
        (0o500, OutputFolder.restore),
    ],
)
def test_rights_that_are_missing_are_one_line(mode, attempt):
    with public_folder() as path:
        folder = OutputFolder(path)
        write_json(path / RUN, {"celora": "0"})
        (path / "checkpoint-3").mkdir()
        path.chmod(mode | mode >> 3 | mode >> 6)
        try:
            error = as_nobody(lambda: attempt(folder))
        finally:
            path.chmod(0o755)
        assert isinstance(error, CELoraError)
        assert str(error).startswith(f"cannot write to --output {str(path)!r}: ")
        assert names(folder) == ["checkpoint-3", RUN]


def test_a_run_json_of_others_is_not_ours(folder):
    (folder.path / RUN).write_text(json.dumps(["not", "ours"]))
    with pytest.raises(CELoraError, match="holds files that are not from a run of celora"):
        folder.check(resume=False, overwrite=True)
