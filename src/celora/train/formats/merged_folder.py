"""The merged model as a folder of Transformers, in safetensors. One new file, 1 GiB, is in memory at a time.

The tokenizer is the one that was trained with. Configuration files are the base model's, with the tokenizer's end token
added: `--eos_token` may have made it another. Weights keep the base's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from celora.errors import CELoraError
from celora.files import read_json
from celora.train.formats.saved_adapter import SavedAdapter
from celora.train.formats.shards import write_shards
from celora.weights.checkpoint import INDEX, SINGLE

_MOST_BYTES = 2**30  # of one file, unless one tensor alone is larger
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_GENERATION = "generation_config.json"


def base_folder(model: str, revision: str) -> Path:
    """The folder of a base model: itself, or its copy from the hub with the files that Transformers loads."""
    if Path(model).expanduser().is_dir():
        return Path(model).expanduser()
    try:
        base = Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", SINGLE]))
        if not (base / SINGLE).is_file():
            shards = read_json(base / INDEX)["weight_map"].values() if (base / INDEX).is_file() else ["*.safetensors"]
            base = Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", *sorted({*shards})]))
        return base
    except Exception as error:  # whatever the hub client raises
        raise CELoraError(f"cannot load a model from {model!r}: {error}") from error


def write_folder(folder: Path, base: Path, adapter: SavedAdapter, tokenizer: Any) -> int:
    """Write the merged model into an empty folder and read it back; gives the number of tensors that were compared.

    Raises:
        CELoraError: the base model is not this adapter's, it is quantised, or what was read is not what was written.
    """
    config = read_json(base / "config.json")
    if config.get("quantization_config"):
        raise CELoraError(
            f"the base model in {str(base)!r} is quantised, and its weights cannot be merged with; give --model with "
            "the model that it was made from"
        )
    generation = read_json(base / _GENERATION) if (base / _GENERATION).is_file() else None
    if not isinstance(generation, dict | None):
        raise CELoraError(f"{str(base / _GENERATION)!r} is no JSON object; fetch the base model again")
    # The file leaves out what is the default of the model's class, which differs between classes.
    text = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config()
    tied = bool(getattr(text, "tie_word_embeddings", False))
    untied = tied and not {_EMBEDDING, _HEAD}.isdisjoint(adapter.touched)
    # The checkpoint of a bare model lacks the prefix of the model around it.
    bare = {name.partition(".")[2]: name for name in adapter.touched}
    tensors = _with_head(_tensors(base), untied)
    merged = ((name, adapter.merged(bare.get(name, name), tensor)) for name, tensor in tensors)
    names = write_shards(folder, merged, _MOST_BYTES)
    if untied and _HEAD not in names:
        raise CELoraError(
            f"the checkpoint in {str(base)!r} has no {_EMBEDDING!r}, of which the adapter makes the head; save the "
            "base model with save_pretrained once, and give its folder as --model"
        )
    if rest := adapter.touched - {bare.get(name, name) for name in names}:
        first = min(rest, key=lambda name: (name.endswith(".bias"), name))
        if homeless := adapter.homeless(first):
            raise CELoraError(f"{homeless}; only PEFT can load this adapter")
        raise CELoraError(
            f"{first!r}, which the adapter changes, is not in the base model in {str(base)!r}: this is another one"
        )
    if untied:
        config["tie_word_embeddings"] = False
    generation = _ending(config, generation, tokenizer.eos_token_id)
    for name, content in (("config.json", config), (_GENERATION, generation)):
        if content is not None:
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    return len(names)


def _ending(config: dict[str, Any], generation: dict[str, Any] | None, end: int | None) -> dict[str, Any] | None:
    """Let the model end with the tokenizer's end token, too, as Trainer does with the model that it trains.

    Args:
        config: the content of config.json, which is changed.
        generation: that of generation_config.json. Without one, Transformers takes such settings from config.json.
        end: the token.

    Returns:
        What generation_config.json has to hold; None for no such file.
    """
    key = "eos_token_id"
    before = {k: config[k] for k in GenerationConfig().to_dict() if k in config} if generation is None else generation
    ends = _listed(before.get(key))
    if end is None or end in ends:
        return generation
    places = [place for place in (config, config.get("text_config") or {}) if key in place]
    for place in places or [config]:
        if end not in _listed(place.get(key)):
            place[key] = [end, *place[key]] if isinstance(place.get(key), list) else end
    return before | {key: [end, *ends]}


def _listed(tokens: Any) -> list[Any]:
    return tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]


def _tensors(base: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's folder, one by one, from the files that Transformers loads."""
    if (base / SINGLE).is_file():
        files = [base / SINGLE]
    elif (base / INDEX).is_file():
        files = sorted({base / Path(name).name for name in read_json(base / INDEX)["weight_map"].values()})
    else:  # of a variant
        files = sorted(base.glob("*.safetensors"))
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # a handle is no mapping
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CELoraError(f"cannot read {str(path)!r}: {error}") from error


def _with_head(tensors: Iterator[tuple[str, Tensor]], untied: bool) -> Iterator[tuple[str, Tensor]]:
    """With the vocabulary projection as a tensor of its own, where it was the embedding's and no longer is."""
    for name, tensor in tensors:
        if name == _HEAD and untied:
            continue
        yield name, tensor
        if name == _EMBEDDING and untied:
            yield _HEAD, tensor.clone()
