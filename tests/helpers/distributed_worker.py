"""What processes do in tests/whole/test_distributed.py, started by torchrun: `distributed_worker.py FOLDER [NAME ...]`.

Each scenario (all, or the named ones) trains the tiny Llama on its share of the same global batches. It leaves
`SCENARIO.RANK.json` in FOLDER.
"""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import HRAConfig, MissConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import celora
import celora.fsdp
from celora.modeling import fused
from celora.modeling.graft import LayerGraft
from celora.modeling.switch import Mode
from celora.runtime.agreement import add_up
from celora.runtime.attachment import require
from small import make_base, make_model
from versions import before

STEPS, ROWS = 6, 8
COLUMNS: dict[str, Any] = {"estimator": "columns", "keep_ratio": 0.4, "rank": 4, "refresh_every": 3, "fused": True}
SCENARIOS: dict[str, dict[str, Any]] = {
    "exact": {"config": {"estimator": "dense", "fused": True}},
    "apart": {"config": COLUMNS},
    "alike": {"config": {**COLUMNS, "synchronise": True, "target_error": 0.3}},
    "tokens": {"config": {"estimator": "tokens", "keep_ratio": 0.9, "rank": 0, "selection": "energy"}},
    "sharded before": {"config": {**COLUMNS, "synchronise": True}, "attach": "before", "shard": "blocks"},
    "sharded after": {"config": {**COLUMNS, "synchronise": True}, "attach": "after", "shard": "blocks"},
    "rows": {"config": {**COLUMNS, "synchronise": True}, "attach": "after", "shard": "layers"},
    "nodes": {"config": {**COLUMNS, "synchronise": True}, "attach": "after", "shard": "nodes"},
    "rows apart": {"config": COLUMNS, "attach": "after", "shard": "layers"},
    "factor": {"config": {**COLUMNS, "factor": "gradient"}, "attach": "after", "shard": "blocks"},
    "dora": {"config": COLUMNS, "attach": "after", "shard": "layers", "adapter": "DoRA"},
    "miss": {"config": "off", "attach": "after", "shard": "layers", "adapter": "MiSS"},
    "hra": {"config": "off", "attach": "after", "shard": "layers", "adapter": "HRA"},
    "copy": {"config": {"estimator": "int8"}, "attach": "after", "shard": "layers"},
    "forwards": {
        "config": {"estimator": "int8", "forward": "int8"},
        "attach": "after",
        "shard": "layers",
        "watched_from": 1,  # under a dispatch mode nothing is measured, so not in the first refresh
    },
    "forwards apart": {
        "config": {"estimator": "int8", "forward": "int8", "fused": True, "refresh_every": 3},
        "watched_from": STEPS,
    },
    "nothing": {"config": "off", "attach": "after", "shard": "layers"},
    "bytes": {"config": {"estimator": "int8"}, "attach": "after", "shard": "layers", "adapter": "int8"},
    "bytes exact": {"config": "exact", "attach": "after", "shard": "layers", "adapter": "int8"},
    "bytes both ways": {
        "config": {"estimator": "int8", "forward": "int8"},
        "attach": "after",
        "shard": "layers",
        "adapter": "int8",
        "watched_from": 1,
    },
}


def on_bytes() -> PeftModel:
    model = make_model()
    celora.quantise_base(model)
    return model


ADAPTERS: dict[str, Callable[[], PeftModel]] = {
    "LoRA": make_model,
    "int8": on_bytes,
    "DoRA": lambda: make_model(use_dora=True),
    # This kind of MiSS reads the weight of its base layer.
    "MiSS": lambda: get_peft_model(make_base(), MissConfig(r=4, target_modules="all-linear", init_weights="bat")),
    "HRA": lambda: get_peft_model(make_base(), HRAConfig(r=4, target_modules="all-linear")),
}


def global_batch(step: int) -> torch.Tensor:
    """Eight rows of eleven tokens, all labelled."""
    return torch.randint(0, 61, (ROWS, 11), generator=torch.Generator().manual_seed(1000 + step))


