"""GGUF files as base models: celora converts one into a folder with the same model, or makes no folder."""

from __future__ import annotations

import errno
import os
import stat

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from celora.errors import CELoraError
from celora.train.formats import gguf_base, shards
from celora.train.formats.architectures import ARCHITECTURES
from celora.train.formats.gguf_base import convert, converted, own_dtype
from celora.train.formats.gguf_file import read_header
from decoders import model_of
from ggufs import TEMPLATE, add_tokenizer, write_model

KINDS = gguf.GGMLQuantizationType
TOKENS = torch.arange(3, 23)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "celora" / "gguf"


def base_of(kind="llama", **more):
    """A model whose norms and biases differ from their defaults."""
    scores = {"query_pre_attn_scalar": 8} if kind in ("gemma2", "gemma3_text") else {}
    model = model_of(kind, **scores, **more).unload().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


CASES = [(kind, tied) for kind in ARCHITECTURES for tied in (True, False) if tied or not kind.startswith("gemma")]


@pytest.mark.parametrize(("kind", "tied"), CASES)
def test_the_converted_model_answers_as_the_one_that_was_written(kind, tied, tmp_path):
    model = base_of(kind, tie_word_embeddings=tied)
    folder = converted(write_model(tmp_path / "model.gguf", model, words=True))
    found = load(folder)
    assert found.config.model_type == ("llama" if kind == "mistral" else kind)
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)
    assert logits(model).std() > 0.01


def test_biases_are_read(tmp_path):
    model = base_of("llama", attention_bias=True, mlp_bias=True)
    found = load(converted(write_model(tmp_path / "model.gguf", model, words=True)))
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-5, atol=1e-5)


QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16")


