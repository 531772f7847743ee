"""mlx-lm with an exported adapter answers like PEFT, for every family and kind of adapter that can be exported.

MLX computes in float32 on this machine's processor. Without the adapter, its logits differ from Transformers' by
rounding. With the adapter they may differ by no more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import SETTINGS, adapted, save
from celora.train.formats.mlx_lora import MODULES, write_mlx
from celora.train.formats.saved_adapter import SavedAdapter
from decoders import model_of

pytestmark = pytest.mark.slow
TOKENS = [3, 17, 5, 40, 8, 22, 63, 1]
LOCAL = {"rope_local_base_freq": 10_000.0, "sliding_window_pattern": 2}  # mlx-lm's names of two settings of Gemma 3


@pytest.fixture(scope="module")
def mlx() -> Any:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    return pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")


def save_base(model: nn.Module, folder: Path) -> Path:
    """Save a model as mlx-lm reads it: it looks for `rope_theta` beside the other settings."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rotation = config["rope_parameters"]
    config["rope_theta"] = rotation.get("full_attention", rotation)["rope_theta"]
    path.write_text(json.dumps(config | (LOCAL if "full_attention" in rotation else {})), encoding="utf-8")
    return folder


def logits(model: Any) -> Tensor:
    import mlx.core as mx
    import numpy as np

    return torch.from_numpy(np.array(model(mx.array([TOKENS]))[0].astype(mx.float32)))


@pytest.mark.parametrize("name", [*MODULES, "rslora", "patterns", "dora", "head", "first block"])
def test_mlx_lm_answers_like_peft(name: str, mlx: Any, tmp_path: Path) -> None:
    settings = SETTINGS.get(name, {"layers_to_transform": [0]})
    model = model_of(name).eval() if name in MODULES else adapted(**settings)
    save(model, tmp_path / "adapter")
    (tmp_path / "mlx").mkdir()
    write_mlx(tmp_path / "mlx", SavedAdapter(tmp_path / "adapter"), model.config)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([TOKENS])).logits[0]
        base = model.unload()
        plain = base(input_ids=torch.tensor([TOKENS])).logits[0]
    loaded, _ = mlx.load_model(save_base(base, tmp_path / "base"))
    torch.testing.assert_close(logits(loaded), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(mlx.load_adapters(loaded, str(tmp_path / "mlx"))), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=1e-2)
