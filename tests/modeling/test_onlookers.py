"""Padding stays if hooks or adapters depend on the shape of a batch."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

import celora
from celora.modeling import packing
from decoders import model_of
from labelled import gradients, ragged
from patching import patch_all
from tolerances import OF_GRADIENT


def test_hooks_that_may_look_at_the_shape_of_a_batch_keep_its_padding() -> None:
    """Hooks that only make activations require a gradient do not count."""
    model, batch = model_of("llama"), ragged([11, 4, 7, 1])
    seen: list[tuple[int, ...]] = []
    celora.attach(model, "exact")
    model.enable_input_require_grads()
    assert model(**batch).logits is None
    layer = model.base_model.model.model.layers[1].mlp
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape[:2])))
    with pytest.warns(UserWarning, match=r"padding stays in batches: layers\.1\.mlp has a forward hook"):
        model(**batch)
    model(**batch)  # the second time, nothing is said
    assert seen == [tuple(batch["input_ids"].shape)] * 2
    handle.remove()
    packed: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        pack = packing.pack
        patch_all(patch, "celora.modeling.packing:pack", lambda *args: packed.append(pack(*args)) or packed[-1])
        model(**batch)
    assert packed[0] is not None


def test_alora_keeps_the_padding() -> None:
    """PEFT tells aLoRA's layers where the adapter begins in each row of the batch."""
    settings = {"target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    model = get_peft_model(model_of("llama").unload(), LoraConfig(alora_invocation_tokens=[7], **settings)).train()
    batch = ragged([11, 4, 7, 6])
    batch["input_ids"][:, 1] = 7
    loss, expected = gradients(model, batch)
    assert any("Padding stays: aLoRA" in note for note in celora.attach(model, "exact").notes)
    found, gradient = gradients(model, batch)
    assert found == pytest.approx(loss, rel=1e-6)
    assert (gradient - expected).norm() < OF_GRADIENT * expected.norm()
