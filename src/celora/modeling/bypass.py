"""Finds code that bypasses a layer's own forward. No hook is called then, so nothing can be estimated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from celora.errors import CELoraError

# These build a weight and multiply with it themselves. They never call their base layer with its own weight.
_OWN_PRODUCT = {
    ("peft.tuners.hra", "HRALinear"): "HRA",
    ("peft.tuners.shira", "Linear"): "SHiRA",
    ("peft.tuners.supertuning", "Linear"): "Super-Tuning",
    ("peft.tuners.trainable_tokens", "TrainableTokensLayer"): "an adapter of some tokens",
    ("peft.tuners.lora", "ParamWrapper"): "an adapter of a bare parameter",
}

# Packages of adapters that only call their base layer. Others may read its weight themselves, as GLoRA and HiRA do.
_ONLY_CALL = frozenset(
    f"peft.tuners.{name}"
    for name in (
        "adalora", "beft", "boft", "c3a", "deft", "delora", "fourierft", "gralora", "ia3", "loha", "lokr", "lora",
        "oft", "psoft", "pvera", "randlora", "road", "vera", "waveft",
    )
)  # fmt: skip


def own_product(tuner: nn.Module) -> str:
    """Why the backward of this PEFT layer bypasses its base layer; '' if it does not."""
    kind = _OWN_PRODUCT.get((_package(tuner), type(tuner).__name__))
    return f"{kind} computes with a weight of its own" if kind else ""


def only_calls_base(tuner: nn.Module) -> bool:
    """Whether this PEFT layer never reads its base layer's weight outside of the base layer's forward."""
    # Variants of LoRA such as DoRA do read it.
    return _package(tuner) in _ONLY_CALL and not getattr(tuner, "lora_variant", None)


def _package(tuner: nn.Module) -> str:
    return ".".join(type(tuner).__module__.split(".")[:3])


def refuse_patched(model: nn.Module) -> None:
    """Raise CELoraError if Unsloth has replaced the forward of a part of `model`.

    Unsloth's kernels read the weights of base layer and adapter, and compute both themselves. They replace methods of
    classes and attributes of modules (`forward`, `apply_qkv`, `apply_o`). The file that defines a function tells
    whether it is Unsloth's.
    """
    for name, module in model.named_modules():
        for function in _functions(module):
            if (getattr(function, "__module__", None) or "").startswith("unsloth"):
                raise CELoraError(
                    f"{name or type(model).__name__!r} is patched by Unsloth ({function.__module__}), whose kernels "
                    "compute past the layers that celora estimates; load the model with Transformers and PEFT alone, "
                    "in a process that does not import unsloth."
                )


def _functions(module: nn.Module) -> Iterator[Any]:
    yield type(module)
    yield type(module).forward
    yield from (value for value in module.__dict__.values() if callable(value))