@pytest.mark.parametrize("name", QUANTISED)
def test_what_is_quantised_is_unpacked(name, tmp_path):
    model, kind = base_of(), KINDS[name]
    header = read_header(write_model(tmp_path / "model.gguf", model, kind, words=True))
    folder = converted(header.path, "float32")
    up = model.model.layers[0].mlp.up_proj.weight.detach().numpy()
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(up, kind), kind))
    torch.testing.assert_close(load(folder).model.layers[0].mlp.up_proj.weight.detach(), expected, rtol=0, atol=0)
    assert own_dtype(header) == {"F16": torch.float16, "BF16": torch.bfloat16}.get(name, torch.bfloat16)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_of_256_numbers_are_unpacked(name, tmp_path):
    """The package cannot quantise to these formats. So their bytes are drawn, small enough for finite numbers."""
    kind = KINDS[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    model = base_of(hidden_size=block, intermediate_size=block)
    shape, packed = (block, block), np.random.default_rng(0).integers(0, 60, (block, size), dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        plain = gguf.quantize
        patch.setattr(gguf, "quantize", lambda x, k: packed if x.shape == shape and k == kind else plain(x, KINDS.F32))
        patch.setattr(gguf.GGUFWriter, "add_tensor", _as_packed(packed, kind, gguf.GGUFWriter.add_tensor))
        path = write_model(tmp_path / "model.gguf", model, kind, words=True)
    found = load(converted(path, "float32")).model.layers[0].mlp.up_proj.weight.detach()
    torch.testing.assert_close(found, torch.from_numpy(gguf.dequantize(packed, kind)), rtol=0, atol=0)


def _as_packed(packed, kind, add):
    def added(writer, name, tensor, **_):
        add(writer, name, tensor, raw_dtype=kind if tensor is packed else KINDS.F32)

    return added


def test_the_tokenizer_comes_from_the_file_alone(tmp_path):
    path = write_model(tmp_path / "model.gguf", base_of(), words=True)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("another")
    folder = converted(path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the cat<eos>")["input_ids"]) == ["Ġthe", "Ġ", *"cat", "<eos>"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.model_max_length) == ("<eos>", "<pad>", 64)
    assert load(folder).generation_config.eos_token_id == [1, 3]


@pytest.mark.parametrize(("says", "begins"), [(None, ["<bos>"]), (True, ["<bos>"]), (False, [])])
def test_a_tokenizer_of_llama_3_begins_a_text_and_looks_up_whole_words(says, begins, tmp_path):
    """What llama.cpp does with this name, and the file does not say."""

    model = base_of()

    def more(writer):
        add_tokenizer(writer, model.config.vocab_size, pre="llama-bpe", merges=["t h"])  # none makes "the"
        if says is not None:
            writer.add_add_bos_token(says)

    path = write_model(tmp_path / "model.gguf", model, more=more)
    tokenizer = AutoTokenizer.from_pretrained(converted(path))
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the cat")["input_ids"]) == [*begins, "Ġthe", "Ġ", *"cat"]


@pytest.mark.parametrize("refused", [[], ["symlink"], ["symlink", "link"]])
def test_where_no_file_may_be_linked_it_is_copied(refused, tmp_path, monkeypatch):
    """As on Windows: without its developer mode, and where the file is on another drive than the cache."""
    for kind in refused:
        monkeypatch.setattr(gguf_base.os, kind, _raising(OSError(errno.EXDEV, "The system cannot move the file")))
    path = write_model(tmp_path / "model.gguf", base_of(), words=True)
    assert AutoTokenizer.from_pretrained(converted(path)).chat_template == TEMPLATE


def test_a_file_is_converted_once_and_again_when_it_is_another(tmp_path, cache):
    said = []
    path = write_model(tmp_path / "model.gguf", base_of(), words=True)
    folder = converted(path, say=said.append)
    assert said == [f"Converting model.gguf to float32, once: {folder}"]
    assert converted(path, say=said.append) == folder
    assert len(said) == 1
    assert converted(path, "bfloat16", said.append) != folder
    write_model(path, base_of(intermediate_size=64), words=True)
    assert converted(path, say=said.append) != folder
    assert len(said) == 3
    assert len([entry for entry in cache.iterdir() if entry.is_dir()]) == 3
    if os.name != "nt":
        assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_weights_are_in_several_files_and_rows_are_unpacked_in_parts(tmp_path, monkeypatch):
    model = base_of()
    monkeypatch.setattr(gguf_base, "_MOST_BYTES", 20_000)
    monkeypatch.setattr("celora.train.formats.gguf_file._UNPACKED_AT_ONCE", 100)
    folder = converted(write_model(tmp_path / "model.gguf", model, words=True))
    assert len(list(folder.glob("*.safetensors"))) > 2
    torch.testing.assert_close(logits(load(folder)), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_conversion_leaves_nothing(error, tmp_path, cache, monkeypatch):
    path = write_model(tmp_path / "model.gguf", base_of(), words=True)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "save_file", _raising(error))
        with pytest.raises((KeyboardInterrupt, CELoraError)):
            converted(path)
    assert [entry.name for entry in cache.iterdir() if entry.suffix != ".lock"] == []
    assert converted(path).is_dir()


def _raising(error):
    def call(*_, **__):
        raise error

    return call


def adds(name, value):
    """Replace an entry of the file's metadata."""

    def more(writer):
        held = type(writer).add_key_value

        def add(self, key, found, *rest, **named):
            held(self, key, value if key == name else found, *rest, **named)

        writer.add_key_value = add.__get__(writer)

    return more


def tensor(name, *shape):
    return lambda writer: writer.add_tensor(name, np.ones(shape, np.float32))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (adds("llama.block_count", 2**31 - 1), "says that it has 2,147,483,647 blocks, and has not"),
        (adds("llama.block_count", 1), r"holds blk.1.attn_k.weight, which Transformers' LlamaForCausalLM has not"),
        (adds("llama.block_count", 0), "says 0 under llama.block_count; expected a whole number"),
        (adds("llama.embedding_length", 64), r"has no embedding of the width 64 .*, but one of \(64, 32\)"),
        (adds("llama.attention.head_count", 0), "says 0 under llama.attention.head_count"),
        (
            adds("llama.attention.head_count", 2**31 - 1),
            "attn_q.weight in .* and its metadata make it|rotates|makes no",
        ),
        (adds("llama.attention.head_count_kv", 4), r"attn_k.weight in .* is \(16, 32\), and its metadata make it"),
        (
            adds("llama.feed_forward_length", 2**31 - 1),
            r"ffn_gate.weight in .* is \(48, 32\), and its metadata make it",
        ),
        (adds("llama.attention.layer_norm_rms_epsilon", float("nan")), "says nan under .*; expected a number above 0"),
        (adds("llama.rope.freq_base", -1.0), "says -1.0 under llama.rope.freq_base; expected a number above 0"),
        (adds("llama.rope.dimension_count", 4), "rotates only 4 of the 8 numbers of a head"),
        (adds("llama.attention.value_length", 4), "has keys and values of different widths"),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            "says 'longrope' under llama.rope",
        ),
        (lambda writer: writer.add_type("adapter"), "is an adapter, not a model; give --model with the model's own"),
        (lambda writer: writer.add_uint16("split.count", 3), "is one of 3 parts; join them with llama-gguf-split"),
        (tensor("blk.0.ffn_gate_exps.weight", 2, 48, 32), "holds blk.0.ffn_gate_exps.weight, which .* has not"),
        (tensor("rope_freqs.weight", 4), None),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.full(4, 3, np.float32)), "which are not Llama 3's"),
        (tensor("rope_freqs.weight", 5), "has no rope_freqs.weight of 4 numbers"),
        (tensor("rope_factors_long.weight", 4), "has rotary factors that depend on the length of a text"),
        (adds("tokenizer.ggml.eos_token_id", 2**32 - 1), "says 4294967295 under tokenizer.ggml.eos_token_id"),
        (adds("tokenizer.ggml.model", "none"), "has no tokenizer that Transformers reads: ValueError"),
        (adds("tokenizer.ggml.pre", "its-own"), "splits text as 'its-own' does, which Transformers does not know"),
        (adds("tokenizer.ggml.tokens", ["a", "b"]), "has no tokenizer that Transformers reads"),
        (adds("tokenizer.ggml.tokens", [1] * 64), "has no tokenizer that Transformers reads"),
        (adds("tokenizer.ggml.merges", ["t"]), "has no tokenizer that Transformers reads"),
        (adds("tokenizer.ggml.merges", ["t q"]), "has no tokenizer that Transformers reads"),
        (adds("tokenizer.ggml.tokens", [f"w{i}" for i in range(99)]), "has no tokenizer that|has 99 tokens"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(more, said, tmp_path, cache):
    path = write_model(tmp_path / "model.gguf", base_of(), more=more, words=True)
    if said is None:
        assert converted(path).is_dir()
        return
    with pytest.raises(CELoraError, match=said) as caught:
        converted(path)
    assert len(str(caught.value).splitlines()) == 1
    assert not cache.exists() or [entry.name for entry in cache.iterdir() if entry.suffix != ".lock"] == []


@pytest.mark.parametrize("name", ["mamba", "lla\nm"])
def test_another_architecture_is_refused(name, tmp_path):
    path = write_model(tmp_path / "model.gguf", base_of(), words=True)
    path.write_bytes(path.read_bytes().replace(b"llama", name.encode(), 1))
    with pytest.raises(CELoraError, match=r"holds a model of .*, and only phi3, .*llama are read") as caught:
        converted(path)
    assert "\n" not in str(caught.value)


def test_a_tensor_that_is_missing_or_of_another_kind_is_named(tmp_path):
    model = base_of()
    path = write_model(tmp_path / "model.gguf", model)
    header = read_header(path)
    rest = {name: tensor for name, tensor in header.tensors.items() if name != "blk.1.ffn_up.weight"}
    (tmp_path / "new").mkdir()
    with pytest.raises(CELoraError, match=r"lacks blk.1.ffn_up.weight, which its model has"):
        convert(type(header)(header.path, header.fields, rest), tmp_path / "new", torch.float32)
    with pytest.raises(CELoraError, match="has no tokenizer that Transformers reads"):
        convert(header, tmp_path / "new", torch.float32)
    whole = read_header(
        write_model(
            path, model, words=True, more=lambda writer: writer.add_tensor("output_norm.bias", np.ones(32, "d"))
        )
    )
    with pytest.raises(CELoraError, match=r"output_norm.bias, which|is stored as F64"):
        convert(whole, tmp_path / "new", torch.float32)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    model = base_of()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] = float("inf")
    path = write_model(tmp_path / "model.gguf", model, words=True)
    with pytest.raises(CELoraError, match=r"'model.layers.1.mlp.down_proj.weight' holds NaN or infinity"):
        converted(path)


