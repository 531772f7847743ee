"""Stand-ins: what celora finds out on a few blocks holds for the whole model."""

from __future__ import annotations

import copy
import json
from itertools import accumulate, chain
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, Gemma3Config

from celora import CELoraConfig
from celora.errors import CELoraError
from celora.modeling.int8_base import quantise_base
from celora.modeling.switch import Mode
from celora.runtime.attachment import require
from celora.train.forecast.blocks import (
    Line,
    how_many_blocks,
    measure,
    mlp_width,
    outline,
    seconds,
    stand_in,
    stand_in_config,
)
from celora.train.loading import lora_config, quiet_libraries, training_rows
from celora.train.request.arguments import make_request, sft_config
from celora.train.trainer import build_trainer
from patching import patch_all


@pytest.fixture
def setting(inputs, tmp_path, monkeypatch):
    """A request on the tiny model as if it had six blocks, and a function that measures it without a real clock."""

    def seconds(probe, batch, optimizer):
        model = probe.model.get_base_model()
        return (0.04 if model.is_gradient_checkpointing else 0.03) * len(model.model.layers)

    patch_all(monkeypatch, "celora.train.forecast.blocks:seconds", seconds)

    def found(preset, dtype=torch.float32, int8=False, blocks=6, **more):
        request = make_request({**inputs, "output": str(tmp_path / "out"), "preset": preset, "lora_r": 4, **more})
        config = AutoConfig.from_pretrained(inputs["model"])
        config.num_hidden_layers = blocks
        with quiet_libraries():
            args, tokenizer = sft_config(request), AutoTokenizer.from_pretrained(inputs["model"])
            rows = training_rows(request, tokenizer)

            def build(model):
                return build_trainer(request, copy.copy(args), model, tokenizer, rows, peft=lora_config(request))

            return request, config, build, measure(request, build, config, dtype, int8=int8)

    return found


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_of_the_whole_are_foreseen(setting, dtype, int8):
    _, config, build, cost = setting("exact", dtype, int8)
    whole = stand_in(config, 6, dtype, None)
    if int8:
        quantise_base(whole)
    with quiet_libraries():
        peft = build(whole).model
    trained = sum(p.nbytes for p in peft.parameters() if p.requires_grad)
    frozen = sum(t.nbytes for t in (*peft.parameters(), *peft.buffers())) - trained
    assert cost.trained[0] + 6 * cost.trained[1] == trained
    assert cost.weights[0] + 6 * cost.weights[1] == pytest.approx(frozen)
    assert cost.copies == (0, 0)
    assert cost.itemsize == dtype.itemsize
    largest = config.hidden_size * config.intermediate_size if int8 else 0
    assert cost.dense == largest * (1 + dtype.itemsize)


def test_steps_are_timed_after_the_first_refresh(setting, monkeypatch):
    """A preset measures its layers in turns in the first ten steps, but a long run has others."""
    modes = []

    def timed(probe, batch, optimizer):
        found = seconds(probe, batch, optimizer)
        modes.extend(graft.mode for graft in require(probe.model).grafts.values() if graft.needed is not False)
        return found

    patch_all(monkeypatch, "celora.train.forecast.blocks:seconds", timed)
    turns = CELoraConfig(keep_ratio=0.5, rank=2, spread=True)
    patch_all(monkeypatch, "celora.train.forecast.blocks:settled_config", lambda request, probe: turns)
    setting("auto", blocks=2)
    assert set(modes) == {Mode.ESTIMATE}


def test_what_is_kept_grows_with_blocks_and_presets_keep_less(setting):
    exact, off = setting("exact")[3], setting("off")[3]
    assert 0 < exact.kept[1] < off.kept[1]
    assert exact.packed
    assert not off.packed


def test_padding_stays_where_settings_of_the_user_keep_it(setting):
    assert not setting("exact", celora={"padding_free": False})[3].packed
    assert not setting(None, celora={"estimator": "dense"})[3].packed
    assert setting("off", celora={"labelled_head": True, "padding_free": True})[3].packed


