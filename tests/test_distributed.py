"""Two processes that train together: DDP and FSDP2 over gloo, in one run of torchrun that all tests here share."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import celora
from conftest import make_model
from distributed_worker import COLUMNS, SCENARIOS, STEPS, configuration, global_batch

# One process sums a gradient over eight rows, two sum it over four each: float32 rounding, amplified by Adam, whose
# step is as large for a small gradient as for a large one.
TOLERANCE = 2e-5


def torchrun(script: Path, *arguments: object, processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]
    return subprocess.run([*map(str, command), *map(str, arguments)], capture_output=True, text=True, check=False)


def both(folder: Path, processes: int) -> dict[str, list[dict[str, Any]]]:
    script = Path(__file__).with_name("distributed_worker.py")
    done = torchrun(script, folder, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    names = [*SCENARIOS, "unseen"]
    return {n: [json.loads((folder / f"{n}.{r}.json").read_text()) for r in range(processes)] for n in names}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return both(tmp_path_factory.mktemp("two"), 2)


def alone(config: Any) -> list[float]:
    """The same steps in one process, whole batches."""
    model = make_model()
    celora.attach(model, configuration(config))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        ids = global_batch(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", SCENARIOS)
def test_parameters_stay_in_sync(ran, name):
    first, second = ran[name]
    assert first["parameters"] == second["parameters"]
    assert first["losses"] == second["losses"]


# Columns that are chosen from the statistics of all are the columns that one process chooses from the whole batch.
@pytest.mark.parametrize("name", ["exact", "alike", "sharded before", "sharded after", "rows"])
def test_the_same_losses_as_one_process_with_the_same_batch(ran, name):
    assert ran[name][0]["losses"] == pytest.approx(alone(SCENARIOS[name]["config"]), abs=TOLERANCE)


def test_the_loss_tells_configurations_apart(ran):
    """Or the test above would say nothing."""
    exact, alike = (ran[name][0]["losses"] for name in ("exact", "alike"))
    assert max(abs(a - b) for a, b in zip(exact, alike, strict=True)) > 50 * TOLERANCE


def test_only_synchronised_processes_select_the_same(ran):
    apart, alike = ran["apart"], ran["alike"]
    assert apart[0]["selected"].keys() == alike[0]["selected"].keys() != set()
    assert apart[0]["selected"] != apart[1]["selected"]
    assert alike[0]["selected"] == alike[1]["selected"]


def test_a_controller_moves_all_processes_alike(ran):
    first, second = (of["keep_ratios"] for of in ran["alike"])
    assert first == second
    assert set(first.values()) != {0.4}


def test_a_process_without_a_gradient_selects_as_the_others(ran):
    first, second = ran["unseen"]
    assert first["selected"] == second["selected"] != []
    assert first["factor"]
    assert second["factor"]


def test_synchronising_is_one_reduction_at_refreshes_outside_backward(ran):
    model = make_model()
    columns = sum(layer.out_features for layer in celora.attach(model, configuration(COLUMNS)).estimated.values())
    layers = len(celora.attach(model, configuration(COLUMNS)).estimated)
    for step, traffic in enumerate(ran["rows"][0]["traffic"]):
        refresh = step % COLUMNS["refresh_every"] == 0
        assert traffic["after"] == ({"allreduce": 4 * (columns + 3 * layers)} if refresh else {})


def frozen_backward(of: list[dict[str, Any]], step: int) -> int:
    """Bytes of weights that a process sends in a backward, without those that FSDP2 gathers whatever is attached."""
    sent = of[0]["traffic"][step]["backward"]
    return sum(n for name, n in sent.items() if "gather" in name)


def test_a_backward_gathers_only_the_rows_it_keeps(ran):
    """Step 1 and 2 estimate; 0 and 3 refresh. The copy gathers nothing once it is made."""
    nothing, rows, copy = (frozen_backward(ran[n], 1) for n in ("nothing", "rows", "copy"))
    trained_and_prefetched = copy  # what FSDP2 gathers by itself
    assert (rows - trained_and_prefetched) < 0.6 * (nothing - trained_and_prefetched)
    assert frozen_backward(ran["rows"], 3) > nothing
    assert frozen_backward(ran["rows apart"], 1) > rows


@pytest.mark.slow
def test_four_processes(tmp_path):
    ran = both(tmp_path, 4)
    for name in ("exact", "alike", "sharded after", "rows"):
        assert all(of["parameters"] == ran[name][0]["parameters"] for of in ran[name])
        assert ran[name][0]["losses"] == pytest.approx(alone(SCENARIOS[name]["config"]), abs=TOLERANCE)
    assert all(of["selected"] == ran["unseen"][0]["selected"] for of in ran["unseen"])
