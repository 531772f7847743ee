"""From messages a model learns the assistant's turns, with any chat template. The run says how much it learns."""

from __future__ import annotations

import json
import string
from pathlib import Path

import datasets
import pytest
import trl
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from celora.cli import main as cli
from celora.errors import CELoraError
from celora.train.loading import (
    evaluation_rows,
    load_model,
    load_tokenizer,
    lora_config,
    quiet_libraries,
    training_rows,
)
from celora.train.request.arguments import make_request, parse, read_yaml, sft_config
from celora.train.rows.answers import Learnt, _check_stop, learnt_tokens, marked_template, mask_answers, what_is_learnt
from celora.train.rows.data import load_rows
from celora.train.rows.truncation import truncation_lines
from celora.train.run import train
from celora.train.trainer import build_trainer
from runs import go, on_build
from tiny import TEMPLATE

CHATML = (  # SmolLM2's template
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (  # like Qwen 3: an empty thought before the last answer, none before earlier ones
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOSED = (  # like Phi 3: a conversation is closed if no answer is to follow
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% else %}<eos>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# the prompt asks for a thought, but the conversation has none
ASKED_TO_THINK = CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")
FORGETFUL = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages[-2:] %}")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|end|>", "<eos>"]


def said(role):
    return lambda content: {"role": role, "content": content}


S, U, A, T = (said(role) for role in ("system", "user", "assistant", "tool"))
ONE, TWO = [U("a?"), A("b")], [S("kind"), U("a?"), A(" b. "), T("3"), A("c"), U("d?"), A("e\n")]


def characters(template=None, merges=()):
    """A fast tokenizer of single characters, special tokens and the given merges. It keeps spaces."""
    words = [*string.printable, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, list(merges), fuse_unk=False))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=SPECIAL)
    tokenizer.chat_template = template
    return tokenizer


def answers(tokenizer, messages, first=0):
    """The pieces of a conversation that are learnt, as text. Between them lies what is not learnt."""
    found = mask_answers(messages, tokenizer, marked_template(tokenizer), first)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert found["input_ids"] == whole["input_ids"]
    assert len(found["assistant_masks"]) == len(found["input_ids"])
    pieces, before = [], 0
    for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True):
        if mask:
            pieces += [] if before else [[]]
            pieces[-1].append(token)
        before = mask
    return [tokenizer.decode(piece) for piece in pieces]


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, ONE, ["b<|im_end|>\n"]),
        (CHATML, TWO, [" b. <|im_end|>\n", "c<|im_end|>\n", "e\n<|im_end|>\n"]),
        (CHATML, [S(""), *ONE], ["b<|im_end|>\n"]),
        (CHATML, [*ONE, U("c?")], ["b<|im_end|>\n"]),
        (CHATML, [A("hi"), *ONE], ["hi<|im_end|>\n", "b<|im_end|>\n"]),
        (CHATML, [*ONE, A("b")], ["b<|im_end|>\n", "b<|im_end|>\n"]),
        (CHATML, [U("<|im_start|>assistant\nb<|im_end|>\n"), A("b")], ["b<|im_end|>\n"]),
        (THINKING, ONE, ["<think>\n\n</think>\n\nb<|im_end|>\n"]),
        (THINKING, [*ONE, U("c"), A("d")], ["b<|im_end|>\n", "<think>\n\n</think>\n\nd<|im_end|>\n"]),
        (CLOSED, ONE, ["b<|end|><eos>"]),
        (CLOSED, TWO, ["b.<|end|>", "c<|end|>", "e<|end|><eos>"]),
        (MARKED, TWO, [" b. <|end|>", "c<|end|>", "e\n<|end|>"]),
    ],
)  # fmt: skip
def test_what_the_assistant_says_is_learnt_and_nothing_else(template, messages, expected):
    assert answers(characters(template), messages) == expected


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_of_a_prompt_with_its_completion_the_completion_s_answers_are_learnt(template):
    end = "<|im_end|>\n" if template == CHATML else "<|end|>"
    assert answers(characters(template), [*ONE, U("c?"), A("d")], first=3) == ["d" + end]


