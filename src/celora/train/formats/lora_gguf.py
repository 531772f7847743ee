"""An adapter as a llama.cpp LoRA file.

llama.cpp adds `(alpha / r) B (A x)` to a layer's output, with one alpha for the file and the rank r of each pair. A
layer whose scaling is another one has it in its B.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from celora.errors import CELoraError
from celora.train.formats.architectures import Layout
from celora.train.formats.gguf_file import GGUFHeader, Written, check_written
from celora.train.formats.saved_adapter import LowRank, SavedAdapter


def lora_tensors(adapter: SavedAdapter, config: Any) -> tuple[float, dict[str, np.ndarray[Any, Any]]]:
    """Alpha and the tensors of the file, by name, in float32.

    Args:
        adapter: what was trained.
        config: the base model's configuration.

    Raises:
        CELoraError: a LoRA file cannot hold this adapter.
    """
    adapter.only_lora("a llama.cpp LoRA file", "give --merged")
    layout = Layout(config)
    if "lm_head" in adapter.layers and config.tie_word_embeddings:
        raise CELoraError(
            "a llama.cpp LoRA file cannot hold LoRA on lm_head where the model ties it to its embedding; give --merged"
        )
    scalings = {layer: low_rank.scaling * len(low_rank.A) for layer, low_rank in adapter.layers.items()}
    alpha = float(np.float32(Counter(scalings.values()).most_common(1)[0][0])) or 1.0  # 0 with lora_alpha=0
    found: dict[str, np.ndarray[Any, Any]] = {}
    for layer, low_rank in adapter.layers.items():
        name = layout.gguf_name(f"{layer}.weight")
        if name is None:
            raise CELoraError(
                f"llama.cpp has no tensor for {layer!r} in models of {layout.architecture.name!r}; give --merged"
            )
        order = layout.row_order(f"{layer}.weight", len(low_rank.B))
        B = low_rank.B if order is None else low_rank.B[order]
        found[f"{name}.lora_a"] = low_rank.A.numpy()
        found[f"{name}.lora_b"] = (B * (scalings[layer] / alpha)).numpy()
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise CELoraError(f"{name} of the adapter holds NaN or infinity; take an earlier checkpoint")
    return alpha, found


def write_lora(path: Path, adapter: SavedAdapter, config: Any, name: str, base: GGUFHeader | None = None) -> int:
    """Write the file and read it back; gives the number of tensors that were compared. `base`: what it is used with.

    Raises:
        CELoraError: as `lora_tensors`, it does not fit `base`, or what was read is not what was written.
    """
    alpha, tensors = lora_tensors(adapter, config)
    layout = Layout(config)
    architecture = layout.architecture.name
    if base is not None:
        layout.check_base(base.path, base.architecture)
        _check_shapes(base, {layout.gguf_name(f"{layer}.weight"): low for layer, low in adapter.layers.items()})
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for each, values in tensors.items():
        writer.add_tensor(each, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stated = {
        gguf.Keys.General.ARCHITECTURE: architecture,
        gguf.Keys.General.TYPE: gguf.GGUFType.ADAPTER,
        gguf.Keys.Adapter.TYPE: "lora",
        gguf.Keys.Adapter.LORA_ALPHA: alpha,
    }
    kind = gguf.GGMLQuantizationType.F32
    written = {name: Written.of(values.shape, kind, values) for name, values in tensors.items()}
    return check_written(path, stated, written)


def _check_shapes(base: GGUFHeader, pairs: Mapping[str | None, LowRank]) -> None:
    """Raise CELoraError if a tensor that a pair adds to is missing in the base model, or has another shape."""
    whole = (base.fields.get(gguf.Keys.Split.LLM_KV_SPLIT_COUNT) or 1) == 1  # else it may be in another part
    for name, low_rank in pairs.items():
        tensor, expected = base.tensors.get(str(name)), (len(low_rank.B), low_rank.A.shape[1])
        if tensor is None and not whole:
            continue
        if tensor is None or tensor.shape != expected:
            found = "is not there" if tensor is None else f"is {' x '.join(map(str, tensor.shape))}"
            raise CELoraError(
                f"{str(base.path)!r} is another model: {name} {found}, and the adapter was trained on one of "
                f"{' x '.join(map(str, expected))}; give its own base model"
            )
