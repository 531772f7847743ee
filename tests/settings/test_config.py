from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from celora import CELoraConfig, CELoraError
from celora.settings.config import LayerConfig, balanced_rank
from celora.settings.presets import PRESETS, resolve


def test_the_paper_preset_is_the_published_one() -> None:
    paper = resolve("paper")
    assert paper.refresh_every == 200
    for kind, keep in {"v_proj": 0.55, "o_proj": 0.55, "up_proj": 0.65, "down_proj": 0.65}.items():
        assert paper.for_layer(f"model.layers.3.{kind}") == LayerConfig("columns", keep, "balanced")
    for kind in ("q_proj", "k_proj", "gate_proj"):
        assert paper.for_layer(f"model.layers.3.{kind}").estimator == "dense"


@pytest.mark.parametrize(("lora_rank", "expected"), [(1, 1), (8, 7), (16, 14), (64, 56), (10, 8)])
def test_balanced_rank(lora_rank: int, expected: int) -> None:
    assert balanced_rank(lora_rank) == expected


def test_overrides_touch_only_what_they_name_and_later_ones_win() -> None:
    config = CELoraConfig(
        keep_ratio=0.5,
        rank=4,
        overrides={
            "*.q_proj": {"estimator": "dense"},
            "layers.1.mlp.up_proj": {"keep_ratio": 0.25},
            "layers.1.*": {"rank": 2},
        },
    )
    assert config.for_layer("model.layers.0.self_attn.q_proj") == LayerConfig("dense", 0.5, 4)
    assert config.for_layer("model.layers.0.mlp.up_proj") == LayerConfig("columns", 0.5, 4)
    assert config.for_layer("model.layers.1.mlp.up_proj") == LayerConfig("columns", 0.25, 2)
    assert config.for_layer("model.layers.11.mlp.up_proj") == LayerConfig("columns", 0.5, 4)


@pytest.mark.parametrize(
    "config",
    [
        *PRESETS.values(),
        CELoraConfig(keep_ratio=0.3, rank=2, overrides={"a": {"rank": 1}}),
        CELoraConfig("dense", saved_input="int8", fused=True, overrides={"a": {"saved_input": "native"}}),
    ],
)
def test_saved_and_loaded_unchanged(config: CELoraConfig, tmp_path: Path) -> None:
    assert CELoraConfig.from_dict(config.to_dict()) == config
    config.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["celora_config.json"]
    assert CELoraConfig.load(tmp_path) == config
    assert CELoraConfig.load(tmp_path / "celora_config.json") == config


BAD: list[tuple[dict[str, Any], str]] = [
    ({"keep_ratio": 1.4}, "keep_ratio=1.4; expected 0 < keep_ratio <= 1. Use 1.0 for the dense backward."),
    ({"keep_ratio": 0}, "keep_ratio=0; expected"),
    ({"keep_ratio": float("nan")}, "keep_ratio=nan; expected"),
    ({"keep_ratio": True}, "keep_ratio=True; expected"),
    ({"keep_ratio": "half"}, "keep_ratio='half'; expected"),
    ({"rank": -1}, "rank=-1; expected an integer >= 0"),
    ({"rank": 2.5}, "rank=2.5; expected an integer >= 0"),
    ({"rank": "balance"}, "rank='balance'; expected an integer >= 0. Use 0 for no frozen factor, \"balanced\""),
    ({"refresh_every": 0}, "refresh_every=0; expected an integer >= 1"),
    ({"estimator": "colums"}, "unknown estimator 'colums'; did you mean 'columns'?"),
    ({"estimator": None}, "estimator=None; expected the name"),
    ({"keep_ration": 0.5}, "unknown celora setting 'keep_ration'; did you mean 'keep_ratio'?"),
    ({"selection": "enery"}, "unknown selection 'enery'; did you mean 'energy'?"),
    ({"selection": ["topk"]}, "unknown selection"),
    ({"factor": 3}, "unknown factor '3'. Known: gradient, svd"),
    ({"precision": "int4"}, "unknown precision 'int4'; did you mean 'int8'?"),
    ({"saved_input": "int4"}, "unknown saved_input 'int4'; did you mean 'int8'?"),
    ({"saved_input": None}, "unknown saved_input 'None'. Known: forward, int8, native"),
    ({"saved_input": "int8"}, "saved_input='int8' needs fused=True: PEFT saves the input of its own adapters itself."),
    ({"overrides": {"q": {"saved_input": "int8"}}}, "override 'q': saved_input='int8' needs fused=True"),
    ({"weight_copy": "no"}, "weight_copy='no'; expected true or false"),
    ({"spread": 1}, "spread=1; expected true or false"),
    ({"target_error": 1.5}, "target_error=1.5; expected 0 < target_error < 1"),
    ({"estimator": "int8", "selection": "energy"}, "selection='energy' means nothing to the estimator 'int8'"),
    ({"estimator": "dense", "precision": "int8"}, "precision='int8' means nothing to the estimator 'dense'; use"),
    ({"overrides": {"q": {"estimator": "dense", "factor": "gradient"}}}, "override 'q': factor='gradient' means"),
    ({"overrides": ["q_proj"]}, "overrides=['q_proj']; expected a mapping"),
    ({"overrides": {"q_proj": "dense"}}, "override 'q_proj': 'dense'; expected a layer pattern"),
    ({"overrides": {"q": {"keep": 0.5}}}, "unknown setting in the override 'q': 'keep'; did you mean 'keep_ratio'?"),
    ({"overrides": {"q_proj": {"keep_ratio": 2}}}, "override 'q_proj': keep_ratio=2; expected"),
    ({"overrides": {"q_proj": {"rank": -2}}}, "override 'q_proj': rank=-2; expected"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), BAD)
