"""SwiGLU blocks: which forwards celora knows, and what it leaves to the block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from celora.kernels.c import library as kernels
from celora.modeling.passes.gate import Gate, is_silu, multiplies
from celora.modeling.switch import Switch
from celora.numerics import passes as numerics
from patching import patch_all

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")

CONFIG = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)
KNOWN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Llama": LlamaMLP.forward,
    "in turns": lambda m, x: m.down_proj(m.up_proj(x) * m.act_fn(m.gate_proj(x))),
}
UNKNOWN: dict[str, Callable[[Any, Tensor], Any]] = {
    "the activation of the product": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x) * m.up_proj(x))),
    "the other projection": lambda m, x: m.down_proj(m.act_fn(m.up_proj(x)) * m.gate_proj(x)),
    "a sum around it": lambda m, x: x + m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)),
    "another input": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(2 * x)),
    "dropout": lambda m, x: m.dropout(m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x))),
    "another dtype": lambda m, x: m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)).double(),
    "two results": lambda m, x: (m.down_proj(m.act_fn(m.gate_proj(x)) * m.up_proj(x)), x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_is_known_by_what_it_computes(dtype: torch.dtype) -> None:
    assert {name: multiplies(forward, dtype) for name, forward in (KNOWN | UNKNOWN).items()} == {
        **dict.fromkeys(KNOWN, True),
        **dict.fromkeys(UNKNOWN, False),
    }


def test_a_forward_that_rounds_otherwise_is_another_one() -> None:
    def in_float32(m: Any, x: Tensor) -> Tensor:
        found: Tensor = m.down_proj((m.act_fn(m.gate_proj(x).float()) * m.up_proj(x)).to(x.dtype))
        return found

    assert multiplies(in_float32)
    assert not multiplies(in_float32, torch.bfloat16)


def test_a_forward_that_asks_for_more_than_its_parts_is_another_one() -> None:
    """What the trial's block lacks, the model's may have."""

    def limited(m: Any, x: Tensor) -> Tensor:
        gate = m.act_fn(m.gate_proj(x))
        limit = getattr(m, "limit", None)
        found: Tensor = m.down_proj((gate if limit is None else gate.clamp(max=limit)) * m.up_proj(x))
        return found

    assert not multiplies(limited)


def test_which_activations_are_silu() -> None:
    class Louder(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block = LlamaMLP(CONFIG)
    assert is_silu(nn.SiLU())
    assert is_silu(block.act_fn)
    assert not any(map(is_silu, (Louder(), nn.GELU(), F.silu, None)))


CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda block: None,
    "the activation": lambda block: setattr(block, "act_fn", nn.GELU()),
    "the class's forward": lambda block: setattr(type(block), "forward", UNKNOWN["a sum around it"]),
    "a projection": lambda block: setattr(block, "up_proj", nn.Linear(8, 1)),
    "a projection's dtype": lambda block: setattr(block, "gate_proj", nn.Sequential(block.gate_proj, Double())),
}


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_later_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(LlamaMLP):
        forward = LlamaMLP.forward

    block, x = Block(CONFIG).train(), torch.randn(2, 5, 8)
    Gate(Switch()).under(block)
    CHANGES[what](block)
    if "dtype" in what:
        block.down_proj.double()
    calls: list[int] = []
    gated = numerics.gated
    patch_all(monkeypatch, "celora.numerics.passes:gated", lambda *both, **how: calls.append(1) or gated(*both, **how))
    torch.testing.assert_close(block(x), type(block).forward(block, x))
    assert len(calls) == (what == "nothing")
