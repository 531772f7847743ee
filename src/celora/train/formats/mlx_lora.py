"""An adapter as a folder that mlx-lm loads (`mlx_lm.generate --adapter-path`).

mlx-lm adds `scale (x lora_a) lora_b` to a layer's output, with lora_a: (in, r), lora_b: (r, out). The folder has one
rank r and one scale. A layer of a smaller rank is filled with zeros. A layer whose scaling is another one has it in its
lora_b. DoRA multiplies the layer's output before its bias, as in PEFT, by `m / ||W + scale (lora_a lora_b)^T||`, row by
row.

mlx-lm converts the modules that `keys` names, in the last `num_layers` blocks. A converted module that has no tensor in
the file adds nothing, because its lora_b begins as zeros. So an adapter may leave out any layer.

Source: mlx-lm's `tuner/utils.py` (`load_adapters`), `tuner/lora.py`, `tuner/dora.py`, and `models/`, one file a family.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import pad

from celora.errors import CELoraError
from celora.train.formats.saved_adapter import SavedAdapter
from celora.train.formats.shards import write_file

WEIGHTS, SETTINGS = "adapters.safetensors", "adapter_config.json"
_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LLAMA = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# Linear layers of a block that have the same name in Transformers and in mlx-lm, by `model_type`.
MODULES = dict.fromkeys(
    ("llama", "mistral", "granite", "smollm3", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"), _LLAMA
) | {"phi3": ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")}
_INSTEAD = "--merged --to safetensors writes a whole model, which mlx-lm loads if it knows the family"


def mlx_tensors(adapter: SavedAdapter, config: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """mlx-lm's settings of an adapter, and its tensors by name, in float32.

    Args:
        adapter: what was trained.
        config: the base model's configuration.

    Raises:
        CELoraError: mlx-lm cannot hold this adapter.
    """
    adapter.only_lora("an adapter of mlx-lm", _INSTEAD, dora=True)
    places = _places(config)
    if unknown := next((layer for layer in adapter.layers if layer not in places), None):
        raise CELoraError(f"mlx-lm has no layer {unknown!r} in this model of type {config.model_type!r}; {_INSTEAD}")
    magnitudes = {
        f"{layer}.m": low_rank.magnitude.float()
        for layer, low_rank in adapter.layers.items()
        if low_rank.magnitude is not None
    }
    if len(magnitudes) not in (0, len(adapter.layers)):
        raise CELoraError(f"mlx-lm takes DoRA in all layers of an adapter or in none; {_INSTEAD}")
    rank = max(len(low_rank.A) for low_rank in adapter.layers.values())
    scalings = Counter(low_rank.scaling for low_rank in adapter.layers.values())
    scale = scalings.most_common(1)[0][0] or 1.0  # 0 with lora_alpha=0
    found: dict[str, Tensor] = {}
    for layer, low_rank in adapter.layers.items():
        zeros = rank - len(low_rank.A)
        found[f"{layer}.lora_a"] = pad(low_rank.A.T, (0, zeros)).contiguous()
        found[f"{layer}.lora_b"] = pad(low_rank.B.T * (low_rank.scaling / scale), (0, 0, 0, zeros)).contiguous()
    first = min(places[layer][0] for layer in adapter.layers)
    keys = sorted({places[layer][1] for layer in adapter.layers})
    settings = {
        "fine_tune_type": "dora" if magnitudes else "lora",
        "num_layers": config.num_hidden_layers - first,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    return settings, found | magnitudes


def write_mlx(folder: Path, adapter: SavedAdapter, config: Any) -> int:
    """Write both files into a folder and read them back; gives the number of tensors that were compared.

    Raises:
        CELoraError: as `mlx_tensors`, or what was read is not what was written.
    """
    settings, tensors = mlx_tensors(adapter, config)
    write_file(folder / WEIGHTS, tensors)
    path = folder / SETTINGS
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if json.loads(path.read_text(encoding="utf-8")) != settings:
        raise CELoraError(f"{path.name} does not read back as it was written; check the disk")
    return len(tensors)


def _places(config: Any) -> dict[str, tuple[int, str]]:
    """The block and the key of each layer that can have LoRA, by the layer's name."""
    kind, blocks = config.model_type, config.num_hidden_layers
    if kind not in MODULES:
        raise CELoraError(f"models of type {kind!r} cannot be exported to MLX, only {', '.join(MODULES)}; {_INSTEAD}")
    found = {f"model.layers.{block}.{key}": (block, key) for block in range(blocks) for key in MODULES[kind]}
    # mlx-lm looks for each key in the whole model, too. A tied model has no lm_head there.
    return found if config.tie_word_embeddings else found | {"lm_head": (blocks - 1, "lm_head")}
