"""GGUF files. If Transformers unpacks one, it is trained like any other model. PEFT does not take packed weights."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import celora
from celora import CELoraConfig
from celora.cli.main import main
from celora.errors import CELoraError
from celora.modeling.int8_base import held_in_8_bits
from celora.runtime.attachment import require
from celora.train.formats.export import export
from celora.train.formats.gguf_base import converted
from celora.train.loading import gguf_of
from celora.train.request.arguments import make_request, parse
from celora.train.run import train as train_run
from celora.train.use.trained import load_trained
from decoders import model_of
from ggufs import write_model
from runs import go
from small import make_batch, train

# Older versions of Transformers always unpack, and have no switch for it.
PACKED = getattr(transformers, "GgufConfig", None)
HIDDEN, INNER, BLOCKS, HEADS, WORDS = 64, 96, 2, 4, 61


def write(path: Path) -> np.ndarray:
    """Write a small Llama with 8-bit weights. Returns the numbers of its first `up_proj`."""
    numbers = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(WORDS)
    kind = gguf.GGMLQuantizationType.Q8_0

    def add(name: str, *shape: int) -> np.ndarray:
        values = numbers.normal(0, 0.05, shape).astype(np.float32)
        packed = gguf.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=kind)
        unpacked: np.ndarray = gguf.dequantize(packed, kind)
        return unpacked

    add("token_embd", WORDS, HIDDEN)
    add("output", WORDS, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    up = []
    for i in range(BLOCKS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}", HIDDEN, HIDDEN)
        add(f"blk.{i}.ffn_gate", INNER, HIDDEN)
        up.append(add(f"blk.{i}.ffn_up", INNER, HIDDEN))
        add(f"blk.{i}.ffn_down", HIDDEN, INNER)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return up[0]


def load(folder: Path) -> LlamaForCausalLM:
    unpacked = {"quantization_config": PACKED(dequantize=True)} if PACKED else {}
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32, **unpacked)


# When peft saves, it looks for the base model's configuration on the hub, and says that it did not find it.
@pytest.mark.filterwarnings("ignore:Could not find a config file in")
def test_an_unpacked_file_trains_on_estimates_and_saves_an_ordinary_adapter(tmp_path: Path) -> None:
    up = write(tmp_path / "model.gguf")
    base = load(tmp_path)
    torch.testing.assert_close(base.model.layers[0].mlp.up_proj.weight.detach(), torch.from_numpy(up))
    model = get_peft_model(base, LoraConfig(target_modules="all-linear"))
    report = celora.attach(model, CELoraConfig(estimator="columns", keep_ratio=0.5, rank=4, refresh_every=3))
    assert len(report.estimated) == 7 * BLOCKS
    train(model, 7)
    assert require(model).refreshes == 3
    assert require(model).relative_errors
    model.save_pretrained(tmp_path / "adapter")
    stock = PeftModel.from_pretrained(load(tmp_path), tmp_path / "adapter").eval()
    with torch.no_grad():
        logits = [each(**make_batch(9)).logits for each in (stock, model.eval())]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_packed_weights_are_refused_by_peft(tmp_path: Path) -> None:
    """When PEFT takes them one day, celora has to read them (docs/use/quantised.md)."""
    if PACKED is None:
        write(tmp_path / "model.gguf")
        assert type(load(tmp_path).model.layers[0].mlp.up_proj) is torch.nn.Linear
        return
    from transformers.integrations.gguf.utils import GgufLinear

    base = torch.nn.Sequential(GgufLinear(HIDDEN, INNER, int(gguf.GGMLQuantizationType.Q8_0)))
    with pytest.raises(ValueError, match="GgufLinear"):
        get_peft_model(base, LoraConfig(target_modules=["0"]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, str]]:
    """The folder of a run on a GGUF file, the file, and what the run said."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("from_gguf")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        path = write_model(
            folder / "model.gguf", model_of("llama").unload(), gguf.GGMLQuantizationType.Q8_0, words=True
        )
        lines = [{"prompt": "the cat ", "completion": f"sat {i}"} for i in range(8)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        inputs = {"model": str(path), "data": str(folder / "rows.jsonl")}
        _, text = go(inputs, folder / "out", dtype="float32")
        yield folder / "out", path, text


def test_a_mistake_in_the_data_is_told_before_the_model_is_converted(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.gguf", model_of("llama").unload(), gguf.GGMLQuantizationType.Q8_0, words=True)
    console = Console(file=io.StringIO())
    (tmp_path / "rows.jsonl").write_text('{"text": "the cat"}')
    for more in ({"data": str(tmp_path / "gone.jsonl")}, {"eval_data": str(tmp_path / "gone.jsonl")}):
        given = {"model": str(path), "data": str(tmp_path / "rows.jsonl"), "output": str(tmp_path / "out"), **more}
        with pytest.raises(CELoraError, match=r"no such data file or folder: .*gone\.jsonl'"):
            train_run(make_request(given), console=console)
    assert console.file.getvalue() == ""


def test_a_trained_adapter_needs_its_data_no_more(trained: tuple[Path, Path, str]) -> None:
    out = trained[0]
    rows = out.parent / "rows.jsonl"
    rows.rename(away := out.parent / "away.jsonl")
    try:
        assert load_trained(out).base == str(trained[1])
    finally:
        away.rename(rows)


def test_a_run_names_the_file_and_its_adapter_the_folder(trained: tuple[Path, Path, str]) -> None:
    out, path, text = trained
    record = json.loads((out / "run.json").read_text())
    assert record["given"]["model"] == str(path)
    assert record["made_from"].keys() >= {f"model in {str(path)!r}"}
    base = Path(json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert base.parent == path.parent / "cache" / "celora" / "gguf"
    assert f"Converting model.gguf to float32, once: {base}" in text
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    found = load_trained(out)
    assert found.base == str(path)
    with torch.no_grad():
        torch.testing.assert_close(*[model(torch.arange(3, 20)[None]).logits for model in (stock, found.model)])
    assert "`model.gguf`" in (out / "README.md").read_text()


def test_the_cache_may_be_emptied(trained: tuple[Path, Path, str]) -> None:
    out, path, _ = trained
    shutil.rmtree(path.parent / "cache")
    assert load_trained(out).model.dtype == torch.float32


def test_an_export_knows_the_file(trained: tuple[Path, Path, str]) -> None:
    out, path, _ = trained
    made = export(out, "gguf", overwrite=True)
    assert f"FROM {path}\nADAPTER ./adapter.gguf\n" in (made.output / "Modelfile").read_text()
    made = export(out, "gguf", merged=True, outtype="f32", overwrite=True)
    merged = AutoModelForCausalLM.from_pretrained(converted(made.output / "model.gguf"), dtype=torch.float32)
    with torch.no_grad():
        logits = [model(torch.arange(3, 20)[None]).logits for model in (merged, load_trained(out).model)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_another_file_under_the_name_is_not_gone_on_with(trained: tuple[Path, Path, str], tmp_path: Path) -> None:
    out, path, _ = trained
    whole = path.read_bytes()
    try:
        write_model(path, model_of("llama", intermediate_size=64).unload(), words=True)
        with pytest.raises(CELoraError, match=r"the model in '.*model\.gguf' is not what the run was started with"):
            train_run(parse([], {"output": str(out), "resume": True, "max_steps": 9}), console=Console(quiet=True))
    finally:
        path.write_bytes(whole)


def test_a_base_in_8_bits_is_made_of_it(trained: tuple[Path, Path, str], tmp_path: Path) -> None:
    _, path, _ = trained
    inputs = {"model": str(path.parent), "data": str(path.parent / "rows.jsonl")}
    result, _ = go(inputs, tmp_path / "out", base="int8", max_steps=1, preset="exact", celora=None, lora_dropout=0.0)
    assert len(held_in_8_bits(result.model)) == 14
    assert load_trained(tmp_path / "out").base == str(path.parent)


def test_which_file_is_meant(tmp_path: Path) -> None:
    assert gguf_of(str(tmp_path)) is None
    (tmp_path / "a.gguf").write_bytes(b"")
    assert gguf_of(str(tmp_path)) == gguf_of(str(tmp_path / "a.gguf")) == tmp_path / "a.gguf"
    (tmp_path / "blob").write_bytes(b"GGUF...")
    assert gguf_of(str(tmp_path / "blob")) == tmp_path / "blob"
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(CELoraError, match=r"holds 2 GGUF files; give one of them: a\.gguf, b\.gguf"):
        gguf_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert gguf_of(str(tmp_path)) is None
    assert gguf_of("someone/model.gguf") is None


def test_a_bad_file_is_one_line_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(40))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the cat"}\n')
    command = ["train", "--model", str(tmp_path / "model.gguf"), "--data", str(rows), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "rows.jsonl"]
