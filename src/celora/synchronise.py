"""Processes that select alike: what each has observed of its own data is added up before anything is selected from it.
And processes that do not, but hold parts of the same weights, so that they have to gather alike.

One all-reduce at the end of a refresh step, outside backward, for all layers together: `out` numbers a layer with
columns and `in (rank + 8)` for a gradient factor, whatever the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from celora.graft import LayerGraft
from celora.sharded import whole
from celora.weights import device_of, read


def in_company() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def shards(parameters: Iterable[Tensor]) -> bool:
    """Whether several processes train together, each with a part of every parameter."""
    return in_company() and any(isinstance(parameter, DTensor) for parameter in parameters)


def gathers(model: nn.Module) -> bool:
    """Whether several processes train together, and wait for each other in every forward of the model."""
    return in_company() and any(isinstance(module, FSDPModule) for module in model.modules())


def largest_of_all(numbers: list[list[int]], device: torch.device) -> list[list[int]]:
    """Each number's maximum over all processes. Collective."""
    flat = torch.tensor(numbers, dtype=torch.int64, device=device)
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    largest: list[list[int]] = flat.tolist()
    return largest


def from_first(value: Any) -> Any:
    """What the first process has, in all of them. Collective."""
    if not in_company():
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def same_in_all(value: Any) -> bool:
    """Whether all processes have given the same value, each of which is told. Collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)


@torch.no_grad()
def add_up(layers: Sequence[tuple[LayerGraft, nn.Module]]) -> None:
    """Replace what these layers, given with their base layers, have observed by the sum over all processes.

    Collective: every process calls it with the same layers. One that saw no gradient of a layer adds nothing to it
    and selects as the others do. Does nothing in a process of its own.
    """
    if not layers or not in_company():
        return
    sizes = [3 + graft.estimator.pooled_size for graft, _ in layers]
    flat = torch.zeros(sum(sizes), device=device_of(layers[0][1]))
    parts = flat.split(sizes)
    for part, (graft, _) in zip(parts, layers, strict=True):
        observed = graft.estimator.pooled()
        if observed is not None:
            part[0], part[3:] = 1, observed
        if graft.squared_error is not None and graft.squared_norm is not None:
            part[1], part[2] = graft.squared_error, graft.squared_norm
    dist.all_reduce(flat)
    processes = dist.get_world_size()
    witnesses = torch.stack([part[0] for part in parts]).tolist()  # once a refresh, so the synchronisation is cheap
    for summed, (graft, base), seen in zip(parts, layers, witnesses, strict=True):
        part = summed.to(device_of(base))  # a model may lie on several devices
        graft.squared_error, graft.squared_norm = part[1].clone(), part[2].clone()
        if seen:
            # A process that saw no gradient has not seen the weight either, and gathering it takes them all.
            graft.estimator.take_pooled(part[3:], whole(read(base)) if seen < processes else None)
