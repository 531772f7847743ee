"""An export appears whole or not at all, replaces only an export, and says what Ollama needs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from celora.errors import CELoraError
from celora.train.formats.export import export
from celora.train.formats.gguf_file import field, open_gguf
from ggufs import write_model
from patching import patch_all


@pytest.fixture
def out(finished, tmp_path):
    return Path(shutil.copytree(finished[0], tmp_path / "out"))


@pytest.fixture(scope="module")
def base(inputs, tmp_path_factory):
    """The tiny model as a GGUF file."""
    return write_model(
        tmp_path_factory.mktemp("gguf") / "base.gguf", AutoModelForCausalLM.from_pretrained(inputs["model"])
    )


def test_an_adapter_for_llama_cpp(out, inputs, base):
    made = export(out, "gguf")
    assert made.output == out.with_name("out-gguf")
    assert made.files == ["Modelfile", "adapter.gguf", "celora_export.json"]
    assert made.tensors == 2 * 14 == len(open_gguf(made.output / "adapter.gguf").tensors)
    head, *lines = (made.output / "Modelfile").read_text().splitlines()
    assert head == "# ollama create NAME -f Modelfile"
    assert lines == [f"FROM {inputs['model']}", "ADAPTER ./adapter.gguf"]
    export(out, "gguf", gguf=base, overwrite=True)
    assert f"FROM {base}\n" in (made.output / "Modelfile").read_text()


def test_a_name_that_ends_in_gguf_is_the_file(out, base):
    file = out.with_name("my adapter.gguf")
    made = export(out, "gguf", gguf=base, output=file)
    assert made.files == [file.name]
    assert len(open_gguf(file).tensors) == made.tensors == 2 * 14
    assert made.command == f"llama-cli -m {base} --lora '{file}'"
    with pytest.raises(CELoraError, match=r"my adapter\.gguf' exists; --overwrite replaces it"):
        export(out, "gguf", output=file)
    assert export(out, "gguf", output=file, overwrite=True).command == f"llama-cli -m BASE.gguf --lora '{file}'"
    whole = out.with_name("whole.gguf")
    assert export(out, "gguf", merged=True, gguf=base, output=whole).command == f"llama-cli -m {whole}"
    assert field(open_gguf(whole), "general.name") == "out"
    assert sorted(path.name for path in out.parent.iterdir()) == [file.name, "out", "whole.gguf"]
    with pytest.raises(CELoraError, match=r"whole\.gguf' is the base model; give another name"):
        export(out, "gguf", gguf=whole, output=whole, overwrite=True)
    with pytest.raises(CELoraError, match=r"is the name of a GGUF file; --to mlx writes a folder"):
        export(out, "mlx", output=file)
    folder = out.with_name("old.gguf")
    folder.mkdir()
    with pytest.raises(CELoraError, match=r"old\.gguf' is a folder; a name that ends in \.gguf is the file"):
        export(out, "gguf", output=folder, overwrite=True)


def test_a_merged_model_for_llama_cpp(out, base):
    made = export(out, "gguf", merged=True, gguf=base, outtype="q8_0")
    assert made.output == out.with_name("out-merged-gguf")
    assert made.files == ["Modelfile", "celora_export.json", "model.gguf"]
    assert field(open_gguf(made.output / "model.gguf"), "general.name") == "out"
    assert (made.output / "Modelfile").read_text().endswith("\nFROM ./model.gguf\n")


def test_a_merged_model_for_transformers(out, inputs):
    made = export(out, "safetensors", merged=True, output=out.with_name("whole"))
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= set(made.files)
    assert AutoConfig.from_pretrained(made.output).model_type == "llama"
    assert (made.output / "Modelfile").read_text().endswith("\nFROM .\n")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [(1, "has weights for 14 layers, and the model has 7 of them"), (3, r"has 21 for it; .*layers\.2\.")],
)
@pytest.mark.parametrize("to", ["gguf", "safetensors", "mlx"])
def test_a_base_model_of_another_depth_is_refused(to, blocks, message, out, inputs, tmp_path):
    shutil.copytree(inputs["model"], tmp_path / "other")
    settings = json.loads((out / "adapter_config.json").read_text())
    settings["target_modules"] = sorted({name.rpartition(".")[2] for name in settings["target_modules"]})
    (out / "adapter_config.json").write_text(json.dumps(settings))  # as PEFT writes it for 20 layers and more
    config = AutoConfig.from_pretrained(inputs["model"], num_hidden_layers=blocks)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(CELoraError, match=message):
        export(out, to, merged=to == "safetensors", model=str(tmp_path / "other"))
    assert not list(tmp_path.glob(f"out-*{to}"))


def test_an_adapter_for_mlx(out, monkeypatch):
    patch_all(monkeypatch, "celora.train.formats.export:find_spec", lambda name: None)  # without the package gguf
    made = export(out, "mlx")
    assert made.output == out.with_name("out-mlx")
    assert made.files == ["adapter_config.json", "adapters.safetensors", "celora_export.json"]
    assert made.tensors == 2 * 14
    with pytest.raises(CELoraError, match=r"out-mlx' exists; --overwrite replaces it"):
        export(out, "mlx")
    assert export(out, "mlx", overwrite=True) == made


def test_a_base_on_the_hub_is_named_in_the_modelfile(out, inputs, monkeypatch):
    record = json.loads((out / "run.json").read_text())
    record["given"]["model"] = "someone/tiny"
    (out / "run.json").write_text(json.dumps(record))
    config = AutoConfig.from_pretrained(inputs["model"])
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    text = (export(out, "gguf").output / "Modelfile").read_text()
    assert "# Put the base model here, someone/tiny: a GGUF file" in text
    assert "FROM ./base.gguf\n" in text


def test_a_base_file_that_is_not_there_is_no_base(out):
    """Ollama would be the first to notice."""
    for merged in (False, True):
        with pytest.raises(CELoraError, match=r"--gguf '.*nowhere.gguf': no such file; give the base model as a GGUF"):
            export(out, "gguf", merged=merged, gguf=out / "nowhere.gguf")
        with pytest.raises(CELoraError, match=r"run\.json' .*GGUF"):
            export(out, "gguf", merged=merged, gguf=out / "run.json")
    assert not out.with_name("out-gguf").exists()


def test_the_folder_may_be_the_one_that_the_user_is_in(out, monkeypatch):
    monkeypatch.chdir(out)
    assert export(Path("."), "gguf").output.samefile(out.with_name("out-gguf"))


def test_an_export_replaces_only_an_export(out):
    first = export(out, "gguf")
    with pytest.raises(CELoraError, match=r"out-gguf' exists; --overwrite replaces it"):
        export(out, "gguf")
    (first.output / "adapter.gguf").write_bytes(b"old")
    export(out, "gguf", overwrite=True)
    assert open_gguf(first.output / "adapter.gguf")
    other = out.with_name("mine")
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(CELoraError, match="exists and no export made it, so it is left alone"):
            export(out, "gguf", output=other, overwrite=overwrite)
        with pytest.raises(CELoraError, match="no export made it"):
            export(out, "gguf", output=out, overwrite=overwrite)
    with pytest.raises(CELoraError, match="expected a name in a folder that exists"):
        export(out, "gguf", output=out / "no" / "where")


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_interrupted_export_leaves_what_was_there(overwrite, out, monkeypatch):
    before = None
    if overwrite:
        before = (export(out, "gguf").output / "adapter.gguf").read_bytes()

    def interrupted(path, *_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    names = sorted(path.name for path in out.parent.iterdir())
    patch_all(monkeypatch, "celora.train.formats.lora_gguf:write_lora", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(out, "gguf", overwrite=True)
    assert sorted(path.name for path in out.parent.iterdir()) == names
    if before is not None:
        assert (out.with_name("out-gguf") / "adapter.gguf").read_bytes() == before


def test_without_the_package_gguf_its_name_is_told(out, monkeypatch):
    patch_all(monkeypatch, "celora.train.formats.export:find_spec", lambda name: None)
    with pytest.raises(CELoraError, match="needs the package gguf, which is not installed; pip install gguf"):
        export(out, "gguf")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"to": "onnx"}, "unknown format 'onnx'"),
        ({"to": "mlx", "merged": True}, "--to mlx writes the adapter alone; --merged --to safetensors writes a model"),
        ({"to": "safetensors"}, "is in safetensors already; give --merged for the whole model"),
        ({"to": "gguf", "merged": True}, "takes metadata and tokenizer from the base model's GGUF file; give --gguf"),
        ({"to": "gguf", "model": "./gone"}, "'./gone': no such folder"),
    ],
)
def test_what_cannot_be_exported_is_one_line(arguments, said, out):
    with pytest.raises(CELoraError, match=said):
        export(out, **arguments)
    assert list(out.parent.glob("*out-*")) == []
