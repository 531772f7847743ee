"""The estimator of each layer under a preset or a configuration, and the layers that stay dense."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import celora
from celora import CELoraConfig
from celora.integrations.while_training import in_one_line
from celora.modeling.assign import last_block
from celora.modeling.graft import LayerGraft
from celora.numerics.estimators import Columns
from celora.numerics.products.fp8 import Fp8Product
from celora.runtime.attachment import require
from patching import patch_all
from small import MEMBERS, make_model, train

HALF = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=3)


def test_paper_preset_on_a_llama(model: PeftModel) -> None:
    report = celora.attach(model, "paper")
    kinds = {(name.rpartition(".")[2], layer.keep_ratio, layer.rank) for name, layer in report.estimated.items()}
    assert kinds == {("v_proj", 0.55, 7), ("o_proj", 0.55, 7), ("up_proj", 0.65, 7), ("down_proj", 0.65, 7)}
    assert len(report.dense) == 6


def test_each_tower_has_a_last_block() -> None:
    text = [f"model.language_model.layers.{i}.mlp.experts.7.up_proj" for i in range(3)]
    images = [f"model.visual.blocks.{i}.attn.proj" for i in range(12)]
    assert last_block([*text, *images, "model.visual.merger.mlp.0", "lm_head"]) == {
        text[-1], images[-1], "model.visual.merger.mlp.0",
    }  # fmt: skip


def test_off_attaches_nothing(model: PeftModel) -> None:
    report = celora.attach(model, "off")
    assert report.estimated == {}
    assert report.cost == 1.0
    assert not any(isinstance(hook, LayerGraft) for m in model.modules() for hook in m._forward_hooks.values())


def test_an_override_touches_only_the_layer_it_names(model: PeftModel) -> None:
    target = "base_model.model.model.layers.1.mlp.down_proj"
    celora.attach(model, CELoraConfig(keep_ratio=0.5, rank=4, overrides={target: {"keep_ratio": 0.25, "rank": 1}}))
    for name, graft in require(model).grafts.items():
        assert isinstance(graft.estimator, Columns)
        expected = (0.25, 1) if name == target else (0.5, 4)
        assert (graft.estimator.keep_ratio, graft.estimator.settings.rank) == expected
    train(model, 1)
    for name, graft in require(model).grafts.items():
        if graft.estimator.ready:
            assert isinstance(graft.estimator, Columns)
            assert graft.estimator.index is not None
            share = len(graft.estimator.index) / graft.estimator.out_features
            assert share == pytest.approx(0.25 if name == target else 0.5, abs=0.03)


def test_zero_tokens_are_not_guessed_on_an_accelerator(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator, `tokens` keeps the share that the latest refresh needed.

    That is too few if more tokens have labels.
    """
    report = celora.attach(model, "exact")
    assert [layer.label for layer in report.layers] == ["dense"] * 7 + ["dense, without zero tokens"] * 7
    celora.detach(model)
    patch_all(monkeypatch, "celora.weights.read:device_of", lambda module: torch.device("cuda"))
    assert {layer.label for layer in celora.attach(model, "exact").layers} == {"dense"}


def test_leaving_out_zero_gradients_is_no_estimate(model: PeftModel) -> None:
    report = celora.attach(model, "exact")
    assert report.estimated == {}
    assert len(report.dense) == len(report.layers) == 14
    assert "None of 14 frozen layers estimated: the gradient is exact LoRA's." in str(report)
    estimated = str(celora.attach(model, HALF))
    assert "14 of 14 frozen layers estimated" in estimated
    assert "FLOPs / dense" in estimated.splitlines()[0]


def test_a_missing_layer_of_a_preset_is_no_mistake() -> None:
    report = celora.attach(make_model(target_modules=["q_proj", "v_proj"]), "paper")
    assert len(report.estimated) == 2


def test_the_adapters_own_rank() -> None:
    report = celora.attach(make_model(r=32), CELoraConfig(rank="adapter"))
    ranks = {name.rpartition(".")[2]: layer.rank for name, layer in report.estimated.items()}
    assert (ranks["up_proj"], ranks["v_proj"]) == (32, 24)  # a rank is at most the layer's size


def test_independent_layers_draw_different_numbers(model: PeftModel) -> None:
    celora.attach(model, MEMBERS["sampled tokens"])
    seeds = {graft.estimator.settings.seed for graft in require(model).grafts.values()}
    assert len(seeds) == 14


def test_a_layer_that_has_no_such_product_is_skipped_with_the_reason() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(24, 32), nn.Linear(32, 24)), LoraConfig(target_modules=["0", "1"]))
    report = celora.attach(model, CELoraConfig(estimator="fp8"))
    said = {"base_model.model.0": "fp8 products need in_features that are a multiple of 16, not 24"}
    none_here = Fp8Product().unavailable(24, 32, torch.device("cpu"))  # some versions of torch have no 8-bit floats
    if none_here:
        said["base_model.model.1"] = none_here
    assert report.skipped == said
    assert set(report.estimated) == {"base_model.model.1"} - said.keys()


def test_an_estimated_head_is_not_called_exact() -> None:
    config = CELoraConfig(estimator="dense", labelled_head=True, head_keep_ratio=0.5)
    report = celora.attach(make_model(), config)
    assert "None of 14 frozen layers estimated: only the head's gradient is." in str(report)
    assert "the head's gradient is" in in_one_line(report)
    assert "the gradient is LoRA's own" in in_one_line(celora.attach(make_model(), "exact"))
