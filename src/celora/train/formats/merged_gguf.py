"""The merged model as a GGUF file, made from the base model's GGUF file: one tensor in memory at a time.

Metadata, tokenizer and chat template are the base file's. A weight under an adapter is unpacked, merged in float32 and
stored anew; the others are stored anew, or copied where they are stored so already.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from celora.errors import CELoraError
from celora.train.formats.architectures import Layout
from celora.train.formats.gguf_file import Written, check_written, field, open_gguf
from celora.train.formats.saved_adapter import SavedAdapter

_KIND = gguf.GGMLQuantizationType
OUTTYPES = {
    "f16": (_KIND.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (_KIND.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "f32": (_KIND.F32, gguf.LlamaFileType.ALL_F32),
}
_BLOCK = 32  # numbers that Q8_0 stores under one scale
_SPLIT = "split.count"  # in each part of a model in several files


def write_merged(path: Path, base: Path, adapter: SavedAdapter, config: Any, outtype: str, name: str) -> int:
    """Write the merged model and read it back; gives the number of tensors that were compared.

    Args:
        path: of the new file.
        base: the base model as GGUF.
        adapter: what was trained.
        config: the base model's configuration, as Transformers has it.
        outtype: "f16", "q8_0" or "f32", of the matrices; vectors stay in float32.
        name: `general.name` of the new model.

    Raises:
        CELoraError: the file is not this adapter's base model, or what was read is not what was written.
    """
    reader = open_gguf(base)
    layout = Layout(config)
    architecture = field(reader, gguf.Keys.General.ARCHITECTURE)
    layout.check_base(base, architecture)
    if (field(reader, _SPLIT) or 1) > 1:
        raise CELoraError(f"{str(base)!r} is one of several parts; join them with llama-gguf-split --merge")
    names = _names(reader, adapter, layout, config, base)
    kind, file_type = OUTTYPES[outtype]
    with closing(gguf.GGUFWriter(path, architecture)) as writer:
        _copy_metadata(reader, writer)
        writer.add_name(name)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for tensor in reader.tensors:
            _announce(writer, tensor, _kind(tensor, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        written = {}
        for tensor in reader.tensors:
            data = _stored(tensor, _kind(tensor, kind), adapter, layout, names)
            writer.write_tensor_data(data)
            written[tensor.name] = Written.of(_shape(tensor), _kind(tensor, kind), data)
    return check_written(path, {gguf.Keys.General.ARCHITECTURE: architecture}, written)


def _names(reader: Any, adapter: SavedAdapter, layout: Layout, config: Any, base: Path) -> dict[str, str]:
    """The tensors that the adapter changes: the name in the file -> the name in Transformers' model."""
    held = {tensor.name for tensor in reader.tensors}
    found = {}
    for name in sorted(adapter.touched):
        there = layout.gguf_name(name)
        if there in held and there not in found:
            found[str(there)] = name
            continue
        if layout.gguf_name(name.replace(".bias", ".weight")) in held and (homeless := adapter.homeless(name)):
            raise CELoraError(f"{homeless}; only PEFT can load this adapter")
        tied = name in ("lm_head.weight", "model.embed_tokens.weight") and config.tie_word_embeddings
        why = "is tied to the embedding there" if tied else "has no tensor there"
        raise CELoraError(
            f"{name!r}, which the adapter changes, {why} ({str(base)!r}); give --to safetensors, which llama.cpp's "
            "convert_hf_to_gguf.py reads"
        )
    if config.tie_word_embeddings and "model.embed_tokens.weight" in adapter.touched:
        raise CELoraError(
            "the adapter changes the embedding alone, and the GGUF file ties the vocabulary projection to it; give "
            "--to safetensors, which llama.cpp's convert_hf_to_gguf.py reads"
        )
    return found


def _copy_metadata(reader: Any, writer: Any) -> None:
    general = gguf.Keys.General
    # The writer says its own, and pads tensors to an alignment of its own.
    left_out = {general.ARCHITECTURE, general.NAME, general.FILE_TYPE, general.QUANTIZATION_VERSION, general.ALIGNMENT}
    for entry in reader.fields.values():
        if entry.name in left_out or entry.name.startswith(("GGUF.", "split.")):
            continue
        kind, value = entry.types[0], entry.contents()
        inner = entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        if value is not None and value != []:
            writer.add_key_value(entry.name, value, kind, sub_type=inner)


def _kind(tensor: Any, kind: Any) -> Any:
    """How a tensor is stored: vectors in float32, and as float16 what Q8_0 cannot cut into blocks."""
    if len(tensor.shape) < 2 or kind == _KIND.F32:
        return _KIND.F32
    return _KIND.F16 if kind == _KIND.Q8_0 and tensor.shape[0] % _BLOCK else kind


def _shape(tensor: Any) -> tuple[int, ...]:
    """Rows first, where a GGUF file has them last."""
    return tuple(int(size) for size in reversed(tensor.shape))


def _announce(writer: Any, tensor: Any, kind: Any) -> None:
    """Tell the writer of a tensor whose numbers come later."""
    dtype = np.dtype({_KIND.F16: np.float16, _KIND.F32: np.float32}.get(kind, np.uint8))
    shape = gguf.quant_shape_to_byte_shape(_shape(tensor), kind) if dtype == np.uint8 else _shape(tensor)
    writer.add_tensor_info(tensor.name, shape, dtype, int(np.prod(shape)) * dtype.itemsize, raw_dtype=kind)


def _stored(
    tensor: Any, kind: Any, adapter: SavedAdapter, layout: Layout, names: Mapping[str, str]
) -> np.ndarray[Any, Any]:
    """The numbers of a tensor as they go into the file."""
    name = names.get(tensor.name)
    if name is None and tensor.tensor_type == kind:
        return np.asarray(tensor.data)
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if name is not None:
        own = layout.from_gguf(name, torch.from_numpy(np.ascontiguousarray(values)))
        values = layout.to_gguf(name, adapter.merged(name, own)).numpy()
    with np.errstate(over="ignore"):  # looked for below
        data: np.ndarray[Any, Any] = gguf.quantize(np.ascontiguousarray(values), kind)
    if kind == _KIND.F16 and not np.isfinite(data).all():
        raise CELoraError(f"{tensor.name} holds numbers too large for float16; give --outtype q8_0 or f32")
    return data
