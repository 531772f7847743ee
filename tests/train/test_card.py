"""The model card: what was trained and how to load it, without any path of the machine."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard

from celora.train.output.card import PICTURE, public_name
from celora.train.output.folder import CARD, is_own
from celora.train.progress import read_metrics
from celora.train.request.arguments import parse
from celora.train.run import train
from runs import go, on_build
from tiny import save_rows


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory):
    """A run in a folder beside its model, and its trainer."""
    output = Path(inputs["model"]).parent / "my adapter"
    trainers = []
    with pytest.MonkeyPatch.context() as patch:
        on_build(patch, trainers.append)
        go(inputs, output, eval_data=inputs["data"], max_steps=3, save_steps=2)
    return output, trainers[0]


def table(text):
    return dict(re.findall(r"^\| (\S.*?) \| (.*) \|$", text, re.MULTILINE))


def test_a_card_says_what_was_trained_and_names_no_path(trained, inputs):
    output, _ = trained
    for folder, steps in ((output, 3), (output / "checkpoint-2", 2), (output / "checkpoint-3", 3)):
        text = (folder / CARD).read_text(encoding="utf-8")
        for path in (inputs["model"], inputs["data"], str(output), str(Path.home()), "/tmp", "None"):
            assert path not in text
        head = ModelCard(text).data.to_dict()
        assert head == {
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "tags": ["celora", "lora", "sft", "transformers", "trl"],
        }
        said = table(text)
        assert said["training data"].startswith("`rows.jsonl`, fingerprint ")
        assert said["evaluation data"] == said["training data"]
        assert (said["rows"], said["tokens"].partition(";")[2]) == ("24", " 42 % are learnt: the answers")
        assert said["LoRA"] == "r = 16, alpha = 32, dropout = 0.1"
        assert said["learning rate"] == "0.0002, linear"
        assert (said["batch"], said["seed"], said["dtype of the base model"]) == ("4 rows", "42", "float32")
        assert "q_proj" in said["target modules"]
        assert said["optimizer steps"].startswith(f"{steps} (")
        losses = {row["step"]: row["loss"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row}
        assert float(said["training loss"]) == pytest.approx(losses[steps], abs=1e-4)
        assert ("evaluation loss" in said) is (folder == output)
    summary = json.loads((output / "run.json").read_text(encoding="utf-8"))["summary"]
    assert float(said["training loss"]) == pytest.approx(summary["loss"], abs=1e-4)


def test_a_card_shows_the_losses_and_how_llama_cpp_loads_the_adapter(trained):
    output, trainer = trained
    text = (output / CARD).read_text(encoding="utf-8")
    assert f"![Losses by optimizer step]({PICTURE})" in text
    picture = (output / PICTURE).read_text(encoding="utf-8")
    ElementTree.fromstring(picture)
    assert "training loss" in picture
    assert "celora export 'my adapter' --to gguf" in text
    adapter = trainer.model.peft_config["default"]
    for setting in ("use_dora", "lora_bias"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(adapter, setting, True)
            assert "llama.cpp" not in trainer.card.text(trainer, output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.model, "named_parameters", lambda: [("embed_tokens.lora_embedding_A.default", None)])
        assert "llama.cpp" not in trainer.card.text(trainer, output)


def test_a_card_has_both_losses_of_an_evaluation(trained, monkeypatch):
    """If the model trained in 8 bits, its adapter is loaded onto another base than it trained with."""
    output, trainer = trained
    assert "the same on the original base" not in table(trainer.card.text(trainer, output))
    history = [*trainer.state.log_history, {"step": 3, "eval_loss": 2.5, "eval_base_loss": 2.25}]
    monkeypatch.setattr(trainer.state, "log_history", history)
    said = table(trainer.card.text(trainer, output))
    assert (said["evaluation loss"], said["the same on the original base"]) == ("2.5000", "2.2500")


def test_a_card_has_the_licence_of_its_base(trained, tmp_path):
    output, trainer = trained
    given = trainer.card.record["given"] | {"model": str(tmp_path)}
    card = dataclasses.replace(trainer.card, record={**trainer.card.record, "given": given})
    for base, expected in (
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("# none", None),
        ("---\n[\n---\n", None),
    ):
        (tmp_path / CARD).write_text(base, encoding="utf-8")
        assert yaml.safe_load(card.text(trainer, output).split("---\n")[1]).get("license") == expected


def test_what_a_card_says_of_loading_works(trained, monkeypatch, capsys):
    """The card's code runs unchanged, offline, in the folder that holds both."""
    output, trainer = trained
    monkeypatch.chdir(output.parent)
    code = re.search(r"```python\n(.*?)```", (output / CARD).read_text(encoding="utf-8"), re.DOTALL)[1]
    exec(compile(code, "card", "exec"), names := {})
    assert capsys.readouterr().out.strip()
    loaded, expected = dict(names["model"].named_parameters()), dict(trainer.model.named_parameters())
    adapters = [name for name in loaded if "lora_" in name]
    assert adapters
    assert all(loaded[name].equal(expected[name]) for name in adapters)


