"""Use as many threads as this process really may: torch counts the machine's cores, but a container may allow fewer."""

from __future__ import annotations

import os

import torch

from celora.machine.cgroup import allowed_cpus


def use_allowed_threads() -> int:
    """Lower torch's threads to what the container's CPU quota allows, unless the user chose; returns their number.

    More threads than that are stopped and started by the kernel, and wait for each other in every operator.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        allowed = allowed_cpus()
        if allowed is not None and allowed < torch.get_num_threads():
            torch.set_num_threads(allowed)
    return torch.get_num_threads()
