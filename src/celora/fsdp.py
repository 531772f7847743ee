"""FSDP2 for a PEFT model: the backward of an estimated layer gathers only what it reads of the frozen weight.

FSDP2 gathers all parameters of a group before the group's forward, and again before its backward. Here each frozen
weight under an adapter is a group of its own. `celora.attach` replaces its second gathering (`celora.weights.sharded`).
Adapters and norms stay in the group of their block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard

from celora.errors import CELoraError
from celora.machine.device import default_device
from celora.modeling.bypass import only_calls_base
from celora.modeling.int8_linear import Int8Linear
from celora.modeling.language_model import pretrained
from celora.modeling.survey import survey
from celora.runtime.attachment import find


def shard(model: nn.Module, **options: Any) -> None:
    """`fully_shard` the frozen weights under `model`'s adapters one by one, then its blocks, then the rest.

    The backward of an estimated layer gathers

    - the kept rows, with `columns` and `synchronise=True`;
    - nothing, with an 8-bit copy, which takes one byte a weight on every process;
    - else the whole weight.

    These weights are not prefetched. Neither are those of layers that stay dense. With gradient checkpointing the
    repeated forward gathers all of them. Weights that adapters may read by themselves (DoRA, HiRA) stay with their
    block, which gathers them for its backward. So do weights of `celora.quantise_base`: what is gathered are their
    bytes, a quarter of float32's. Move such a model to its device before.

    Args:
        model: a PEFT model of a Transformers model, neither sharded nor attached yet.
        options: for `torch.distributed.fsdp.fully_shard`: `mesh`, `mp_policy`, `reshard_after_forward`, ...

    Raises:
        CELoraError: the model has no adapters, celora is attached already, the base is quantised by others, weights are
            to be offloaded to the CPU, the model does not name its blocks, or a base in 8 bits is on another device,
            or too much for this version of torch.
    """
    layers = survey(model).layers.values()
    if isinstance(options.get("offload_policy"), CPUOffloadPolicy):
        raise CELoraError(
            "offload_policy=CPUOffloadPolicy keeps on the CPU the weights that an estimated backward reads; leave it "
            "out, or call fully_shard yourself and train without celora."
        )
    for layer in layers:
        if layer.quantised and not layer.cannot_estimate and not isinstance(layer.base, Int8Linear):
            raise CELoraError(
                f"{layer.name!r} is quantised ({layer.quantised}), and FSDP2 cannot split such a weight by rows; "
                "use celora.quantise_base on a plain base, or train with DDP."
            )
    mesh = options.get("mesh")
    device = default_device().type if mesh is None else mesh.device_type
    for layer in layers:
        if isinstance(layer.base, Int8Linear) and layer.base.W_q.device.type != device:
            raise CELoraError(
                f"the bytes of {layer.name!r} are laid out for {layer.base.W_q.device.type}, and FSDP2 would move them "
                f"to {device} as they are; call model.to({device!r}) first."
            )
    if find(model) is not None:
        raise CELoraError(
            "celora is attached already, and its hooks have to come after FSDP2's; shard first, then attach."
        )
    causal = pretrained(model)
    names = set(getattr(causal, "_no_split_modules", None) or ())
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    if not blocks:
        raise CELoraError(
            f"{type(causal or model).__name__} does not name its blocks; call fully_shard on them yourself."
        )
    for layer in layers:
        # A weight that is read outside of its layer's forward, too, stays with its block. So do bytes: a backward in 8
        # bits reads all of them.
        if not layer.cannot_estimate and not layer.quantised and only_calls_base(layer.module):
            fully_shard(layer.base, **options)
    try:
        sharded = [fully_shard(block, **options) for block in blocks]
        fully_shard(model, **options)
    except RuntimeError as error:  # before torch 2.12
        if "floating point dtype can require gradients" not in str(error):
            raise
        raise CELoraError(
            f"FSDP2 of torch {torch.__version__} cannot split a base in 8 bits; take a newer torch, or DDP"
        ) from error
    # By default FSDP2 prefetches the frozen weight that was used last. The first block has no block before it.
    for block, before in zip(sharded, [sharded[0], *sharded], strict=False):
        assert isinstance(before, FSDPModule)
        block.set_modules_to_backward_prefetch([before])
