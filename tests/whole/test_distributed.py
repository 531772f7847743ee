"""Two processes that train together, with DDP and FSDP2 over gloo. All tests here share one run of torchrun."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import celora
from benchmarks.scale import scaling
from celora.runtime.attachment import require
from distributed_worker import ADAPTERS, COLUMNS, SCENARIOS, STEPS, configuration, global_batch, on_bytes, optimizer_of
from forked import torchrun
from machine import refuses
from small import make_model
from versions import before

ROOT = Path(__file__).parents[2]

# One process sums a gradient over eight rows, two sum it over four each. The difference is float32 rounding: units of
# losses around 4. SGD keeps it small and shows a gradient's scale. Adam would enlarge the one and hide the other.
TOLERANCE = 4 * 4 * torch.finfo(torch.float32).eps
# A number half-way between two of 127 steps may round either way: in one row of a gradient that moves losses by 1e-2.
IN_8_BITS = 1e-2 / 127 / 2


class Ran(dict[str, list[dict[str, Any]]]):
    """The results of each process in each scenario. A test of one that cannot run here is skipped."""

    def __missing__(self, name: str) -> list[dict[str, Any]]:
        pytest.skip(LEFT_OUT[name])


LEFT_OUT = {
    name: "torch before 2.12 cannot split a base in 8 bits"
    for name, scenario in SCENARIOS.items()
    if scenario.get("adapter") == "int8" and before("torch", "2.12")
}
if refuses():
    need_8_bits = ["at odds", *(name for name, scenario in SCENARIOS.items() if "int8" in repr(scenario))]
    LEFT_OUT |= dict.fromkeys(need_8_bits, "no 8-bit products here, which is tested in test_products")


def all_of_them(folder: Path, names: Collection[str], processes: int) -> Ran:
    """Run these scenarios in so many processes."""
    names = [name for name in names if name not in LEFT_OUT]
    script = Path(__file__).parents[1] / "helpers" / "distributed_worker.py"
    done = torchrun(script, folder, *names, processes=processes, ahead="distributed_worker")
    assert done.returncode == 0, done.stderr[-3000:]
    return Ran({n: [json.loads((folder / f"{n}.{r}.json").read_text()) for r in range(processes)] for n in names})


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    return all_of_them(
        tmp_path_factory.mktemp("two"), [*SCENARIOS, "unseen", "at odds", "chosen", "labels", "uneven"], 2
    )


def alone(scenario: dict[str, Any], replicas: int = 1) -> list[float]:
    """The same steps in one process, with whole batches.

    If processes select for themselves, each has a replica here.
    """
    models = [ADAPTERS[scenario.get("adapter", "LoRA")]() for _ in range(replicas)]
    trained = []
    for model in models:
        celora.attach(model, configuration(scenario["config"]))
        model.train()
        trained.append([p for p in model.parameters() if p.requires_grad])
    optimizers = [optimizer_of(model) for model in models]
    losses = []
    for step in range(STEPS):
        batches = [global_batch(step)[i::replicas] for i in range(replicas)]
        own = [model(input_ids=ids, labels=ids).loss for model, ids in zip(models, batches, strict=True)]
        (sum(own) / replicas).backward()
        for same in zip(*trained, strict=True):
            total = sum(p.grad for p in same)
            for p in same:
                p.grad = total.clone()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        agree(models)
        losses.append(sum(loss.item() for loss in own) / replicas)
    return losses


def tolerance(scenario: str) -> float:
    in_8_bits = ("copy", "forwards", "forwards apart", "bytes", "bytes both ways")
    return IN_8_BITS if scenario in in_8_bits else TOLERANCE


def agree(models: list[PeftModel]) -> None:
    """Let all 8-bit forwards scale their input by the largest features that any replica has seen, as processes do."""
    for same in zip(*(require(model).forwards.values() for model in models), strict=True):
        products = [forward.graft.estimator.product for forward in same]
        largest = torch.stack([product.levels for product in products]).amax(0)
        for product in products:
            if not product.levels.equal(largest):
                product.follow_levels(largest.tolist())


@pytest.mark.parametrize("name", SCENARIOS)
def test_parameters_stay_in_sync(ran, name):
    first, second = ran[name]
    assert first["parameters"] == second["parameters"]
    assert first["losses"] == second["losses"]


@pytest.mark.parametrize("name", ["forwards", "forwards apart", "bytes both ways"])
def test_layers_are_estimated_in_both_directions_alike(ran, name):
    """Sharded by FSDP2, or whole in each process under DDP. Processes agree on levels and errors."""
    first, second = ran[name]
    for process in (first, second):
        assert process["left"] == {}
        assert process["forwards"] == len(process["errors"]) == 14
        assert process["copies"] == (0 if name == "bytes both ways" else 14)
        assert None not in process["levels"]
    assert (first["levels"], first["errors"]) == (second["levels"], second["errors"])


# From the statistics of all, processes choose the columns that one process chooses from the whole batch.
TOGETHER = ["exact", "alike", "sharded before", "sharded after", "rows", "nodes", "nothing", "hra", "miss",
            "bytes exact"]  # fmt: skip
EACH_FOR_ITSELF = ["apart", "tokens", "rows apart", "factor", "dora", "copy", "forwards", "forwards apart", "bytes",
                   "bytes both ways"]  # fmt: skip


def test_every_scenario_is_compared_with_one_process():
    assert sorted(TOGETHER + EACH_FOR_ITSELF) == sorted(SCENARIOS)


# HRA's layers are not estimated, and celora says so.
@pytest.mark.filterwarnings("ignore:celora. no layer can be estimated")
@pytest.mark.parametrize("name", TOGETHER)
def test_the_same_losses_as_one_process_with_the_same_batch(ran, name):
    assert ran[name][0]["losses"] == pytest.approx(alone(SCENARIOS[name]), abs=TOLERANCE)


@pytest.mark.parametrize("name", EACH_FOR_ITSELF)
def test_the_same_losses_as_replicas_in_one_process(ran, name):
    """Each replica has a process's share of the batch and its own selection. Gradients are averaged."""
    assert ran[name][0]["losses"] == pytest.approx(alone(SCENARIOS[name], 2), abs=tolerance(name))


