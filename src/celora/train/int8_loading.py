"""Load a model with its base in 8 bits, tensor by tensor. The whole base is never in memory in another dtype.

Transformers does the loading, as for any quantised model: it handles names, tied weights and buffers. celora gives it
two things. The checkpoint reads each tensor only when Transformers asks for it. The quantiser replaces each linear
layer by an `Int8Linear` as soon as its weight arrives. Nothing of Transformers' quantisation stays on the model
afterwards: Trainer and TRL see an ordinary model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from celora.errors import CELoraError
from celora.modeling.int8_base import frozen_linears, put, quantise_base
from celora.modeling.int8_linear import Int8Linear
from celora.train.request.model_init import LOADING
from celora.weights.checkpoint import stored_dtype, stored_tensors

_METHOD = "celora_int8"


def load_int8_model(
    model: str, *, revision: str | None, dtype: Any, attention: str | None, settings: dict[str, Any]
) -> Any:
    """Load a causal language model onto the CPU, with the linear layers of its blocks in 8 bits.

    Args:
        model: a folder, or a name on the hub.
        revision: the revision on the hub.
        dtype: dtype of everything else. Weights are rounded to it before they are quantised. `auto` takes the
            checkpoint's own.
        attention: which implementation of attention to use.
        settings: `model_init_kwargs`.

    Raises:
        CELoraError: the checkpoint is quantised already or has no safetensors, or `settings` say how to load.
    """
    if where := sorted(LOADING & settings.keys()):
        raise CELoraError(f"{where[0]} in model_init_kwargs says how to load, as --base int8 does; leave it out")
    tensors = stored_tensors(model, revision)
    experts = {name: value for name, value in settings.items() if name == "experts_implementation"}
    fields = {name: value for name, value in settings.items() if name not in experts}
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False, **fields)
    if getattr(config, "quantization_config", None) is not None:
        raise CELoraError("its weights are quantised already; leave out --base int8")
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or config.get_text_config().dtype or stored_dtype(tensors)
    _register()
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=False))
    found = kind.from_pretrained(
        None,
        config=config,
        trust_remote_code=False,
        state_dict=tensors,
        quantization_config=_Config(),
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        **experts,
    )
    loaded = complete(*found)
    loaded.config.name_or_path = loaded.name_or_path = model
    if loaded.can_generate():
        with contextlib.suppress(OSError):  # the model has no such file, and its configuration says it
            loaded.generation_config = GenerationConfig.from_pretrained(model, revision=revision)
    loaded.config._commit_hash = revision  # the original weights are read from there again
    quantise_base(loaded)  # notes for each layer where that is
    return loaded


def complete(model: Any, info: Mapping[str, Any]) -> Any:
    """The model that Transformers has loaded; CELoraError if its checkpoint lacks weights, which are random then."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise CELoraError(
            f"its checkpoint lacks {len(missing):,} of the model's weights, {missing[0]!r} for one; fetch it again, or "
            "give a checkpoint of the whole model"
        )
    return model


class _Config(QuantizationConfigMixin):  # type: ignore[misc]
    """Asks Transformers for the quantiser below."""

    def __init__(self, **_: Any) -> None:
        self.quant_method = _METHOD


class _Quantizer(HfQuantizer):  # type: ignore[misc]
    """Quantises each weight when it is loaded."""

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
    """Puts each quantised layer into the model, and hands every other tensor back to Transformers."""

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
