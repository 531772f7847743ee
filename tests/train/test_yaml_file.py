"""Settings in a file: the same names as flags, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import pytest
import yaml

from asked import OWN, fails, write
from celora.errors import CELoraError
from celora.settings.config import CELoraConfig
from celora.settings.presets import resolve
from celora.train.request.arguments import make_request, parse, read_yaml
from celora.train.request.yaml_file import set_environment
from trl_fields import TRL_SFT


def test_a_file_of_trl_sft_with_every_default_written_out(tmp_path):
    """celora accepts every setting of `trl sft` that has its default value."""
    values = {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for cls in TRL_SFT
        for f in dataclasses.fields(cls)
        if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
    }
    values |= {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "out", "use_peft": True}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(values, default=str))), encoding="utf-8")
    request = parse([], {"config": str(tmp_path / "sft.yaml")})
    assert (request.model, request.data, request.lora["lora_dropout"]) == ("m", "d", 0.05)


def test_what_a_file_of_trl_sft_asks_for_is_refused_by_name(tmp_path):
    mixture = "datasets: [{path: a}, {path: b}]"
    fails(
        [], "datasets=", "put the rows of all of them into one folder", own={"config": write(tmp_path / "m", mixture)}
    )
    for text, part in (("trust_remote_code: true", "never runs code"), ("use_peft: false", "LoRA adapters only")):
        fails([], text.partition(":")[0], part, own=OWN | {"config": write(tmp_path / "y", text)})


def test_launch_settings_in_a_file(tmp_path, monkeypatch):
    own = OWN | {"config": write(tmp_path / "sft.yaml", "num_processes: 2")}
    fails([], "key 'num_processes'", "accelerate launch --num_processes ... -m celora train", own=own)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "num_processes" not in parse([], own).given
    own = OWN | {"config": write(tmp_path / "one.yaml", "num_processes: 1")}
    monkeypatch.delenv("WORLD_SIZE")
    assert parse([], own).model == "m"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_steps: 1\nseed: 1\nmax_steps: 2", "the key 'max_steps' comes twice in one mapping in .*line 3"),
        ("celora: {rank: 0, overrides: {a: {rank: 4, rank: 4}}}", "the key 'rank' comes twice"),
        ("max_steps: 1\nmax-steps: 1", r"key 'max-steps' in \S+ says max_steps a second time"),
        ("model: a\nmodel_name_or_path: b", r"key 'model_name_or_path' in \S+ says model a second time"),
        ('celora: \'{"rank": 0, "rank": 4}\'', "the key 'rank' comes twice in one object"),
    ],
)
def test_a_key_that_comes_twice_in_a_file(text, words, tmp_path):
    with pytest.raises(CELoraError, match=words) as caught:
        parse([], OWN | {"config": write(tmp_path / "sft.yaml", text)})
    assert "\n" not in str(caught.value)


def test_what_is_merged_into_a_mapping_may_be_overridden(tmp_path):
    text = "celora: &c {<<: &a {rank: 0, seed: 3}, rank: 4}\nlr_scheduler_kwargs: {<<: *c, seed: 5, 4: 1, '4': 2}"
    found = read_yaml(write(tmp_path / "sft.yaml", text))
    assert found["celora"] == {"rank": 4, "seed": 3}
    assert found["lr_scheduler_kwargs"] == {"rank": 4, "seed": 5, 4: 1, "4": 2}


def test_the_environment_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "before")
    file = write(tmp_path / "sft.yaml", "env: {WANDB_PROJECT: 3}\nmax_steps: 7")
    assert parse([], OWN | {"config": file}).train["max_steps"] == 7
    set_environment(file)
    assert os.environ["WANDB_PROJECT"] == "3"
    with pytest.raises(CELoraError, match=r"env in --config .* is \[1\]; expected a mapping"):
        set_environment(write(tmp_path / "bad.yaml", "env: [1]"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((f"{name}: /elsewhere", f"'{name}' is not set from a file") for name in (
            "PATH", "LD_PRELOAD", "PYTHONPATH", "HF_ENDPOINT", "HF_HOME", "HF_TOKEN", "HTTPS_PROXY", "WANDB_BASE_URL",
            "XDG_CACHE_HOME", "RANK", "CC")),
        ('"": x', "'' is not set from a file"),
        ("3: x", "3 is not set from a file"),
        ('"A=B": x', "'A=B' is not set from a file"),
        ('"A\\0": x', "is not set from a file"),
        ("WANDB_PROJEKT: x", "or did you mean WANDB_PROJECT?"),
        ('WANDB_NAME: "a\\0b"', "WANDB_NAME is 'a\\x00b'; expected text or a number"),
        ('WANDB_NAME: "\\ud800"', "expected text or a number"),
        ("WANDB_NAME: [a]", "WANDB_NAME is ['a']; expected text or a number"),
        ("WANDB_NAME:", "WANDB_NAME is None; expected text or a number"),
    ],
)  # fmt: skip
def test_variables_that_a_file_may_not_set(text, words, tmp_path):
    before = dict(os.environ)
    with pytest.raises(CELoraError, match=re.escape(words)) as caught:
        set_environment(write(tmp_path / "sft.yaml", f"env:\n  WANDB_PROJECT: mine\n  {text}"))
    assert "\n" not in str(caught.value)
    assert dict(os.environ) == before


def test_yaml_takes_the_same_names_and_flags_win(tmp_path):
    text = """