def test_the_loss_tells_configurations_apart(ran):
    """Otherwise the test above would show nothing."""
    exact, alike = (ran[name][0]["losses"] for name in ("exact", "alike"))
    assert max(abs(a - b) for a, b in zip(exact, alike, strict=True)) > 50 * TOLERANCE


def test_only_synchronised_processes_select_the_same(ran):
    apart, alike = ran["apart"], ran["alike"]
    assert apart[0]["selected"].keys() == alike[0]["selected"].keys() != set()
    assert apart[0]["selected"] != apart[1]["selected"]
    assert alike[0]["selected"] == alike[1]["selected"]


def test_a_controller_moves_all_processes_alike(ran):
    first, second = (process["keep_ratios"] for process in ran["alike"])
    assert first == second
    assert set(first.values()) != {0.4}


def test_a_process_without_a_gradient_selects_as_the_others(ran):
    first, second = ran["unseen"]
    assert first["selected"] == second["selected"] != []
    assert first["factor"]
    assert second["factor"]


def test_sharded_layers_become_exact_in_all_processes_or_in_none(ran):
    """Otherwise one process gathers the weight and waits for ever for the other, which uses its 8-bit copy."""
    for process in ran["at odds"]:
        assert process["exact"] == process["expected"]
        assert process["modes"] == 3  # one process has no token, and the others have some


def test_all_processes_take_what_the_first_has_timed(ran):
    """If processes choose apart where they would wait for each other, celora refuses."""
    first, second = ran["chosen"]
    assert first["layers"] == second["layers"] != []
    assert "different configurations" in first["error"] == second["error"]


def test_a_process_whose_head_has_nothing_to_do_gathers_it_with_the_others(ran):
    """Once logits are not finite, so the head cannot be recognised. Later a batch has no label."""
    first, second = ran["labels"]
    assert math.isnan(first["off"][0])
    assert second["off"][2] == 0
    for process in (first, second):
        assert process["exact"] == pytest.approx(process["off"], abs=TOLERANCE, nan_ok=True)


def test_a_process_with_few_tokens_gathers_a_sharded_layer_as_often_as_the_others(ran):
    """Also after a batch that is not finite, by which a layer cannot be tried."""
    for process in ran["uneven"]:
        assert process["exact"] == pytest.approx(process["off"], abs=TOLERANCE, nan_ok=True)
        assert all(math.isfinite(loss) for loss in process["paper"][1:])
    assert math.isnan(ran["uneven"][1]["exact"][0])


def test_synchronising_is_one_reduction_at_refreshes_outside_backward(ran):
    """Some layers never see a gradient, like the first q, k and v. They do not cause a reduction in every step."""
    for process in ran["alike"]:
        reductions = [list(traffic["after"]) for traffic in process["traffic"]]
        assert reductions == [["allreduce"], [], [], ["allreduce"], [], []]
        assert {tuple(traffic["backward"]) for traffic in process["traffic"]} == {("allreduce",)}