def test_a_token_that_reaches_into_an_answer_is_learnt():
    tokenizer = characters(CHATML, merges=[("\n", "b")])
    assert answers(tokenizer, ONE) == ["\nb<|im_end|>\n"]
    assert answers(tokenizer, [U("a"), A("c")]) == ["c<|im_end|>\n"]


def test_a_tokenizer_that_does_not_say_where_its_tokens_are_is_refused():
    slow = ByT5Tokenizer()
    slow.chat_template = CHATML
    with pytest.raises(CELoraError, match="does not say which characters a token stands for; give a template"):
        mask_answers(ONE, slow, marked_template(slow))


CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
]}  # fmt: skip
RESULT = {"role": "tool", "name": "add", "content": "2"}
KINDS = {
    "one turn": ONE,
    "several turns": [*ONE, U("c?"), A("d")],
    "a system message": [S("kind"), *ONE],
    "a tool call": [U("a?"), CALL, RESULT, A("b")],
    "a thought": [U("a?"), A("<think>\nhm\n</think>\n\nb"), U("c?"), A("d")],
}
SHIPPED = sorted(
    path for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if "_training" not in path.name
)
NOT_MARKED = ("gemma4", "llama3_1", "llama3_2")  # in TRL as stock templates alone


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """An SFTTrainer whose `_prepare_dataset` is asked about one template after the other."""
    args = SFTConfig(
        str(tmp_path_factory.mktemp("sft")),
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=None,
        max_length=None,
    )
    rows = datasets.Dataset.from_list([{"text": "a"}])
    config = LlamaConfig(vocab_size=200, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return SFTTrainer(LlamaForCausalLM(config), args, train_dataset=rows, processing_class=characters(CHATML))


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if not path.stem.startswith(NOT_MARKED)], ids=lambda path: path.stem
)
def test_templates_that_trl_marks_are_learnt_as_in_trl(path, sft, monkeypatch):
    tokenizer = characters(path.read_text(encoding="utf-8"))
    template = None if has_generation_markers(tokenizer.chat_template) else get_training_chat_template(tokenizer)
    monkeypatch.setattr(sft, "chat_template", template)
    monkeypatch.setattr(sft.args, "assistant_only_loss", True)
    taken = []
    for kind, messages in KINDS.items():
        rows = datasets.Dataset.from_list([{"messages": messages}])
        try:
            found_by_trl = sft._prepare_dataset(rows, tokenizer, sft.args, False, None, "train")
        except (TemplateError, RuntimeError):  # the template refuses such a conversation, or marks nothing in it
            continue
        for row in found_by_trl:  # none if it has nothing to learn
            taken.append(kind)
            found = mask_answers(rows[0]["messages"], tokenizer, marked_template(tokenizer))
            whole = tokenizer.apply_chat_template(rows[0]["messages"], chat_template=template, tokenize=True)
            assert found["input_ids"] == row["input_ids"] == whole["input_ids"]
            assert found["assistant_masks"] == [int(label != -100) for label in row["labels"]]
    assert {"one turn", "several turns"} <= set(taken) or path.stem == "llava_next"  # which takes parts, no text


