"""Processes that train together: whether there are others, and how all of them come to know the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from celora.errors import CELoraError


def in_company() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_initialized() and dist.get_world_size() > 1


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


def any_of_them(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true in any process. Collective. It waits for the device, as logging a loss does."""
    return largest_of_all([[int(flag)]], device) == [[1]] if in_company() else flag


def from_first(value: Any) -> Any:
    """The first process's value, in every process. Collective."""
    if not in_company():
        return value
    shared = [value]
    dist.broadcast_object_list(shared)
    return shared[0]


def made_by_first(make: Callable[[], Any]) -> Any:
    """What `make` gives in the first process, in all of them. If it raises, all of them raise. Collective.

    Raises:
        CELoraError: a launcher has started several processes, and they do not know each other yet.
    """
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not dist.is_initialized():
        raise CELoraError(
            "a launcher has started several processes, which do not know each other yet, so each would measure alone; "
            "call this after Accelerator(), TrainingArguments(...) or torch.distributed.init_process_group, or unset "
            "WORLD_SIZE if each trains by itself."
        )
    if not in_company():
        return make()
    made: tuple[Any, str] = None, ""
    if dist.get_rank() == 0:
        try:
            made = make(), ""
        except Exception as error:
            from_first((None, str(error) or type(error).__name__))
            raise
    made, failed = from_first(made)
    if failed:
        raise CELoraError(f"the first process could not go on: {failed}")
    return made


def same_in_all(value: Any) -> bool:
    """Whether all processes have given the same value. Every process gets the answer. Collective."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(other == values[0] for other in values)