def test_where_the_cache_cannot_be_used_is_said(tmp_path, monkeypatch):
    path = write_model(tmp_path / "model.gguf", base_of(), words=True)
    monkeypatch.setattr(gguf_base, "cache_folder", _raising(PermissionError("it could be written to by others")))
    with pytest.raises(CELoraError, match="cannot be kept: it could be written to by others; set XDG_CACHE_HOME"):
        converted(path)


def test_a_disk_that_is_full_is_not_taken_for_a_tokenizer_that_is_none(tmp_path, monkeypatch):
    path = write_model(tmp_path / "model.gguf", base_of(), words=True)
    full = _raising(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(gguf_base.tempfile, "TemporaryDirectory", full)
    with pytest.raises(CELoraError, match=r"cannot write .*: No space left on device; what was there is unchanged"):
        converted(path)


def test_what_was_converted_is_read_where_nothing_can_be_written(tmp_path, cache, monkeypatch):
    path = write_model(tmp_path / "model.gguf", base_of(), words=True)
    folder = converted(path)
    monkeypatch.setattr(gguf_base.FileLock, "acquire", _raising(OSError(errno.EROFS, "Read-only file system")))
    assert converted(path) == folder
    with pytest.raises(CELoraError, match=r"cannot be kept: .*Read-only file system; set XDG_CACHE_HOME"):
        converted(path, "bfloat16")