@pytest.mark.parametrize("path", [path for path in SHIPPED if path.stem.startswith(NOT_MARKED)], ids=lambda p: p.stem)
@pytest.mark.parametrize("kind", ["one turn", "several turns", "a system message"])
def test_templates_that_trl_does_not_mark_are_compared(path, kind):
    tokenizer = characters(path.read_text(encoding="utf-8"))
    assert marked_template(tokenizer) is None
    said = [message["content"] for message in KINDS[kind] if message["role"] == "assistant"]
    learnt = answers(tokenizer, KINDS[kind])
    assert len(learnt) == len(said)
    assert all(content in text for content, text in zip(said, learnt, strict=True))


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (ASKED_TO_THINK, ONE, r"^the chat template writes the answer messages\[1\] differently after its generation"),
        (FORGETFUL, [*ONE, *ONE], r"^the chat template writes the answer messages\[3\] differently"),
        (THINKING.replace("m.content", "m.content if loop.last else m.content[:1]"), [U("a"), A("bc"), *ONE],
         r"^the chat template writes the answer messages\[1\] differently"),
        ("{{ raise_exception('not\nyet') if messages | length < 3 }}" + CHATML, [*ONE, U("c")],
         r"^the chat template refuses what ends at messages\[1\] \(not yet\); give a template with"),
        (ASKED_TO_THINK, [A("b"), U("a")], r"^the chat template writes the answer messages\[0\] differently"),
        (CHATML, [U("a")], "no assistant turn is in it, so there is nothing to learn"),
        (MARKED.replace("== 'assistant'", "== 'model'"), ONE, "marks none of its tokens as an answer"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused(template, messages, message):
    tokenizer = characters(template)
    with pytest.raises(CELoraError, match=message) as caught:
        mask_answers(messages, tokenizer, marked_template(tokenizer))
    assert "\n" not in str(caught.value)


def test_a_template_that_teaches_no_end_is_said():
    for template in (
        CHATML.replace("<|im_end|>", ""),
        MARKED.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>"),
    ):
        with pytest.warns(UserWarning, match="nothing that ends an answer"):
            _check_stop(characters(template), marked_template(characters(template)))
    for template in (CHATML, MARKED, CLOSED, THINKING, FORGETFUL):
        _check_stop(characters(template), marked_template(characters(template)))


def test_shares():
    assert [Learnt(*counts, "the answers").share for counts in ((0, 9), (1, 900), (37, 100), (899, 900), (9, 9))] == [
        "0 %", "1 %", "37 %", "99 %", "100 %"
    ]  # fmt: skip


# --- in a run --------------------------------------------------------------------------------------------------------


def chats(path, *conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return str(path)


def talk(turns, words=3):
    """A conversation whose users say w1 and whose assistant says w2 w2 w2 ..."""
    return [m for _ in range(turns) for m in (U("w1 w1"), A(" ".join(["w2"] * words)))]


def words(trainer, dataset):
    """What is learnt of every row."""
    assert dataset.cache_files  # the rows are in a file, not in memory
    decode = trainer.processing_class.decode
    return [decode([label for label in labels if label != -100]) for labels in dataset["labels"]]


def built(given, output, **more):
    """What the trainer of a run would learn and evaluate on, and what the run says about it."""
    request = make_request({**given, "output": str(output), **more})
    tokenizer, args = load_tokenizer(request), sft_config(request)
    rows, eval_rows = training_rows(request, tokenizer), evaluation_rows(request, tokenizer)
    with quiet_libraries():
        model = load_model(request)
        trainer = build_trainer(request, args, model, tokenizer, rows, eval_rows, peft=lora_config(request))
    text = "\n".join([str(what_is_learnt(trainer, rows)), *truncation_lines(trainer, rows, eval_rows)])
    return words(trainer, trainer.train_dataset), eval_rows and words(trainer, trainer.eval_dataset), text


def test_a_run_learns_the_answers(inputs, tmp_path, monkeypatch):
    data = chats(tmp_path / "rows.jsonl", talk(1), [S("w9"), *talk(2)])
    seen = []
    on_build(monkeypatch, seen.append)
    given = {**inputs, "data": data, "eval_data": data}
    _, text = go(given, tmp_path / "out", max_steps=1, save_strategy="no")
    answer = "w2 w2 w2 <eos>"
    for dataset in (seen[0].train_dataset, seen[0].eval_dataset):
        assert words(seen[0], dataset) == [answer, f"{answer} {answer}"]
    assert "Learning 40 % of 30 tokens: the answers." in text  # 12 of 9 + 21 tokens
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["train"]["assistant_only_loss"] is True
    labels, evaluated, said = built(given, tmp_path / "b", assistant_only_loss=True)
    assert labels == evaluated == [answer, f"{answer} {answer}"]
    assert said in text


def test_masks_of_another_version_are_not_taken(inputs, tmp_path, monkeypatch):
    given = {**inputs, "data": chats(tmp_path / "rows.jsonl", talk(1))}
    for code, learnt in (("old", "w2 w2 w2 <eos>"), ("old", "w2 w2 w2 <eos>"), ("new", "<|user|>")):
        monkeypatch.setattr("celora.train.rows.answers.code_digest", lambda file, code=code: code)
        assert built(given, tmp_path / "out")[0] == [learnt]
        monkeypatch.setattr(
            "celora.train.rows.answers._compared", lambda *_: {"input_ids": [2, 3], "assistant_masks": [0, 1]}
        )


def test_a_run_that_is_to_learn_every_token_says_so(inputs, tmp_path):
    data = chats(tmp_path / "rows.jsonl", talk(1), [U("w1")])
    labels, _, text = built({**inputs, "data": data}, tmp_path / "out", assistant_only_loss=False)
    assert labels[0] == "<|user|> w1 w1 <eos> <|assistant|> w2 w2 w2 <eos>"
    assert "Learning 100 % of 12 tokens: all turns, the user's, too." in text


@pytest.mark.parametrize(
    ("more", "expected", "line"),
    [
        ({"max_length": 13}, ["w2 w2 w2 w2 w2 w2 <eos>"] * 2, "Learning 56 % of 25 tokens"),
        ({"max_length": 13, "packing": True}, ["w2 w2 w2 w2 w2 w2 <eos>"] * 2, "Learning 56 % of 25 tokens"),
    ],
)
def test_what_is_cut_off_and_what_is_packed(more, expected, line, inputs, tmp_path):
    """Rows have 12 + 12 and 12 tokens. A third row has no token left to learn."""
    long = [U("w1 " * 20), A("w2")]
    data = chats(tmp_path / "rows.jsonl", talk(2, 6), talk(1, 6), long)
    labels, _, text = built({**inputs, "data": data}, tmp_path / "out", **more)
    assert "2 of 3 rows are longer than max_length=13" in text
    assert "and 1 rows have nothing to learn left and are not used" in text
    assert labels == expected
    assert line in text


@pytest.mark.parametrize("asked", [{}, {"assistant_only_loss": True}])
def test_a_row_without_an_answer_is_named(asked, inputs, tmp_path):
    data = chats(tmp_path / "rows.jsonl", talk(1), [S("w9"), U("w1")])
    with pytest.raises(CELoraError, match=r"rows\.jsonl:2: no message is the assistant's, so there is nothing to lear"):
        go({**inputs, "data": data}, tmp_path / "out", **asked)
    with pytest.raises(CELoraError, match=r"rows\.jsonl:2: no message is the assistant's"):
        go(inputs, tmp_path / "out", eval_data=data, **asked)
    assert not (tmp_path / "out").exists()
    assert len(load_rows(data, chat=True, cache_dir=tmp_path / "cache")) == 2


@pytest.mark.parametrize("which", ["training", "evaluation"])
def test_a_row_whose_answers_cannot_be_told_is_named(which, inputs, tmp_path):
    (tmp_path / "forgetful.jinja").write_text(FORGETFUL)
    fine, bad = chats(tmp_path / "fine.jsonl", talk(1)), chats(tmp_path / "bad.jsonl", talk(1), talk(2))
    data = {"data": bad} if which == "training" else {"data": fine, "eval_data": bad}
    with pytest.raises(CELoraError, match=rf"^row 2 of the {which} data: the chat template writes the answer"):
        go({**inputs, **data}, tmp_path / "out", chat_template_path=str(tmp_path / "forgetful.jinja"))


def test_prompts_with_completions_stay_trl_s(inputs, tmp_path):
    rows = [{"prompt": [U("w1"), A("w3"), U("w1")], "completion": [A("w2")]}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {**inputs, "data": str(tmp_path / "rows.jsonl")}
    for name, more, expected in (
        ("a", {}, "w2 <eos>"),
        ("b", {"assistant_only_loss": True}, "w2 <eos>"),
        ("c", {"assistant_only_loss": True, "completion_only_loss": False}, "w3 <eos> w2 <eos>"),
    ):
        labels, _, text = built(given, tmp_path / name, **more)
        assert labels == [expected] * 2
    assert "tokens: the answers." in text
    _, _, text = built(given, tmp_path / "d")
    assert "Learning 17 % of 24 tokens: the completions." in text


def test_rows_of_text(inputs, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 2)
    given = {**inputs, "data": str(tmp_path / "rows.jsonl")}
    labels, _, text = built(given, tmp_path / "a")
    assert labels == ["w1 w2 <unk> <eos>"] * 2 or labels == ["w1 w2 w3 <eos>"] * 2
    assert "Learning 100 % of 8 tokens: all of them." in text
    with pytest.raises(CELoraError, match="assistant_only_loss=True is for conversations, and these rows are text"):
        go(given, tmp_path / "b", assistant_only_loss=True)
    labels, evaluated, _ = built(inputs, tmp_path / "c", eval_data=given["data"], max_length=None)
    assert evaluated[0].startswith("w1 w2")


def test_learnt_tokens_counts_block_by_block():
    rows = datasets.Dataset.from_dict({"labels": [[-100, 1], [2], []] * 700})
    assert learnt_tokens(rows) == (1400, 2100)
    assert learnt_tokens(rows.select(range(700, 703))) == (2, 3)


def test_a_file_of_trl_sft_keeps_trl_s_default(tmp_path):
    (tmp_path / "trl.yaml").write_text("model_name_or_path: m\ndataset_name: d\noutput-dir: o\ndataset_test_split: x\n")
    assert read_yaml(tmp_path / "trl.yaml")["assistant_only_loss"] is False
    assert parse([], {"config": str(tmp_path / "trl.yaml")}).train["assistant_only_loss"] is False
    assert parse(["--assistant_only_loss"], {"config": str(tmp_path / "trl.yaml")}).train["assistant_only_loss"] is True
    for text in (
        "max_steps: 3",
        "model: m\nmax_steps: 3",
        "model_name_or_path: m\npreset: exact",
        "use-peft: true\ndata: d",
    ):
        (tmp_path / "ours.yaml").write_text(text)
        assert "assistant_only_loss" not in read_yaml(tmp_path / "ours.yaml")


def test_a_resumed_run_evaluates_what_it_evaluated(inputs, tmp_path, monkeypatch):
    """Rows to evaluate on may have another shape than those to train on. Each is learnt by its own default."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "w1", "completion": " w2"}))
    given = {**inputs, "data": str(tmp_path / "rows.jsonl"), "eval_data": chats(tmp_path / "test.jsonl", talk(1))}
    seen = []
    on_build(monkeypatch, seen.append)
    go(given, tmp_path / "out", max_steps=1, save_steps=1)
    again = {"output": str(tmp_path / "out"), "resume": True, "quiet": True}
    assert train(parse(["--max_steps", "2"], again)).step == 2
    for trainer in seen:
        assert words(trainer, trainer.eval_dataset) == ["w2 w2 w2 <eos>"]


def test_texts_that_are_only_evaluated_may_be_cut(inputs, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "w1 w2 w3 w4 w5 w6"}))
    given = {**inputs, "data": chats(tmp_path / "rows.jsonl", talk(1)), "eval_data": str(tmp_path / "test.jsonl")}
    _, _, text = built(given, tmp_path / "out", assistant_only_loss=True, max_length=10)
    assert "rows to evaluate on" not in text
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "w1 w2 w3 w4 " * 4}))
    _, _, text = built(given, tmp_path / "out", assistant_only_loss=True, max_length=10)
    assert "1 of 1 rows to evaluate on are longer than max_length=10" in text


def test_an_audit_refuses_a_row_without_an_answer(inputs, tmp_path, capsys):
    """An audit, too, names a row without an answer."""
    data = chats(tmp_path / "rows.jsonl", [U("w1")])
    given = ["--model", inputs["model"], "--data", data, "--preset", "exact"]
    assert cli.main(["audit", *given]) == 2
    assert "rows.jsonl:1: no message is the assistant's" in capsys.readouterr().err
    assert cli.main(["train", *given, "--output", str(tmp_path / "out")]) == 2


def test_the_tiny_template_is_learnt_as_words(inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    assert answers(tokenizer, talk(2)) == ["w2 w2 w2 <eos>"] * 2
