"""`celora estimate` and `celora train --memory`: what they show and take, and what they say if nothing fits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from celora.cli.main import main
from celora.errors import CELoraError
from celora.train.forecast.estimate import estimate, fitted
from celora.train.request.arguments import make_request, parse
from celora.train.run import train
from decoders import model_of
from ggufs import write_model
from patching import patch_all
from runs import go


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A machine that takes a second for a thousand tokens in a block in float32, and half a second in other dtypes.

    With checkpointing it takes four thirds of that.
    """

    def seconds(probe, batch, optimizer):
        model = probe.model.get_base_model()
        speed = 1000 if model.dtype.itemsize == 4 else 2000
        speed *= 3 / 4 if model.is_gradient_checkpointing else 1
        tokens = batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel()
        return len(model.model.layers) * int(tokens) / speed

    patch_all(monkeypatch, "celora.train.forecast.blocks:seconds", seconds)


@pytest.fixture
def ask(inputs, tmp_path):
    def found(memory=None, **more):
        return estimate(make_request({**inputs, "output": str(tmp_path / "out"), **more}), memory)

    return found


def test_rows_and_ways(ask):
    found = ask(max_length=8)
    assert (found.rows, found.longest, found.sampled, found.epochs) == (24, 8, None, 3.0)
    assert "rows are longer than max_length=8" in found.cut
    assert {way.base for way in found.ways} == {"float32", "bfloat16", "int8"}
    assert {way.preset for way in found.ways} == {"auto", "exact", "fast"}
    assert {(way.batch, way.accumulation) for way in found.ways} == {(8, 1), (4, 2), (2, 4), (1, 8)}
    assert len(found.ways) == 3 * 3 * 4 * 2
    assert found.taken is not None
    assert found.taken.base == "bfloat16"
    assert not found.taken.checkpointing
    assert list(found.ways) == sorted(found.ways, key=lambda way: (way.epoch_seconds, way.peak_bytes))
    assert "<- celora takes this" in str(found)


