"""The tiers of compiled kernels that this CPU can run: a test of a kernel runs once for each."""

from __future__ import annotations

import pytest
import torch

from celora.kernels.backends import available, choose
from celora.kernels.c import dot
from celora.kernels.c.build import build_and_load
from celora.kernels.c.tier import Kernels, offered
from patching import patch_all

LIBRARY, _ = build_and_load()
TIERS = [] if LIBRARY is None else offered(LIBRARY)


def use_tier(patch: pytest.MonkeyPatch, tier: str) -> Kernels:
    """Compute with the kernels of this tier from now on, as on a CPU that has nothing newer."""
    assert LIBRARY is not None
    kernels = Kernels(LIBRARY, tier)
    patch_all(patch, "celora.kernels.c.library:library", lambda: kernels)
    patch_all(patch, "celora.machine.cpu:matrix_instructions", lambda: tier == "amx")
    return kernels


WITH_DOTS = [tier for tier in TIERS if Kernels(LIBRARY, tier).has("gathered_product_f32")]  # type: ignore[arg-type]
PAIRED = {tier: bool(Kernels(LIBRARY, tier).run("paired", b"", 1)) for tier in WITH_DOTS}  # type: ignore[arg-type]
each_tier = pytest.mark.parametrize("tier", TIERS, indirect=True)
each_tier_with_dots = pytest.mark.parametrize("tier", WITH_DOTS, indirect=True)


def paired() -> bool:
    """Whether rows for an 8-bit product here are quantised by pairs, as things are patched now."""
    cpu = torch.device("cpu")
    ours = available("pack_weight", cpu) and choose("pack_weight", cpu).name == "c"
    return ours and PAIRED[dot.used_tier()]
