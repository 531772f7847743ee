"""What the base model of a run is loaded as."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from celora.train.arguments import make_request
from celora.train.loading import load_model
from tiny import save_tiny_model


@pytest.mark.parametrize(("dtype", "computes"), [("float16", "float16"), ("float32", "float32"), ("auto", "bfloat16")])
def test_a_4_bit_base_computes_in_the_dtype_asked_for(dtype: str, computes: str, tmp_path: Path) -> None:
    """TRL's own default is float32 products, whatever the model's dtype is; auto is the checkpoint's dtype."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    own = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "float32"), dtype=torch.bfloat16)
    own.save_pretrained(tmp_path / "model")
    names = {"model": str(tmp_path / "model"), "data": "rows.jsonl", "output": str(tmp_path / "out")}
    model = load_model(make_request({**names, "load_in_4bit": True, "dtype": dtype}))
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert {layer.compute_dtype for layer in layers} == {getattr(torch, computes)}
