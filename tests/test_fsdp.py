"""What `celora.fsdp.shard` refuses. Several processes test what it does, in test_distributed.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import CPUOffloadPolicy

import celora
import celora.fsdp
from layers import bits_and_bytes_4
from small import make_base, make_model


def test_refuses_weights_offloaded_to_the_cpu() -> None:
    with pytest.raises(celora.CELoraError, match="offload_policy"):
        celora.fsdp.shard(make_model(), offload_policy=CPUOffloadPolicy())


def test_refuses_a_quantised_base() -> None:
    base = make_base()
    base.model.layers[0].mlp.up_proj = bits_and_bytes_4(base.model.layers[0].mlp.up_proj)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with pytest.raises(celora.CELoraError, match=r"up_proj' is quantised \(Linear4bit\).*DDP"):
        celora.fsdp.shard(model)


def test_refuses_bytes_that_lie_as_another_device_reads_them() -> None:
    """FSDP2 moves them as they are."""
    model = make_model()
    celora.quantise_base(model)
    with pytest.raises(celora.CELoraError, match=r"laid out for cpu.*call model\.to\('cuda'\) first"):
        celora.fsdp.shard(model, mesh=SimpleNamespace(device_type="cuda"))


def test_refuses_a_model_that_is_attached_already() -> None:
    model = make_model()
    celora.attach(model)
    with pytest.raises(celora.CELoraError, match="shard first, then attach"):
        celora.fsdp.shard(model)


def test_refuses_a_model_without_blocks() -> None:
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(celora.CELoraError, match="does not name its blocks"):
        celora.fsdp.shard(model)
