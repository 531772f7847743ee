"""Whole training steps with and without torch.compile (inductor): time, graphs, graph breaks, and what a refresh adds.

`python -m benchmarks.steps.compiled --arm ARM` measures plain PEFT and one arm, each eager and compiled, in turns;
without `--arm` all of them, in a process each. It needs a C++ compiler. Rows go to compiled.jsonl. inductor keeps what
it has compiled in TORCHINDUCTOR_CACHE_DIR. With an empty folder, `compile_s` is the whole cost.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import celora
from benchmarks import rows
from celora import CELoraConfig
from celora.machine.timing import percentiles, timed

PLAIN, COMPILED = "PEFT", " + compile"
REFRESH_EVERY, STEPS = 6, 14  # refreshes at steps 0, 6 and 12; the first two steps of each kind compile
HIDDEN, BLOCKS, WORDS, SEQUENCES, LENGTH = 1024, 4, 8000, 4, 256
ARMS: dict[str, Any] = {
    "exact": "exact",
    "paper": "paper",
    "columns 0.5": {"estimator": "columns", "keep_ratio": 0.5, "rank": 16},
    "tokens 0.6": {"estimator": "tokens", "keep_ratio": 0.6, "rank": 0},
    "int8 x tokens": {
        "estimator": "tokens", "keep_ratio": 0.99, "rank": 0, "selection": "energy", "precision": "int8",
    },
}  # fmt: skip


def configuration(arm: str) -> CELoraConfig:
    """The configuration of an arm, with one refresh interval for all. Arms other than presets estimate every layer."""
    asked = ARMS[arm]
    fields = CELoraConfig().to_dict() | {"fused": True} | asked if isinstance(asked, dict) else None
    config = celora.settings.presets.resolve(asked) if fields is None else CELoraConfig.from_dict(fields)
    return CELoraConfig.from_dict(config.to_dict() | {"refresh_every": REFRESH_EVERY})


class Contender:
    """A model with its optimizer, and what its steps took."""

    def __init__(self, arm: str, *, compiled: bool) -> None:
        torch.manual_seed(0)
        self.model = _model()
        if arm != PLAIN:
            celora.attach(self.model, configuration(arm))
        self.compiled = compiled
        self.run: Callable[..., Any] = functools.partial(_function(compiled=compiled), self.model)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.times: list[float] = []
        self.graphs: list[int] = []
        self.losses: list[float] = []
        self.breaks = 0

    def __call__(self, batch: dict[str, torch.Tensor]) -> None:
        """One step, timed; graphs and breaks that it added are this contender's, since no other runs meanwhile."""
        counters = torch._dynamo.utils.counters
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        self.times.append(timed(lambda: self._step(batch)))
        self.graphs.append(counters["stats"]["unique_graphs"] - graphs)
        self.breaks += sum(counters["graph_break"].values()) - breaks

    def _step(self, batch: dict[str, torch.Tensor]) -> None:
        loss = self.run(**batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())

    def row(self) -> dict[str, Any]:
        """The numbers of this contender. Usual steps are those from the third on without refreshes."""
        refreshing = range(REFRESH_EVERY, STEPS, REFRESH_EVERY)
        usual = percentiles([ms for step, ms in enumerate(self.times) if step >= 2 and step % REFRESH_EVERY])
        row: dict[str, Any] = usual | {"refresh_ms": round(min(self.times[step] for step in refreshing), 3)}
        row |= {"last_loss": round(self.losses[-1], 4)}
        if self.compiled:
            spent = sum(ms for ms, graphs in zip(self.times, self.graphs, strict=True) if graphs)
            row |= {
                "compile_s": round((spent - usual["time_ms"] * sum(map(bool, self.graphs))) / 1e3, 1),
                "graphs": sum(self.graphs[: REFRESH_EVERY + 1]),
                "graphs_added_later": sum(self.graphs[REFRESH_EVERY + 1 :]),
                "graphs_at": [step for step, graphs in enumerate(self.graphs) if graphs],
                "graph_breaks": self.breaks,
            }
        return row


def _function(*, compiled: bool) -> Callable[..., Any]:
    """A forward with code of its own.

    torch.compile finds graphs by code, and ignores hooks when it takes a graph of another model.
    """
    names: dict[str, Any] = {}
    exec("def forward(model, **batch): return model(**batch)", names)
    function: Callable[..., Any] = names["forward"]
    return torch.compile(function) if compiled else function


def _model() -> PeftModel:
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=HIDDEN * 11 // 4, num_hidden_layers=BLOCKS, vocab_size=WORDS,
        num_attention_heads=HIDDEN // 64, num_key_value_heads=HIDDEN // 64, use_cache=False,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to(torch.bfloat16)
    return get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")).train()


def measure(arm: str) -> list[dict[str, Any]]:
    """Plain PEFT and the arm, eager and compiled, in turns: a row for each."""
    contenders = {name: Contender(name, compiled=False) for name in (PLAIN, arm)}
    contenders |= {name + COMPILED: Contender(name, compiled=True) for name in (PLAIN, arm)}
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        tokens = torch.randint(0, WORDS, (SEQUENCES, LENGTH), generator=generator)
        for contender in contenders.values():
            contender({"input_ids": tokens, "labels": tokens})
    plain = statistics.median(contenders[PLAIN].times[2:])
    shared = {"hidden": HIDDEN, "blocks": BLOCKS, "words": WORDS, "tokens": SEQUENCES * LENGTH, "dtype": "bfloat16"}
    found = []
    for name, contender in contenders.items():
        row = contender.row()
        row |= {"measured_with": arm, "speed_up": round(plain / row["time_ms"], 3), "refresh_every": REFRESH_EVERY}
        found.append({"arm": name} | row | shared | rows.conditions(name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=ARMS, help="this one alone")
    asked = parser.parse_args()
    if asked.arm is None:
        for arm in ARMS:
            subprocess.run([sys.executable, "-m", "benchmarks.steps.compiled", "--arm", arm], check=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", scratch))
        cached = any(cache.glob("*"))
        found = [row | {"cached": cached} for row in measure(asked.arm)]
    rows.replace(Path(__file__).with_name("compiled.jsonl"), found, ["measured_with"])
    for row in found:
        print(json.dumps({k: v for k, v in row.items() if k in _SHOWN}))


_SHOWN = ("arm", "time_ms", "refresh_ms", "speed_up", "compile_s", "graphs_at", "graph_breaks", "last_loss")

if __name__ == "__main__":
    main()
