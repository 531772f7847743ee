"""Answers equal those of stock PEFT, in a conversation and in batches, with and without the adapter."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from celora.errors import CELoraError
from celora.train.use import generation
from celora.train.use.generation import Conversation, Sampling, answers, check_base, encode, generate
from celora.train.use.trained import load_trained

GREEDY = Sampling(max_new_tokens=8, temperature=0)
PROMPTS = ["w1 w2", "w30 w7 w9 w11 w12", "w5"]


@pytest.fixture(scope="module")
def trained(finished):
    loaded = load_trained(finished[0])
    with torch.no_grad():  # six steps change no answer of such a small model
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(40)
    return loaded


@pytest.fixture(scope="module")
def stock(trained, finished, inputs):
    """What PEFT and Transformers answer without celora."""
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    base = AutoModelForCausalLM.from_pretrained(inputs["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, finished[0]).eval()
    model.load_state_dict(trained.model.state_dict())

    def answer(messages, *, off=False):
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            if off:
                with model.disable_adapter():
                    made = model.generate(**tokens, max_new_tokens=8, do_sample=False)
            else:
                made = model.generate(**tokens, max_new_tokens=8, do_sample=False)
        return tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    "settings",
    [{"num_return_sequences": 2, "do_sample": True}, {"return_dict_in_generate": True},
     {"num_beams": 2}],
    ids=str,
)  # fmt: skip
def test_settings_of_the_model_that_make_no_single_answer(settings, trained, monkeypatch):
    """What `generation_config.json` may ask for."""
    for name, value in settings.items():
        monkeypatch.setattr(trained.model.generation_config, name, value)
    (made,) = generate(trained, [[5, 6]], replace(GREEDY, temperature=None))
    assert made.dim() == 1
    assert isinstance(Conversation(trained, replace(GREEDY, temperature=None)).ask("w1"), str)


@pytest.mark.parametrize("settings", [{"do_sample": True, "temperature": 0.0}, {"stop_strings": ["w3"]}], ids=str)
def test_settings_of_the_model_that_do_not_work(settings, trained, monkeypatch):
    """Transformers finds no pieces of a stop string in a tokenizer of whole words."""
    for name, value in settings.items():
        monkeypatch.setattr(trained.model.generation_config, name, value)
    with pytest.raises(CELoraError, match=r"generation_config.json and these options do not work: "):
        generate(trained, [[5, 6]], replace(GREEDY, temperature=None))


def test_a_conversation_is_streamed_and_remembered(trained, stock):
    talk, pieces = Conversation(trained, GREEDY, system="w3"), []
    first = talk.ask(PROMPTS[0], pieces.append)
    history = [{"role": "system", "content": "w3"}, user(PROMPTS[0])]
    assert first == "".join(pieces) == stock(history)
    assert len(pieces) > 1
    history += [{"role": "assistant", "content": first}, user(PROMPTS[1])]
    assert talk.ask(PROMPTS[1]) == stock(history)
    talk.forget()
    assert talk.ask(PROMPTS[0]) == first


def test_the_untouched_model_answers_beside_it(trained, stock):
    own, base = Conversation(trained, GREEDY), Conversation(trained, GREEDY, base=True)
    for prompt in PROMPTS:
        own.forget()
        base.forget()
        assert own.ask(prompt) == stock([user(prompt)])
        assert base.ask(prompt) == stock([user(prompt)], off=True)
    assert own.turns != base.turns


def test_prompts_of_different_lengths_are_answered_in_one_batch(trained, stock):
    expected = [stock([user(prompt)]) for prompt in PROMPTS]
    assert answers(trained, PROMPTS, GREEDY) == expected
    untouched = [stock([user(prompt)], off=True) for prompt in PROMPTS]
    assert answers(trained, PROMPTS, GREEDY, base=True) == untouched
    assert untouched != expected


def test_ctrl_c_ends_the_answer_and_keeps_what_was_said(trained):
    talk, told = Conversation(trained, GREEDY, system="w3"), []

    def interrupt(text):
        told.append(text)
        raise KeyboardInterrupt

    whole = talk.ask(PROMPTS[0])
    talk.forget()
    with pytest.raises(KeyboardInterrupt):
        talk.ask(PROMPTS[0], interrupt)
    assert talk.turns[-1] == {"role": "assistant", "content": "".join(told)}
    assert whole.startswith("".join(told))
    assert len("".join(told)) < len(whole)
    untouched = Conversation(trained, GREEDY, base=True)
    told.clear()
    with pytest.raises(KeyboardInterrupt):
        untouched.ask(PROMPTS[0], interrupt)
    talk.forget()
    assert talk.ask(PROMPTS[0]) == whole  # after that, the adapter is on again


def test_sampling_is_the_seeds(trained):
    warm = Sampling(max_new_tokens=8, temperature=1.5)
    first, again, other = (answers(trained, PROMPTS, replace(warm, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other


def test_without_a_chat_template_a_prompt_is_continued(trained):
    tokenizer = trained.tokenizer
    assert encode(tokenizer, "w1 w2", raw=True) == tokenizer("w1 w2")["input_ids"]
    talk = Conversation(replace(trained, raw=True), GREEDY)
    assert talk.ask("w1 w2") == talk.ask("w1 w2")
    assert talk.turns == []
    for system in ("w3", ""):
        with pytest.raises(CELoraError, match="--system needs the chat template"):
            Conversation(replace(trained, raw=True), GREEDY, system=system)


def test_a_prompt_that_is_continued_has_no_end(trained):
    """Some tokenizers end each text. In training the end follows the completion."""
    tokenizer = copy.deepcopy(trained.tokenizer)
    plain = tokenizer("w1 w2")["input_ids"]
    start, end = tokenizer.convert_tokens_to_ids(["w9", "<eos>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="w9 $A <eos>", special_tokens=[("w9", start), ("<eos>", end)]
    )
    assert tokenizer("w1 w2")["input_ids"] == [start, *plain, end]
    assert encode(tokenizer, "w1 w2", raw=True) == [start, *plain]
    assert encode(tokenizer, "", raw=True) == [start, end]  # nothing tells which of them begins a text


def test_an_empty_system_message_switches_off_the_template_s_own(trained, monkeypatch):
    own = "{% if messages[0]['role'] != 'system' %}w9 {% endif %}" + trained.tokenizer.chat_template
    monkeypatch.setattr(trained.tokenizer, "chat_template", own)
    asked = []
    monkeypatch.setattr(generation, "generate", lambda trained, prompts, *_, **more: asked.extend(prompts))
    for system in (None, ""):
        Conversation(trained, GREEDY, system=system).ask("w1")
    (own,) = trained.tokenizer("w9", add_special_tokens=False)["input_ids"]
    assert [tokens.count(own) for tokens in asked] == [1, 0]


def test_what_cannot_be_asked_is_one_line(trained, monkeypatch):
    with pytest.raises(CELoraError, match=r"1\d\d tokens, and the model's context holds 128"):
        Conversation(trained, GREEDY).ask("w1 " * 150)
    with pytest.raises(CELoraError, match="the prompt holds no tokens"):
        encode(trained.tokenizer, "", raw=True)
    for raw in (False, True):  # as Python reads bytes of another encoding from a terminal or from stdin
        with pytest.raises(CELoraError, match="the prompt is not UTF-8 text; save its file, or set the terminal, as"):
            encode(trained.tokenizer, b"w1 \xe9".decode(errors="surrogateescape"), raw=raw)
    monkeypatch.setattr(trained.tokenizer, "chat_template", "{{ raise_exception('only users') }}")
    with pytest.raises(CELoraError, match="the chat template refuses this conversation: only users"):
        encode(trained.tokenizer, "w1")
    monkeypatch.setattr(trained.tokenizer, "chat_template", None)
    with pytest.raises(CELoraError, match="has no chat template, so it takes no conversations"):
        encode(trained.tokenizer, [user("w1")])


def test_the_context_bounds_the_answer(trained):
    prompt = "w1 " * 120
    length = len(encode(trained.tokenizer, prompt))
    made = Conversation(trained, Sampling(max_new_tokens=64, temperature=0)).ask(prompt)
    assert len(made.split()) <= 128 - length


def test_a_long_prompt_leaves_other_answers_whole(trained, monkeypatch):
    """It has a batch of its own, because the whole of a batch gets as many new tokens as its longest prompt allows."""
    long, asked = "w1 " * 120, []

    def recorded(trained, prompts, sampling, *, base=False):
        asked.append([len(prompt) for prompt in prompts])
        return generate(trained, prompts, sampling, base=base)

    expected = [answers(trained, [prompt], GREEDY)[0] for prompt in (PROMPTS[0], long, PROMPTS[1])]
    monkeypatch.setattr(generation, "generate", recorded)
    assert answers(trained, [PROMPTS[0], long, PROMPTS[1]], GREEDY) == expected
    assert [len(batch) for batch in asked] == [2, 1]
    assert asked[1][0] > max(asked[0])


def test_trained_biases_leave_no_untouched_model(trained, monkeypatch):
    check_base(trained)
    monkeypatch.setattr(trained.model.peft_config["default"], "bias", "lora_only")
    with pytest.raises(CELoraError, match="bias='lora_only' has trained biases"):
        check_base(trained)
