"""Frozen weights that FSDP2 shards over processes: a backward gathers only the rows that it reads.

Between its forward and its backward such a weight is a `DTensor`, split by rows. An estimate of kept rows gathers only
these rows. A product with an 8-bit copy gathers nothing. Anything else gathers the whole weight.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

# The first is the name since torch 2.13.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def whole(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole weight: itself or, if it is sharded, gathered in `dtype`. It is cast before it is sent."""
    if dtype is not None and isinstance(weight, DTensor):
        weight = weight.to(dtype)
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def rows_alone(weight: Tensor) -> bool:
    """Whether `RowGather` can gather rows of this weight: it is sharded by rows, along one dimension of its mesh."""
    return isinstance(weight, DTensor) and _sharded_dim(weight) is not None


class RowGather:
    """`weight[index]` of a sharded weight: (K, in). All processes must have the same selection `index`.

    Each process sends its rows, padded to the largest number that any process has. So `processes max_r K_r in` numbers
    arrive instead of `out in`.
    """

    def __init__(self, weight: Tensor, index: Tensor) -> None:
        assert isinstance(weight, DTensor)
        dim = _sharded_dim(weight)
        assert dim is not None
        self.group = weight.device_mesh.get_group(dim)
        here, self.processes = weight.device_mesh.get_local_rank(dim), weight.device_mesh.size(dim)
        share = -(-weight.shape[0] // self.processes)  # torch.chunk splits like this
        owner = index // share
        counts = torch.bincount(owner, minlength=self.processes)
        self.most = int(counts.max())  # waits for the device, once for each selection
        before = counts.cumsum(0) - counts
        self.place = owner * self.most + torch.arange(len(index), device=index.device) - before[owner]
        self.mine = (index % share)[owner == here]

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows in `dtype`, in ascending order. Collective."""
        assert isinstance(weight, DTensor)
        sent = torch.zeros(self.most, weight.shape[1], dtype=dtype, device=self.place.device)
        sent[: len(self.mine)] = weight.to_local().detach()[self.mine].to(dtype)
        received = sent.new_empty(self.processes * self.most, weight.shape[1])
        _gather(received, sent, group=self.group)
        return received[self.place]


def _sharded_dim(weight: DTensor) -> int | None:
    """The dimension of the mesh that splits the weight by rows, if nothing else splits it."""
    split = [dim for dim, placement in enumerate(weight.placements) if not placement.is_replicate()]
    return split[0] if len(split) == 1 and weight.placements[split[0]] == Shard(0) else None
