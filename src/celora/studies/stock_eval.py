"""Scores how often a causal language model prefers the right label, without celora.

The model's own chat template renders the prompt. Where the answer would start, the logits of the labels' first tokens
are compared. The file imports only the standard library, torch, transformers and PEFT. It runs by its path:
`python stock_eval.py --base MODEL --adapter DIR --data test.jsonl`. So stock PEFT scores an adapter trained with
celora, in a process that never imports celora.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

LABELS = ("negative", "positive")


def label_accuracy(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    labels: Sequence[str] = LABELS,
    batch_size: int = 32,
) -> float:
    """The share of `rows` whose label has the largest logit among the first tokens of `labels`.

    A row is `{"prompt": [message, ...], "completion": [assistant message]}`; the completion is one of `labels`.
    A batch has rows of similar length, padded on the right, whatever `tokenizer.padding_side` says. A causal model
    never looks right, so padding and batch size change a result by rounding only. Logits are computed only where a row
    of the batch ends. The model's mode (train or eval) is restored at the end.

    Raises ValueError if there are no rows, a label is unknown, or two labels begin with the same token.
    """
    if not rows:
        raise ValueError("no rows to score; expected at least one")
    answers = [str(row["completion"][-1]["content"]) for row in rows]
    for answer in answers:
        if answer not in labels:
            raise ValueError(f"label {answer!r} is not one of {', '.join(labels)}")
    prompts = [_token_ids(tokenizer, row["prompt"], answering=True) for row in rows]
    first = [_first_token(tokenizer, rows[0]["prompt"], prompts[0], label) for label in labels]
    if len(set(first)) < len(labels):
        raise ValueError(f"labels {', '.join(labels)} start with the same token; choose labels that differ there")

    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    was_training = model.training
    model.eval()
    right = 0
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                scores = _answer_logits(model, [prompts[i] for i in batch], device)[:, first]
                right += sum(
                    labels[best] == answers[i] for best, i in zip(scores.argmax(dim=1).tolist(), batch, strict=True)
                )
    finally:
        model.train(was_training)
    return right / len(rows)


def _answer_logits(model: Any, prompts: Sequence[list[int]], device: torch.device) -> torch.Tensor:
    """Logits after the last token of each prompt: (prompts, vocabulary), float32."""
    ends = torch.tensor([len(ids) - 1 for ids in prompts], device=device)
    tokens = torch.zeros(len(prompts), int(ends.max()) + 1, dtype=torch.long, device=device)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = torch.tensor(ids, device=device)
        mask[row, : len(ids)] = 1
    kept, which = ends.unique(return_inverse=True)
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
    answers: torch.Tensor = logits[torch.arange(len(prompts), device=device), which].float()
    return answers


def _token_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, answering: bool) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _first_token(tokenizer: Any, prompt: Sequence[Mapping[str, str]], prompt_ids: list[int], label: str) -> int:
    """The first token of the answer `label` in a finished chat. Training had its loss on this token."""
    chat = _token_ids(tokenizer, [*prompt, {"role": "assistant", "content": label}], answering=False)
    if chat[: len(prompt_ids)] != prompt_ids or len(chat) == len(prompt_ids):
        raise ValueError("the chat template renders an answered chat differently from an open one; cannot place labels")
    return chat[len(prompt_ids)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Score a model, or PEFT adapters of it, and print one JSON object for each."""
    parser = argparse.ArgumentParser(description="Label accuracy of a model and adapters, with stock libraries only.")
    parser.add_argument("--base", required=True, help="model folder or name")
    parser.add_argument(
        "--adapter", action="append", help="PEFT adapter folder, repeatable; none scores the base model"
    )
    parser.add_argument("--untouched", action="store_true", help="score the base model, too, as without adapters")
    parser.add_argument("--data", required=True, type=Path, help="JSON lines of prompt/completion message lists")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, ... or auto, the one in the file")
    options = parser.parse_args(arguments)
    rows = [json.loads(line) for line in options.data.read_text("utf-8").split("\n") if line.strip()]

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.base, trust_remote_code=False)
    adapters = options.adapter or []
    for adapter in [None, *adapters] if options.untouched or not adapters else adapters:
        model = AutoModelForCausalLM.from_pretrained(options.base, dtype=options.dtype, trust_remote_code=False)
        model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        accuracy = label_accuracy(model, tokenizer, rows, batch_size=options.batch_size)
        imported = any(name.partition(".")[0] == "celora" for name in sys.modules)
        print(json.dumps({"accuracy": accuracy, "n": len(rows), "celora_imported": imported}))


if __name__ == "__main__":
    main()