def test_a_base_and_data_of_the_hub_are_named_to_it(trained):
    output, trainer = trained
    card = trainer.card
    given = card.record["given"] | {"model": "owner/base", "data": "owner/data"}
    lora = card.record["lora"] | {"model_revision": "v2"}
    hub = dataclasses.replace(card, name="me/adapter", record={**card.record, "given": given, "lora": lora})
    text = hub.text(trainer, output)
    head = yaml.safe_load(text.split("---\n")[1])
    assert (head["base_model"], head["datasets"]) == ("owner/base", ["owner/data"])
    assert "base_model:adapter:owner/base" in head["tags"]
    assert 'base = "owner/base"  # its name on the hub' in text
    assert 'adapter = "me/adapter"' in text
    assert 'dtype="float32", revision="v2")' in text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("owner/name", ("owner/name", True)),
        ("name", ("name", True)),
        ("/data/me/models/base", ("base", False)),
        ("./base", ("base", False)),
        ("~/rows.jsonl", ("rows.jsonl", False)),
        ("/c/hub/models--owner--na-me/snapshots/0123abc", ("owner/na-me", True)),
        ("/", ("model", False)),
    ],
)
def test_names_without_a_path(source, expected):
    assert public_name(source) == expected


def test_what_is_here_has_no_name_on_the_hub(tmp_path, monkeypatch):
    (tmp_path / "name").mkdir()
    monkeypatch.chdir(tmp_path)
    assert public_name("name") == ("name", False)


def test_a_card_of_one_s_own_is_kept(inputs, tmp_path):
    output = tmp_path / "out"
    small = {**inputs, "data": str(save_rows(tmp_path / "rows.jsonl", 8))}
    go(small, output, max_steps=1, save_steps=1)
    assert not is_own(output / CARD)
    mine = b"---\nlicense: mit\n---\n\nMine.\r\n"
    (output / CARD).write_bytes(mine)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        on_build(patch, seen.append)
        train(parse(["--max_steps", "2"], {"output": str(output), "resume": True, "quiet": True}))
    assert (output / CARD).read_bytes() == mine
    said = table((output / "checkpoint-2" / CARD).read_text(encoding="utf-8"))
    assert said["optimizer steps"].startswith("2 (")
    (trainer,) = seen
    trainer.save_model(str(output))
    assert (output / CARD).read_bytes() == mine
    (output / CARD).unlink()
    trainer.create_model_card(model_name="x")  # as at each checkpoint; the adapter that it would describe is not here
    assert not (output / CARD).exists()
    trainer.save_model(str(output))
    assert table((output / CARD).read_text(encoding="utf-8"))["optimizer steps"].startswith("2 (")


def test_a_card_of_one_s_own_outlives_the_run(inputs, tmp_path):
    output = tmp_path / "out"
    go(inputs, output, max_steps=1)
    (output / CARD).write_text("Mine.")
    go(inputs, output, max_steps=1, overwrite=True)
    assert (output / CARD).read_text() == "Mine."


@pytest.mark.parametrize(
    ("content", "own"),
    [
        (b"# Model Card for Model ID\n", False),
        (b"It has been trained using [TRL](https://github.com/huggingface/trl).", False),
        (b"my adapter", True),
        (b"\xff\xfe", True),
        (b"", True),
    ],
)
def test_whose_a_card_is(content, own, tmp_path):
    (tmp_path / CARD).write_bytes(content)
    assert is_own(tmp_path / CARD) is own
    assert not is_own(tmp_path / "none")
