"""Makes processes that train together agree on what they have observed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from celora.machine.processes import in_company, largest_of_all
from celora.modeling.graft import LayerGraft
from celora.weights.read import device_of, read
from celora.weights.sharded import whole

_STEPS, _MOST = 10**6, 10.0**3  # errors are sent as whole millionths, and cut off at `_MOST`


def largest_errors(errors: Sequence[float | None], device: torch.device) -> list[float | None]:
    """The maximum of each error over all processes that train together; None if no process has one.

    Collective: every process calls it with the same number of errors. A single process gets its own errors back.
    """
    if not in_company():
        return list(errors)
    told = [[-1 if error is None else round(min(error, _MOST) * _STEPS)] for error in errors]
    return [None if most < 0 else most / _STEPS for (most,) in largest_of_all(told, device)]


@torch.no_grad()
def add_up(layers: Sequence[tuple[LayerGraft, nn.Module]]) -> None:
    """Replace what these layers have observed by the sum over all processes; each layer comes with its base layer.

    Collective: every process calls it with the same layers. A process that saw no gradient of a layer adds nothing, and
    selects like the others. A single process does nothing.

    One all-reduce for all layers together: three numbers a layer, and `out` more with columns.
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
    witnesses = torch.stack([part[0] for part in parts]).tolist()  # synchronises once for each refresh, which is cheap
    for summed, (graft, base), seen in zip(parts, layers, witnesses, strict=True):
        part = summed.to(device_of(base))  # a model may lie on several devices
        graft.squared_error, graft.squared_norm = part[1].clone(), part[2].clone()
        if seen:
            # A process that saw no gradient has no weight either. Gathering it needs all processes.
            graft.estimator.take_pooled(part[3:], whole(read(base)) if seen < processes else None)