def test_a_block_takes_what_two_stand_ins_differ_by(setting):
    cost = setting("off")[3]
    for checkpointing, taken in ((False, 0.03), (True, 0.04)):
        outside, block = cost.step[checkpointing]
        assert block.at(100) == pytest.approx(taken)
        assert outside.at(100) == pytest.approx(0, abs=1e-9)


def test_a_model_of_one_block_is_all_block(setting):
    cost = setting("off", blocks=1)[3]
    assert cost.weights[0] == 0
    assert cost.weights[1] > 0


def test_lines():
    assert Line.through({10: 1.0, 20: 1.5}) == Line(0.5, 0.05)
    assert Line.through({10: 1.0, 20: 0.5}) == Line(0.5, 0.0)  # noise makes no time negative
    assert Line.through({10: 1.0, 20: 4.0}) == Line(0.0, 0.3)
    assert Line.through({10: 1.0}) == Line(0.0, 0.1)
    assert Line(1.0, 2.0).at(3) == 7.0


def test_a_stand_in_has_few_words_and_the_layers_of_its_beginning():
    config = AutoConfig.for_model("gemma2", num_hidden_layers=8, vocab_size=100_000, pad_token_id=99_999)
    small = stand_in_config(config, 2)
    assert (small.num_hidden_layers, small.vocab_size, small.pad_token_id) == (2, 8192, None)
    assert small.layer_types == config.layer_types[:2]
    assert config.num_hidden_layers == 8
    for blocks in (2, None):  # where the outer configuration has no number of blocks, too
        with pytest.raises(CELoraError, match="models of type 'gemma3' have other parts than text"):
            outline(Gemma3Config(), blocks)


def test_the_widest_matrix_tells_the_width_of_an_mlp_that_is_not_configured():
    assert mlp_width(outline(AutoConfig.for_model("llama", intermediate_size=100))) == 100
    assert mlp_width(outline(AutoConfig.for_model("gpt2", vocab_size=32, n_embd=8, n_head=2, n_layer=2))) == 32
    opt = {"hidden_size": 8, "word_embed_proj_dim": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    assert mlp_width(outline(AutoConfig.for_model("opt", vocab_size=32, ffn_dim=24, **opt))) == 24


def test_a_model_that_is_no_causal_language_model_is_one_line():
    for kind, said in {"t5": "Unrecognized configuration class", "mamba": "layer_types"}.items():
        config = AutoConfig.for_model(kind, vocab_size=32, num_hidden_layers=2)
        with pytest.raises(CELoraError, match=f"models of type '{kind}' are not estimated: .*{said}.*") as caught:
            stand_in(config, 1, torch.float32, None, torch.device("meta"))
        assert "\n" not in str(caught.value)


def test_large_blocks_are_two_small_ones_four():
    small = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=64, num_attention_heads=4)
    large = AutoConfig.for_model("llama", hidden_size=4096, intermediate_size=11008)
    assert how_many_blocks(small) == 4
    assert how_many_blocks(large) == 2
    assert json.dumps(small.to_dict())  # the configuration is unchanged


@pytest.mark.parametrize(("taken", "turns"), [([9, 1, 1, 1], 4), ([9, 3, 1, 1], 2), ([9, 1, 1.5, 1], 3)])
def test_slow_steps_have_fewer_turns(taken, turns, monkeypatch):
    now = iter(accumulate(chain([0], *([one, 0] for one in taken))))
    monkeypatch.setattr("celora.train.forecast.blocks.time", SimpleNamespace(perf_counter=lambda: next(now)))
    weight, calls = torch.nn.Parameter(torch.ones(1)), []
    probe = SimpleNamespace(model=None, compute_loss=lambda model, batch: calls.append(1) or weight.sum())
    assert seconds(probe, {}, torch.optim.SGD([weight], lr=0.1)) == min(taken[1:turns])
    assert len(calls) == turns
