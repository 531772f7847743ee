"""Arguments: every name of TRL's, three sources with one conversion, and one line for each mistake."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch

from asked import OWN, fails, write
from celora.errors import CELoraError
from celora.settings.config import LayerConfig
from celora.train.request.arguments import estimator_config, make_request, parse, recorded, sft_config
from celora.train.request.fields import (
    ALIASES,
    DEFAULTS,
    REFUSED,
    SYNONYMS,
    check_flags,
    convert,
    help_all,
    known_fields,
)
from celora.train.request.names import launcher_names
from celora.train.rows.places import local_files
from trl_fields import TRL_SFT


def test_every_field_of_trl_is_known():
    names = {f.name for cls in TRL_SFT for f in dataclasses.fields(cls)}
    assert names - set(known_fields()) == {"output_dir", "model_name_or_path", "dataset_name"}
    assert set(DEFAULTS) <= names
    assert set(REFUSED) <= names
    for name in known_fields():
        assert f"  --{name}  " in help_all()


def test_flags_take_trls_names_with_underscores_or_dashes():
    tokens = "--max_steps 40 --learning-rate 2e-4 --lora_r=8 --lora-target-modules q_proj v_proj --bf16 false --packing"
    request = parse(
        [*tokens.split(), "--model_init_kwargs", '{"use_cache": false}', "--no_average_tokens_across_devices"], OWN
    )
    assert request.train["max_steps"] == 40
    assert request.train["learning_rate"] == 2e-4
    assert request.train["bf16"] is False
    assert request.train["packing"] is True
    assert request.train["average_tokens_across_devices"] is False
    assert request.train["model_init_kwargs"] == {"use_cache": False}
    assert request.lora["lora_target_modules"] == ["q_proj", "v_proj"]
    assert request.lora_r == 8


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("max_length", "none", None),
        ("max_length", None, None),
        ("learning_rate", "2e-4", 2e-4),
        ("logging_steps", "5", 5),
        ("eval_strategy", False, "no"),
        ("report_to", "none", "none"),
        ("bf16", "FALSE", False),
        ("lora_target_modules", "all-linear", ["all-linear"]),
        ("include_num_input_tokens_seen", "all", "all"),
        ("lr_scheduler_type", "cosine", "cosine"),
        ("max_steps", "-1", -1),
        ("pad_to_multiple_of", "8", 8),
    ],
)
def test_conversion(name, raw, value):
    assert convert(known_fields()[name], raw) == value


@pytest.mark.parametrize(
    ("tokens", "parts"),
    [
        ("--max_step 3", ["--max_step;", "did you mean --max_steps?"]),
        ("--max_steps abc", ["max_steps='abc'", "whole number"]),
        ("--max_steps 1.5", ["max_steps='1.5'", "whole number"]),
        ("--max_steps", ["needs a value", "whole number"]),
        ("--learning_rate high", ["learning_rate='high'", "a number"]),
        ("--packing maybe", ["packing='maybe'", "true or false"]),
        ("--lr_scheduler_type cosin", ["'cosine'"]),
        ("--dtype int3", ["dtype", "float32"]),
        ("--dataset_kwargs {a", ["JSON"]),
        ("--lora_r -4", ["lora_r=-4", ">= 1"]),
        ("--lora_r 8 9", ["lora_r=['8', '9']"]),
        ("--preset papper", ["'paper'"]),
        ("--trust_remote_code true", ["refused"]),
        ("--use_peft false", ["LoRA adapters only"]),
        ("--resume_from_checkpoint x", ["--resume"]),
        ("--dataset_streaming", ["dataset_streaming=True is refused", "memory stays flat without it"]),
        ("--streaming true", ["streaming=True is refused"]),
        ("--ignore_bias_buffers", ["ignore_bias_buffers=True is refused"]),
        ("--test_split_size 0.1", ["test_split_size=0.1 is refused", "eval_data"]),
        ("--gradient_checkpointing_kwargs x", ["gradient_checkpointing_kwargs='x'", "expected a mapping"]),
        ('--dataset_kwargs {"skip_prepare_dataset":true}', ["skip_prepare_dataset", "is refused"]),
        ("--num_processes 4", ["--num_processes belongs to the launcher", "accelerate launch --num_processes"]),
        ("--accelerate_config zero2", ["belongs to the launcher"]),
        ("stray", ["'stray'"]),
        ("--config nowhere.yaml", ["nowhere.yaml", "No such file"]),
    ],
)
def test_mistakes_are_one_line(tokens, parts):
    fails(tokens.split(), *parts)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--lr", "learning_rate"),
        ("--epochs", "num_train_epochs"),
        ("--batch_size", "per_device_train_batch_size"),
        ("--batch-size=8", "per_device_train_batch_size"),
        ("--max_seq_length", "max_length"),
        ("--rank", "lora_r"),
        ("--modle", "model"),
    ],
)
def test_what_other_tools_call_it_is_answered_with_its_name_here(flag, name):
    for read in (lambda tokens: parse(tokens, OWN), check_flags):
        with pytest.raises(CELoraError, match=rf"unknown option {flag.partition('=')[0]}; did you mean --{name}\?"):
            read([flag, "3"])


def test_what_other_tools_call_it_is_no_name_of_ours():
    known, meant = set(known_fields()) | set(ALIASES) | launcher_names(), set(SYNONYMS.values())
    assert not known & set(SYNONYMS)
    assert meant <= set(known_fields())


def test_missing_and_contradicting_options():
    fails([], "--output is missing", own={"model": "m", "data": "d"})
    with pytest.raises(CELoraError, match="exclude each other"):
        make_request({**OWN, "resume": True, "overwrite": True})


def test_paper_preset_balances_both_ranks():
    assert (make_request(OWN).preset, make_request(OWN).r) == ("auto", 16)
    request = make_request({**OWN, "lora_r": 16, "preset": "paper"})
    assert (request.preset, request.r, request.config.rank, request.lora_r) == ("paper", 14, "adapter", 16)
    assert make_request({**OWN, "preset": "off"}).r == 16
    over = make_request({**OWN, "preset": "paper", "celora": {"refresh_every": 3}})
    assert (over.config.refresh_every, over.r) == (3, 14)
    fixed = make_request({**OWN, "preset": "paper", "celora": {"rank": 5}})
    assert (fixed.config.rank, fixed.r) == (5, 16)


def test_defaults_that_differ_from_trl():
    args = sft_config(make_request({**OWN, "use_cpu": True}))
    assert args.learning_rate == 2e-4
    assert args.gradient_checkpointing is False
    assert args.bf16 is False
    assert args.report_to == []
    assert args.dataloader_pin_memory is False
    assert sft_config(make_request({**OWN, "gradient_checkpointing": True, "use_cpu": True})).gradient_checkpointing
    request = make_request(OWN)
    assert request.lora["dtype"] == "auto"
    assert request.lora["lora_target_modules"] == ["all-linear"]


def test_copies_of_pinned_batches_do_not_wait(monkeypatch):
    assert "accelerator_config" not in make_request(OWN).train
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert make_request(OWN).train["accelerator_config"] == {"non_blocking": True}
    assert "accelerator_config" not in make_request({**OWN, "dataloader_pin_memory": False}).train
    assert "accelerator_config" not in make_request({**OWN, "use_cpu": True}).train
    own = {"even_batches": False}
    assert make_request({**OWN, "accelerator_config": own}).train["accelerator_config"] == own


def test_what_sftconfig_refuses_is_one_line():
    with pytest.raises(CELoraError, match="warmup_steps") as caught:
        sft_config(make_request({**OWN, "warmup_steps": -3}))
    assert "\n" not in str(caught.value)


def test_what_sftconfig_refuses_has_the_settings_name():
    with pytest.raises(CELoraError, match=r"^pad_to_multiple_of='x': invalid literal for int\(\) with base 10: 'x'$"):
        sft_config(make_request({**OWN, "pad_to_multiple_of": "x", "use_cpu": True}))


def test_a_whole_number_is_a_beta_too():
    """torch takes two floats, or two tensors."""
    args = sft_config(make_request({**OWN, "adam_beta1": "0", "adam_beta2": 0, "use_cpu": True}))
    assert (args.adam_beta1, args.adam_beta2) == (0.0, 0.0)
    assert {type(args.adam_beta1), type(args.adam_beta2)} == {float}


def test_resume_keeps_earlier_arguments_and_refuses_to_change_the_run(tmp_path):
    own = {**OWN, "output": str(tmp_path)}
    first = parse(["--max_steps", "40", "--lora_r", "8"], own)
    record = {"celora": "0", "given": first.given, "train": {"seed": 42}, "lora": first.lora, "r": first.r}
    record |= {"preset": first.preset, "config": first.config.to_dict()}
    write(tmp_path / "run.json", json.dumps(record, default=str))

    again = parse(["--max_steps", "80"], {"output": str(tmp_path), "resume": True})
    assert (again.train["max_steps"], again.lora_r, again.model) == (80, 8, "m")
    fails(["--lora_r", "4"], "cannot change lora_r (8 -> 4)", own={"output": str(tmp_path), "resume": True})
    fails(["--seed", "7"], "cannot change seed (42 -> 7)", own={"output": str(tmp_path), "resume": True})
    fails([], "cannot change", own={"output": str(tmp_path), "resume": True, "preset": "off"})
    record["processes"] = 2
    write(tmp_path / "run.json", json.dumps(record, default=str))
    fails([], "cannot change the number of processes (2 -> 1)", own={"output": str(tmp_path), "resume": True})
    fails([], "nothing to resume", own={"output": str(tmp_path / "none"), "resume": True})


def test_what_json_cannot_hold_is_resumed_with(tmp_path):
    init = {"rope_theta": float("inf"), "max_memory": {0: "1GiB"}}
    request = make_request({**OWN, "output": str(tmp_path), "max_grad_norm": "inf", "model_init_kwargs": init})
    record = {"celora": "0", "given": recorded(request.given), "train": {"max_grad_norm": None}, "lora": request.lora}
    record |= {"r": request.r, "config": request.config.to_dict()}
    write(tmp_path / "run.json", json.dumps(record, allow_nan=False))
    again = {"output": str(tmp_path), "resume": True}
    assert parse(["--max_grad_norm", "inf"], again).train["max_grad_norm"] == float("inf")
    assert parse([], again).train["model_init_kwargs"] == {"rope_theta": float("inf"), "max_memory": {"0": "1GiB"}}
    fails(["--max_grad_norm", "2"], "cannot change max_grad_norm (inf -> 2)", own=again)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--learning_rate nan", "learning_rate=nan; expected a finite number. LoRA usually wants about 2e-4"),
        ("--learning_rate 1e400", "learning_rate=inf; expected a finite number"),
        ("--max_length -5", "max_length=-5; expected a number >= 1"),
        ("--max_steps " + 99 * "9", "max_steps=999999999999999999999999999...; expected a number of 64 bits"),
        ("--max_steps " + 400 * "9", "expected a number of 64 bits"),
        ("--max_steps -3", "expected a number >= -1"),
        ("--max_steps 0", "max_steps=0 trains nothing; give 1 or more, or -1 to train num_train_epochs"),
        ("--num_train_epochs 0", "num_train_epochs=0; expected a number > 0"),
        ("--gradient_accumulation_steps -2", "expected a number >= 1"),
        ("--per_device_train_batch_size 0", "expected a number >= 1"),
        ("--save_total_limit -1", "0 keeps every checkpoint"),
        ("--eval_accumulation_steps 0", "expected a number >= 1"),
        ("--dataloader_prefetch_factor 0", "expected a number >= 1"),
        ("--pad_to_multiple_of 0", "expected a number >= 1"),
        ("--adam_beta1 1", "adam_beta1=1; expected a number >= 0 and < 1"),
        ("--seed 4294967296", "expected a number >= 0 and <= 4294967295"),
        ("--logging_steps nan", "expected a finite number"),
    ],
)
def test_numbers_that_a_setting_cannot_be(flag, message):
    fails(flag.split(), message)


@pytest.mark.parametrize("name", ["model", "data", "output"])
@pytest.mark.parametrize("value", ["x" * 300, "a\0b", "~nobody-of-this-name/x", "o\udcff"])
def test_names_that_cannot_be_paths_are_one_line(name, value):
    for more in ({}, {"resume": True}) if name == "output" else ({},):
        with pytest.raises(CELoraError, match="cannot be a path") as caught:
            parse([], OWN | {name: value} | more)
        assert str(caught.value).isascii()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["eval_data", "chat_template_path", "deepspeed"])
def test_a_file_is_found_again_from_another_folder(name, tmp_path, monkeypatch):
    (tmp_path / "file.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    request = parse([], OWN | {name: "file.json"})
    assert request.given[name] == str(tmp_path / "file.json")
    used = getattr(request.options, name, None) or request.train[name]
    assert used == str(tmp_path / "file.json")


def test_a_file_below_the_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "file.json").write_text("{}")
    assert parse([], OWN | {"eval_data": "~/file.json"}).options.eval_data == str(tmp_path / "file.json")


def test_a_link_to_a_file_keeps_its_ending(tmp_path):
    """The hub's cache has such links: to files whose name is their digest."""
    (tmp_path / "5e0a").write_text("{}")
    link = tmp_path / "rows.jsonl"
    link.symlink_to(tmp_path / "5e0a")
    assert parse([], OWN | {"data": str(link)}).data == str(link)


