"""A GGUF file as the base model of a run: converted once into a folder of Transformers in the user's cache.

The folder appears whole or not at all. Its name is the SHA-256 of the file and the dtype, so a file that was replaced
is converted anew. One tensor is unpacked at a time, a few rows of it in float32.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from celora.borrowed import borrow
from celora.errors import CELoraError
from celora.files import read_json, replacing_folder
from celora.machine.cache import cache_folder
from celora.train.formats.architectures import Layout
from celora.train.formats.gguf_config import ROPE_TENSORS, gguf_config
from celora.train.formats.gguf_file import GGUFHeader, read_header, read_tensor
from celora.train.formats.shards import write_shards

_FORMAT = 2  # of the folder; in its name, so that a later celora does not take what an earlier one has made
_MOST_BYTES = 2**28  # of one file of weights
# Names of GPT-2's way to split text, and of ways that differ from it only in digits that no merge joins.
_AS_GPT_2 = ("default", "gpt-2", "mpt", "olmo", "smollm", "refact", "starcoder")
# Names of the ways with which llama.cpp looks up a whole word before it merges, and begins a text with BOS, unless the
# file says otherwise. Transformers splits as they do, and does neither.
_WHOLE_WORDS = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
)  # fmt: skip
_KIND = gguf.GGMLQuantizationType
_PLAIN = {_KIND.F32: torch.float32, _KIND.F16: torch.float16, _KIND.BF16: torch.bfloat16}


def converted(path: Path, dtype: str | None = None, say: Callable[[str], None] | None = None) -> Path:
    """The folder in the user's cache that a GGUF file is converted into, made if it is not there.

    Args:
        path: the file.
        dtype: of the weights, by its name; None or "auto" for the one that `own_dtype` gives.
        say: is told that this takes a while, if it does.

    Raises:
        CELoraError: as `convert`, or the cache cannot be written to.
    """
    header = read_header(path)
    kind = own_dtype(header) if dtype in (None, "auto") else getattr(torch, str(dtype))
    name = str(kind).removeprefix("torch.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        target = cache_folder("gguf") / f"{digest}-{name}-{_FORMAT}"
        if target.is_dir():  # first: this user may not write beside it
            return target
        lock = FileLock(target.with_name(f"{target.name}.lock")).acquire()  # another process may be making it
    except (OSError, RuntimeError) as error:
        raise CELoraError(
            f"the converted model cannot be kept: {error}; set XDG_CACHE_HOME to a folder of yours"
        ) from None
    with lock:
        if not target.is_dir():
            if say:
                say(f"Converting {path.name} to {name}, once: {target}")
            with replacing_folder(target) as new:
                convert(header, new, kind)
    return target


def own_dtype(header: GGUFHeader) -> torch.dtype:
    """The dtype that a file's matrices are in, or bfloat16 where they are quantised.

    bfloat16 rounds by 0.17 % (relative root mean square), Q8_0 by 0.5 %, 4 bits by 7 %.
    """
    kinds = {_PLAIN.get(tensor.kind, torch.bfloat16) for tensor in header.tensors.values() if len(tensor.shape) > 1}
    return kinds.pop() if len(kinds) == 1 else torch.bfloat16


def convert(header: GGUFHeader, folder: Path, dtype: torch.dtype) -> None:
    """Write the model in a GGUF file into an empty folder, as Transformers does: configuration, tokenizer, weights.

    Raises:
        CELoraError: as `write_settings`, or a weight is not finite. What the folder holds then is no model.
    """
    config, names = write_settings(header, folder, dtype)
    write_shards(folder, _tensors(header, names, Layout(config), dtype), _MOST_BYTES)


def write_settings(header: GGUFHeader, folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, str]]:
    """Write configuration and tokenizer alone; gives the configuration, and the parameters' names in the file.

    Raises:
        CELoraError: the file's architecture or a quantisation of it is not read, or its tensors or its tokenizer do not
            fit the model.
    """
    config = gguf_config(header)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    names = _names(header, model)
    _save_tokenizer(header, config, folder)
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    _generation(header, config).save_pretrained(folder)
    return config, names


def _names(header: GGUFHeader, model: Any) -> dict[str, str]:
    """The parameters of the model: name -> name in the file. None is missing, none is left over, and all shapes fit."""
    layout, found = Layout(model.config), {}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    where = str(header.path)
    for name, parameter in model.state_dict().items():
        if name in tied:
            continue
        there = layout.gguf_name(name)
        tensor = header.tensors.get(str(there))
        if tensor is None:
            raise CELoraError(f"{where!r} lacks {there or name}, which its model has; it is damaged or of another kind")
        if tensor.shape != tuple(parameter.shape):
            raise CELoraError(
                f"{there} in {where!r} is {tensor.shape}, and its metadata make it {tuple(parameter.shape)}"
            )
        found[name] = tensor.name
    rest = header.tensors.keys() - set(found.values()) - set(ROPE_TENSORS)
    if rest:
        raise CELoraError(
            f"{where!r} holds {min(rest)}, which Transformers' {type(model).__name__} has not; give --model with the "
            "model's own folder or hub name"
        )
    for kind in {tensor.kind for tensor in header.tensors.values()}:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            raise CELoraError(
                f"{where!r} is stored as {kind.name}, which is not read; F32, F16, BF16, Q8_0, Q4_0 to Q6_K and "
                "what else the package gguf unpacks are"
            ) from None
    return found


def _tensors(
    header: GGUFHeader, names: dict[str, str], layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, there in names.items():
        tensor = header.tensors[there]
        # A norm's offset is taken off before it is rounded.
        read = read_tensor(header, tensor, dtype if len(tensor.shape) > 1 else torch.float32)
        yield name, layout.from_gguf(name, read).to(dtype)


def _put(file: Path, place: Path) -> None:
    """Link a file to another place, or copy it: Windows lets few people link, and none to another drive."""
    for link in (os.symlink, os.link):
        with contextlib.suppress(OSError):
            link(file, place)
            return
    shutil.copyfile(file, place)


def _save_tokenizer(header: GGUFHeader, config: Any, folder: Path) -> None:
    """Write the tokenizer in a file, with its chat template; what lies beside the file is not looked at."""
    _check_split(header)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as alone:
            link = Path(alone) / "model.gguf"
            _put(header.path.resolve(), link)
            tokenizer = PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=link.name, trust_remote_code=False)
        tokenizer.model_max_length = config.max_position_embeddings
        if header.fields.get("tokenizer.ggml.pre") in _WHOLE_WORDS:
            tokenizer.backend_tokenizer.model.ignore_merges = True
            tokenizer.add_bos_token = bool(header.fields.get("tokenizer.ggml.add_bos_token", True))
        tokenizer.save_pretrained(folder)
        _without_others(folder / "tokenizer.json", config.vocab_size)
        words = len(PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:  # whatever Transformers and tokenizers raise about words, merges and special tokens
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk is full, for example
        raise CELoraError(
            f"{str(header.path)!r} has no tokenizer that Transformers reads: {type(error).__name__}: {str(error)[:200]}"
        ) from error
    if words > config.vocab_size:
        raise CELoraError(f"{str(header.path)!r} has {words:,} tokens, and an embedding of {config.vocab_size:,}")


def _check_split(header: GGUFHeader) -> None:
    """Refuse a byte-level vocabulary that Transformers would split otherwise, without a word."""
    model, split = (header.fields.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    known = borrow("transformers.integrations.gguf.gguf_tokenizer_mapping:GGUF_PRE_TOKENIZER_SPLITS")
    if model == "gpt2" and known is not None and split not in {None, *_AS_GPT_2, *known}:
        raise CELoraError(
            f"{str(header.path)!r} splits text as {split!r} does, which Transformers does not know; give --model with "
            "the model's own folder or hub name"
        )


def _without_others(path: Path, words: int) -> None:
    """Take out what Transformers' class has added to the file's vocabulary: the model has no embedding of it."""
    found = read_json(path)
    found["added_tokens"] = [token for token in found["added_tokens"] if token["id"] < words]
    path.write_text(json.dumps(found, ensure_ascii=False, indent=2), encoding="utf-8")


def _generation(header: GGUFHeader, config: Any) -> Any:
    """Ends an answer at the end of a turn, too, where that is another token than the end of a text."""
    found = GenerationConfig.from_model_config(config)
    turn = header.fields.get("tokenizer.ggml.eot_token_id")
    if isinstance(turn, int) and 0 <= turn < config.vocab_size and config.eos_token_id not in (None, turn):
        found.eos_token_id = [config.eos_token_id, turn]
    return found