model_name_or_path: m
dataset_name: d.jsonl
output_dir: out
use_peft: true
max_steps: 40
learning_rate: 1e-3
eval_strategy: no
lora_target_modules: [q_proj, v_proj]
celora: {estimator: columns, keep_ratio: 0.3, rank: 4, refresh_every: 7, overrides: {"*.q_proj": {estimator: dense}}}
"""
    request = parse(["--max_steps", "5"], {"config": write(tmp_path / "run.yaml", text)})
    assert (request.model, request.data, request.output.name) == ("m", "d.jsonl", "out")
    assert request.train["max_steps"] == 5
    assert request.train["learning_rate"] == 1e-3
    assert request.train["eval_strategy"] == "no"
    assert request.config.keep_ratio == 0.3
    assert request.config.rank == 4
    assert request.config.for_layer("layers.0.q_proj").estimator == "dense"
    assert request.preset is None
    assert request.r == 16


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("max_step: 3", ["key 'max_step'", "'max_steps'"]),
        ("max_steps: [1, 2]", ["max_steps=[1, 2]"]),
        ("celora: {keep_ratio: 1.4}", ["keep_ratio=1.4", "0 < keep_ratio <= 1"]),
        ("celora: {keep_ratio: 0}", ["keep_ratio=0"]),
        ("celora: {rank: -1}", ["rank=-1"]),
        ("celora: {keep_ration: 0.5}", ["'keep_ration'", "'keep_ratio'"]),
        ("celora: columns", ["celora='columns'", "mapping"]),
        ("a: [", ["not valid YAML"]),
        ("- a\n- b", ["list", "mapping"]),
    ],
)
def test_yaml_mistakes_are_one_line(tmp_path, text, parts):
    fails([], *parts, own={**OWN, "config": write(tmp_path / "run.yaml", text)})


def test_a_file_that_is_not_utf_8_says_so(tmp_path):
    """PowerShell's `>` writes UTF-16."""
    (tmp_path / "run.yaml").write_text("max_steps: 3", encoding="utf-16")
    fails([], "is not UTF-8 text; save it as UTF-8", own={**OWN, "config": str(tmp_path / "run.yaml")})


def test_a_saved_celora_config_is_a_config_file(tmp_path):
    request = make_request({**OWN, "celora": {"keep_ratio": 0.4, "rank": 3}})
    request.config.save(tmp_path / "celora_config.json")
    assert parse([], {**OWN, "config": str(tmp_path / "celora_config.json")}).config == request.config


def test_off_is_off_whatever_the_file_says(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndata: d\noutput: o\ncelora: {estimator: columns, keep_ratio: 0.5}\n")
    off = parse(["--config", str(path)], {"preset": "off"})
    assert (off.preset, off.config) == ("off", CELoraConfig.from_dict(resolve("off").to_dict()))
    with pytest.raises(CELoraError, match="estimator has no effect beside preset 'exact'"):
        parse(["--config", str(path)], {"preset": "exact"})
