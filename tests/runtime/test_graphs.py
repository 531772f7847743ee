"""`compile_model`: what it compiles, what a copy and `detach` leave of it, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import celora
from celora import CELoraConfig, CELoraError
from celora.runtime.attachment import require
from labelled import gradients, masked_batch
from small import make_base

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

CONFIG = CELoraConfig(keep_ratio=0.5, rank=4, refresh_every=4, fused=True, labelled_head=True)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model(**changes: Any) -> PeftModel:
    base = make_base(layers=1, dtype=torch.float64)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).train()
    celora.attach(model, CONFIG, **changes)
    return model


def estimated(model: PeftModel) -> Tensor:
    """The gradient at a step that estimates."""
    for _ in range(2):
        _, found = gradients(model, masked_batch())
        require(model).clock.advance()
    return found


def test_it_computes_what_the_model_computes_and_detach_ends_the_estimates() -> None:
    plain, eager, model = make_model(), make_model(), make_model()
    celora.detach(plain)
    celora.compile_model(model, backend="aot_eager", fullgraph=True)
    (_, exact), wanted = gradients(plain, masked_batch()), estimated(eager)
    assert (wanted - exact).norm() > 1e-3 * exact.norm()
    for _ in range(2):
        torch.testing.assert_close(estimated(model), wanted)
        celora.detach(model)
        torch.testing.assert_close(gradients(model, masked_batch())[1], exact)
        celora.attach(model, CONFIG)


def test_a_graph_of_the_same_model_without_celora_is_forgotten() -> None:
    plain, model = make_model(), make_model()
    celora.detach(plain)
    plain.get_base_model().model.compile(backend="aot_eager")
    gradients(plain, masked_batch())
    celora.compile_model(model, backend="aot_eager")
    torch.testing.assert_close(estimated(model), estimated(make_model()))


def test_a_copy_is_not_compiled() -> None:
    model = make_model()
    celora.compile_model(model, backend="aot_eager")
    twin = copy.deepcopy(model)
    for each, compiled in ((model, True), (twin, False)):
        graft = require(each).forward
        assert graft is not None
        assert (graft.scorer is not None) == compiled
        assert (each.get_base_model().model._compiled_call_impl is not None) == compiled
    torch.testing.assert_close(estimated(twin), estimated(make_model()))


def test_what_it_cannot_compile_is_said() -> None:
    model = make_model(labelled_head=False)
    with pytest.raises(CELoraError, match=r"^celora does not compute the loss of this model: .*labelled_head=False; "):
        celora.compile_model(model)
    celora.detach(model)
    with pytest.raises(CELoraError, match="not attached"):
        celora.compile_model(model)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    other = get_peft_model(layers, LoraConfig(target_modules=["1"]))
    celora.attach(other, CONFIG)
    with pytest.raises(CELoraError, match="PeftModel is not a model of Transformers; compile it"):
        celora.compile_model(other)
    with pytest.raises(CELoraError, match="object is not a model"):
        celora.compile_model(object())  # type: ignore[arg-type]
