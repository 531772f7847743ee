"""The stock judge: padding and batching change nothing, a known model gets its known score, and celora is not used."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from celora.studies import stock_eval
from celora.studies.assets import demo_model
from celora.studies.sentiment import splits, to_rows
from celora.studies.stock_eval import label_accuracy
from forked import run, script


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model())


@pytest.fixture(scope="module")
def small() -> Any:
    """A small Llama in float32 with the demo model's vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=49152, initializer_range=0.5, **shape))


class Oracle(torch.nn.Module):
    """Answers 'positive' exactly if the question had 'good' in it. Checks how it is called."""

    def __init__(self, good: int, labels: list[int]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.good, self.labels, self.positions = good, labels, 0

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool, logits_to_keep: Any) -> Any:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        assert not use_cache
        ends = attention_mask.sum(1) - 1
        assert set(ends.tolist()) == set(logits_to_keep.tolist())
        self.positions += logits_to_keep.numel() * len(input_ids)
        seen = ((input_ids == self.good) & attention_mask.bool()).any(1).float()
        logits = torch.full((len(input_ids), len(logits_to_keep), 49152), 1e6)
        logits[:, :, self.labels] = torch.stack([0.5 - seen, seen - 0.5], 1)[:, None]
        return SimpleNamespace(logits=logits)


def rows(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [
        {"prompt": [{"role": "user", "content": text}], "completion": [{"role": "assistant", "content": label}]}
        for text, label in pairs
    ]


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_known_answers(tokenizer: Any) -> None:
    data = rows(("so good", "positive"), ("so very very bad", "negative"), ("no good", "negative"), ("a", "negative"))
    model = Oracle(ids(tokenizer, " good")[0], [ids(tokenizer, label)[0] for label in stock_eval.LABELS]).train()
    assert [label_accuracy(model, tokenizer, data, batch_size=size) for size in (1, 3, 4, 9)] == [0.75] * 4
    assert model.training


def test_padding_side_and_batch_size_change_nothing(tokenizer: Any, small: Any) -> None:
    prompts = [ids(tokenizer, text) for text in ("a", "a much longer sentence, with commas", "two words", "b")]
    device = torch.device("cpu")
    alone = torch.cat([stock_eval._answer_logits(small, [prompt], device) for prompt in prompts])
    together = stock_eval._answer_logits(small, prompts, device)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    data = to_rows(splits(0, test=40).test)
    scores = set()
    for side, batch_size in (("left", 40), ("right", 40), ("left", 7), ("right", 1)):
        tokenizer.padding_side = side
        scores.add(label_accuracy(small, tokenizer, data, batch_size=batch_size))
    assert len(scores) == 1


def test_same_as_the_whole_models_logits(tokenizer: Any, small: Any) -> None:
    data = to_rows(splits(0, test=20).test)
    first = torch.tensor([ids(tokenizer, label)[0] for label in stock_eval.LABELS])
    right = 0
    for row in data:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        with torch.no_grad():
            logits = small(torch.tensor([ids(tokenizer, text)])).logits[0, -1, first]
        right += stock_eval.LABELS[int(logits.argmax())] == row["completion"][0]["content"]
    assert label_accuracy(small, tokenizer, data) == right / len(data)


def test_errors(tokenizer: Any, small: Any) -> None:
    with pytest.raises(ValueError, match="no rows to score"):
        label_accuracy(small, tokenizer, [])
    with pytest.raises(ValueError, match="label 'neutral' is not one of negative, positive"):
        label_accuracy(small, tokenizer, rows(("a", "neutral")))
    with pytest.raises(ValueError, match="labels new, new york start with the same token"):
        label_accuracy(small, tokenizer, rows(("a", "new")), labels=("new", "new york"))


# PEFT 0.21 asks Transformers for a name that version 5.24 has renamed. Nothing here depends on it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_by_path_without_celora(tmp_path: Path, tokenizer: Any, small: Any) -> None:
    from peft import LoraConfig, get_peft_model

    small.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    adapted = get_peft_model(small, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    data = to_rows(splits(0, test=40).test)
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps(row) for row in data), "utf-8")
    adapter = ["--adapter", tmp_path / "adapter"]
    given = ["--base", tmp_path / "base", *adapter, "--data", tmp_path / "test.jsonl", "--untouched", *adapter]
    done = run(script, stock_eval.__file__, *given)
    assert done.returncode == 0, done.stderr
    with adapted.disable_adapter():
        untouched = label_accuracy(adapted, tokenizer, data)
    expected = label_accuracy(adapted, tokenizer, data)
    assert expected != untouched
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"accuracy": accuracy, "n": 40, "celora_imported": False} for accuracy in (untouched, expected, expected)
    ]
