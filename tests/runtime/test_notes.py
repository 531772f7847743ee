"""The notes of a report: what refreshes measure, and advice."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import celora
from celora.settings.config import CELoraConfig
from celora.settings.presets import PRESETS
from patching import patch_all
from small import make_model


def test_refreshes_measure_only_what_is_estimated() -> None:
    said = (
        "Refreshes measure each estimate's relative error: beyond 0.05 a layer becomes exact, and the head keeps more."
    )
    nothing = CELoraConfig(estimator="dense", labelled_head=True, most_error=0.05)
    of_the_head = dataclasses.replace(nothing, head_keep_ratio=0.5)
    of_layers = dataclasses.replace(nothing, overrides={"up_proj": {"estimator": "tokens", "keep_ratio": 0.5}})
    for config, told in ((nothing, False), (of_the_head, True), (of_layers, True)):
        assert (said in celora.attach(make_model(), config).notes) == told
    assert said not in celora.attach(make_model(), dataclasses.replace(of_layers, most_error=None)).notes


@pytest.mark.parametrize("emulated", [False, True])
def test_advice_where_the_users_own_settings_cost_time(emulated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.machine.timing:slower_than_float32", lambda dtype, device: emulated)
    patch_all(monkeypatch, "celora.machine.cpu:multiplies", lambda dtype: True)
    plain = celora.attach(make_model(), "paper").notes
    unfused = dataclasses.replace(PRESETS["paper"], fused=False)
    model = make_model(dtype=torch.bfloat16, lora_dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    costly = celora.attach(model, unfused).notes
    assert not [note for note in plain if "float32" in note or "dropout" in note or "checkpointing" in note]
    assert [note for note in costly if note.startswith("Gradient checkpointing computes every forward twice")]
    assert [note for note in costly if note.startswith("lora_dropout=0.1 draws")]
    assert [note for note in costly if note.startswith("float32 adapters on a bfloat16 base")]
    said = [note for note in costly if note.startswith("This CPU takes longer for bfloat16")]
    assert len(said) == emulated


def test_a_dtype_that_the_cpu_does_not_multiply_is_slow_without_celora(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_all(monkeypatch, "celora.machine.timing:slower_than_float32", lambda dtype, device: True)
    patch_all(monkeypatch, "celora.machine.cpu:multiplies", lambda dtype: False)
    for preset, slow in (("off", True), ("exact", False), ("fast", False)):
        notes = " ".join(celora.attach(make_model(dtype=torch.bfloat16), preset).notes)
        assert ("This CPU takes longer for bfloat16" in notes) is slow
        assert ("Products of bfloat16 are computed in float32" in notes) is not slow
