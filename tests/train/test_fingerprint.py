"""A run can be resumed only with the files that it was started with."""

from __future__ import annotations

import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from celora.errors import CELoraError
from celora.train.request.arguments import parse
from celora.train.run import train
from runs import go
from tiny import TEMPLATE, save_rows


def test_nothing_that_was_changed_under_the_same_name_is_resumed_with(inputs, tmp_path):
    model, data, rows = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "held-out.jsonl"
    template = tmp_path / "own.jinja"
    own = {"model": str(shutil.copytree(inputs["model"], model)), "data": str(shutil.copy(inputs["data"], data))}
    own |= {"eval_data": str(save_rows(rows, 4)), "chat_template_path": str(template)}
    template.write_text(TEMPLATE)
    go(own, tmp_path / "out", max_steps=3)
    again = ["--max_steps", "4"], {"output": str(tmp_path / "out"), "resume": True, "quiet": True}
    for file, what in (
        (data, "data"),
        (model / "model.safetensors", "model"),
        (model / "config.json", "tokenizer or configuration"),
        (model / "tokenizer.json", "tokenizer or configuration"),
        (model / "chat_template.jinja", "tokenizer or configuration"),
        (template, "chat template"),
        (rows, "evaluation data"),
    ):
        before = file.read_bytes()
        if file == model / "model.safetensors":
            tensors = load_file(file)
            save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, file, metadata={"format": "pt"})
        else:
            file.write_bytes(before.replace(b"w7", b"w8") if file in (data, rows) else before + b"\n")
        with pytest.raises(CELoraError, match=rf"^the {what} in .* is not what the run was started with"):
            train(parse(*again))
        file.unlink()
        file.write_bytes(before)  # the same content with other dates
    (model / "README.md").write_text("of no account")
    assert train(parse(*again)).step == 4
    other = {**again[1], "eval_data": str(save_rows(tmp_path / "other.jsonl", 5))}
    assert train(parse(["--max_steps", "5"], other)).step == 5  # evaluation rows may be chosen again


def test_a_file_with_a_relative_name_is_known_again(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows, template = save_rows(tmp_path / "held-out.jsonl", 4), tmp_path / "own.jinja"
    template.write_text(TEMPLATE)
    go({**inputs, "eval_data": rows.name, "chat_template_path": template.name}, tmp_path / "out", max_steps=3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"\| evaluation data \| .*held-out.jsonl.*, fingerprint [0-9a-f]+ \|", card)
    again = ["--max_steps", "4"], {"output": str(tmp_path / "out"), "resume": True, "quiet": True}
    for file, what in ((template, "chat template"), (rows, "evaluation data")):
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        with pytest.raises(CELoraError, match=rf"^the {what} in .* is not what the run was started with"):
            train(parse(*again))
        file.write_bytes(before)
    assert train(parse(*again)).step == 4