def test_bad_values_are_one_clear_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CELoraError) as error:
        CELoraConfig.from_dict(values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_changes_of_what_concerns_all_layers() -> None:
    assert resolve("exact", {"padding_free": False}) == dataclasses.replace(PRESETS["exact"], padding_free=False)
    without = resolve(dataclasses.replace(PRESETS["auto"], head_keep_ratio=0.1), {"labelled_head": False})
    assert (without.labelled_head, without.padding_free, without.head_keep_ratio) == (False, False, 1.0)
    with pytest.raises(CELoraError, match="padding_free=True needs labelled_head=True"):
        resolve("exact", {"labelled_head": False, "padding_free": True})
    with pytest.raises(CELoraError, match="keep_ratio is a setting of layers; give a CELoraConfig"):
        resolve("paper", {"keep_ratio": 0.3})
    with pytest.raises(CELoraError, match="unknown setting 'labeled_head'; did you mean 'labelled_head'"):
        resolve("exact", {"labeled_head": False})
    with pytest.raises(CELoraError, match=r"a preset is the second argument; write celora.attach\(model, 'fast'\)"):
        resolve("paper", {"preset": "fast"})


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(CELoraError, match="unknown preset 'papper'; did you mean 'paper'"):
        resolve("papper")
    with pytest.raises(CELoraError, match=r"'plan.json' is a file; give celora.CELoraConfig.load"):
        resolve("plan.json")
    with pytest.raises(CELoraError, match="expected a CELoraConfig or one of"):
        resolve(3)  # type: ignore[arg-type]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(CELoraError, match="cannot read"):
        CELoraConfig.load(tmp_path / "none.json")
    (tmp_path / "celora_config.json").write_text('{"rank": 3,\n oops}')
    with pytest.raises(CELoraError, match=r"celora_config.json:2: not JSON"):
        CELoraConfig.load(tmp_path)


@pytest.mark.parametrize("setting", ["forward", "saved_input"])
def test_a_configuration_without_a_later_setting_has_its_default(setting: str) -> None:
    """Configurations from before the 8-bit forward do not have its settings."""
    values = {key: value for key, value in CELoraConfig().to_dict().items() if key != setting}
    assert CELoraConfig.from_dict(values) == CELoraConfig()


def test_logits_in_8_bits_need_the_head_over_labelled_tokens() -> None:
    with pytest.raises(CELoraError, match="head_forward='int8' needs labelled_head=True"):
        CELoraConfig(head_forward="int8")
    with pytest.raises(CELoraError, match="unknown head_forward 'int4'"):
        CELoraConfig(head_forward="int4", labelled_head=True)
