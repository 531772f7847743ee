"""How much memory a model with celora's loss keeps, and how often its forward waits for the device."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import celora
from celora import CELoraConfig
from celora.kernels import plain
from celora.modeling import model_graft as forward
from celora.modeling.model_graft import ModelGraft
from celora.numerics import head
from celora.numerics.head import Logits
from celora.runtime.attachment import require
from labelled import masked_batch
from patching import patch_all
from reads import Reads, Waits
from small import make_batch, make_model


@pytest.mark.parametrize("kind", ["full", "padded"])
def test_a_dropped_model_is_freed_at_once(kind: str) -> None:
    model, batch = make_model().train(), make_batch(0) if kind == "full" else masked_batch()
    report = celora.attach(model, "exact")
    assert "Padding left out of training batches." in report.notes
    for _ in range(2):
        loss = model(**batch).loss
        loss.backward()
    kept = [weakref.ref(part) for part in (*model.modules(), *model.parameters())]
    del loss
    gc.collect()
    gc.disable()
    try:
        del model
        assert not [reference for reference in kept if reference() is not None]
    finally:
        gc.enable()


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_a_forward_waits_for_the_device_once(packs: bool, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model().train(), masked_batch() | {"num_items_in_batch": torch.tensor(7)}
    celora.attach(model, CELoraConfig(estimator="dense", labelled_head=True, padding_free=packs))
    model(**batch)  # the first call looks at more, once
    reads, waits, score = Reads(), Waits(), forward.score_tokens

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            with waits, reads:
                return function(*args)

        return called

    def alone(*args: Any, **kwargs: Any) -> Any:  # on an accelerator the head reads nothing: see below
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            return score(*args, **kwargs)

    patch_all(monkeypatch, "celora.numerics.head:score_tokens", alone)
    for name in ("_not_here", "_begin", "_scored"):
        monkeypatch.setattr(ModelGraft, name, watched(getattr(ModelGraft, name)))
    if attention == "sdpa":
        assert model(**batch).logits is None
    else:  # no CPU has this attention
        causal = model.base_model.model
        causal.config._attn_implementation = attention
        _, passed = require(model).forward._begin(causal, batch, batch["labels"])
        assert ("cu_seq_lens_q" in passed) is packs
        require(model).forward.settle(causal)
    assert reads.seen == ["tolist"]
    assert waits.seen == []


@pytest.mark.parametrize("logits", [Logits(), Logits(0.5, 30.0)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_head_reads_nothing_of_an_accelerator(
    logits: Logits, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on the device `meta` have no numbers that could be read."""
    # torch asks for autocast's state, and `meta` has none
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    hidden = torch.empty(2, 40, 32, device="meta", requires_grad=True)
    rows, targets = (torch.empty(50, dtype=torch.int64, device="meta") for _ in range(2))
    weight = torch.empty(777, 32, device="meta")
    found = head.score_tokens(
        hidden, rows, targets, weight, weight[:, 0], logits=logits, smoothing=smoothing, statistics=True
    )
    found.log_probs.sum().backward()
    assert hidden.grad.shape == hidden.shape


class Largest(TorchDispatchMode):
    """Record the bytes of the largest tensor that is made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        there = {leaf.untyped_storage()._cdata for leaf in tree_leaves(args) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in there:
                self.nbytes = max(self.nbytes, leaf.numel() * leaf.element_size())
        return made


@pytest.mark.parametrize("logits", [Logits(), Logits(1.0, 30.0)], ids=str)
def test_the_softmax_works_on_little_at_once(logits: Logits) -> None:
    """For 1,024 tokens and 151,936 words on an accelerator, in float32, it takes 64 MiB."""
    z = torch.empty(1024, 151_936, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(1024, dtype=torch.int64, device="meta")
    with Largest() as made:
        plain.softmax_rows(
            z,
            targets,
            scale=logits.scale,
            cap=logits.cap,
            smoothing=0.1,
            log_probs=torch.empty(1024, device="meta"),
            entropy=None,
            top1=None,
            write=True,
        )
    assert 2**25 < made.nbytes <= 2**26
