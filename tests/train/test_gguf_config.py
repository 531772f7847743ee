"""Configurations from the metadata of GGUF files: celora reads what a family rotates and scales, or refuses."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from celora.errors import CELoraError
from celora.train.formats.gguf_base import converted
from celora.train.formats.gguf_config import gguf_config
from celora.train.formats.gguf_file import read_header
from decoders import model_of
from ggufs import write_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 23)[None]).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def base_of(kind="llama", **more):
    scores = {"query_pre_attn_scalar": 8} if kind in ("gemma2", "gemma3_text") else {}
    return model_of(kind, **scores, **more).unload().eval()


def test_sizes_and_special_tokens_are_the_files(tmp_path):
    model = base_of("qwen3")
    found = gguf_config(read_header(write_model(tmp_path / "model.gguf", model, words=True)))
    names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "bos_token_id", "eos_token_id")
    assert [getattr(found, name) for name in names] == [getattr(model.config, name) for name in names]


@pytest.mark.parametrize(("blocks", "width"), [(46, 8), (2, 16)])
def test_the_largest_gemma_scales_its_scores_by_another_width(blocks, width, tmp_path):
    model = base_of("gemma2", num_hidden_layers=blocks, head_dim=16)
    found = gguf_config(read_header(write_model(tmp_path / "model.gguf", model, words=True)))
    assert found.query_pre_attn_scalar == width


def test_llama_3s_rotation_is_found_from_what_it_came_to(tmp_path):
    rotation = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rotation |= {"original_max_position_embeddings": 8192, "rope_theta": 10_000.0}
    model = base_of(rope_parameters=rotation, max_position_embeddings=16_384, head_dim=16)
    divisors = 1 / (model.model.rotary_emb.inv_freq * 10_000.0 ** (torch.arange(0, 16, 2) / 16))
    assert divisors.max() > 1.5
    path = write_model(
        tmp_path / "model.gguf", model, words=True,
        more=lambda writer: writer.add_tensor("rope_freqs.weight", divisors.numpy()),
    )  # fmt: skip
    found = load(converted(path))
    assert found.config.rope_parameters["factor"] == pytest.approx(float(divisors.max()))
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "scaling"),
    [
        ("llama", {"rope_type": "linear", "factor": 4.0}),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
        ("gemma3_text", {"rope_type": "linear", "factor": 8.0}),
        ("phi3", {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 6.0, 8.0]}),
    ],
)
def test_other_rotations_are_read(kind, scaling, tmp_path):
    rotation = scaling | {"rope_theta": 10_000.0}
    more = {}
    if kind == "gemma3_text":
        rotation = {
            "full_attention": rotation,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        }
    if kind == "phi3":
        rotation["original_max_position_embeddings"] = more["original_max_position_embeddings"] = 32
    model = base_of(kind, rope_parameters=rotation, **more)

    def add(writer):
        if kind == "phi3":
            for length in ("short", "long"):
                writer.add_tensor(f"rope_factors_{length}.weight", np.array(scaling[f"{length}_factor"], np.float32))
            return
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])

    found = load(converted(write_model(tmp_path / "model.gguf", model, more=add, words=True)))
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("said", "factor"),
    [
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 4.0}, 4.0),  # an older name
        ({"rope.scaling.factor": 2.0, "rope.scale_linear": 4.0}, 2.0),
        ({"rope.scaling.factor": 0.0, "rope.scale_linear": 4.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, 1.0),
    ],
)
def test_a_scale_is_read_as_llama_cpp_does(said, factor, tmp_path):
    def more(writer):
        for key, value in said.items():
            add = writer.add_string if isinstance(value, str) else writer.add_float32
            add(f"llama.{key}", value)

    found = gguf_config(read_header(write_model(tmp_path / "model.gguf", base_of(), more=more))).rope_parameters
    assert (found["rope_type"], found.get("factor")) == ("default" if factor is None else "linear", factor)


def test_a_yarn_without_its_first_length_has_that_of_the_model(tmp_path):
    def more(writer):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)

    found = gguf_config(read_header(write_model(tmp_path / "model.gguf", base_of(), more=more)))
    assert found.rope_parameters["original_max_position_embeddings"] == found.max_position_embeddings


@pytest.mark.parametrize("key", ["attn_factor", "yarn_beta_fast"])
def test_what_scales_a_rotation_further_is_refused(key, tmp_path):
    def more(writer):
        writer.add_float32(f"llama.rope.scaling.{key}", 2.0)

    with pytest.raises(CELoraError, match=rf"says 2.0 under llama.rope.scaling.{key}; expected (1|32)"):
        gguf_config(read_header(write_model(tmp_path / "model.gguf", base_of(), more=more)))
