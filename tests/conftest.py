"""Shared by all tests: seeds, threads, and a Llama small enough to train in milliseconds."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported, and for the processes that tests start: matrices this small are slower on two threads, and
# far slower where tests run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Inductor's cache hands out what was compiled for wide registers where torch is kept to narrow ones, which then writes
# past the end of its buffers.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"inductor-{getpass.getuser()}-{capability}")
    )

import hypothesis
import pytest
import torch
from filelock import FileLock
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from celora import CELoraConfig
from celora.kernels.c import library as kernels
from celora.studies import assets
from patching import patch_all

# Generated input (test_input.py): four tests, so 300 cases in all, the same every time, or 2,000 new ones.
hypothesis.settings.register_profile("ci", max_examples=75, derandomize=True, database=None, deadline=None)
hypothesis.settings.register_profile("nightly", max_examples=500, database=None, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches here are so small that adapters would not be fused."""
    patch_all(monkeypatch, "celora.modeling.fused:_FEWEST_TOKENS", 0)


@pytest.fixture(autouse=True, scope="session")
def _threads() -> None:
    """As many as `OMP_NUM_THREADS` says, also where a plugin has imported torch before this file could set it."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config: pytest.Config) -> None:
    """Compile the kernels once, before pytest-xdist starts its workers, each of which would."""
    if not hasattr(config, "workerinput"):
        kernels.library()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Drop what pytest-xdist's workers wrote outside tests, warnings of imports, unless it may explain a failure."""
    if exitstatus == 0:
        session.config.pluginmanager.getplugin("capturemanager").read_global_capture()


@pytest.fixture(scope="session")
def real_assets() -> None:
    """The demo's model and sentences, prepared by the first worker that needs them while the others wait."""
    folder = assets.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".tests.lock"):
        assets.demo_model()
        assets.movie_reviews()


# One of each kind that the family has.
MEMBERS = {
    "int8": CELoraConfig(estimator="int8", refresh_every=3),
    "int8, no copy": CELoraConfig(estimator="int8", weight_copy=False, refresh_every=3),
    "tokens by energy": CELoraConfig(estimator="tokens", keep_ratio=0.95, rank=0, selection="energy", refresh_every=3),
    "int8 x tokens": CELoraConfig(
        estimator="tokens", keep_ratio=0.95, rank=0, selection="energy", precision="int8", refresh_every=3
    ),
    "tokens and a gradient factor": CELoraConfig(
        estimator="tokens", keep_ratio=0.5, rank=4, factor="gradient", refresh_every=3
    ),
    "sampled tokens": CELoraConfig(estimator="tokens", keep_ratio=0.8, rank=0, selection="sampled", refresh_every=3),
    "int8 x columns": CELoraConfig(keep_ratio=0.5, rank=4, precision="int8", refresh_every=3),
    "columns by energy": CELoraConfig(keep_ratio=0.9, rank=4, selection="energy", refresh_every=3),
    "sampled columns": CELoraConfig(keep_ratio=0.8, rank=4, selection="sampled", refresh_every=3),
    "controlled": CELoraConfig(
        estimator="tokens", keep_ratio=0.5, rank=0, selection="energy", target_error=0.1, refresh_every=3
    ),
    "spread": CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3, spread=True),
}


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is flushed to the disk and what takes another name, in order, by the number of its inode."""
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


def written_whole(file: Path) -> list[tuple[str, int]]:
    """What the disk must see of a file that is to be there whole or not at all, whenever the power fails."""
    number = file.stat().st_ino
    return [("fsync", number), ("replace", number), ("fsync", file.parent.stat().st_ino)]


def make_base(
    *, seed: int = 0, layers: int = 2, base_bias: bool = False, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A small Llama; the same weights for the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        attention_bias=base_bias,
        mlp_bias=base_bias,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def make_model(*, seed: int = 0, base_bias: bool = False, dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    """The same with LoRA on all linear layers."""
    lora = {"r": 8, "target_modules": "all-linear", "init_lora_weights": False, **lora}
    return get_peft_model(make_base(seed=seed, base_bias=base_bias, dtype=dtype), LoraConfig(**lora))


@pytest.fixture
def model() -> PeftModel:
    return make_model()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return make_batch(0)


def make_batch(seed: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens.clone()}


def train(
    model: PeftModel,
    steps: int,
    *,
    first: int = 0,
    accumulate: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    between: Callable[[], object] = lambda: None,
) -> torch.optim.Optimizer:
    """A bare PyTorch loop over deterministic batches, as a user would write it."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(first, first + steps):
        for micro in range(accumulate):
            model(**make_batch(1000 * step + micro)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        between()
    return optimizer


def adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
