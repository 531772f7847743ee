"""The report of `attach`."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

import celora
from celora import CELoraConfig
from celora.modeling.report import counts
from small import make_model


def test_report_says_what_and_why() -> None:
    model = make_model(target_modules=["q_proj", "v_proj", "up_proj", "embed_tokens"])
    model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    report = celora.attach(model, CELoraConfig(keep_ratio=0.25, rank=2, overrides={"v_proj": {"estimator": "dense"}}))
    prefix = "base_model.model.model"
    assert set(report.estimated) == {
        f"{prefix}.layers.0.self_attn.q_proj",
        f"{prefix}.layers.0.mlp.up_proj",
        f"{prefix}.layers.1.mlp.up_proj",
    }
    assert set(report.dense) == {f"{prefix}.layers.{i}.self_attn.v_proj" for i in (0, 1)}
    assert report.skipped == {
        f"{prefix}.embed_tokens": "Embedding is not a linear layer",
        f"{prefix}.layers.1.self_attn.q_proj": "its weight is trained",
    }
    layer = report.estimated[f"{prefix}.layers.0.mlp.up_proj"]
    assert (layer.out_features, layer.in_features, layer.keep_ratio, layer.rank) == (80, 48, 0.25, 2)
    assert layer.cost == pytest.approx(0.25 + 2 * 128 / (80 * 48))
    table = str(report)
    assert "up_proj" in table
    assert "(its weight is trained)" in table
    assert re.search(r"^q_proj +x1, block 0 .*\nv_proj +x2  ", table, re.MULTILINE)
    assert "3 of 7 frozen layers estimated" in table


def test_the_table_says_in_which_blocks_layers_of_one_kind_differ() -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(12)]
    groups = {
        ("up_proj", 1): names[:1],
        ("up_proj", 2): names[1:4] + names[6:7],
        ("up_proj", 3): names[4:6:2],
        ("head",): ["lm_head"],
    }
    found = counts({key: [SimpleNamespace(name=name) for name in like] for key, like in groups.items()})
    assert found == ["x1, block 0", "x4, blocks 1-3, 6", "x1, block 4", "x1"]
    towers = {("fc1", 1): ["encoder.layers.0.fc1"], ("fc1", 2): ["decoder.layers.0.fc1"]}
    assert counts({key: [SimpleNamespace(name=name) for name in like] for key, like in towers.items()}) == ["x1", "x1"]
    far = {("up_proj", 1): names[::2], ("up_proj", 2): names[1::2]}
    found = counts({key: [SimpleNamespace(name=name) for name in like] for key, like in far.items()})
    assert found == ["x6, blocks 0, 2, 4, 6, ...", "x6, blocks 1, 3, 5, 7, ..."]
