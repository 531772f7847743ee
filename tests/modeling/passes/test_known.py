"""What celora finds in a model, for every kind of decoder that it packs, and what it leaves alone."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import celora
from celora import CELoraConfig
from celora.kernels.c import library as kernels
from celora.modeling.passes import known as passes
from celora.modeling.passes.gate import Gate
from celora.numerics import passes as numerics
from decoders import EXPERTS, PACKED, logit_gradients, model_of
from patching import patch_all
from small import make_model
from tolerances import no_further

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
DTYPES = [torch.float32, torch.bfloat16]
FUSED = CELoraConfig(estimator="dense", fused=True)


# The number of each kind of operation in two layers of each decoder. Gemma's gates are GELUs. Cohere's norms have a
# mean, and its rotations turn other pairs. Phi-3 has one projection for gate and up. Phi turns a part of each head.
EVERY = {"RMS norms": 5, "gates": 2, "rotations": 2}
FOUND: dict[str, dict[str, int]] = {
    "gemma": {"RMS norms": 5, "rotations": 2},
    "gemma3_text": {"RMS norms": 13, "rotations": 2},
    "cohere": {"gates": 2},
    "olmo2": EVERY | {"RMS norms": 9},
    "qwen3": EVERY | {"RMS norms": 9},
    "phi3": {"RMS norms": 5, "rotations": 2},
    "olmo": {"gates": 2, "rotations": 2},
    "olmo3": EVERY | {"RMS norms": 9},
    "starcoder2": {"rotations": 2},
    "phi": {},
    "seed_oss": {"RMS norms": 5, "rotations": 2},
    "glm": {"RMS norms": 5},
    "glm4": {"RMS norms": 9},
    "exaone4": EVERY | {"RMS norms": 9},
    "arcee": {"RMS norms": 5, "rotations": 2},
    "ernie4_5": {"RMS norms": 5, "gates": 2},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [kind for kind in PACKED if kind not in EXPERTS])
def test_every_decoder(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """celora finds all of them, reports them, and computes them in the forward of every layer."""
    model = model_of(kind).to(dtype)
    expected = FOUND.get(kind, EVERY)
    assert Counter(one.name for one in passes.known(model).values()) == expected
    calls: Counter[str] = Counter()
    for name, function in {"RMS norms": "rms_norm", "gates": "gated", "rotations": "rotated"}.items():
        before = getattr(numerics, function)

        def counted(*args: Any, name: str = name, before: Any = before, **kwargs: Any) -> Any:
            calls[name] += 1
            return before(*args, **kwargs)

        patch_all(monkeypatch, f"celora.numerics.passes:{function}", counted)
    with torch.no_grad():  # if all weights of a norm are 1 or 0, its variant cannot be told
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batch = {"input_ids": torch.randint(3, 64, (6, 33))}  # with few tokens, one rounding may decide about all of them
    plain, truth = model(**batch).logits, copy.deepcopy(model).double()(**batch).logits
    report = celora.attach(model, FUSED)
    said = ", ".join(f"{count} {name}" for name, count in expected.items())
    assert any(all(part in note for part in said.split(", ")) for note in report.notes)
    model(**batch)  # norms are tried, perhaps several times, before they are used
    calls.clear()
    assert no_further(model(**batch).logits, plain, truth)
    turned = {"rotations": 2 * expected["rotations"]} if "rotations" in expected else {}  # queries and keys
    if kind in ("olmo", "olmo2", "olmo3") and dtype == torch.bfloat16:  # their angles are always float32
        turned["rotations"] = 0
    assert +calls == +Counter(expected | turned)


class WeightlessRMSNorm(nn.Module):
    """A norm like NanoChat's."""

    eps = 1e-6


class BiasedRMSNorm(LlamaRMSNorm):
    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))


def test_only_what_is_on_cpu_is_known() -> None:
    assert passes.known(make_model())
    assert not passes.known(make_model().to("meta"))


def test_norms_without_a_weight_or_with_a_bias_are_not_known() -> None:
    assert not passes.known(nn.Sequential(WeightlessRMSNorm(), BiasedRMSNorm(8)))


def test_an_activation_of_another_kind_is_not_known() -> None:
    class Louder(nn.SiLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = make_model()
    layers = model.base_model.model.model.layers
    layers[0].mlp.act_fn = Louder()
    assert [m for m, kind in passes.known(model).items() if kind is Gate] == [layers[1].mlp]


def test_unknown_formulas_are_left_alone() -> None:
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) + 0.5

    class OtherMLP(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x) * self.up_proj(x)))

    model = make_model().train()
    layer = model.base_model.model.model.layers[0]
    config = model.base_model.model.config
    layer.input_layernorm = OtherRMSNorm(48).requires_grad_(False)
    plain_mlp, layer.mlp = layer.mlp, OtherMLP(config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(layer.mlp, name, getattr(plain_mlp, name))
    assert layer.mlp not in passes.known(model)
    batch = {"input_ids": torch.randint(3, 61, (2, 9))}
    expected = logit_gradients(model, batch)
    celora.attach(model, FUSED)
    torch.testing.assert_close(logit_gradients(model, batch), expected, rtol=1e-4, atol=1e-7)
    assert layer.input_layernorm.forward.tried == {torch.float32: None}


def test_a_machine_of_several_accelerators_may_copy_modules_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """nn.DataParallel does.

    Its copies have all attributes of the original, so their forward would be the original's.
    """
    model = make_model()
    celora.attach(model, FUSED)
    norm = model.base_model.model.model.norm
    assert norm._replicate_for_data_parallel().forward is norm.forward
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert not passes.known(model)