def test_a_link_to_a_device_is_refused_under_its_own_name(tmp_path):
    """So is a pipe of the shell, which is a link, too."""
    (tmp_path / "rows").symlink_to(os.devnull)
    with pytest.raises(CELoraError, match=r"cannot read '.*/rows': a pipe or a device; expected a file"):
        local_files(make_request(OWN | {"data": str(tmp_path / "rows")}).data, "train")


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_is_settled_under_both_of_its_names(name):
    if name not in known_fields():
        pytest.skip("this version of Transformers has one name for it")
    assert make_request({**OWN, name: False}).asks_for_checkpointing
    assert not make_request(OWN).asks_for_checkpointing


def test_a_template_that_trl_would_not_read_is_refused(tmp_path):
    template = tmp_path / "template.txt"
    template.write_text("{{ messages }}")
    with pytest.raises(CELoraError, match=r"template.txt'; TRL reads templates from .jinja and .j2 files alone"):
        sft_config(make_request({**OWN, "use_cpu": True, "chat_template_path": str(template)}))
    fine = template.rename(tmp_path / "template.j2")
    assert sft_config(make_request({**OWN, "use_cpu": True, "chat_template_path": str(fine)})).chat_template_path


def test_numbers_at_their_bounds_are_taken():
    flags = (
        "--max_steps -1 --learning_rate 0 --max_grad_norm inf --save_total_limit 0 --lora_dropout 0 --max_length none"
    )
    assert parse(flags.split(), OWN).train["max_grad_norm"] == float("inf")


