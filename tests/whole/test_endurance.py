"""Attaching and detaching many times, or interrupting a forward, leaves nothing behind."""

from __future__ import annotations

import gc
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.optim import optimizer as optim

import celora
from celora import CELoraConfig
from celora.modeling import compiled as graft
from celora.runtime import clock
from celora.runtime.attachment import attachments, require
from machine import refuses_config
from small import make_batch, make_model, train

CONFIGS: list[Any] = [
    "paper",
    "exact",
    CELoraConfig(estimator="int8"),
    CELoraConfig(estimator="tokens", keep_ratio=0.9, rank=4, factor="gradient"),
]


def _resident() -> int:
    """The memory that the process holds now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _hooks(model: PeftModel) -> int:
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
              "_forward_hooks_always_called", "_backward_hooks")  # fmt: skip
    return sum(len(getattr(module, table)) for module in model.modules() for table in tables)


def _registries() -> tuple[int, ...]:
    gc.collect()
    return (
        len(optim._global_optimizer_post_hooks),
        len(clock._running),
        len(graft.layers),
        len(attachments),
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see the memory held")
@pytest.mark.parametrize("cycles", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_attaching_and_detaching_leaks_nothing(model: PeftModel, cycles: int) -> None:
    configs = [config for config in CONFIGS if isinstance(config, str) or not refuses_config(config)]
    registries, hooks, held = _registries(), _hooks(model), []
    for cycle in range(cycles):
        celora.attach(model, configs[cycle % len(configs)])
        if cycle % 5 == 0:
            train(model, 2)
        celora.detach(model)
        if cycle in (cycles // 2, cycles - 1):
            gc.collect()
            held.append(_resident())
    assert _registries() == registries
    assert _hooks(model) == hooks
    assert held[1] - held[0] < 8 * 2**20  # growth in the second half of the cycles


class _Stop(BaseException):
    """Like KeyboardInterrupt: no handler for exceptions catches it."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, _Stop])
@pytest.mark.parametrize("attached", ["exact", "paper"])
@pytest.mark.filterwarnings("ignore:celora. padding stays", "ignore:.* keeps PEFT's own backward")
def test_an_interruption_leaves_the_model_as_it_was(
    attached: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the middle of a layer's forward, in one pass after another."""
    model = make_model(lora_dropout=0.1).train()
    celora.attach(model, attached)
    model(**make_batch(0)).loss.backward()
    tuner = model.base_model.model.model.layers[1].mlp.up_proj

    def state() -> tuple[Any, ...]:
        grafts = require(model).grafts
        return (
            _hooks(model),
            model.config._attn_implementation,
            [module.training for module in model.modules()],
            [dict(module.lora_variant) for module in model.modules() if hasattr(module, "lora_variant")],
            [(id(graft.estimator), graft.mode, graft.observed) for graft in grafts.values()],
            require(model).switch.on,
            [p.requires_grad for p in model.parameters()],
        )

    before, numbers = state(), torch.get_rng_state()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    for passes in (1, 2, 3, 5):
        calls = 0

        def fail(*_: object, passes: int = passes) -> None:
            nonlocal calls
            calls += 1
            if calls == passes:
                raise error

        handle = tuner.base_layer.register_forward_pre_hook(fail)
        with suppress(error):
            celora.audit(model, make_batch(0))
        handle.remove()
        assert calls >= min(passes, 2)
        assert state() == before
        assert torch.get_rng_state().equal(numbers)
        assert all(tensor.equal(value) for tensor, value in zip(tensors, values, strict=True))


@pytest.mark.filterwarnings("ignore:celora. padding stays")
def test_detaching_after_an_interrupted_forward_leaves_the_adapter_on(model: PeftModel) -> None:
    celora.attach(model, "exact")
    tuner = model.base_model.model.model.layers[0].mlp.up_proj

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    handle = tuner.base_layer.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.train()(**make_batch(0))
    handle.remove()
    celora.detach(model)
    assert tuner.lora_variant == {}
    assert tuner.cast_input_dtype_enabled


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_what_is_not_finite_cannot_be_judged(model: PeftModel, how: str) -> None:
    """One line, instead of a report full of NaN."""
    celora.attach(model, "paper")
    if how == "loss":
        model.base_model.model.model.norm.weight.data[0] = float("nan")
        match = "the loss of this batch is nan"
        with pytest.raises(celora.CELoraError, match=match):
            celora.audit(model, make_batch(0))
    else:

        def overflows(peft_model: Any, batch: Any) -> torch.Tensor:
            loss: torch.Tensor = peft_model(**batch).loss
            return loss * 1e-38 * 1e38 + (loss - loss.detach()) * 1e38 * 1e3

        with pytest.raises(celora.CELoraError, match="the exact gradient of this batch is not finite"):
            celora.audit(model, make_batch(0), loss=overflows)
