"""llama.cpp with an exported adapter, or with a merged model, answers like PEFT.

The base is a real model in a 4-bit file. PEFT computes on the same weights, unpacked to float32. llama.cpp multiplies
the 4-bit weights with activations in 8 bits: without an adapter, its log-probabilities are off by this noise. With the
adapter they may be off by no more. A merged file in float32 has next to no noise.
"""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from adapters import save
from benchmarks.scale.estimate import run_alone
from celora.studies import assets
from celora.studies.demo import ASKED, whole_way
from celora.studies.sentiment import SYSTEM, splits, to_rows
from celora.train.formats.export import export
from ggufs import unpack_model

pytestmark = pytest.mark.slow
WORDS = 100  # the log-probabilities of this many likeliest words are compared
CLEAR = 1.0  # if the likeliest word leads by more logits than this, noise cannot change the order
PROMPTS = [
    "The capital of France is", "Once upon a time", "def add(a, b):", "Water boils at", "The opposite of hot is",
    "My favourite colour is", "In the beginning", "Two plus two equals", "The sun rises in the", "Dear Sir or Madam,",
    "A cat sat on the", "To be or not to", "The largest planet is", "Roses are red, violets are", "She opened the door",
    "Breaking news:", "The recipe needs flour and", "import numpy as", "Paris, London and", "He said that he would",
]  # fmt: skip


class LlamaCpp:
    """llama.cpp in this process, with one model and perhaps an adapter."""

    def __init__(self, model: Path, lora: Path | None = None) -> None:
        xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp, which carries llama.cpp, is not installed")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = 512, 1, 0
        parameters.warmup, parameters.verbosity = False, -1
        parameters.cpuparams.n_threads = 1
        if lora is not None:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(parameters)

    def next_words(self, tokens: list[int], count: int = 1) -> list[dict[int, float]]:
        """The log-probabilities of the likeliest words at each of the next places.

        The likeliest word is taken each time.
        """
        asked = {"prompt": tokens, "n_predict": count, "temperature": -1.0, "n_probs": WORDS, "cache_prompt": False}
        answer = self.server.handle_completions(asked)
        places = answer["choices"][0]["logprobs"]["content"]
        return [{word["id"]: word["logprob"] for word in place["top_logprobs"]} for place in places]


def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    """The log-probability of every word after each token: (tokens, words)."""
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return found


def distance(found: dict[int, float], expected: torch.Tensor) -> float:
    """The root mean square difference over the words in `found`."""
    return float((torch.tensor(list(found.values())) - expected[list(found)]).square().mean().sqrt())


@pytest.fixture(scope="module")
def gguf() -> Path:
    pytest.importorskip("xllamacpp", reason="xllamacpp, which carries llama.cpp, is not installed")
    return assets.demo_gguf()


@pytest.fixture(scope="module")
def prompts(real_assets: None) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(assets.demo_model())
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def adapted(gguf: Path) -> Any:
    """The unpacked model with an adapter that changes every layer, and scales some differently."""
    torch.manual_seed(0)
    base = unpack_model(gguf)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", alpha_pattern={"q_proj": 32}, use_rslora=True)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.006)
    return model


@pytest.fixture(scope="module")
def folder(adapted: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save(adapted, tmp_path_factory.mktemp("run") / "out"))


def test_the_adapter_is_pefts_within_the_noise_of_the_base(
    adapted: Any, folder: Path, gguf: Path, prompts: list[list[int]]
) -> None:
    lora = export(folder, "gguf", model=str(assets.demo_model()), gguf=gguf).output / "adapter.gguf"
    plain, changed = LlamaCpp(gguf), LlamaCpp(gguf, lora)
    noise, error = [], []
    for tokens in prompts:
        with adapted.disable_adapter():
            noise.append(distance(plain.next_words(tokens)[0], log_probabilities(adapted, tokens)[-1]))
        error.append(distance(changed.next_words(tokens)[0], log_probabilities(adapted, tokens)[-1]))
    assert sum(error) <= 1.5 * sum(noise)


def test_on_an_unpacked_base_the_adapter_is_pefts(
    adapted: Any, folder: Path, gguf: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    model = str(assets.demo_model())
    nothing = shutil.copytree(folder, tmp_path / "nothing")
    weights = load_file(nothing / "adapter_model.safetensors")
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in weights.items()}, nothing / "adapter_model.safetensors"
    )
    unpacked = export(nothing, "gguf", merged=True, gguf=gguf, outtype="f32", model=model).output / "model.gguf"
    lora = export(folder, "gguf", model=model, output=tmp_path / "lora").output / "adapter.gguf"
    changed = LlamaCpp(unpacked, lora)
    for tokens in prompts[:8]:
        with adapted.disable_adapter():
            untouched = log_probabilities(adapted, tokens)[-1]
        expected, found = log_probabilities(adapted, tokens)[-1], changed.next_words(tokens)[0]
        assert distance(found, expected) < 0.02
        assert distance(found, untouched) > 0.1


def test_greedy_answers_are_pefts_where_its_margin_is_clear(
    adapted: Any, folder: Path, gguf: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    made = export(folder, "gguf", model=str(assets.demo_model()), output=tmp_path / "new")
    changed, clear = LlamaCpp(gguf, made.output / "adapter.gguf"), 0
    for tokens in prompts:
        answer = [max(place, key=place.__getitem__) for place in changed.next_words(tokens, 8)]
        expected = log_probabilities(adapted, tokens + answer)[len(tokens) - 1 : -1]
        best, second = expected.topk(2).values.T
        for place in range(len(answer)):
            if best[place] - second[place] > CLEAR:
                clear += 1
                assert answer[place] == int(expected[place].argmax())
    assert clear >= 40


def test_a_merged_model_is_pefts(
    adapted: Any, folder: Path, gguf: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    for outtype, most in (("f32", 0.02), ("f16", 0.03), ("q8_0", 0.4)):
        output = tmp_path / outtype
        export(folder, "gguf", merged=True, gguf=gguf, outtype=outtype, model=str(assets.demo_model()), output=output)
        merged = LlamaCpp(output / "model.gguf")
        for tokens in prompts[:5]:
            assert distance(merged.next_words(tokens)[0], log_probabilities(adapted, tokens)[-1]) < most, outtype


def test_from_one_gguf_file_to_an_answer_of_llama_cpp(gguf: Path, tmp_path: Path) -> None:
    """What `celora demo` offers at its end, command by command; the data are the demo's."""
    data = tmp_path / "data" / "train-seed0.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in to_rows(splits(0, train=320).train)))
    printed = [run_alone(shlex.split(command)[1:]) for command in whole_way(tmp_path)]
    estimate, _, chat, _ = (out for out, _ in printed)
    assert "2 GiB" in estimate
    assert all(peak <= 1.05 * 2**31 for _, peak in printed)
    lora = tmp_path / "from-gguf-gguf" / "adapter.gguf"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "from-gguf")
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": ASKED}]
    tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    places = LlamaCpp(gguf, lora).next_words(tokens, len(tokenizer("negative")["input_ids"]))
    answer = tokenizer.decode([max(place, key=place.__getitem__) for place in places])
    assert answer in ("negative", "positive")
    assert chat.strip() == answer
