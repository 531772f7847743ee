"""If a chat template refuses a row, the error names the row and the reason."""

from __future__ import annotations

import json
import shutil

import pytest
from transformers import AutoTokenizer

from celora.errors import CELoraError
from celora.train.loading import read_tokenizer
from celora.train.rows.template import check_text_is_rendered, refused_row
from celora.train.use.generation import encode
from runs import go
from tiny import TEMPLATE

STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate\nuser/assistant') }}{% endif %}{% endfor %}" + TEMPLATE
)
USER, ASSISTANT, SYSTEM = ({"role": role, "content": "w1 w2"} for role in ("user", "assistant", "system"))


def rows(path, *conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return str(path)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ([SYSTEM, USER, ASSISTANT], "System role not supported"),
        ([USER, USER, ASSISTANT], "Roles must alternate user/assistant"),
    ],
)
@pytest.mark.parametrize("which", ["training", "evaluation"])
def test_the_row_is_named(refused, message, which, inputs, tmp_path):
    (tmp_path / "strict.jinja").write_text(STRICT)
    fine, bad = [USER, ASSISTANT], rows(tmp_path / "bad.jsonl", *[[USER, ASSISTANT]] * 2, refused)
    data = {"data": rows(tmp_path / "fine.jsonl", fine), "eval_data": bad} if which == "evaluation" else {"data": bad}
    with pytest.raises(CELoraError) as caught:
        go({**inputs, **data}, tmp_path / "out", chat_template_path=str(tmp_path / "strict.jinja"))
    assert str(caught.value) == f"the chat template refuses row 3 of the {which} data: {message}"
    assert not (tmp_path / "out").exists()


def test_prompts_are_rendered_as_for_training(inputs):
    """First the prompt alone, with an answer to follow; then both."""
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    row = {"prompt": [USER], "completion": [ASSISTANT]}
    assert refused_row([row, {"text": "w1"}, {"prompt": "w1", "completion": "w2"}], tokenizer, STRICT) is None
    assert refused_row([row, {"prompt": [USER], "completion": [USER]}], tokenizer, STRICT)[0] == 2
    no_answer = "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
    assert refused_row([{"messages": [USER]}, row], tokenizer, no_answer)[0] == 2
    number, error = refused_row([row], tokenizer, "{{ 1 / 0 }}")
    assert (number, type(error)) == (1, ZeroDivisionError)


@pytest.mark.parametrize("empty", ["", " \n"])
def test_an_empty_template_is_none(empty, inputs, tmp_path):
    """It would render every chat as nothing. Rows of text train as they do without a template."""
    model, template = tmp_path / "model", tmp_path / "empty.jinja"
    shutil.copytree(inputs["model"], model)
    for file in (model / "chat_template.jinja", template):
        file.write_text(empty)
    chats = {"model": str(model), "data": rows(tmp_path / "chats.jsonl", [USER, ASSISTANT])}
    with pytest.raises(CELoraError, match="the rows are chats, and the model's tokenizer has no chat template; give"):
        go({**inputs, **chats}, tmp_path / "out")
    with pytest.raises(CELoraError, match=r"chat_template_path=.*empty.jinja' is an empty file; give one"):
        go({**inputs, **chats}, tmp_path / "out", chat_template_path=str(template))
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "w1 w2"}) + "\n")
    go({**inputs, **chats, "data": str(tmp_path / "texts.jsonl")}, tmp_path / "out", max_steps=1)
    assert encode(read_tokenizer(str(model)), "w1") == encode(read_tokenizer(inputs["model"]), "w1", raw=True)


OF_PARTS = (
    "{% for m in messages %}<|{{ m['role'] }}|> {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }} {% endif %}{% endfor %}<eos> {% endfor %}"
)


@pytest.mark.parametrize("rows_of", ["messages", "instruction"])
def test_a_template_without_text_is_refused(rows_of, inputs, tmp_path):
    (tmp_path / "parts.jinja").write_text(OF_PARTS)
    data = rows(tmp_path / "rows.jsonl", [USER, ASSISTANT])
    if rows_of == "instruction":
        (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "w1", "output": "w2"}) + "\n")
    with pytest.raises(CELoraError, match=r"^the chat template leaves out what messages say"):
        go({**inputs, "data": data}, tmp_path / "out", chat_template_path=str(tmp_path / "parts.jinja"))
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    tokenizer.chat_template = OF_PARTS
    with pytest.raises(CELoraError, match=r"^the chat template leaves out what messages say"):
        encode(tokenizer, "w1 w2")


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        TEMPLATE.replace("m['content']", "m['content'] | upper | replace('W', 'w ')"),
        "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}{% endif %}{% endfor %}A:",
        "{{ raise_exception('not this one') }}",
    ],
)
def test_a_template_that_renders_some_text_is_taken(template, inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    tokenizer.chat_template = template
    check_text_is_rendered({"messages": [USER, ASSISTANT]}, tokenizer)
    check_text_is_rendered({"prompt": [USER], "completion": [ASSISTANT]}, tokenizer)
    tokenizer.chat_template = OF_PARTS
    check_text_is_rendered({"messages": [{"role": "user", "content": "?!"}]}, tokenizer)