def test_overrides_beside_a_preset_add_to_it():
    config, r = estimator_config("paper", {"overrides": {"layers.0.mlp.up_proj": {"keep_ratio": 0.25}}}, 16)
    assert r == 14
    assert config.for_layer("model.layers.0.mlp.up_proj") == LayerConfig("columns", 0.25, "adapter")
    assert config.for_layer("model.layers.1.mlp.up_proj") == LayerConfig("columns", 0.65, "adapter")
    assert config.for_layer("model.layers.0.self_attn.v_proj").keep_ratio == 0.55


def test_evaluations_are_as_far_apart_as_with_trl():
    base = {"model": "m", "data": "d", "output": "o"}
    assert make_request(base).train["eval_steps"] == 10
    assert make_request(base | {"logging_steps": 25}).train["eval_steps"] == 25
    assert make_request(base | {"logging_steps": 25, "eval_steps": 50}).train["eval_steps"] == 50
    best = make_request(base | {"load_best_model_at_end": True, "save_steps": 25, "eval_strategy": "steps"}).train
    assert best["eval_steps"] == 25


@pytest.mark.parametrize("field", ["estimator", "keep_ratio"])
def test_what_a_preset_would_shadow_is_refused(field):
    with pytest.raises(CELoraError, match=f"{field} has no effect beside preset 'paper'"):
        estimator_config("paper", {field: "columns" if field == "estimator" else 0.1}, 16)
