"""Load a model whose base is held in 8 bits: tensor by tensor, so that never more of it is in memory than that.

Transformers does the loading, as it does for any quantised model: names, tied weights and buffers are its business. It
is given a checkpoint of which each tensor is read when it is asked for, and a quantiser that puts an `Int8Linear` in
the place of each linear layer as soon as its weight is there. What is left of Transformers' quantisation afterwards is
nothing: to Trainer and TRL the model is an ordinary one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from celora.errors import CELoraError
from celora.modeling.int8_base import frozen_linears, put, quantise_base
from celora.modeling.int8_linear import Int8Linear
from celora.weights.checkpoint import StoredTensor, stored_tensors

_METHOD = "celora_int8"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What model_init_kwargs may hold and reading tensor by tensor leaves no room for.
_LOADING = {
    "device_map", "max_memory", "low_cpu_mem_usage", "disable_mmap", "local_files_only", "force_download", "variant",
}  # fmt: skip


def load_int8_model(
    model: str, *, revision: str | None, dtype: Any, attention: str | None, settings: dict[str, Any]
) -> Any:
    """The causal language model in a folder or on the hub, the linear layers of its blocks in 8 bits, all of it on CPU.

    Args:
        model: a folder, or a name on the hub.
        revision: on the hub.
        dtype: of everything else, and what weights are rounded to before they are quantised; `auto` for the
            checkpoint's own.
        attention: the implementation.
        settings: `model_init_kwargs`.

    Raises:
        CELoraError: the checkpoint is quantised already or has no safetensors, or settings say how to load.
    """
    if where := sorted(_LOADING & settings.keys()):
        raise CELoraError(f"{where[0]} in model_init_kwargs says how to load, and --base int8 does; leave it out")
    tensors = stored_tensors(model, revision)
    experts = {name: value for name, value in settings.items() if name == "experts_implementation"}
    fields = {name: value for name, value in settings.items() if name not in experts}
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False, **fields)
    if getattr(config, "quantization_config", None) is not None:
        raise CELoraError("its weights are quantised already; leave out --base int8")
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or config.get_text_config().dtype or _dtype_of(tensors)
    _register()
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    loaded: Any = kind.from_pretrained(
        None,
        config=config,
        trust_remote_code=False,
        state_dict=tensors,
        quantization_config=_Config(),
        dtype=dtype,
        attn_implementation=attention,
        **experts,
    )
    loaded.config.name_or_path = loaded.name_or_path = model
    loaded.config._commit_hash = revision  # where the weights are read again
    quantise_base(loaded)  # what the checkpoint lacked
    return loaded


def _dtype_of(tensors: dict[str, StoredTensor]) -> torch.dtype:
    """The first dtype of the checkpoint that is one of a model."""
    kinds = (tensor.get_dtype() for tensor in tensors.values())
    return next((_DTYPES[kind] for kind in kinds if kind in _DTYPES), torch.float32)


class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Asks Transformers for the quantiser below."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = _METHOD


class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Quantises each weight as it is loaded."""

    is_trainable = True

    def is_serializable(self) -> bool:
        return False

    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        super().preprocess_model(model, dtype=dtype, **kwargs)
        self.names = {f"{name}.weight" for name in frozen_linears(model)}

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        return param_name in self.names

    def get_quantize_ops(self) -> Any:
        return _Quantise(self.names)

    def postprocess_model(self, model: Any, **_: Any) -> None:
        self.remove_quantization_config(model)


class _Quantise(ConversionOps):  # type: ignore[misc]
    """Puts the layer in 8 bits into the model. What is left for Transformers to put there is what is not quantised."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        model, missing = kwargs["model"], kwargs["missing_keys"]
        left = {}
        for name, value in input_dict.items():
            if name not in self.names:
                left[name] = value
                continue
            linear = model.get_submodule(name.removesuffix(".weight"))
            tensor = value[0] if isinstance(value, list) else value
            if tensor.shape != linear.weight.shape:
                raise CELoraError(f"{name} is {tuple(tensor.shape)}, and the model's {tuple(linear.weight.shape)}")
            linear.weight = nn.Parameter(tensor, requires_grad=False)
            layer = Int8Linear.of(linear)
            layer._is_hf_initialized = True
            put(model, linear, layer)
            missing.discard(name)
        return left


@functools.cache
def _register() -> None:
    register_quantization_config(_METHOD)(_Config)
    register_quantizer(_METHOD)(_Quantizer)