def gathered(processes: list[dict[str, Any]], step: int, phase: str) -> int:
    """The bytes that the first process gave to all-gathers."""
    return sum(n for name, n in processes[0]["traffic"][step][phase].items() if "gather" in name)


def shapes(pattern: str) -> list[tuple[int, int]]:
    """The shapes (rows, columns) of the tiny model's parameters with such names."""
    named = make_model().named_parameters()
    return [(len(p), p.numel() // len(p)) for name, p in named if re.search(pattern, name)]


# The input of layer 0's q, k and v is the embedding, which needs no gradient.
FROZEN = r"(layers\.1\..*|o_proj\.|mlp.*)base_layer"


def test_bytes_are_those_of_the_cost_model(ran):
    """Steps 1 and 2 estimate. Step 3 is a refresh, and gathers every weight whole."""
    held, kept = scaling.held, scaling.kept
    trained = 4 * sum(rows * columns for rows, columns in shapes("lora_"))
    assert ran["exact"][0]["traffic"][1]["backward"] == {"allreduce": trained}
    in_blocks = held(shapes("lora_|layers.*norm"), 2, 4)
    for name in ("nothing", "sharded after", "rows", "copy"):
        assert gathered(ran[name], 1, "forward") == held(shapes(""), 2, 4)
        assert ran[name][0]["traffic"][1]["backward"]["reduce_scatter_base"] == trained
    assert gathered(ran["copy"], 1, "backward") == in_blocks
    whole, least = held(shapes(FROZEN), 2, 4), kept(shapes(FROZEN), COLUMNS["keep_ratio"], 2, 4)
    assert gathered(ran["rows"], 3, "backward") == gathered(ran["rows apart"], 1, "backward") == in_blocks + whole
    # The process with the most rows sets the size. With few rows, that is more than half of them.
    rows = gathered(ran["rows"], 1, "backward") - in_blocks
    assert least <= rows < 1.2 * least < 0.5 * whole
    page = (ROOT / "docs" / "measured" / "scale.md").read_text(encoding="utf-8")
    said = f"{whole:,} without estimates, {rows:,} with columns at {COLUMNS['keep_ratio']}"
    text = " ".join(page.split())
    assert said in text
    assert f"{rows:,} is {rows / whole:.0%}".replace("%", " %") in text
    out_features = [rows for rows, _ in shapes("base_layer")]
    assert ran["rows"][0]["traffic"][0]["after"] == {"allreduce": scaling.statistics(out_features)}


@pytest.mark.skipif(refuses(), reason="no 8-bit products here, which is tested in test_products")
def test_a_base_in_8_bits_is_gathered_as_its_bytes(ran):
    """With its block, in forward and in backward; nothing is copied, however the layers multiply."""
    parameters = [(name, p) for name, p in on_bytes().named_parameters()]

    def given(*parts: str) -> int:
        """The bytes that one of two processes gives for these parameters, split along their first dimension."""
        chosen = [p for name, p in parameters if not parts or any(part in name for part in parts)]
        return sum(-(-len(p) // 2) * (p.nbytes // len(p)) for p in chosen)

    for name in ("bytes", "bytes exact", "bytes both ways"):
        assert ran[name][0]["left"] == {}
        assert ran[name][0]["copies"] == 0
        assert gathered(ran[name], 1, "forward") == given()
        assert gathered(ran[name], 1, "backward") == given("layers.")
    assert ran["bytes both ways"][0]["forwards"] == 14
    assert {p.dtype.itemsize for name, p in parameters if name.endswith("W_q")} == {1}


def test_the_page_holds_the_cost_model_s_table():
    page = (ROOT / "docs" / "measured" / "scale.md").read_text(encoding="utf-8")
    assert scaling.table(scaling.Setting()) in page, "put the output of python -m benchmarks.scale.scaling there"


def test_four_processes(tmp_path):
    """DDP, two nodes of two processes, and weights whose rows four processes divide."""
    ran = all_of_them(tmp_path, ["alike", "nodes", "rows", "copy", "unseen"], 4)
    for name, replicas in (("alike", 1), ("nodes", 1), ("rows", 1), *(() if refuses() else (("copy", 4),))):
        assert all(process["parameters"] == ran[name][0]["parameters"] for process in ran[name])
        assert ran[name][0]["losses"] == pytest.approx(alone(SCENARIOS[name], replicas), abs=tolerance(name))
    assert all(process["selected"] == ran["unseen"][0]["selected"] for process in ran["unseen"])