def configuration(config: Any) -> Any:
    return config if isinstance(config, str) else celora.CELoraConfig(**config)


class Traffic(TorchDispatchMode):
    """Count the bytes that this process gives to collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace in ("c10d", "_c10d_functional") and not name.startswith("wait"):
            # c10d's gathers and scatters take the output first.
            given = args[1] if namespace == "c10d" and name.startswith(("_allgather", "_reduce_scatter")) else args[0]
            tensors = given if isinstance(given, list | tuple) else [given]
            self.sent[name.split(".")[0].strip("_")] += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return func(*args, **(kwargs or {}))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """What every way to train the same steps has: SGD, whose losses show a gradient's scale."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)


def average_over_gloo(model: nn.Module) -> None:
    """gloo of torch 2.8 adds up where FSDP2 asks for an average. So FSDP2 adds up and divides by itself."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


def run(scenario: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    """Train, and return the results for the test to judge."""
    model = ADAPTERS[scenario.get("adapter", "LoRA")]()
    config, sharded = configuration(scenario["config"]), scenario.get("shard")
    if scenario.get("attach") != "after":
        celora.attach(model, config)
    wrapped: nn.Module = model
    if sharded == "layers":
        celora.fsdp.shard(model)
    elif sharded == "nodes":  # nodes of two processes each
        celora.fsdp.shard(model, mesh=init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("across", "within")))
    elif sharded:
        for block in model.base_model.model.model.layers:
            fully_shard(block)
        fully_shard(model)
    else:
        wrapped = DistributedDataParallel(model)
    if sharded and before("torch", "2.9"):
        average_over_gloo(model)
    if scenario.get("attach") == "after":
        celora.attach(model, config)
    model.train()
    optimizer = optimizer_of(model)
    losses, traffic = [], []
    for step in range(STEPS):
        ids = global_batch(step)[rank::world]
        watched = step >= scenario.get("watched_from", 0)
        with Traffic() if watched else nullcontext(Traffic()) as forward:
            loss = wrapped(input_ids=ids, labels=ids).loss
        with Traffic() as backward:
            loss.backward()
        with Traffic() as after:
            optimizer.step()
        optimizer.zero_grad()
        traffic.append({"forward": forward.sent, "backward": backward.sent, "after": after.sent})
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / world)
    attachment = require(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    full = [p.full_tensor() if sharded else p for p in parameters]
    estimators = {name: graft.estimator for name, graft in attachment.grafts.items()}
    products = [forward.product for forward in attachment.forwards.values()]
    return {
        "losses": losses,
        "left": attachment.switch.left,
        "forwards": len(attachment.forwards),
        "copies": sum(graft.estimator.product.holds_copy for graft in attachment.grafts.values()),
        "levels": [None if p.levels is None else p.levels.tolist() for p in products],
        "errors": attachment.forwards.errors,
        "parameters": [p.detach().flatten()[:50].tolist() for p in full],
        "numbers": sum(p.numel() for p in full),
        "selected": {n: e.index.tolist() for n, e in estimators.items() if getattr(e, "index", None) is not None},
        "keep_ratios": {name: e.keep_ratio for name, e in estimators.items()},
        "traffic": traffic,
    }


def one_without_a_gradient(rank: int) -> dict[str, Any]:
    """Only the second process sees a gradient of this layer, as if an expert got no token in the first process."""
    model = make_model()
    celora.attach(model, celora.CELoraConfig(**COLUMNS, synchronise=True))
    name, graft = next(iter(require(model).grafts.items()))
    base: Any = model.get_submodule(name).get_base_layer()
    if rank == 1:
        see(graft, base)
    add_up([(graft, base)])
    graft.estimator.select()
    return {"selected": graft.estimator.index.tolist(), "factor": graft.estimator.U_off is not None}


def at_odds(rank: int) -> dict[str, Any]:
    """Only the second process finds that a layer has no usable estimate.

    Only one process has a gradient without tokens.
    """
    model = make_model()
    celora.fsdp.shard(model)
    celora.attach(model, celora.CELoraConfig(estimator="int8", refresh_every=2))
    attachment = require(model)
    names = [name for name in attachment.grafts if name.endswith("down_proj")]
    if rank == 1:
        attachment.grafts[names[0]].take_error = lambda: 1.5  # type: ignore[method-assign]
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        model(input_ids=global_batch(step), labels=global_batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    base: Any = model.get_submodule(names[1]).get_base_layer()
    graft, empty = attachment.grafts[names[1]], torch.zeros(0 if rank else 3, base.out_features)
    modes = [mode for mode in Mode if len(graft.grad_input(empty, base.weight, mode)) == len(empty)]
    return {"exact": sorted(attachment.made_exact), "expected": names[:1], "modes": len(modes)}


def chosen_apart(rank: int) -> dict[str, Any]:
    """Each process times for itself, and then has a configuration of its own."""
    model = make_model()
    report = celora.attach(model, "auto")
    celora.detach(model)
    celora.fsdp.shard(model)
    try:
        celora.attach(model, celora.CELoraConfig(**COLUMNS | {"keep_ratio": 0.3 + 0.1 * rank}))
    except celora.CELoraError as error:
        return {"layers": [layer.label for layer in report.layers], "error": str(error)}
    return {}


def one_without_labels(config: Any, rank: int, world: int) -> list[float]:
    """The losses if the first logits of one process are not finite, and a later batch of the other has no label.

    The head is sharded as a unit of its own, so it is gathered by itself.
    """
    model = make_model()
    celora.attach(model, config)
    causal = model.base_model.model
    for part in (*causal.model.layers, causal.lm_head, model):
        fully_shard(part)
    return losses_after_nan(
        model, lambda step: global_batch(step)[rank::world], rank == 0, unlabelled=2 if rank else None
    )


def uneven(config: Any, rank: int) -> list[float]:
    """The losses if one process has few tokens, and its first batch is not finite. Each layer is sharded by itself."""
    model = make_model()
    celora.fsdp.shard(model)
    celora.attach(model, config)
    return losses_after_nan(model, lambda step: global_batch(step)[rank : rank + 1 if rank else None], rank == 1)


def losses_after_nan(
    model: Any, ids_of: Callable[[int], torch.Tensor], not_finite: bool, unlabelled: int | None = None
) -> list[float]:
    """The losses of four steps; the first is not taken, and perhaps `not_finite`. Step `unlabelled` has no label."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(4):
        ids = ids_of(step)
        labels = torch.full_like(ids, -100) if step == unlabelled else ids
        embedded = make_base().get_input_embeddings()(ids).detach()
        if not_finite and step == 0:
            embedded[0, -1] = float("nan")
        loss = model(inputs_embeds=embedded, labels=labels, num_items_in_batch=40).loss
        loss.backward()
        if step:
            optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def with_fewest(tokens: int, work: Callable[[], Any]) -> Any:
    """What `work` returns if batches of fewer tokens take PEFT's own path, as they do outside tests."""
    before, fused._FEWEST_TOKENS = fused._FEWEST_TOKENS, tokens
    try:
        return work()
    finally:
        fused._FEWEST_TOKENS = before


def see(graft: LayerGraft, base: Any) -> None:
    torch.manual_seed(5)
    graft.observe(torch.randn(30, base.out_features), base.weight)


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    fused._FEWEST_TOKENS = 0
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))  # only a hanging collective takes this long
    rank, world = dist.get_rank(), dist.get_world_size()
    work: dict[str, Callable[[], Any]] = {
        **{name: functools.partial(run, scenario, rank, world) for name, scenario in SCENARIOS.items()},
        "unseen": lambda: one_without_a_gradient(rank),
        "at odds": lambda: at_odds(rank),
        "chosen": lambda: chosen_apart(rank),
        "uneven": lambda: with_fewest(
            50, lambda: {config: uneven(config, rank) for config in ("off", "exact", "paper")}
        ),
        "labels": lambda: {config: one_without_labels(config, rank, world) for config in ("off", "exact")},
    }
    for name in names or work:
        (folder / f"{name}.{rank}.json").write_text(json.dumps(work[name]()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