def test_the_table_has_what_is_taken_the_fastest_and_the_smallest_that_fit(ask):
    found = ask()
    peaks = sorted(way.peak_bytes for way in found.ways)
    limit = 21 * peaks[len(peaks) // 2] // 20 + 1  # so that about half of them fit
    fitting = [way for way in found.ways if way.fits(limit)]
    taken = next(way for way in fitting if way.preset == "auto")
    found = replace(found, memory=limit, taken=taken)
    shown = found.shown()
    smallest = min(fitting, key=lambda way: way.peak_bytes)
    assert 2 <= len(shown) <= 3
    assert set(shown) == {taken, fitting[0], smallest}
    table = str(found).split("\n\n")[1].splitlines()[1:]
    assert len(table) == len(shown)
    for row, way in zip(table, shown, strict=True):
        assert f" {way.batch} x {way.accumulation} " in row
        assert f" {way.step_seconds:.3g} s " in row
        assert ("<- celora takes this" in row) is (way == taken)
    assert [way["shown"] for way in found.to_dict()["ways"]] == [way in shown for way in found.ways]


def test_after_a_minute_no_other_way_is_measured_and_the_rest_is_named(ask, monkeypatch):
    now = iter(range(0, 10_000, 25))
    patch_all(monkeypatch, "celora.train.forecast.estimate:_clock", lambda: float(next(now)))
    found = ask(preset=None)
    assert {(way.base, way.preset) for way in found.ways} == {
        (base, "auto") for base in ("float32", "bfloat16", "int8")
    }
    (late,) = found.skipped
    assert late.startswith("after 60 s: exact on base float32, exact on base bfloat16, exact on base int8, fast on ")
    assert f"Not measured: {late}.\n" in str(found)
    assert found.taken.preset == "auto"


def test_a_base_whose_weights_alone_do_not_fit_is_not_measured(ask, inputs):
    model = AutoModelForCausalLM.from_pretrained(inputs["model"])
    weights = 4 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
    found = ask(weights - 1, preset="exact", gradient_checkpointing=False)
    assert "float32" not in {way.base for way in found.ways}
    assert found.skipped == ("base float32, whose weights alone take 0 MiB",)


def test_what_is_asked_for_is_kept(ask):
    found = ask(dtype="float32", preset="exact", gradient_checkpointing=True, per_device_train_batch_size=3)
    assert {(way.base, way.preset, way.checkpointing, way.batch) for way in found.ways} == {
        ("float32", "exact", True, 3), ("int8", "exact", True, 3),
    }  # fmt: skip
    found = ask(base="int8", preset="fast", gradient_checkpointing=False)
    assert {way.base for way in found.ways} == {"int8"}


def test_the_seconds_of_an_epoch_follow_from_the_speed(ask):
    found = ask(dtype="float32", preset="off", gradient_checkpointing=False, per_device_train_batch_size=8)
    way = next(way for way in found.ways if way.base == "float32")
    assert way.epoch_seconds == pytest.approx(2 * found.tokens / 1000, rel=1e-6)  # 2 blocks


def test_nothing_fits(ask, inputs, tmp_path, capsys):
    found = ask(1000, preset="exact")
    assert found.taken is None
    assert found.verdict().startswith("nothing fits into 0 MiB with 5 % to spare: the least is ")
    command = ["--model", inputs["model"], "--data", inputs["data"]]
    assert main(["estimate", *command, "--memory", "1000B", "--preset", "exact"]) == 2
    assert "nothing fits into" in capsys.readouterr().out
    assert main(["train", *command, "--output", str(tmp_path / "out"), "--memory", "1000B"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --memory 1000B: nothing fits into 0 MiB with 5 % to spare: the least is ")
    assert not (tmp_path / "out").exists()


def test_a_run_takes_the_way_and_its_record_names_it(inputs, tmp_path):
    result, text = go(inputs, tmp_path / "out", memory="64GiB", max_steps=2, celora=None, preset="exact")
    assert "Within 64GiB: exact in bfloat16, 4 x 1 rows a step: " in text
    given = json.loads((tmp_path / "out" / "run.json").read_text())["given"]
    assert (given["memory"], given["dtype"], given["per_device_train_batch_size"]) == ("64GiB", "bfloat16", 4)
    assert str(result.model.dtype) == "torch.bfloat16"
    again, text = go(given, tmp_path / "out", resume=True, max_steps=3, celora=None, preset="exact")
    assert again.step == 3
    assert "Within" not in text


def test_a_repeated_command_keeps_the_way_that_memory_chose(inputs, tmp_path):
    own = {**inputs, "output": str(tmp_path / "out"), "resume": True, "quiet": True}
    flags = ["--preset", "exact", "--memory", "64GiB", "--dtype", "auto", "--gradient_accumulation_steps", "2"]
    assert train(parse([*flags, "--max_steps", "1"], own)).step == 1
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["given"]["dtype"] in ("float32", "bfloat16")
    assert record["asked"]["dtype"] == "auto"
    assert train(parse([*flags, "--max_steps", "2"], own)).step == 2
    with pytest.raises(CELoraError, match="--resume cannot change dtype"):
        parse([*flags, "--dtype", "float16"], own)


def test_the_least_memory_takes_a_base_in_8_bits(inputs, tmp_path):
    request = make_request({**inputs, "output": str(tmp_path / "out"), "preset": "exact"})
    found = estimate(request, 2**40)
    least = min(way.peak_bytes for way in found.ways if way.base != "int8")
    only = [way for way in found.ways if way.peak_bytes < least]
    assert all(way.base == "int8" for way in only)
    if only:  # the tiny model's blocks are small compared with what it keeps
        settled, line = fitted(request, str(least - 1))
        assert settled.options.base == "int8"
        assert "on a base in int8" in line


def test_a_gguf_file_is_estimated_without_converting_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_model(tmp_path / "model.gguf", model_of("llama").unload(), gguf.GGMLQuantizationType.Q8_0, words=True)
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "the cat sat on {i}"}}\n' for i in range(9)))
    command = ["estimate", "--model", str(path), "--data", str(tmp_path / "rows.jsonl"), "--preset", "exact", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 9
    assert found["taken"]["preset"] == "exact"
    assert {"fits", "quality", "peak_bytes", "epoch_seconds"} <= found["ways"][0].keys()
    assert not (tmp_path / "cache" / "celora" / "gguf").exists()


def test_of_many_rows_a_sample_is_tokenised(ask, tmp_path):
    rows = tmp_path / "many.jsonl"
    lines = [json.dumps({"text": "w1 w2 w3"})] * 5000 + [json.dumps({"text": " ".join(["w1"] * 100)})]
    rows.write_text("\n".join(lines) + "\n")
    found = ask(data=str(rows), preset="exact", dtype="float32", base="int8")
    assert found.rows == 5001
    assert found.longest == 101  # 100 words and the end of the text
    assert found.sampled is not None
    assert found.tokens == pytest.approx(5000 * 4 + 101, rel=0.02)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["q_proj", "v_porj"], "did you mean 'v_proj'"),
        (["q_proj", "layers.1.mlp.up_proj"], "lora_target_modules='q_proj layers.1.mlp.up_proj' takes other layers"),
        (["1.mlp.up_proj"], "count all blocks alike; leave out numbers of blocks"),
        ([r".*layers\.0\.mlp\.up_proj"], "count all blocks alike"),
    ],
)
def test_targets_that_cannot_be_estimated_are_named(ask, names, said):
    with pytest.raises(CELoraError, match=said):
        ask(lora_target_modules=names)


