"""Many prompts: how a row becomes a prompt, and an output file that is always complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from celora.errors import CELoraError
from celora.train.use.generation import Sampling, answers, encode
from celora.train.use.prompts import answer_all, answered_rows, load_prompts
from celora.train.use.trained import load_trained
from patching import patch_all

GREEDY = Sampling(max_new_tokens=4, temperature=0)
ASKED = [{"role": "user", "content": "w1 w2"}]


@pytest.fixture(scope="module")
def trained(finished):
    return load_trained(finished[0])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_row_of_any_shape_asks_what_training_would_ask(load, tmp_path):
    rows = [
        {"prompt": "w1"},
        {"prompt": ASKED, "completion": [{"role": "assistant", "content": "w3"}]},
        {"messages": [*ASKED, {"role": "assistant", "content": "w3"}]},
        {"instruction": "w1", "input": "w2", "output": "w3"},
        {"text": "w4"},
    ]
    found = load_prompts(write(tmp_path / "rows.jsonl", rows))
    assert [row for row, _ in found] == rows
    assert [prompt for _, prompt in found] == ["w1", ASKED, ASKED, "w1\n\nw2", "w4"]
    assert len(load_prompts(tmp_path / "rows.jsonl", limit=2)) == 2

    (without_template,) = load(write(tmp_path / "row.jsonl", rows[3:4]), chat=False)
    texts = []

    class Tokenizer:
        chat_template = None

        def __call__(self, text, add_special_tokens=True):
            texts.extend([text] if add_special_tokens else [])
            return {"input_ids": [1]}

    assert encode(Tokenizer(), found[3][1]) == [1]
    assert texts == [without_template["prompt"]] == ["w1\n\nw2\n\n"]


def test_of_several_columns_the_one_with_its_answer_asks(tmp_path):
    rows = [
        {"prompt": "w1", "instruction": "w2", "output": "w3"},
        {"prompt": "w1", "text": "w2"},
        {"prompt": "w1", "body": "w2"},
        {"text": "w1", "instruction": "w2"},
        {"instruction": "w1", "output": "w3", "body": "w2"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    assert [prompt for _, prompt in load_prompts(path)] == ["w2", "w1", "w1", "w2", "w1"]
    assert [prompt for _, prompt in load_prompts(path, text_field="body")] == ["w2", "w1", "w2", "w2", "w1"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": ASKED, "tools": [{"type": "function"}]}, r"rows.jsonl:1: 'tools' are not shown to the model"),
        ({"question": "w1"}, r"rows.jsonl:1: columns 'question'; expected a row with prompt, messages"),
        ({"prompt": ""}, r"rows.jsonl:1: 'prompt' is empty"),
        ({"prompt": "w1", "generated": "w2"}, r"the column 'generated' is where the answer goes"),
        ({"messages": [{"role": "assistant", "content": "w1"}]}, "no message asks anything"),
        (["w1"], r"rows.jsonl:1: no object"),
    ],
)
def test_a_row_that_asks_nothing_is_named(row, said, tmp_path):
    with pytest.raises(CELoraError, match=said):
        load_prompts(write(tmp_path / "rows.jsonl", [row]))


def test_no_rows_are_refused(tmp_path):
    with pytest.raises(CELoraError, match="no rows"):
        load_prompts(write(tmp_path / "rows.jsonl", []))


def test_answers_stand_beside_the_rows(trained, tmp_path):
    rows = load_prompts(write(tmp_path / "rows.jsonl", [{"prompt": f"w{i}", "id": i} for i in range(5)]))
    heard = []
    made = answer_all(
        trained, rows, GREEDY, batch=2, base=True, output=tmp_path / "out.jsonl", say=lambda n, new: heard.append(n)
    )
    assert heard == [2, 4, 5]
    assert [row["id"] for row in made] == list(range(5))
    assert made[3]["generated"] == answers(trained, ["w3"], GREEDY)[0]
    assert made[3]["generated_by_base"] == answers(trained, ["w3"], GREEDY, base=True)[0]
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == made


@pytest.mark.parametrize("batch", [1, 4])
def test_each_batch_draws_anew_and_a_resumed_one_as_before(batch, trained):
    rows, warm = [({}, "w1")] * 8, Sampling(max_new_tokens=6, temperature=1.5)
    made = answer_all(trained, rows, warm, batch=batch)
    assert len({row["generated"] for row in made}) > 6
    assert answer_all(trained, rows, warm, batch=batch, earlier=made[:4]) == made


def test_what_was_answered_before_an_interruption_is_continued(trained, tmp_path, monkeypatch):
    rows = load_prompts(write(tmp_path / "rows.jsonl", [{"prompt": f"w{i}"} for i in range(5)]))
    output = tmp_path / "out.jsonl"
    whole = answer_all(trained, rows, GREEDY, batch=2)
    plain, calls = answers, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    with monkeypatch.context() as patch:
        patch_all(patch, "celora.train.use.generation:answers", interrupted)
        with pytest.raises(KeyboardInterrupt):
            answer_all(trained, rows, GREEDY, batch=2, output=output)
    earlier = answered_rows(output, [row for row, _ in rows], base=False)
    assert earlier == whole[:2]
    assert answer_all(trained, rows, GREEDY, batch=2, earlier=earlier, output=output) == whole
    assert [json.loads(line) for line in output.read_text().splitlines()] == whole
    other = [{"prompt": "w9"}, *(row for row, _ in rows[1:])]
    with pytest.raises(CELoraError, match=r"row 1 of .* is no answer to row 1 of the data"):
        answered_rows(output, other, base=False)
    with pytest.raises(CELoraError, match="row 1 of"):
        answered_rows(output, [row for row, _ in rows], base=True)  # the rows have no answers of the base
    assert answered_rows(tmp_path / "none.jsonl", other, base=False) == []


def test_nothing_is_written_where_nothing_was_answered(trained, tmp_path, monkeypatch):
    rows = load_prompts(write(tmp_path / "rows.jsonl", [{"prompt": "w1"}]))

    def fail(*arguments, **options):
        raise KeyboardInterrupt

    patch_all(monkeypatch, "celora.train.use.generation:answers", fail)
    with pytest.raises(KeyboardInterrupt):
        answer_all(trained, rows, GREEDY, batch=2, output=tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_prompt_without_room_for_an_answer_is_named_before_the_first_answer(trained, tmp_path):
    asked = [{"prompt": "w1"}, {"prompt": "w2"}, {"prompt": "w1 " * 150}]
    rows = load_prompts(write(tmp_path / "rows.jsonl", asked))
    output, heard = tmp_path / "out.jsonl", []
    for earlier in ([], [{**asked[0], "generated": "w3"}]):
        with pytest.raises(CELoraError, match=r"row 3 of the data: 1\d\d tokens, and the model's context holds 128"):
            answer_all(trained, rows, GREEDY, batch=1, earlier=earlier, output=output, say=lambda *a: heard.append(a))
    assert not heard
    assert not output.exists()


def test_a_folder_below_the_home_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write(tmp_path / "test.jsonl", [{"prompt": "w1"}])
    write(tmp_path / "train.jsonl", [{"prompt": "w2"}])
    assert [prompt for _, prompt in load_prompts(Path("~"))] == ["w1"]
