"""Shared by all tests: seeds, threads, and fixtures of the small model.

pytest-xdist's own process imports this file, too, and runs no test. So what only tests need is imported by fixtures.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import getpass
import importlib.metadata
import os
import tempfile
import types
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Set these before torch is imported. Processes that tests start inherit them. Two threads are slower for matrices this
# small. By default a thread that waits keeps its core busy, which makes several workers several times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Inductor's cache may return code for wide registers although torch is limited to narrow ones. Such code writes past
# the end of its buffers.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"inductor-{getpass.getuser()}-{capability}")
    )

import hypothesis
import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Set this before anything imports Triton; torch does not.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import forked
from celora.kernels.c import library as kernels
from room import with_room

if TYPE_CHECKING:
    from peft import PeftModel

_HAS_ROOM = pytest.StashKey[bool]()

# Generated input (test_input.py) in four tests: by default 300 cases in all, always the same; or 2,000 new ones.
hypothesis.settings.register_profile("ci", max_examples=75, derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=500, database=None, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture
def integers_may_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit products are not left out where torch's are a slow loop over single numbers."""
    from patching import patch_all

    patch_all(monkeypatch, "celora.kernels.plain:one_by_one", lambda: False)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse adapters for any number of tokens. Batches here are so small that celora would not fuse them."""
    monkeypatch.setattr("celora.modeling.fused._FEWEST_TOKENS", 0)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """Use `OMP_NUM_THREADS` threads, even if a plugin has imported torch before this file."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(optionalhook=True, wrapper=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One worker more than there are cores: tests that wait for processes of their own leave a core idle."""
    return (yield) + 1


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels once, and start the process that tests fork theirs from, before pytest-xdist's workers."""
    if not hasattr(config, "workerinput"):
        kernels.library()
        forks = contextlib.ExitStack()
        forks.enter_context(forked.server())
        config.add_cleanup(forks.close)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run rooms with long files first. If short files come last, the workers end at about the same time."""
    items.sort(key=lambda item: item.path.parent.name not in ("whole", "studies", "project", "numerics", "weights"))


def pytest_collection() -> None:
    """Turn off Python's garbage collector while test modules are imported: nearly everything they make stays."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let the collector look at what tests make. Freeze the half million objects from the libraries' imports."""
    gc.enable()
    gc.freeze()  # to look for garbage first takes half a second
    atexit.register(gc.unfreeze)  # nanobind's modules, such as Triton's, call whatever is frozen at the end leaked


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> object:
    """Run the usual loop, but with room."""
    if session.stash.setdefault(_HAS_ROOM, False):
        return None
    session.stash[_HAS_ROOM] = True
    return with_room(session.config.hook.pytest_runtestloop, session=session)


@pytest.fixture(autouse=True, scope="module")
def _no_collecting_what_stays() -> Iterator[None]:
    """Freeze what a file's tests imported and cached: libraries call the collector often, and it would look at all."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_seeds_for_devices_that_are_not_there() -> Iterator[None]:
    """Without a GPU, every `torch.manual_seed` spends a millisecond on recording a stack trace for later."""
    with pytest.MonkeyPatch.context() as patch:
        for device in (torch.cuda, torch.mtia, torch.xpu):
            if not device.is_available():
                patch.setattr(
                    device, "manual_seed_all", lambda seed: None, raising=False
                )  # torch 2.8 has none for mtia
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_reading_what_was_read() -> Iterator[None]:
    """accelerate reads the metadata of three packages from disk several times in every step of a Trainer. Cache it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "metadata", functools.cache(importlib.metadata.metadata))
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_compiling_what_was_compiled() -> Iterator[None]:
    """PEFT compiles the template of its model card whenever an adapter is saved. Compile each template once."""
    import jinja2

    compiled, known = jinja2.Environment.compile, {}

    def once(environment: Any, source: Any, *args: Any, **more: Any) -> Any:
        key = environment, source, args, tuple(more.items())
        if not isinstance(source, str):
            return compiled(*key[:2], *args, **more)
        if key not in known:
            known[key] = compiled(environment, source, *args, **more)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2.Environment, "compile", once)
        yield


@pytest.fixture(autouse=True, scope="session")
def _nobody_else_on_this_machine() -> Iterator[None]:
    """Other workers keep the processors busy. What depends on that would depend on chance."""
    from celora.machine import timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "psutil", types.SimpleNamespace(cpu_percent=lambda seconds, percpu: [0.0] * 1024))
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Times that are measured beside other tests do not stay in the user's cache, and none there decides a test."""
    from celora.machine import cache

    def folder(name: str) -> Path:
        users = (Path.home(), os.environ.get("XDG_CACHE_HOME")) == home
        return measured if users and name == cache._MEASURED else cache_folder(name)

    measured, cache_folder = tmp_path_factory.mktemp("measured"), cache.cache_folder
    home = Path.home(), os.environ.get("XDG_CACHE_HOME")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "cache_folder", folder)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Skip flushes to disk: a test's files need not survive a power cut. `disk` still sees every flush."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """If all tests passed, drop what pytest-xdist's workers wrote outside tests: warnings of imports."""
    if exitstatus == 0:
        session.config.pluginmanager.getplugin("capturemanager").read_global_capture()


@pytest.fixture(scope="session")
def real_assets() -> None:
    """The demo's model and sentences. The first worker that needs them prepares them; the others wait."""
    from filelock import FileLock

    from celora.studies import assets

    folder = assets.assets_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".tests.lock"):
        assets.demo_model()
        assets.movie_reviews()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tiny model and rows for `celora train`. Tests that change a file copy it first."""
    from tiny import save_rows, save_tiny_model

    folder = tmp_path_factory.mktemp("inputs")
    return {"model": str(save_tiny_model(folder / "model")), "data": str(save_rows(folder / "rows.jsonl"))}


@pytest.fixture(scope="session")
def finished(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, str, Any]:
    """A run of six steps that ended well: its folder, its result, what it printed, and its model."""
    from runs import go, on_build

    output, trainers = tmp_path_factory.mktemp("finished") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        on_build(patch, trainers.append)
        result, text = go(inputs, output, eval_data=inputs["data"])
    return output, result, text, trainers[0].model


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record every flush to disk and every rename, in order, each with its inode number."""
    seen: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        seen.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def renamed(source: Any, target: Any) -> None:
        seen.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    return seen


@pytest.fixture
def model() -> PeftModel:
    from small import make_model

    return make_model()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    from small import make_batch

    return make_batch(0)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of a user whose cache is `home/.cache`. Tests may let other users write to the folder around it."""
    if not hasattr(os, "getuid"):
        pytest.skip("Windows keeps a user's folder for the user")
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return home