def test_targets_of_all_blocks_are_estimated(ask):
    for names in (["q_proj"], ["mlp.up_proj"], [r".*\.(q|v)_proj"], ["all-linear"]):
        assert ask(lora_target_modules=names, preset="exact", dtype="float32").ways


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--output", "x"], "--output is not for celora estimate, which writes nothing"),
        (["--eval_data", "gone.jsonl"], "--eval_data is not for celora estimate, which looks at training alone"),
        (["--memory", "much"], "expected a size with its unit, like 8GiB"),
        (["--load_in_4bit"], "are not estimated; leave out --load_in_4bit"),
    ],
)
def test_what_cannot_be_estimated_is_one_line(more, said, inputs, capsys):
    assert main(["estimate", "--model", inputs["model"], "--data", inputs["data"], *more]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_damaged_files_of_a_model_are_one_line(inputs, tmp_path, capsys):
    for name, content, said in (
        ("model.safetensors", "{", r"/model.safetensors' is damaged: "),
        ("config.json", '{"model_type": "lama"}', "has model type `lama` but Transformers does not recognize"),
    ):
        folder = tmp_path / name
        shutil.copytree(inputs["model"], folder)
        (folder / name).write_text(content)
        assert main(["estimate", "--model", str(folder), "--data", inputs["data"]]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_model_without_a_linear_layer_has_no_way_in_8_bits(inputs, tmp_path, monkeypatch):
    """GPT-2's layers are of another class, and its configuration does not name the width of its MLP."""
    patch_all(monkeypatch, "celora.train.forecast.blocks:seconds", lambda probe, batch, optimizer: 0.1)
    small = {"vocab_size": 48, "n_embd": 32, "n_head": 4, "n_layer": 2, "pad_token_id": 0, "bos_token_id": 1}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **small)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(inputs["model"]).save_pretrained(tmp_path)
    given = {"model": str(tmp_path), "data": inputs["data"], "output": str(tmp_path / "out"), "preset": "exact"}
    found = estimate(make_request({**given, "dtype": "float32"}))
    assert {way.base for way in found.ways} == {"float32"}
    with pytest.raises(CELoraError, match=r"has no frozen nn.Linear in numbered blocks"):
        estimate(make_request({**given, "base": "int8"}))


def test_modules_of_every_block_may_train_as_a_whole(ask):
    """The model that is measured in its place has fewer blocks."""
    assert ask(lora_modules_to_save=["model.layers.1.input_layernorm"]).rows == 24


def test_packed_rows_make_fewer_steps_of_an_epoch(ask):
    """24 rows of at most 25 tokens are three or four packed rows."""
    plain, packed = (ask(max_length=128, max_steps=12, per_device_train_batch_size=2, packing=p) for p in (False, True))
    assert plain.epochs == 1.0
    assert packed.epochs >= 3.0


def test_the_models_own_words_are_counted_and_not_the_stand_ins(ask, inputs, tmp_path, monkeypatch):
    """A vocabulary may have more words than the model that is measured in its place."""
    patch_all(monkeypatch, "celora.train.forecast.blocks:WORDS", 16)
    assert ask().rows == 24
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    model = Path(shutil.copytree(inputs["model"], tmp_path / "model"))
    tokenizer.add_tokens(["one", "more", "new"])  # there were 46, and 48 embeddings
    tokenizer.save_pretrained(model)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "w1 new w2"}))
    with pytest.raises(CELoraError, match="has token 48, and the model has 48 embeddings"):
        ask(model=str(model), data=str(tmp_path / "rows.jsonl"))
